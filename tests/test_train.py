"""train.py as users start it: one process and several, what it writes, resuming, what it refuses."""
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from data.report import pretraining_table
from m3ae_mini import M3AE, checkpoint, distributed, optim, plots
from m3ae_mini.config import RunConfig, TrainConfig, UserError
from m3ae_mini.model import Fusion
from m3ae_mini.objectives import OBJECTIVES
from m3ae_mini.tokenizer import Tokenizer
from test_loader import CAPTIONS, write_pack

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--image_size 16 --patch_size 4 --vit_width 32 --vit_heads 2 --text_width 32 --text_heads 2 "
         "--fusion_width 32 --fusion_heads 2 --decoder_width 16 --decoder_heads 2 --tokenizer_vocab 300 "
         "--batch_size 8 --micro_batch 4 --device cpu --dtype float32 --log_every 1 --eval_every 1000 "
         "--save_every 1000 --dropout 0.1 --attn_dropout 0.1").split()

SCALER = torch.amp.GradScaler


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs") / "pack"
    write_pack(folder, CAPTIONS * 2, {"train": 40, "val": 41, "test": 10})
    return folder


def started(monkeypatch, *flags):
    """Call train.main() as `python train.py flags` would."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    train.main()


def logged(out, split="train"):
    lines = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["split"] == split]


def losses(out):
    return [[line[name] for name in ("mlm_loss", "mim_loss", "itm_loss")] for line in logged(out)]


# -------------------------------------------------------------------------------- a run

def test_what_the_user_froze_stays_frozen(small_config, random_batch):
    cfg = small_config(itm=0.0)
    model = M3AE(cfg)
    model.vit.requires_grad_(False)
    batch = random_batch(cfg) | {"mlm_positions": torch.arange(4)}
    optim.freeze(model, TrainConfig(), optim.dry_run(cfg, TrainConfig(), batch))
    assert not any(parameter.requires_grad for parameter in model.vit.parameters())
    assert not any(parameter.requires_grad for parameter in model.image_pooler.parameters())    # unused
    assert all(parameter.requires_grad for parameter in model.text.parameters())


def test_dropout_modules_of_a_frozen_part_are_off(small_config):
    """A fusion of one's own may hold nn.Dropout in place of a number."""
    model = M3AE(small_config())
    model.fusion.dropout = torch.nn.Dropout(0.5)
    optim.freeze(model, TrainConfig(fusion_lr_mult=0.0))
    assert model.fusion.dropout.p == 0
    assert model.train().fusion.dropout(torch.ones(99)).eq(1).all()


class OneSided(Fusion):
    """A fusion that wants as many images as texts."""

    def forward(self, text, image, text_mask, **limits):
        both = torch.cat([text, image], dim=1)                                         # (B, T+N, D)
        return super().forward(both[:, :text.shape[1]], image, text_mask, **limits)


class Grows(Fusion):
    """A fusion that returns one row more for one image and many texts."""

    def forward(self, text, image, text_mask, **limits):
        text, new_image = super().forward(text, image, text_mask, **limits)
        return text, new_image if len(image) > 1 or text is None else new_image[:1]


@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize("fusion, words", [
    (OneSided, "fails with one image and many texts, which retrieval needs"),
    (Grows, r"fails with one image and many texts, .*: it returns")])
def test_a_fusion_that_fails_beside_many_is_refused(fusion, words, gpus, pack, tmp_path, monkeypatch):
    """Before a process starts, and before the folder holds a run."""
    monkeypatch.setattr("m3ae_mini.model.Fusion", fusion)
    monkeypatch.setattr(train, "launch_torchrun", lambda count: pytest.fail("processes were started"))
    monkeypatch.setattr(train, "fit", lambda *args: pytest.fail("training was started"))
    with pytest.raises(UserError, match=f"^Fusion.forward {words}") as error:
        started(monkeypatch, *SMALL, "--data", pack, "--out", tmp_path / "run", "--steps", 2,
                "--gpus", gpus)
    assert "\n" not in str(error.value)
    checkpoint.remove_unused_run_dir(tmp_path / "run")       # as the end of the process does
    assert not (tmp_path / "run").exists()


class Wasteful(Fusion):
    """A fusion of somebody's own, which ignores what only saves work."""

    def forward(self, text, image, text_mask, **limits):
        return super().forward(text, image, text_mask)


