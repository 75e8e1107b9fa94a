"""tests/ablate.py and every tests/ablations/NAME.diff: they fit this code, and change what they say."""
import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import ablate
import tables
from m3ae_mini.config import UserError
from test_loader import CAPTIONS, write_pack
from test_readme import parsed
from test_train import SMALL
import train

DIFFS = sorted(path.stem for path in ablate.DIFFS.glob("*.diff"))
CHANGES = {"mlp_pixel_decoder": "mim_loss", "transformer_text_head": "mlm_loss",
           "perturbed_input": "mim_loss", "mask_schedule": "mim_loss"}


@pytest.fixture(scope="module")
def code_of(tmp_path_factory):
    """A function: a row's name -> the folder of its code."""
    base = tmp_path_factory.mktemp("ablations")

    def find(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ablate, "OUT", base)
            return base / "ablations" / ablate.begin(name) / "code"
    return find


@pytest.fixture(scope="module")
def losses(tmp_path_factory, code_of):
    """A function: name -> the losses of the first step of training by that row's code, of two steps, from
    which it can be fine-tuned."""
    base, done = tmp_path_factory.mktemp("losses"), {}
    write_pack(base / "pack", CAPTIONS * 2, {"train": 40, "val": 4, "test": 4})

    def run(name):
        if name not in done:
            flags = [*SMALL, "--data", base / "pack", "--out", base / name, "--steps", 2, "--no-resume"]
            tuned = [*flags, "--init", base / name, "--out", base / f"{name}-tuned", "--steps", 1]
            for script in ["train.py", *flags], ["finetune.py", "irtr", *tuned]:
                subprocess.run([sys.executable, *map(str, [code_of(name) / script[0], *script[1:]])],
                               check=True, cwd=ablate.ROOT)
            lines = [json.loads(line) for line in open(base / name / "metrics.jsonl")]
            assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2]
            done[name] = {key: value for key, value in lines[0].items() if key.endswith("loss")}
        return done[name]
    return run


@pytest.mark.parametrize("name", DIFFS)
def test_a_diff_is_small_and_of_one_file(name):
    lines = (ablate.DIFFS / f"{name}.diff").read_text().splitlines()
    assert lines[0] and not lines[0].startswith("diff"), "its first line says what it changes"
    files = [line for line in lines if line.startswith("+++ ")]
    assert len(files) == 1 and files[0].startswith(("+++ b/m3ae_mini/", "+++ b/train.py"))
    changed = [line for line in lines if line.startswith(("+", "-")) and line[:4] not in ("+++ ", "--- ")]
    assert len([line for line in changed if line[0] == "+"]) <= 30 and len(changed) <= 40
    assert not [line for line in changed if line[0] == "+" and len(line) > 111]


@pytest.mark.parametrize("name", DIFFS)
def test_a_diff_applies_trains_and_changes_the_loss_it_is_about(name, losses):
    before, after = losses("unchanged"), losses(name)
    assert all(value is not None for value in after.values())          # null is what is not finite
    loss = CHANGES.get(name)
    assert before.get(loss) != after[loss] if loss else before != after


def objectives_by(name, code_of):
    """The package's objectives.py as a row has it, beside the other files as they are."""
    file = code_of(name) / "m3ae_mini" / "objectives.py"
    spec = importlib.util.spec_from_file_location(f"m3ae_mini.objectives_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name, mixes", [("unchanged", True), ("mlp_pixel_decoder", False)])
def test_what_a_hidden_patch_knows(name, mixes, code_of, small_config):
    """A Transformer brings it the visible patches; an MLP leaves it with the class token alone."""
    torch.manual_seed(0)
    mim, kept = objectives_by(name, code_of).M3AE(small_config()).objectives["mim"], torch.randn(1, 5, 64)
    restore = torch.randperm(16)[None]                                         # the first 4 are visible
    hidden = restore[0] >= 4
    for token, reaches in (0, True), (2, mixes):
        other = kept.clone()
        other[:, token] += 1
        seen = (mim.decode(kept, restore) - mim.decode(other, restore)).abs().amax(-1)[0, hidden]
        assert (seen > 1e-6).all() if reaches else (seen == 0).all()


