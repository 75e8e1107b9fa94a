"""The three READMEs hold: commands run or parse, tables are computed anew, names exist."""
import csv
import importlib
import json
import re
import shlex
import string
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops, ImageStat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "experiments"))
import ablate
import bench
import figures
import finetune
import gpu
import large
import linear
import results
import shift
import train
import walk
from data import few_pairs, phantoms, prepare, report, table
from m3ae_mini import M3AE, config, evaluate, objectives, weights
from m3ae_mini.config import PRESETS, UserError

READMES = ("README.md", "data/README.md", "tests/README.md")
TEXT = {name: (ROOT / name).read_text() for name in READMES}
MAIN, DATA, TESTS = TEXT.values()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
BLOCKS = {name: FENCE.findall(text) for name, text in TEXT.items()}    # [(language, text)]
PROSE = {name: re.sub("<!--.*?-->", "", FENCE.sub("", text), flags=re.S)
         for name, text in TEXT.items()}

# Commands: the lines of blocks without a language, and those within sentences.
COMMANDS = [line for blocks in BLOCKS.values() for language, text in blocks if not language
            for line in text.splitlines()]
INLINE = [" ".join(found.split()) for text in PROSE.values()
          for found in re.findall(r"`((?:python (?:-m )?)?[\w./]+ [^`]+)`", text)]
INLINE = [command for command in INLINE if re.match(r"python |\S+\.py ", command)]
# These need data, weights or machines that not everybody has: parsed, not run.
FOREIGN = re.compile("MedPix|medpix|roco|openi|medicat|vqa_rad|Slake|slake|VQA-Med|vqa_med|melinda|"
                     "MINILM|runs/base|ChestXray|mimic")
SHORT = ("--steps 1 --batch_size 8 --micro_batch 4 --eval_samples 8 --test_samples 8 --gpus 0 "
         "--dtype float32").split()
SCRIPTS = {"train.py": train, "finetune.py": finetune}
EXPERIMENTS = {f"tests/experiments/{module.__name__}.py": module
               for module in (ablate, bench, figures, gpu, large, linear, results, shift, walk)}
COUNTS = {"train": 48, "val": 16, "test": 512}     # 512: figures.py looks for certain findings


# ---------------------------------------------------------------------------------------- commands

def words(command):
    """A command, without what stands before && -> (what is run, its arguments)."""
    parts = shlex.split(command.rpartition("&& ")[2])
    start = next(i for i, part in enumerate(parts) if part.endswith(".py") or part == "-m")
    start += parts[start] == "-m"
    return parts[start], parts[start + 1:]


class Parsed(Exception):
    """Carries what a script made of its flags, before it did anything."""


def parsed(script, arguments, monkeypatch):
    """What main of train.py or finetune.py makes of its arguments: configurations, then flags."""
    parse = config.parse

    def stop(parser, configs):
        raise Parsed(*parse(parser, configs, arguments))
    with monkeypatch.context() as patch, pytest.raises(Parsed) as caught:
        patch.setattr(config, "parse", stop)
        script.main()
    return caught.value.args


def without_numbers(text):
    """The lines of a report; its numbers differ from run to run."""
    lines = [re.sub(r"[+-]?\d[\d,.]*", "N", line) for line in text.splitlines()]
    return [" ".join(line.split()) for line in lines]


def test_the_two_commands_come_first():
    setup = ("python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && "
             ".venv/bin/python ")
    first, second = COMMANDS[:2]
    assert first == setup + "train.py --gpus 2 --device cpu"
    assert second == setup + "-m pytest -q tests"


def given_micro_batch(arguments):
    """The value of --micro_batch, or None."""
    if "--micro_batch" in arguments:
        return int(arguments[arguments.index("--micro_batch") + 1])


@pytest.mark.parametrize("command", [command for command in COMMANDS + INLINE
                                     if not re.search("pytest|--help", command)])