@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_a_fusion_may_ignore_what_only_saves_work(small_config, random_batch, monkeypatch, layer):
    """Where --mim_layer 0 decodes pixels before the fusion, it is not called."""
    monkeypatch.setattr("m3ae_mini.model.Fusion", Wasteful)
    cfg = small_config(mim_layer=layer, itm=0.0)
    optim.dry_run(cfg, TrainConfig(), random_batch(cfg) | {"mlm_positions": torch.arange(4)})


class Length(torch.nn.Module):
    """A loss of somebody's own: how long is the text?"""
    inputs = ("text",)

    def __init__(self, cfg):
        super().__init__()
        self.fc = torch.nn.Linear(cfg.fusion_width, 1)

    def forward(self, model, batch, text):
        predicted = self.fc(text[:, 0])[:, 0]                                          # (B,)
        return {"length_loss": (predicted - batch["text_mask"].sum(1)).square().mean()}


def test_another_loss_is_trained_logged_and_validated(pack, tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES["pretrain"], "length", Length)
    started(monkeypatch, *SMALL, "--data", pack, "--out", tmp_path / "run", "--steps", 2)
    for split in "train", "val", "test":
        assert logged(tmp_path / "run", split)[-1]["length_loss"] > 0


@pytest.mark.release
def test_a_loss_of_ones_own_alone(pack, tmp_path, monkeypatch):
    """The three shipped ones are off: its weight has a flag, and it alone chooses best.pt."""
    monkeypatch.setitem(OBJECTIVES["pretrain"], "length", Length)
    out, alone = tmp_path / "run", ["--mlm", 0, "--mim", 0, "--itm", 0]
    started(monkeypatch, *SMALL, "--data", pack, "--out", out, "--steps", 4, "--eval_every", 1,
            *alone, "--length", 0.5)
    for line in logged(out):
        assert {name for name in line if name.endswith("loss")} == {"loss", "length_loss"}
        assert line["loss"] == pytest.approx(0.5 * line["length_loss"])
    scores = [line["score"] for line in logged(out, "val")]
    assert scores == sorted(scores)                          # it is learned, so the last is the best
    for line in logged(out, "val"):
        assert line["score"] == pytest.approx(-0.5 * line["length_loss"])
    assert torch.load(out / "best.pt", weights_only=True)["step"] == 4
    saved = json.loads((out / "config.json").read_text())
    assert saved["model"]["loss_weights"] == {"length": 0.5}

    for weight, words in ((0, "--mlm, --mim, --itm, --itc, --length are all 0"),
                          (-1, "--length -1.0 is a weight: use 0 or more")):
        with pytest.raises(UserError, match=words):
            started(monkeypatch, *SMALL, "--data", pack, "--out", tmp_path / "never", *alone,
                    "--length", weight)


def test_a_loss_of_ones_own_can_be_left_out(pack, tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES["pretrain"], "length", Length)
    started(monkeypatch, *SMALL, "--data", pack, "--out", tmp_path / "run", "--steps", 1,
            "--length", 0)
    line, = logged(tmp_path / "run")
    assert "mlm_loss" in line and "length_loss" not in line


