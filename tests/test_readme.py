"""The README is held to what it says: its commands run or parse, its tables, shapes and counts are computed
again, its files and tests exist."""
import csv
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import ablate
import bench
import figures
import finetune
import tables
import train
import walk
from data import phantoms, prepare
from m3ae_mini import loop, weights
from m3ae_mini.config import PRESETS

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)     # (language, text)
COMMANDS = [line for language, text in BLOCKS if not language for line in text.splitlines()]
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
WITHIN = [" ".join(found.split()) for found in re.findall(r"`(python [^`]+ [^`]+)`", PROSE)]
# These need a data set, weights or machines that not everybody has: their flags are checked, and they fit.
FOREIGN = re.compile("MedPix|medpix|roco|medicat|vqa_rad|Slake|VQA-Med|melinda|MINILM|runs/base")
SHORT = ("--steps 1 --batch_size 8 --micro_batch 4 --eval_samples 8 --test_samples 8 --gpus 0 "
         "--dtype float32").split()
LONG = {"tests/bench.py": bench, "tests/tables.py": tables, "tests/ablate.py": ablate}
COUNTS = {"train": 48, "val": 16, "test": 512}             # 512: the figures look for certain findings there


def words(command):
    """A command, a set-up before it left out -> (what is run, its arguments)."""
    parts = shlex.split(command.rpartition("&& ")[2])
    start = next(i for i, part in enumerate(parts) if part.endswith(".py") or part == "-m")
    start += parts[start] == "-m"
    return parts[start], parts[start + 1:]


class Parsed(Exception):
    """Carries what a script made of its flags, before it did anything."""


def parsed(script, arguments, monkeypatch):
    """The configurations (ModelConfig, TrainConfig, all flags) that a script makes of its arguments."""
    def stop(*found):
        raise Parsed(*found)
    monkeypatch.setattr(weights, "sources", stop)
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    with pytest.raises(Parsed) as caught:
        script.main()
    return caught.value.args


def plain(text):
    """A report without its numbers, which differ from run to run."""
    text = re.sub(r"below|above", "beside", text)
    return [" ".join(re.sub(r"[+-]?\d[\d,.]*", "N", line).split()) for line in text.splitlines()]


def test_the_two_commands_come_first():
    assert "train.py" in COMMANDS[0] and COMMANDS[1].endswith("-m pytest -q tests")
    for command in COMMANDS[:2]:
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && ")


@pytest.mark.parametrize("command", [c for c in COMMANDS + WITHIN if not re.search("pytest|--help", c)])
def test_flags(command, monkeypatch):
    name, arguments = words(command)
    if name in ("train.py", "finetune.py") and "--predict" not in arguments:
        script = {"train.py": train, "finetune.py": finetune}[name]
        cfg, train_cfg, flags = parsed(script, arguments, monkeypatch)
        cfg.num_answers = cfg.num_classes = 1                # what the data would say
        cfg.check()
        many = re.search(r"--nnodes (\d+) --nproc-per-node (\d+)", command)
        world = int(many[1]) * int(many[2]) if many else flags["gpus"] or 1
        config.check_batch_size(train_cfg, cfg, world)
    elif name == "data.prepare":
        args = prepare.command_line().parse_args(arguments)
        assert args.show or args.verify or (args.name and args.root and args.out)
        if args.name:
            reader = importlib.import_module(f"data.{args.name}")
            with pytest.raises((prepare.UserError, OSError)) as caught:      # the files are missing, no more
                list(reader.rows(Path("/nowhere"), args.task))
            assert "has nothing for the task" not in str(caught.value)
    elif name in LONG:                                       # parsed, not run
        script = LONG[name]
        called = arguments[0] if script is bench else "make_all"
        monkeypatch.setattr(ablate, "begin", lambda name: "unchanged")

        def stop(*args):
            raise Parsed(*args)
        stop.__name__ = called                               # bench knows its parts by their names
        monkeypatch.setattr(script, called, stop)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(Parsed):
            script.main()
    else:
        assert (ROOT / name).is_file() or name == "m3ae_mini.weights" or "--predict" in arguments