def test_flags(command, monkeypatch):
    name, arguments = words(command)
    if name in SCRIPTS:
        cfg, train_cfg, run_cfg, *_ = parsed(SCRIPTS[name], arguments, monkeypatch)
        cfg.num_answers = cfg.num_classes = 1              # the data would tell
        for settings in (cfg, train_cfg, run_cfg) if cfg.task != "embed" else ():
            settings.check()
        nodes = re.search(r"--nnodes (\d+) --nproc-per-node (\d+)", command)
        counts = {int(nodes[1]) * int(nodes[2])} if nodes else {run_cfg.gpus or 1, 1, 2, 4, 8}
        for world_size in counts:
            trial = replace(train_cfg)
            config.fit_micro_batch(cfg, trial, world_size, given_micro_batch(arguments), None)
            assert trial.batch_size % (trial.micro_batch * world_size) == 0
    elif name == "data.prepare":
        args = prepare.command_line().parse_args(arguments)
        assert args.show or args.verify or (args.name and args.root and args.out)
        if args.name:                                      # a reader of this task, without files
            reader = importlib.import_module(f"data.{args.name}")
            with pytest.raises((UserError, OSError)) as caught:
                list(reader.rows(Path("/nowhere"), args.task))
            assert "has nothing for the task" not in str(caught.value)
    elif name in EXPERIMENTS:                              # parsed, not run
        script = EXPERIMENTS[name]
        called = {figures: "open_run", walk: "tables", gpu: "run_parts", shift: "row", large: "make_table",
                  linear: "report"}
        called = called.get(script, "make_all")
        if script is bench:
            called = arguments[0]
        monkeypatch.setattr(ablate, "copy_code", lambda name: "unchanged")

        def stop(*args):
            raise Parsed(*args)
        stop.__name__ = called                             # bench finds its parts by their names
        monkeypatch.setattr(script, called, stop)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(Parsed):
            script.main()
    elif name == "data.few_pairs":
        assert not arguments or few_pairs.command_line().parse_args(arguments).out
    elif name == "m3ae_mini.plots":
        assert arguments == ["RUN", "RUN"]
    else:
        assert name == "m3ae_mini.weights" and arguments[0] == "export" and len(arguments) == 3


def test_commands_run_in_order(tmp_path, monkeypatch, capsys):
    """Those that need nothing foreign, with few steps on few phantoms, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(phantoms, "COUNTS", COUNTS)
    monkeypatch.setattr(phantoms, "LABELLED", {"train": 160, "val": 8, "test": 8})
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    for name, task in ("reports", "pretrain"), ("questions", "vqa"):           # "Your own data"
        with open(f"{name}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["image", "text", "split", "answer"])
            counts = {"train": 16, "val": 4, "test": 4}
            for n, row in enumerate(phantoms.rows(None, task, counts)):
                row.image(64).save(f"{name}{n}.png")
                rows.writerow([f"{name}{n}.png", row.text, row.split, row.answer or ""])
    Path("new.png").write_bytes(Path("questions0.png").read_bytes())

    # data.few_pairs needs a text encoder from elsewhere; this is a run of the same shape.
    flags = shlex.split("table --root reports.csv --size 96 --out runs/few/pack")
    prepare.run(prepare.command_line().parse_args(flags))
    flags = shlex.split(f"{few_pairs.MODEL} --data runs/few/pack --out runs/few/all")
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, *SHORT])
    train.main()

    figures_script = "tests/experiments/figures.py"
    printed = {}
    for command in COMMANDS:
        name, arguments = words(command)
        skipped = name == "pytest" or name in EXPERIMENTS and name != figures_script
        if skipped or FOREIGN.search(command):
            continue
        main = {"train.py": train.main, "finetune.py": finetune.main, figures_script: figures.main,
                "data.prepare": lambda: prepare.run(prepare.command_line().parse_args(arguments)),
                "m3ae_mini.weights": weights.export}[name]
        short = SHORT if name in SCRIPTS else []
        if "--epochs" in arguments:                        # SHORT sets the length
            at = arguments.index("--epochs")
            arguments = arguments[:at] + arguments[at + 2:]
        if name == figures_script:
            short = ["--out", "figures"]
        monkeypatch.setattr(sys, "argv", [name, *arguments, *short])
        print(command)
        capsys.readouterr()
        main()
        printed[command] = capsys.readouterr().out

    assert len(printed) >= 15
    drawn = sorted(path.name for path in Path("figures").iterdir())
    assert drawn == sorted(path.name for path in (ROOT / "tests" / "figures").iterdir())
    report, prediction = report_and_prediction()
    assert not set(without_numbers(report)) - set(without_numbers(printed[COMMANDS[0]]))
    told = next(text for command, text in printed.items() if "chest.png" in command).splitlines()
    (lines,) = [text for language, text in BLOCKS["README.md"] if "load_run" in text]
    exec(compile(lines, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() in {line.split("%")[1].strip() for line in told[:-1]}
    assert len(told) == len(prediction.splitlines()) and told[-1] == prediction.splitlines()[-1]


def report_and_prediction():
    """The two blocks of README.md that show what is printed."""
    return [text for language, text in BLOCKS["README.md"] if language == "text" and "─" not in text]


def test_the_report_is_the_codes():
    """The printed report, made again by report.pretraining_table from the README's own numbers."""
    head, *lines, plots, card = report_and_prediction()[0].splitlines()
    assert re.fullmatch(r"On [\d,]+ test samples \(step [\d,]+\), with 95 % intervals:", head)
    assert plots == "Plots: runs/pretrain/plots" and card == "Model card: runs/pretrain/card.md"
    metrics, ranges = {}, {}
    shown = [line for line in report.LINES if line[0] != "itc_acc"]
    for line, (name, number, title, note) in zip(lines, shown, strict=True):
        # The line as a regular expression: a group for each number.
        value, other = r"[+-]?[\d.]+%?", r"(?P<{}>[+-]?[\d.]+%?)"
        pattern = rf"  {re.escape(title)}\s+(?P<{name}>{value})  (\((?P<low>{value}) to (?P<high>{value})\))?\s*"
        for literal, key, _, _ in string.Formatter().parse(note):
            pattern += re.escape(literal) + (other.format(key) if key else "")
        found = re.fullmatch(pattern, line)
        assert found, f"{line!r} is not printed as {title!r}"
        percent = "%" in number
        scale = 100 if percent or number == report.POINTS else 1
        for key, text in found.groupdict().items():
            if key in ("low", "high"):
                if text:
                    ranges.setdefault(name, []).append(float(text) / scale)
            else:
                metrics[key] = float(text.rstrip("%")) / (scale if key == name else 100 if "%" in text else 1)
        assert name == "noise_floor" or ranges[name][0] <= metrics[name] <= ranges[name][1]
    assert report.pretraining_table(metrics, ranges).splitlines() == lines