def test_a_run_leaves_what_it_promises(pack, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    started(monkeypatch, *SMALL, "--data", pack, "--out", out, "--steps", 4,
            "--eval_every", 2, "--save_every", 2)

    assert [line["step"] for line in logged(out)] == [1, 2, 3, 4]
    assert [line["step"] for line in logged(out, "val")] == [2, 4] and len(logged(out, "test")) == 1
    names = {"mlm_acc", "mlm_gain_random", "mlm_gain_hard", "mim_gain_random", "itm_acc"}
    assert names <= set(logged(out, "val")[0])
    for name in ("last.pt", "prev.pt", "best.pt"):
        state = torch.load(out / name, weights_only=True)
        assert state["model_config"]["image_size"] == 16 and "vit.pos_embed" in state["model"]
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 4
    assert torch.load(out / "prev.pt", weights_only=True)["step"] == 2
    for name in ("step000002.png", "step000004.png", "curves.png"):
        with Image.open(out / "plots" / name) as image:
            assert len(set(image.convert("L").getdata() if not hasattr(image, "get_flattened_data")
                           else image.convert("L").get_flattened_data())) > 10
    report = capsys.readouterr().out
    for words in ("On 10 test samples", "most frequent token", "mean patch"):
        assert words in report
    assert not list(out.glob("*.tmp"))


def test_a_log_that_is_no_terminal_gets_lines(pack, tmp_path, monkeypatch, capfd):
    """A batch system's log has a line each --log_every, and no bars without line ends."""
    flags = [*SMALL, "--data", pack, "--out", tmp_path / "run", "--steps", 4, "--log_every", 2]
    started(monkeypatch, *flags, "--test_samples", 0)
    printed = capfd.readouterr()
    lines = [line for line in printed.out.splitlines() if " of 4  " in line]
    assert [line.split("  ")[0] for line in lines] == ["step 2 of 4", "step 4 of 4"]
    assert all(re.search(r"mlm_loss .* lr \S+e-\d\d  [\d,]+ samples/s  0:00:0\d left$", line)
               for line in lines)
    assert "\r" not in printed.out + printed.err


def test_few_pairs_and_random_weights_name_the_recipe(pack, tmp_path, monkeypatch, capsys):
    flags = [*SMALL, "--data", pack, "--steps", 1, "--test_samples", 0]
    for name, more, said in (("all", [], True), ("one", ["--mlm", 0, "--itm", 0], False),
                             ("init", ["--init", tmp_path / "all"], False)):
        started(monkeypatch, *flags, "--out", tmp_path / name, *more)
        assert ("python -m data.few_pairs" in capsys.readouterr().out) == said


def test_no_metric_against_hard_negatives_where_the_data_name_no_groups(tmp_path, monkeypatch, capsys):
    """The mean of nothing is no zero: ROCO, MedICaT and many a table have no groups."""
    write_pack(tmp_path / "pack", CAPTIONS * 2, {"train": 16, "val": 8, "test": 8}, groups=0)
    started(monkeypatch, *SMALL, "--data", tmp_path / "pack", "--out", tmp_path / "run", "--steps", 1)
    for split in "val", "test":
        line, = logged(tmp_path / "run", split)
        assert not [name for name in line if "hard" in name]
        assert {"mlm_gain_random", "itm_acc_random"} <= line.keys()
    _, report = capsys.readouterr().out.split("On 8 test samples")
    assert report.count("no hard negatives: the data have no groups") == 1
    assert "over a hard negative" not in report and "gain over a random image" in report


def test_a_report_on_one_sample_has_no_negatives_to_compare_with(pack, tmp_path, monkeypatch, capsys):
    started(monkeypatch, *SMALL, "--data", pack, "--out", tmp_path / "run", "--steps", 1, "--test_samples", 1)
    _, report = capsys.readouterr().out.split("On 1 test samples")
    assert "masked tokens" in report and "reconstruction error" in report
    assert not any(words in report for words in ("gain", "matching", "nan"))
    assert report.count("no negatives: all pairs share an image or a text") == 1
    assert "itm_acc" not in logged(tmp_path / "run", "test")[0]
    assert "mlm_gain_random" not in logged(tmp_path / "run", "test")[0]


def test_a_report_tells_only_of_losses_that_were_trained():
    trivial = {"most_frequent_token": 0.1, "group_only": 0.5, "mean_patch": 1.0, "noise_floor": 0.3}
    pixels = pretraining_table(trivial | {"mim_loss": 0.6, "mim_gain_random": 0.1}, {})
    assert "noise floor" in pixels and "-40%" in pixels and "hard negatives" not in pixels
    words = {"mlm_loss": 2.0, "mlm_acc": 0.4, "mlm_gain_random": 0.1}
    words = pretraining_table(trivial | words, {"mlm_gain_random": (0.05, 0.15)})
    assert "+10.0 (+5.0 to +15.0) points" in " ".join(words.split()) and "no hard negatives" in words and "noise floor" not in words


def test_curves_of_losses_that_were_never_finite(tmp_path):
    lines = [{"step": 1, "split": split, "length_loss": None} for split in ("train", "val")]
    plots.curves({"run": lines}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()


def test_a_small_rate_is_logged_as_it_is(tmp_path):
    log = checkpoint.Log(tmp_path, 0)
    log.write(1, "train", lr=1e-9, skipped=0)              # base's first step
    assert checkpoint.read_log(log.path.parent) == [{"step": 1, "split": "train", "lr": 1e-9, "skipped": 0}]


def test_a_length_in_epochs_is_a_step_at_least():
    for epochs, samples, steps in ((1.0, 20, 1), (2.0, 640, 20), (0.0, 20, 900)):
        train_cfg = TrainConfig(steps=900, epochs=epochs, batch_size=64)
        run_cfg = RunConfig(eval_every=0)
        optim.epochs_to_steps(train_cfg, run_cfg, samples)
        assert train_cfg.steps == steps and run_cfg.eval_every == max(1, samples // 64)


def test_resume_equals_a_run_that_never_stopped(pack, tmp_path, monkeypatch):
    flags = [*SMALL, "--data", pack, "--steps", 7, "--save_every", 3]
    started(monkeypatch, *flags, "--out", tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(*args):
        raise Killed
    save, saved = checkpoint.save_checkpoint, []
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *args: saved.append(save(*args)) or kill())
    with pytest.raises(Killed):
        started(monkeypatch, *flags, "--out", tmp_path / "parts")
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:   # what a kill after saving leaves behind
        file.write('{"step": 4, "split": "train", "mlm_loss": 99}\n{"step": 5, "spl')
    started(monkeypatch, *flags, "--out", tmp_path / "parts", "--resume")

    whole, parts = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 7
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_validation_and_report_mask_as_configured_whatever_the_schedule(pack, tmp_path, monkeypatch):
    """A run that has ended reports the same again: its last step's settings don't reach the test."""
    settings_at, ratios = train.settings_at, []

    def schedule(step, cfg, train_cfg):
        ratios.append(0.25 + 0.125 * step)
        return settings_at(step, cfg, train_cfg)._replace(mask_ratio=ratios[-1])
    monkeypatch.setattr(train, "settings_at", schedule)
    flags = [*SMALL, "--data", pack, "--out", tmp_path / "run", "--steps", 2]
    started(monkeypatch, *flags)
    first, = logged(tmp_path / "run", "test")
    assert set(ratios) == {0.25, 0.375}
    started(monkeypatch, *flags, "--resume")
    assert logged(tmp_path / "run", "test") == [first, first]       # a test's line is never deleted


@pytest.mark.release
@pytest.mark.parametrize("off", ["", "mlm", "mim", "itm", "mlm mim", "mlm itm", "mim itm"])
def test_every_combination_of_losses_trains(pack, tmp_path, monkeypatch, off):
    flags = [flag for name in off.split() for flag in (f"--{name}", 0)]
    started(monkeypatch, *SMALL, "--data", pack, "--out", tmp_path / "run", "--steps", 2, *flags)
    names = {name for name in logged(tmp_path / "run")[0] if name.endswith("_loss")}
    assert names == {f"{name}_loss" for name in ("mlm", "mim", "itm") if name not in off}


# -------------------------------------------------------------------------------- frozen parts

PARTS = ("vit", "text", "fusion", "head")


@pytest.fixture(scope="module")
def frozen(pack, tmp_path_factory):
    """{part: what a run with its rate at 0 began with, and its folder}"""
    base, runs, fit = tmp_path_factory.mktemp("frozen"), {}, train.fit
    for part in PARTS:
        begun = {}

        def watched(model, net, optimizer, *rest):
            begun["state"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            begun["trained"] = {id(p) for group in optimizer.param_groups for p in group["params"]}
            begun["parameters"] = dict(model.named_parameters())
            begun["modules"] = dict(model.named_modules())
            return fit(model, net, optimizer, *rest)

        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(train, "fit", watched)
            started(patch, *SMALL, "--data", pack, "--out", base / part, "--steps", 3,
                    f"--{part}_lr_mult", 0)
        runs[part] = begun | {"out": base / part, "printed": printed.getvalue()}
    return runs


def part_of(name):
    """The part whose rate a parameter has."""
    rates = TrainConfig(vit_lr_mult=1, text_lr_mult=2, fusion_lr_mult=3, head_lr_mult=4)
    return ("vit", "text", "fusion", "head")[int(optim.lr_mult_of(name, rates)) - 1]


def check_frozen(part, before, out):
    """The part's weights are those of `before`, bit by bit; each other part has been trained."""
    after = torch.load(out / "last.pt", weights_only=True)["model"]
    changed = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(PARTS) - {part}


@pytest.mark.parametrize("part", PARTS)
def test_a_rate_of_0_freezes_a_part(part, frozen):
    run = frozen[part]
    check_frozen(part, run["state"], run["out"])
    parameters = {name: p for name, p in run["parameters"].items() if part_of(name) == part}
    assert not any(p.requires_grad or id(p) in run["trained"] for p in parameters.values())
    for name, module in run["modules"].items():
        if hasattr(module, "dropout") and part_of(name) in ("text", "fusion"):
            assert module.dropout == (0 if part_of(name) == part else 0.1), name

    # The optimizer's state holds the trained parameters alone; the start-up line counts them.
    saved = torch.load(run["out"] / "last.pt", weights_only=True)["optimizer"]["state"]
    assert len(saved) == len(run["trained"]) < len(run["parameters"])
    total = sum(p.numel() for p in run["parameters"].values())
    trained = sum(p.numel() for p in run["parameters"].values() if id(p) in run["trained"])
    counts = f"{total / 1e6:.1f} million parameters, {trained / 1e6:.1f} million trained"
    assert counts in run["printed"]


def test_a_part_stays_frozen_under_two_processes(frozen, pack, tmp_path):
    flags = [*SMALL, "--data", pack, "--steps", 3]
    together([[*flags, "--out", tmp_path / part, f"--{part}_lr_mult", 0] for part in PARTS], tmp_path)
    for part in PARTS:
        check_frozen(part, frozen[part]["state"], tmp_path / part)
        one, two = torch.tensor(losses(frozen[part]["out"])), torch.tensor(losses(tmp_path / part))
        assert (one - two).abs().max() < 1e-5


# -------------------------------------------------------------------------------- several processes

def together(runs, folder):
    """Runs of train.py, a list of flags each, one after the other in the same two gloo processes."""
    script = folder / "several.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                      "import train\nfrom m3ae_mini import distributed\n"
                      "def main():\n"
                      "    for line in open(sys.argv[1]).read().splitlines():\n"
                      "        sys.argv = ['train.py', *line.split()]\n"
                      "        train.main()\n"
                      "distributed.run(main)\n")
    (folder / "runs.txt").write_text("\n".join(" ".join(map(str, run)) for run in runs))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", script, folder / "runs.txt"],
                          capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-3), ("bfloat16", 0.1), ("float16", 0.1)])