@pytest.mark.parametrize("name, mixes", [("unchanged", False), ("transformer_text_head", True)])
def test_what_a_hidden_word_knows(name, mixes, code_of, small_config, random_batch):
    """After the fusion an MLP looks at its own token alone, a Transformer at the whole text."""
    cfg = small_config()
    torch.manual_seed(0)
    mlm, batch = objectives_by(name, code_of).M3AE(cfg).eval().objectives["mlm"], random_batch(cfg)
    stream, logits = torch.randn(4, 12, 64), []
    hidden = torch.zeros(4, 12, dtype=torch.bool)
    hidden[:, 1] = True
    batch |= {"mlm_labels": torch.where(hidden, batch["text_ids"], -100)}
    for add in 0, 1:
        stream[:, 2] += add * torch.randn(64)
        trunk = SimpleNamespace(encode_text=lambda *_: stream, fuse=lambda text, *_, **limits: (text, None))
        logits.append(mlm(trunk, batch, None, None)["mlm_logits"])
    assert torch.equal(*logits) != mixes


def test_pixels_are_restored_as_they_were_before_they_were_perturbed(code_of, small_config, random_batch):
    cfg = small_config()
    torch.manual_seed(0)
    model, batch, seen = objectives_by("perturbed_input", code_of).M3AE(cfg), random_batch(cfg), []
    mim, encode = model.objectives["mim"], model.encode_image
    model.encode_image = lambda image, noise: seen.append(image) or encode(image, noise)
    for training in True, False:
        model.train(training)
        out = mim(model, batch, model.encode_text(batch["text_ids"], batch["text_mask"]), None)
        error = (out["mim_pred"] - mim.target(batch["image"], cfg)).square().mean(-1)[out["mim_hidden"] == 1]
        assert torch.isclose(out["mim_loss"], error.mean())
        assert torch.equal(seen[-1], batch["image"]) != training


def test_a_table_holds_what_has_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(ablate, "ROOT", tmp_path)
    for name, gains in ("unchanged", (0.125, 0.25)), ("no_mlm", (None,)):
        for seed, gain in enumerate(gains):
            for which, run in ablate.runs(name, seed).items():
                found = {"acc": 0.5} if which != "pretrain" else {"mlm_gain_hard": gain} if gain else {}
                (tmp_path / run.out).mkdir(parents=True)
                line = json.dumps({"step": 9, "split": "test", **found})
                (tmp_path / run.out / "metrics.jsonl").write_text(line + "\n")
    for row in "no_mlm", "mine":                           # the second has only begun
        (tmp_path / ablate.OUT / "ablations" / row).mkdir(exist_ok=True)
        (tmp_path / ablate.OUT / "ablations" / row / "applied.diff").write_text("")

    ablate.write()
    text = (tmp_path / ablate.OUT / "ablations.md").read_text()
    assert "| the default (`unchanged`) | 2 | 18.8 (12.5 to 25.0) |" in text
    assert "| words are not restored (`no_mlm`) | 1 | – | – | 50.0 (50.0 to 50.0) |" in text
    with Image.open(tmp_path / ablate.OUT / "ablations.png") as image:
        assert ablate.GREEN in {colour for _, colour in image.getcolors(1 << 16)}


@pytest.mark.parametrize("name", ablate.FLAGS)
def test_a_row_of_flags_is_pretrained_as_it_says(name, monkeypatch):
    seen = [ablate.runs(row, 3)["pretrain"].command.split()[1:] for row in ("unchanged", name)]
    usual, changed = (parsed(train, flags, monkeypatch) for flags in seen)
    assert "--seed 3" in ablate.runs(name, 3)["vqa"].command
    assert (usual == changed) == (name == "unchanged")


def test_a_diff_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "OUT", tmp_path)
    with pytest.raises(UserError, match="nothing.diff is not there: use a file, or one of unchanged, no_mim"):
        ablate.begin("nothing")

    (tmp_path / "no_mim.diff").touch()
    with pytest.raises(UserError, match="no_mim is a row of flags: rename your file"):
        ablate.begin(str(tmp_path / "no_mim.diff"))

    mine = tmp_path / "mine.diff"
    mine.write_text("--- a/m3ae_mini/model.py\n+++ b/m3ae_mini/model.py\n@@ -1 +1 @@\n-no such line\n+new\n")
    with pytest.raises(UserError, match="mine.diff does not apply to this code"):
        ablate.begin(str(mine))

    mine.write_text("--- /dev/null\n+++ b/m3ae_mini/new.py\n@@ -0,0 +1 @@\n+1\n")
    assert ablate.begin(str(mine)) == ablate.begin(str(mine)) == ablate.what("mine") == "mine"
    run = ablate.runs("mine", 0)["vqa"]
    assert (run.code / "m3ae_mini" / "new.py").read_text() == "1\n" and (run.code / "finetune.py").is_file()
    mine.write_text("what it changes\n" + mine.read_text().replace("+1\n", "+2\n"))
    with pytest.raises(UserError, match="mine.diff has changed since its row began"):
        ablate.begin(str(mine))