# ------------------------------------------------------------------------------- tables and numbers

@pytest.fixture(scope="module")
def tiny():
    return walk.tables("tiny")


def test_the_walk(tiny):
    batch_table, stage_table, _, _ = tiny
    for table in batch_table, stage_table:
        assert "\n".join(table) in TESTS, "put the tables of walk.py into tests/README.md"
    shape = r"\(\d+(?:, \d+)+\)"
    shapes = set(re.findall(shape, "".join(TEXT.values())))
    assert len(shapes) > 15
    assert shapes <= set(re.findall(shape, "\n".join(batch_table + stage_table)))


def test_the_walk_counts_everything():
    """Its parts add up to what the whole model has and does."""
    cfg, batch = walk.phantom_batch("tiny")
    model = M3AE(cfg).eval()
    found, out = walk.walk(model, batch)
    with walk.sdpa_kernel(walk.SDPBackend.MATH), walk.FlopCounterMode(display=False) as counter:
        plain = model(batch)
    assert plain["loss"] == out["loss"]
    assert sum(row["operations"] for row in found) == counter.get_total_flops()
    mlm, mim, _ = model.objectives.values()
    rest = model.modality.numel() + mim.mask_token.numel()
    rest += sum(p.numel() for head in (mlm, mim) for p in head.norm.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert sum(row["parameters"] for row in found) + rest == total
    assert not model.vit._forward_hooks and set(walk.MEANING) == set(batch)


def test_counts_of_the_model(tiny):
    parameters = int(tiny[1][-1].split("|")[5].replace(",", ""))
    assert f"a model of {parameters / 1e6:.1f} million parameters" in plain(MAIN)
    base = walk.tables("base")[1][-1].split("|")[5].strip()
    assert f"({base} parameters)" in plain(MAIN) and f"({base} parameters)" in plain(TESTS)
    cfg = tiny[2]
    patches = (cfg.image_size // cfg.patch_size) ** 2
    visible = int(patches * (1 - cfg.mask_ratio))
    assert f"{patches - visible} of {patches} patches are hidden" in plain(MAIN)
    assert f"takes {visible} of the {patches} patches" in plain(TESTS)


def test_counts_of_the_data_and_presets():
    steps, images = PRESETS["tiny"]["steps"], sum(phantoms.COUNTS.values())
    assert f"{images:,} phantoms" in plain(MAIN) and f"for {steps:,} steps" in plain(MAIN)
    shares = [f"`{name}` {values.get('hard_negatives', 0)}" for name, values in PRESETS.items()]
    assert all(share in plain(MAIN) for share in shares)
    assert f"{images:,} images: " in DATA
    kilobytes = 288 ** 2 / 1e3
    assert f"at 288 pixels {kilobytes:.0f} or {3 * kilobytes:.0f} kB" in plain(DATA)

    # The tables of data/README.md: data sets, phantoms.
    listed = re.findall(r"^\| `(\w+)` \| (?:all|vqa|cls|pretrain)", DATA, re.M)
    assert set(listed) == set(prepare.READERS)
    for group, names in phantoms.FINDINGS.items():
        row = f"| {group} | {', '.join(names)} | {', '.join(phantoms.ZONES[group])} |"
        assert row in DATA
    for tasks, counts in (("`pretrain` and `irtr`", phantoms.COUNTS),
                          ("`vqa` and `cls`", phantoms.LABELLED)):
        cells = " | ".join(f"{count:,}" for count in counts.values())
        assert f"| images for {tasks} | {cells} |" in DATA

    # Fine-tuning with few labels.
    vqa, cls, irtr = results.LABELS.values()
    assert f"{vqa} questions, {cls} images with a class, or {irtr} pairs" in plain(TESTS)
    for count, noun in (vqa, "questions to train on"), (cls, "images with a class"), (irtr, "pairs"):
        assert f"phantoms: {count} {noun}" in MAIN


def plain(text):
    """A text on one line."""
    return " ".join(text.split())


def test_the_front_doors_results_are_those_of_tests():
    """README.md repeats figures of tests/README.md; none differs."""
    cells = re.findall(r"\d+\.\d \(\d+\.\d–\d+\.\d\)", MAIN.replace("**", ""))
    assert len(cells) >= 12
    assert not [cell for cell in cells if cell not in TESTS.replace("**", "")]
    for ratio in re.findall(r"\| (\d[\d.]*) times", MAIN):
        assert re.search(rf"\b{re.escape(ratio)}\b", TESTS)


ROWS = {"none": "unchanged", "without MLM": "no_mlm", "without MIM": "no_mim",
        "mask 50 % of the patches": "mask_50", "mask 50 % of the words": "words_50",
        "a fourth loss: image-text contrast (`--itc 1`)": "itc",
        "contrast, and mask 50 % of the words": "itc_words_50",
        "contrast, patches and words masked as in XLIP": "xlip",
        "contrast first, then masks (Jamal & Mohareri)": "contrast_first"}


def test_the_ablations(tmp_path):
    """Both tables and the bars are those of results.json, of three seeds a row."""
    rows = json.loads((ablate.DIFFS / "results.json").read_text())
    assert ablate.table(rows) in TESTS, "put ablate.table of results.json into tests/README.md"
    assert len(rows) >= 8
    assert all(len(values) == 3 for row in rows.values() for values in row.values())
    ablate.bars(rows, tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as drawn, Image.open(ablate.DIFFS / "bars.png") as kept:
        assert drawn.size == kept.size
        gap = ImageStat.Stat(ImageChops.difference(drawn, kept.convert("RGB"))).mean
        assert max(gap) < 1                                # of 255: another Pillow, other letters

    # README.md: the mean; bold where all seeds lie on one side of the default's.
    assert set(ROWS.values()) <= set(rows)
    for label, name in ROWS.items():
        cells = []
        for head in "questions", "classes":
            values, default = ([value for value, _, _ in rows[row][head]] for row in (name, "unchanged"))
            apart = min(values) > max(default) or max(values) < min(default)
            mean = f"{sum(values) / len(values):.1f}"
            cells.append(f"**{mean}**" if apart else mean)
        assert f"| {label} | {' | '.join(cells)} |" in MAIN


# ------------------------------------------------------------------------------------ names and code

def test_links_lead_somewhere():
    links = {(name, link) for name, text in PROSE.items()
             for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")}
    assert len(links) > 8
    assert not [link for link in links if not (ROOT / link[0]).parent.joinpath(link[1]).is_file()]
    for path in (ROOT / "tests" / "figures").iterdir():
        assert path.stat().st_size < 150_000 and Image.open(path).size[0] <= 1400


def test_files_and_tests_that_are_named_exist():
    text = "\n".join(TEXT.values())
    files = set(re.findall(r"(?<![\w./-])[\w/]+\.py\b", text))
    assert len(files) > 20
    assert not sorted(name for name in files if not (ROOT / name).is_file())
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    tests = set(re.findall(r"\btest_\w+\b(?!\.(?:py|csv))", text))
    assert len(tests) > 15
    assert not sorted(name for name in tests if f"def {name}(" not in sources)


def test_names_and_flags_that_are_written_exist():
    """Names with an underscore in `code`, and every --flag, stand in some file of code."""
    files = [path for folder in ("", "m3ae_mini", "data", "tests", "tests/experiments")
             for path in (ROOT / folder).glob("*.py") if path.name != "test_readme.py"]
    code = "\n".join(path.read_text() for path in files)
    known = set(re.findall(r"\w+", code)) | {path.stem for path in (ROOT / "data").glob("*.py")}
    known |= set(ablate.row_names())
    prose = "\n".join(PROSE.values())
    names = {name for span in re.findall(r"`([^`\n]+)`", prose)
             for name in re.findall(r"(?<![\w/-])[A-Za-z]\w*_\w+(?![\w/])", span)}
    assert len(names) > 40
    assert not sorted(names - known)

    parsers = [config.make_parser("", (config.ModelConfig, config.TrainConfig, config.RunConfig,
                                       finetune.TaskConfig)), prepare.command_line()]
    flags = {flag for parser in parsers for flag in parser._option_string_actions}
    flags |= set(re.findall(r'"(--\w+)"', code)) | {"--max-restarts"}          # torchrun's
    assert not sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose)) - flags)


def python_block(name):
    return next(text for language, text in BLOCKS[name] if language == "python")


def test_the_loss_of_the_readme_is_a_loss(small_config, random_batch, monkeypatch):
    """"Another loss": pasted above OBJECTIVES it is built, trained and tried on the meta device."""
    space = dict(vars(objectives))
    exec(python_block("README.md"), space)
    monkeypatch.setitem(objectives.OBJECTIVES["pretrain"], "siglip", space["SigLIP"])
    cfg = small_config()
    torch.manual_seed(0)
    for device in "meta", "cpu":
        with torch.device(device):
            model = M3AE(cfg).to(device)
        batch = {name: tensor.to(device) for name, tensor in random_batch(cfg).items()}
        batch["mlm_positions"] = (batch["text_ids"][:, 1] * 0).to(device)
        out = model(batch)
        out["loss"].backward()
        assert model.objectives["siglip"].scale.grad is not None
    assert out["siglip_loss"].isfinite() and model.loss_weights["siglip"] == 1
    assert "siglip_loss" in evaluate.validation_metrics(
        model, batch | {"random_negative_index": batch["itm_index"],
                        "hard_negative_index": batch["itm_index"]})


def test_the_recipe_for_hugging_face_writes_a_table(tmp_path, monkeypatch):
    """"From Hugging Face": run with a stand-in for their library, its table is read by `table`."""
    (code,) = [text for language, text in BLOCKS["data/README.md"] if language == "py"]
    assert len(code.splitlines()) <= 12
    rows = [{"image": Image.new("L", (9, 7), i), "caption": f'A "CT",\n{i}'} for i in range(3)]
    library = types.ModuleType("datasets")
    library.load_dataset = lambda name: {"train": rows, "validation": rows[:2], "test": rows[:1]}
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    found = list(table.rows(tmp_path / "mine", "pretrain"))
    assert [row.split for row in found] == ["train"] * 3 + ["val"] * 2 + ["test"]
    assert found[1].text == 'A "CT",\n1' and Image.open(found[1].image).getpixel((0, 0)) == 1


def test_the_reader_of_the_readme_reads(tmp_path):
    """"A new data set": its rows come from the files that it names."""
    space = {}
    exec(python_block("data/README.md"), space)
    for split in "train", "val", "test":
        (tmp_path / f"{split}.csv").write_text("file,caption,modality\na.png,A small nodule.,ct\n")
    rows = list(space["rows"](tmp_path, "pretrain"))
    assert [row.split for row in rows] == ["train", "val", "test"]
    assert rows[0].image == tmp_path / "images" / "a.png" and rows[0].group == "ct"