def test_a_gpu_trains_as_the_cpu_does(dtype, tolerance, pack, tmp_path, monkeypatch):
    """Without dropout, whose draws differ from a CPU's: the same losses."""
    flags = [*SMALL, "--data", pack, "--steps", 5, "--dropout", 0, "--attn_dropout", 0]
    started(monkeypatch, *flags, "--out", tmp_path / "cpu")
    started(monkeypatch, *flags, "--out", tmp_path / "gpu", "--device", "cuda", "--dtype", dtype)
    cpu, gpu = (torch.tensor(losses(tmp_path / name)) for name in ("cpu", "gpu"))
    assert (cpu - gpu).abs().max() < tolerance


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_for_it_once(pack, tmp_path, monkeypatch):
    """torch warns at every operation that makes the host wait: six more steps bring six more."""
    counts = []
    for steps in 6, 12:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                started(monkeypatch, *SMALL, "--data", pack, "--steps", steps, "--log_every", 99,
                        "--device", "cuda", "--out", tmp_path / f"{steps}")
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))
    assert 0 < counts[0] and counts[1] - counts[0] <= 6


def test_two_processes_equal_one(pack, tmp_path, monkeypatch):
    """One process with two micro-batches a step and two gloo processes with one see the same losses, dropout
    on, to 1e-5 over ten float32 steps; validation counts every sample once on both. And all combinations of
    losses train under DDP."""
    combinations = ["", "--mlm 0", "--mim 0", "--itm 0",
                    "--mlm 0 --mim 0", "--mlm 0 --itm 0", "--mim 0 --itm 0"]
    base = [*SMALL, "--data", pack]
    runs = [[*base, "--out", tmp_path / f"ddp{i}", "--steps", 2 if i else 10, *flags.split()]
            for i, flags in enumerate(combinations)]
    together(runs, tmp_path)
    assert len(list(tmp_path.glob("ddp*/last.pt"))) == len(combinations)

    started(monkeypatch, *base, "--out", tmp_path / "one", "--steps", 10)
    one, two = torch.tensor(losses(tmp_path / "one")), torch.tensor(losses(tmp_path / "ddp0"))
    assert one.shape == (10, 3) and (one - two).abs().max() < 1e-5
    for split in ("val", "test"):
        one, two = (logged(tmp_path / name, split)[0] for name in ("one", "ddp0"))
        assert one.keys() == two.keys() and len(one) > 8
        assert all(abs(one[name] - two[name]) < 1e-4 for name in one if name != "split")