def test_commands_run_in_order(tmp_path, monkeypatch, capsys):
    """Those that need nothing foreign, with few steps on few phantoms, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(phantoms, "COUNTS", COUNTS)
    monkeypatch.setattr(phantoms, "LABELLED", {"train": 160, "val": 8, "test": 8})
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    for name, task in ("reports", "pretrain"), ("questions", "vqa"):           # "your own table"
        with open(f"{name}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["image", "text", "split", "answer"])
            for n, row in enumerate(phantoms.rows(None, task, {"train": 16, "val": 4, "test": 4})):
                row.image(64).save(f"{name}{n}.png")
                rows.writerow([f"{name}{n}.png", row.text, row.split, row.answer or ""])
    Path("new.png").write_bytes(Path("questions0.png").read_bytes())

    ran, printed = [], {}
    for command in COMMANDS:
        name, arguments = words(command)
        if FOREIGN.search(command) or name in ("pytest", "tests/walk.py", *LONG):
            continue                                         # walk: see below
        short = SHORT * (name in ("train.py", "finetune.py"))
        if name == "tests/figures.py":
            short = ["--out", "figures"]
        main = {"train.py": train.main, "finetune.py": finetune.main, "tests/figures.py": figures.main,
                "data.prepare": lambda: prepare.run(prepare.command_line().parse_args(arguments)),
                "m3ae_mini.weights": weights.export}[name]
        monkeypatch.setattr(sys, "argv", [name, *arguments, *short])
        print(command)
        capsys.readouterr()
        main()
        ran.append(command)
        printed[command] = capsys.readouterr().out

    assert len(ran) >= 15
    assert sorted(p.name for p in Path("figures").iterdir()) == sorted(
        p.name for p in (ROOT / "tests" / "figures").iterdir())
    report, prediction = (text for language, text in BLOCKS if language == "text" and "─" not in text)
    assert not set(plain(report)) - set(plain(printed[COMMANDS[0]]))
    told = next(text for command, text in printed.items() if "chest.png" in command).splitlines()
    assert len(told) == len(prediction.splitlines()) and told[-1] == prediction.splitlines()[-1]


# ------------------------------------------------------------------------------------- tables and numbers

@pytest.fixture(scope="module")
def tiny():
    return walk.tables("tiny")


def test_the_walk(tiny):
    batch, stages, cfg, out = tiny
    for table in batch, stages:
        assert "\n".join(table) in README, "run tests/walk.py and put its tables into the README"
    shapes = set(re.findall(r"\(\d+(?:, \d+)+\)", README))
    assert len(shapes) > 15 and shapes <= set(re.findall(r"\(\d+(?:, \d+)+\)", "\n".join(batch + stages)))


def test_the_walk_counts_everything():
    """Its parts add up to what the whole model has and does."""
    cfg, batch = walk.batch_of_phantoms("tiny")
    model = walk.M3AE(cfg).eval()
    found, out = walk.walk(model, batch)
    with walk.sdpa_kernel(walk.SDPBackend.MATH), walk.FlopCounterMode(display=False) as counter:
        plain = model(batch)
    assert plain["loss"] == out["loss"]
    assert sum(row["operations"] for row in found) == counter.get_total_flops()
    mlm, mim, _ = model.objectives.values()
    own = model.modality.numel() + mim.mask_token.numel() + sum(
        p.numel() for head in (mlm, mim) for p in head.norm.parameters())
    assert sum(row["parameters"] for row in found) + own == sum(p.numel() for p in model.parameters())
    assert not model.vit._forward_hooks and set(walk.MEANING) == set(batch)


def test_counts(tiny):
    total = int(tiny[1][-1].split("|")[5].replace(",", ""))
    assert f"a model of {total / 1e6:.1f} million parameters" in README
    assert f"({walk.tables('base')[1][-1].split('|')[5].strip()} parameters" in README
    cfg, tiny_steps = tiny[2], PRESETS["tiny"]["steps"]
    patches = (cfg.image_size // cfg.patch_size) ** 2
    kept = int(patches * (1 - cfg.mask_ratio))
    assert f"{patches - kept} of {patches} patches are hidden" in README
    assert f"for {tiny_steps:,} steps" in README and f"{sum(phantoms.COUNTS.values()):,} phantoms" in README
    assert f"`tiny` {PRESETS['tiny']['hard_negatives']}, `small` {PRESETS['small']['hard_negatives']}" in README
    base = 288 ** 2 / 1e3
    assert f"at 288 pixels {base:.0f} or {3 * base:.0f} kB" in README


def test_the_ablations(tmp_path):
    """The table and its bars are those of the kept results, of three seeds a row."""
    rows = json.loads((ROOT / "tests/ablations/results.json").read_text())
    assert ablate.table(rows) in README, "put ablate.table of tests/ablations/results.json into the README"
    assert len(rows) >= 9 and all(len(values) == 3 for row in rows.values() for values in row.values())
    ablate.bars(rows, tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as drawn, Image.open(ROOT / "tests/ablations/bars.png") as kept:
        assert drawn.size == kept.size
        gap = ImageStat.Stat(ImageChops.difference(drawn, kept.convert("RGB"))).mean
        assert max(gap) < 1                                 # of 255: another Pillow draws letters otherwise


def test_what_is_named_exists():
    names = {"LICENSE", *re.findall(r"[\w/]+\.py\b", README), *re.findall(r"\]\(([\w/.]+)\)", README)}
    missing = [name for name in names if not (ROOT / name).is_file()]
    assert len(names) > 20 and not missing
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    tests = re.findall(r"\btest_\w+(?!\w*\.py)", README.replace("/test_", " "))
    tests = [name for name in tests if not (ROOT / f"tests/{name}.py").exists()]
    assert len(tests) >= 2 and all(f"def {name}(" in sources for name in tests)
    for path in (ROOT / "tests" / "figures").iterdir():
        assert path.stat().st_size < 150_000 and Image.open(path).size[0] <= 1400


def test_small_enough_to_read():
    lines = {path: len(path.read_text().splitlines()) for path in [*(ROOT / "m3ae_mini").glob("*.py"),
                                                                   ROOT / "train.py", ROOT / "finetune.py"]}
    assert lines.pop(ROOT / "train.py") <= 300 and lines.pop(ROOT / "finetune.py") <= 350
    assert sum(lines.values()) <= 2000 and max(lines.values()) <= 500