def test_launchers(pack, tmp_path):
    """--gpus 2 starts torchrun itself; two members of one rendezvous stand for two machines."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = [*SMALL, "--data", str(pack), "--steps", "2"]
    itself = subprocess.Popen([sys.executable, ROOT / "train.py", *flags, "--gpus", "2",
                               "--out", tmp_path / "itself"],
                              cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    nodes = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                               "--nproc-per-node", "1", "--rdzv-backend", "c10d",
                               "--rdzv-endpoint", "127.0.0.1:29517", "--rdzv-id", "test",
                               ROOT / "train.py", *flags, "--out", tmp_path / "nodes"],
                              cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
             for _ in range(2)]
    for process in (itself, *nodes):
        text, _ = process.communicate(timeout=240)
        assert process.returncode == 0, text[-3000:]
    assert losses(tmp_path / "itself") == losses(tmp_path / "nodes")


# -------------------------------------------------------------------------------- bad input

REFUSED = {
    "no such folder": ("--data /nowhere/pack", "no pack at /nowhere/pack"),
    "another image size": ("--image_size 24", "holds images of 16 pixels"),
    "batch and micro-batch": ("--batch_size 10", "--batch_size 10 in steps of --micro_batch 4 can't be divided"),
    "micro-batch of one": ("--micro_batch 1", "--micro_batch 1 leaves no other row"),
    "mim_layer": ("--mim_layer 2", "--mim_layer 2: use -1"),
    "patch": ("--patch_size 5", "--patch_size 5"),
    "heads": ("--fusion_heads 5", "--fusion_heads 5"),
    "no logging": ("--log_every 0", "--log_every 0: use 1 or more"),
    "no validation": ("--eval_samples 0", "--eval_samples 0: use 1 or more"),
    "fewer than no test": ("--test_samples -1", "--test_samples -1: use 0 or more"),
    "no batch": ("--batch_size 0", "--batch_size 0: use 1 to"),
    "clipping turned on by turning it off": ("--grad_clip -1", "--grad_clip -1.0: use 0 to"),
    "no number": ("--warmup nan", "--warmup nan: use 0 to 1"),
    "no share": ("--min_crop_area 1.5", "--min_crop_area 1.5: use 0 to 1"),
    "beta2": ("--beta2 1", "--beta2 1.0: use 0 to 0.9999"),
    "vocab": ("--tokenizer_vocab 0", "--tokenizer_vocab 0: use 1 to"),
    "seed": ("--seed -1", "--seed -1: use 0 to"),
    "two lengths": ("--epochs 3", "--steps and --epochs both set the length"),
    "no rate": ("--lr 0", "--lr 0 .* --vit_lr_mult 0, --text_lr_mult 0, --fusion_lr_mult 0 or --head_lr_mult 0"),
    "all frozen": ("--vit_lr_mult 0 --text_lr_mult 0 --fusion_lr_mult 0 --head_lr_mult 0",
                   "all parts are frozen: one of --vit_lr_mult, --text_lr_mult"),
    "tokenizer": ("--tokenizer /nowhere", "no tokenizer at /nowhere"),
    "device": ("--device tpu", "--device tpu"),
    "dtype": ("--dtype int8", "--dtype int8"),
}
if not torch.cuda.is_available():
    REFUSED["no gpu"] = ("--device cuda", "1 GPUs are needed, none available")
    REFUSED["too many gpus"] = ("--device cuda --gpus 2 --batch_size 8", "2 GPUs are needed")


@pytest.mark.parametrize("flags, words", REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_in_one_sentence(pack, tmp_path, monkeypatch, flags, words):
    with pytest.raises(UserError, match=words) as error:
        started(monkeypatch, *SMALL, "--data", pack, "--out", tmp_path / "run", "--steps", 2, *flags.split())
    assert "\n" not in str(error.value)
    checkpoint.remove_unused_run_dir(tmp_path / "run")       # as the end of the process does
    assert not (tmp_path / "run").exists()


@pytest.mark.release
def test_no_loss_at_all_is_refused(pack, tmp_path, monkeypatch):
    test_bad_input_is_refused_in_one_sentence(
        pack, tmp_path, monkeypatch, "--mlm 0 --mim 0 --itm 0",
        "are all 0, so nothing is learned: set one above 0")


def test_a_folder_that_holds_something_else(pack, tmp_path, monkeypatch):
    flags = [*SMALL, "--data", pack, "--steps", 2]
    started(monkeypatch, *flags, "--out", tmp_path / "run")
    before = {file: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}
    with pytest.raises(UserError, match="holds another run"):
        started(monkeypatch, *flags, "--out", tmp_path / "run")
    with pytest.raises(UserError, match=r"other settings: .*lr .*\(now 0.5\)"):
        started(monkeypatch, *flags, "--out", tmp_path / "run", "--resume", "--lr", 0.5)
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not empty"):
        started(monkeypatch, *flags, "--out", tmp_path / "thesis")


def test_another_tokenizer_than_the_runs(pack, tmp_path, monkeypatch):
    from m3ae_mini.tokenizer import Tokenizer
    flags = [*SMALL, "--data", pack, "--steps", 2, "--out", tmp_path / "run"]
    started(monkeypatch, *flags)
    (tmp_path / "tokenizer.json").write_text(Tokenizer.train(CAPTIONS, 280).json)
    with pytest.raises(UserError, match="numbers tokens otherwise than .*run, .*: leave --tokenizer out"):
        started(monkeypatch, *flags, "--resume", "--tokenizer", tmp_path)


def test_a_run_goes_on_without_its_first_weights(pack, tmp_path, monkeypatch):
    """They are in the checkpoint; before there is one, they are needed."""
    start = tmp_path / "start"
    started(monkeypatch, *SMALL, "--data", pack, "--steps", 1, "--out", start, "--test_samples", 0)
    flags = [*SMALL, "--data", pack, "--steps", 2, "--save_every", 1, "--test_samples", 0,
             "--init", start, "--out", tmp_path / "run"]
    started(monkeypatch, *flags)
    whole = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    (tmp_path / "run" / "last.pt").unlink()                  # as if stopped after the first step
    start.rename(tmp_path / "moved")
    started(monkeypatch, *flags, "--resume")
    again = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(whole[name], again[name]) for name in whole)

    (tmp_path / "run" / "last.pt").unlink()
    started(monkeypatch, *flags[:-3], tmp_path / "moved", *flags[-2:], "--resume")
    for name in "last.pt", "prev.pt":
        (tmp_path / "run" / name).unlink()
    with pytest.raises(UserError, match="start.* can't be read"):
        started(monkeypatch, *flags, "--resume")


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    for flags in (["--data", "/nowhere"], ["--gpus", "2", "--device", "cpu", "--micro_batch", "48"]):
        done = subprocess.run([sys.executable, ROOT / "train.py", "--out", tmp_path / "run", *flags],
                              capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("train.py: ") and done.stderr.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_out_of_memory_names_the_flag(monkeypatch, capsys):
    def exhausted():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    with pytest.raises(SystemExit) as status:
        distributed.run(exhausted)
    assert status.value.code == 2 and "--grad_checkpointing --resume" in capsys.readouterr().err


@pytest.mark.parametrize("scaling", [False, True])
def test_gradients_that_are_not_finite_are_skipped_then_the_run_ends(scaling, pack, tmp_path, monkeypatch):
    if scaling:                                            # as in float16 on a GPU
        monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: SCALER(device))
    flags = [*SMALL, "--data", pack, "--steps", 40, "--lr", "1e9"]
    with pytest.raises(UserError, match="no finite gradient in 20 steps"):
        started(monkeypatch, *flags, "--out", tmp_path / "run")
    assert sum(line["skipped"] for line in logged(tmp_path / "run")) == 19


def test_the_scale_falls_after_a_bad_gradient(pack, tmp_path, monkeypatch):
    """A run that was saved without a scaler goes on with one, skips a bad gradient, and halves its scale."""
    flags = [*SMALL, "--data", pack, "--out", tmp_path / "run", "--steps", 4, "--save_every", 2]
    started(monkeypatch, *flags)
    (tmp_path / "run" / "last.pt").unlink()                # as if it had been stopped at step 2
    assert not checkpoint.load_checkpoint(tmp_path / "run" / "prev.pt")["scaler"]

    class Spoiler(SCALER):
        def unscale_(self, optimizer):
            if self.get_scale() == 2.0 ** 16:
                optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
            super().unscale_(optimizer)

    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: Spoiler(device))
    started(monkeypatch, *flags, "--resume")
    state = checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")
    assert [line["skipped"] for line in logged(tmp_path / "run")] == [0, 0, 1, 0]
    assert state["scaler"]["scale"] == 2.0 ** 15
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


# -------------------------------------------------------------------------------- weights to start from

def test_a_run_starts_from_clip_and_bert(pack, tmp_path, monkeypatch, capsys):
    """The flags bring the files' weights, their architecture and their tokenizer; the table says so."""
    from m3ae_mini import M3AE, ModelConfig
    from m3ae_mini.weights import to_official
    from test_loader import bert_tokenizer

    vocabulary = bert_tokenizer(CAPTIONS, tmp_path / "tokenizer.json").get_vocab_size()
    cfg = ModelConfig(text_kind="bert", vocab_size=vocabulary, text_width=64, text_layers=3, text_heads=4,
                      text_max_positions=40, max_text_len=32, vit_width=64, vit_blocks=3, vit_heads=1,
                      image_size=32, patch_size=4, fusion_width=32, fusion_heads=2, fusion_layers=2,
                      mim_layer=1, decoder_width=16, decoder_heads=2)
    files = to_official(M3AE(cfg).state_dict(), cfg)
    clip = {name.removeprefix("vision_encoder."): tensor for name, tensor in files.items()
            if ".visual." in name}
    bert = {name.removeprefix("language_encoder."): tensor for name, tensor in files.items()
            if name.startswith("language_encoder.")}
    torch.save(clip, tmp_path / "clip.pt")
    torch.save(bert, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4, "hidden_act": "gelu"}))

    begun, fit = [], train.fit
    monkeypatch.setattr(train, "fit", lambda model, *rest: begun.append(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}) or fit(model, *rest))
    sizes = ("--image_size 16 --patch_size 4 --fusion_width 32 --fusion_heads 2 --decoder_width 16 "
             "--decoder_heads 2 --batch_size 8 --micro_batch 4 --device cpu --dtype float32").split()
    started(monkeypatch, *sizes, "--data", pack, "--out", tmp_path / "run", "--steps", 1, "--test_samples", 0,
            "--init_image", tmp_path / "clip.pt", "--init_text", tmp_path, "--vit_heads", 1)
    model = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    expected = dict(text_kind="bert", vocab_size=vocabulary, text_layers=3, text_heads=4, vit_width=64,
                    vit_blocks=2, vit_heads=1, image_size=16)
    assert {name: model[name] for name in expected} == expected
    for name, file, released in (
            ("text.layers.2.fc1.weight", bert, "encoder.layer.2.intermediate.dense.weight"),
            ("vit.blocks.1.fc1.weight", clip, "visual.transformer.resblocks.1.mlp.c_fc.weight")):
        assert torch.equal(begun[0][name], file[released])
    printed = capsys.readouterr().out
    assert f"--init_image {tmp_path / 'clip.pt'}: 65 image positions resized to 17" in printed
    assert "fusion" in printed and "random" in printed and f"--init_text {tmp_path}\n" in printed

    # And from what this run left, at another image size.
    other = tmp_path / "other"
    write_pack(other, CAPTIONS, {"train": 16, "val": 8}, size=24)
    started(monkeypatch, *sizes, "--image_size", 24, "--data", other, "--out", tmp_path / "next",
            "--steps", 1, "--init", tmp_path / "run")
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"]
    name = "objectives.mlm.decoder.weight"
    assert torch.equal(begun[1][name], best[name])
    assert len(begun[1]["vit.pos_embed"]) == 37
    assert Tokenizer.load(tmp_path / "next").hash == Tokenizer.load(tmp_path).hash


def test_mistakes_are_found_before_processes_start(pack, tmp_path):
    """With --gpus, too, a folder in use and other settings end in one sentence, not in torchrun's report."""
    flags = [*SMALL, "--data", pack, "--out", tmp_path / "run", "--steps", 1, "--test_samples", 0]

    def run(*more):
        command = [sys.executable, "train.py", *flags, *more]
        return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert run().returncode == 0
    for more, sentence in (((), "holds another run"), (("--resume", "--lr", 1), "with other settings: lr")):
        done = run("--gpus", 2, *more)
        assert done.returncode == 2 and sentence in done.stderr and len(done.stderr.splitlines()) == 1


def test_curves_of_several_runs(tmp_path, monkeypatch, capsys):
    """One image; each run in a colour of its own, named; runs without a log are refused."""
    for i, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        log = checkpoint.Log(tmp_path / name, 0)
        for step in 1, 2, 3:
            log.write(step, "val", mim_loss=1.0 / (step + i), score=step * 0.1)
    drawn = {}
    for names in ["one"], ["one", "two"]:
        out = tmp_path / f"{len(names)}.png"
        monkeypatch.setattr(sys, "argv", ["plots", *(str(tmp_path / n) for n in names), "--out", str(out)])
        plots.main()
        drawn[len(names)] = {colour for _, colour in Image.open(out).getcolors(1 << 16)}
        assert capsys.readouterr().out == f"wrote {out}\n"
    assert plots.GREEN in drawn[1] and plots.RED not in drawn[1]
    assert {plots.GREEN, plots.RED} <= drawn[2]

    before = (tmp_path / "one" / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path / "one"), str(tmp_path / "none")])
    with pytest.raises(UserError, match="none holds no metrics.jsonl with lines"):
        plots.main()
    assert (tmp_path / "one" / "metrics.jsonl").read_bytes() == before and not (tmp_path / "none").exists()
