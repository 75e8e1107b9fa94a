"""ablate.py and every ablations/NAME.diff: they fit this code, and change what they say."""
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import ablate
import results
import train
from data import phantoms
from m3ae_mini import M3AE
from m3ae_mini.config import TrainConfig, UserError
from m3ae_mini.loader import Samples
from m3ae_mini.model import patchify
from m3ae_mini.objectives import loss_weights
from m3ae_mini.tokenizer import Tokenizer
from test_loader import CAPTIONS, settings, write_pack
from test_readme import parsed
from test_train import SMALL

DIFFS = sorted(path.stem for path in ablate.DIFFS.glob("*.diff"))
CHANGED_LOSS = {"mlp_pixel_decoder": "mim_loss", "transformer_text_head": "mlm_loss",
                "perturbed_input": "mim_loss", "mask_schedule": "mim_loss",
                "xlip": "mim_loss", "semmim": "semmim_loss", "contrast_first": "itc_loss"}


@pytest.fixture(scope="module")
def code_of(tmp_path_factory):
    """A function: a row's name -> the folder of its code."""
    base = tmp_path_factory.mktemp("ablations")

    def find(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ablate, "OUT", base)
            return base / "ablations" / ablate.copy_code(name) / "code"
    return find


@pytest.fixture(scope="module")
def losses(tmp_path_factory, code_of):
    """A function: name -> the losses of the first of two steps of pre-training by that row's code;
    what a diff has trained is fine-tuned, too."""
    base, done = tmp_path_factory.mktemp("losses"), {}
    write_pack(base / "pack", CAPTIONS * 2, {"train": 40, "val": 4, "test": 4})

    def first_losses(name):
        if name in done:
            return done[name]
        flags = [*SMALL, "--data", base / "pack", "--out", base / name, "--steps", 2]
        tuning = [*flags, "--init", base / name, "--out", base / f"{name}-tuned", "--steps", 1]
        scripts = [["train.py", *flags], ["finetune.py", "irtr", *tuning]]
        for script, *arguments in scripts[:1] if name == "unchanged" else scripts:
            command = [sys.executable, code_of(name) / script, *arguments]
            subprocess.run(list(map(str, command)), check=True, cwd=ablate.ROOT,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
        lines = [json.loads(line) for line in open(base / name / "metrics.jsonl")]
        lines = [line for line in lines if line["split"] == "train"]
        assert [line["step"] for line in lines] == [1, 2]
        done[name] = {key: value for key, value in lines[0].items() if key.endswith("loss")}
        return done[name]
    return first_losses


@pytest.mark.parametrize("name", DIFFS)
def test_a_diff_is_small_and_of_one_file(name):
    lines = (ablate.DIFFS / f"{name}.diff").read_text().splitlines()
    assert lines[0] and not lines[0].startswith("diff"), "its first line says what it changes"
    files = [line for line in lines if line.startswith("+++ ")]
    assert len(files) == 1 and files[0].startswith(("+++ b/m3ae_mini/", "+++ b/train.py"))
    added = [line for line in lines if line[0:1] == "+" and not line.startswith("+++ ")]
    removed = [line for line in lines if line[0:1] == "-" and not line.startswith("--- ")]
    assert len(added) + len(removed) <= 40
    assert max(map(len, added)) <= 101


@pytest.mark.parametrize("name", DIFFS)
def test_a_diff_applies(name, code_of):
    assert (code_of(name) / "train.py").is_file()


SLOW = ("mask_schedule", "mlp_pixel_decoder", "transformer_text_head")


@pytest.mark.parametrize("name", DIFFS)
def test_a_diff_applies_trains_and_changes_its_loss(name, losses, request):
    if name in SLOW and not request.config.getoption("--long"):
        pytest.skip("the older diffs train with --long")
    before, after = losses("unchanged"), losses(name)
    assert all(value is not None for value in after.values())          # null: it was not finite
    loss = CHANGED_LOSS.get(name)
    assert before.get(loss) != after[loss] if loss else before != after


def module_of(name, code_of, file):
    """A file of the project as a row has it, beside the other files as they are."""
    path, package = code_of(name) / file, ".".join(Path(file).parts[:-1])
    spec = importlib.util.spec_from_file_location(f"{package}.{path.stem}_{name}".lstrip("."), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def objectives_of(name, code_of):
    return module_of(name, code_of, "m3ae_mini/objectives.py")


@pytest.mark.parametrize("name, mixes", [("unchanged", True), ("mlp_pixel_decoder", False)])
def test_what_reaches_a_hidden_patch(name, mixes, code_of, small_config):
    """A Transformer brings it the visible patches; an MLP only the class token."""
    torch.manual_seed(0)
    mim = objectives_of(name, code_of).M3AE(small_config()).objectives["mim"]
    visible, ids_restore = torch.randn(1, 5, 64), torch.randperm(16)[None]     # 4 of 16 are visible
    hidden = ids_restore[0] >= 4
    for token, reaches in (0, True), (2, mixes):
        changed = visible.clone()
        changed[:, token] += 1
        gap = mim.decode(visible, ids_restore) - mim.decode(changed, ids_restore)
        gap = gap.abs().amax(-1)[0, hidden]
        assert (gap > 1e-6).all() if reaches else (gap == 0).all()


@pytest.mark.parametrize("name, mixes", [("unchanged", False), ("transformer_text_head", True)])
def test_what_reaches_a_masked_word(name, mixes, code_of, small_config, random_batch):
    """After the fusion an MLP reads its own token alone, a Transformer the whole text."""
    cfg = small_config()
    torch.manual_seed(0)
    mlm = objectives_of(name, code_of).M3AE(cfg).eval().objectives["mlm"]
    batch, masked = random_batch(cfg), torch.zeros(4, 12, dtype=torch.bool)
    masked[:, 1] = True
    batch |= {"mlm_labels": torch.where(masked, batch["text_ids"], -100)}

    text, logits = torch.randn(4, 12, 64), []
    for noise in 0, 1:
        text[:, 2] += noise * torch.randn(64)
        backbone = SimpleNamespace(fuse=lambda text, *_, **limits: (text, None))
        logits.append(mlm(backbone, batch, text, None)["mlm_logits"])
    assert torch.equal(*logits) != mixes


def test_the_target_is_the_image_before_it_is_perturbed(code_of, small_config, random_batch):
    cfg = small_config()
    torch.manual_seed(0)
    model = objectives_of("perturbed_input", code_of).M3AE(cfg)
    mim, encode, batch, seen = model.objectives["mim"], model.encode_visible, random_batch(cfg), []
    model.encode_visible = lambda image, noise: seen.append(image) or encode(image, noise)
    for training in True, False:
        model.train(training)
        text = model.encode_text(batch["text_ids"], batch["text_mask"])
        out = mim(model, batch, text)
        error = (out["mim_pred"] - mim.target(batch["image"], cfg)).square().mean(-1)
        assert torch.isclose(out["mim_loss"], error[out["mim_hidden"] == 1].mean())
        assert torch.equal(seen[-1], batch["image"]) != training


# ------------------------------------------------------------------- diffs after neighbouring papers

NEIGHBOURS = {"xlip": "2407.19546", "semmim": "2403.00249", "contrast_first": "2408.02245",
              "perturbed_input": "2602.17689"}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_neighbour_says_whose_idea_it_is_and_what_is_ours(name):
    head = (ablate.DIFFS / f"{name}.diff").read_text().partition("diff --git")[0]
    for words in NEIGHBOURS[name], "not a reproduction", "\nOurs":
        assert words in head
    assert len(ablate.what(name)) < 100


def test_xlip_hides_what_answers_to_the_words(code_of):
    """Two words, padding behind them; patch 2 answers to both, 0 and 1 are alike."""
    hide = module_of("xlip", code_of, "train.py").hide_responsive
    text = torch.tensor([[[0.0, 8.0, 4.0], [0.0, 4.0, 8.0], [9.0, 0.0, 0.0]]])    # (1, T, D)
    patches = torch.tensor([[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.5, 0.0]]])
    model = SimpleNamespace(
        encode_text=lambda ids, mask: text,
        encode_image=lambda image: torch.cat([100 + patches[:, :1], patches], dim=1))
    batch = {"text_ids": None, "text_mask": torch.tensor([[1, 1, 0]]), "image": None,
             "mim_noise": torch.tensor([[0.9, 0.1, 0.5, 0.2]])}
    noise = hide(model, batch)["mim_noise"]
    assert noise.argsort().tolist() == [[1, 0, 3, 2]]      # the noise decides between 0 and 1
    assert torch.isclose(noise.sum(), torch.tensor(2.0), atol=1e-4)    # each word gives 1
    tuning = {"text_ids": None, "text_mask": None, "image": None}
    assert hide(model, tuning) is tuning


@pytest.mark.parametrize("whole_word", [True, False])
def test_xlip_masks_names_of_findings_first(whole_word, code_of, tmp_path):
    module = module_of("xlip", code_of, "train.py")
    captions = [phantoms.caption(phantoms.make_scene(0, number)) for number in range(60)]
    pack, _ = write_pack(tmp_path / "pack", captions, {"train": 60})
    tokenizer = Tokenizer.train(captions * 9, 600)
    cfg, train_cfg = settings(tokenizer, mlm_ratio=0.3, whole_word=whole_word)
    names = [*phantoms.SYNONYMS.values(), *sum(phantoms.FINDINGS.values(), ()),
             *(word for pair in phantoms.PLACES.values() for word in pair)]
    entities = set(" ".join(names).split())

    def masked_words(samples_of):
        samples = samples_of([pack], "train", tokenizer, cfg, train_cfg)
        images = np.empty((60, 3, 16, 16), np.uint8)
        labels = samples.batch(np.arange(60), 0, 0, 0, images)["mlm_labels"]
        return [[word.strip() for word in tokenizer.words(row[row != -100])] for row in labels]

    masked, plain = masked_words(module.EntitySamples), masked_words(Samples)
    assert masked_words(module.EntitySamples) == masked
    for words, row, caption in zip(masked, plain, captions):
        assert len(words) == len(row)
        known = [word for word in re.findall(r"\w+", caption.lower()) if word in entities]
        assert sum(word in entities for word in words) == min(len(words), len(known))
    share = [sum(word in entities for words in part for word in words) / sum(map(len, part))
             for part in (plain, masked)]
    assert share[0] < 0.7 and share[1] > 0.9


def test_xlip_hides_in_training_and_validates_with_random_masks(code_of, tmp_path, monkeypatch):
    module = module_of("xlip", code_of, "train.py")
    write_pack(tmp_path / "pack", CAPTIONS, {"train": 16, "val": 8})
    encode, train_all, seen = M3AE.encode_visible, module.fit, []

    def encode_visible(self, image, noise):
        if noise.device.type != "meta":                                # the dry run's
            seen.append((self.training, noise.mean().item()))
        return encode(self, image, noise)

    def fit(model, net, optimizer, scaler, train, *more):
        assert isinstance(train, module.EntitySamples)
        return train_all(model, net, optimizer, scaler, train, *more)

    monkeypatch.setattr(module, "fit", fit)
    monkeypatch.setattr(M3AE, "encode_visible", encode_visible)
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--steps", "1",
                                      "--data", str(tmp_path / "pack"), "--out", str(tmp_path / "x")])
    module.main()
    assert [training for training, _ in seen].count(True) == 2         # micro-batches
    for training, mean in seen:
        # A caption has 10 to 18 tokens here, whose responses are shared by 16 patches.
        assert 0.6 < mean < 1.2 if training else 0.4 < mean < 0.6
    log = (tmp_path / "x" / "metrics.jsonl").read_text()
    assert '"itc_loss"' in log.splitlines()[0]


def test_semmim_restores_encodings_of_the_whole_image(code_of, small_config, random_batch):
    """The loss, written out; the patches most like the text are the hidden ones."""
    cfg = small_config()
    torch.manual_seed(0)
    model = objectives_of("semmim", code_of).M3AE(cfg).eval()
    assert list(model.objectives) == ["mlm", "semmim", "itm"]
    semmim, batch = model.objectives["semmim"], random_batch(cfg)
    for parameter in semmim.momentum_vit.pos_embed, semmim.momentum_vit.norm_post.weight:
        torch.nn.init.normal_(parameter)                               # now it is not the ViT
    text = model.encode_text(batch["text_ids"], batch["text_mask"])
    image = model.encode_image(batch["image"])
    likeness = torch.einsum("bld,bd->bl", image[:, 1:], text[:, 0])
    order = likeness.argsort(dim=1)                                    # (B, L)

    target = semmim.momentum_vit(patchify(batch["image"], cfg.patch_size))[:, 1:]
    var, mean = torch.var_mean(target, dim=2, keepdim=True, correction=0)
    target = (target - mean) / (var + 1e-5).sqrt()                     # (B, L, W)
    visible, ids_restore = model.encode_visible(batch["image"], likeness)
    _, visible = model.fuse(text, visible, batch["text_mask"], depth=cfg.mim_layer)
    pred = semmim.decode(visible, ids_restore)                         # (B, L, W)
    error = (pred - target).square().mean(-1).gather(1, order[:, 4:])  # 4 of 16 are visible
    out = model(batch)
    assert torch.isclose(out["semmim_loss"], error.mean())
    total = out["mlm_loss"] + out["semmim_loss"] + out["itm_loss"]
    assert torch.isclose(out["loss"], total)


def test_semmim_moves_its_copy_once_a_step_of_training(code_of, small_config, random_batch):
    cfg = small_config()
    torch.manual_seed(0)
    model = objectives_of("semmim", code_of).M3AE(cfg)
    copy = model.objectives["semmim"].momentum_vit
    for mean, new in zip(copy.parameters(), model.vit.parameters(), strict=True):
        assert torch.equal(mean, new) and not mean.requires_grad
    with torch.no_grad():
        model.vit.cls_token += 1
    before = copy.cls_token.clone()
    model.eval()(random_batch(cfg))
    assert torch.equal(copy.cls_token, before)
    for _ in range(2):                                 # micro-batches of one step: once is enough
        model.train()(random_batch(cfg))["loss"].backward()
        assert torch.allclose(copy.cls_token, before + 0.01, atol=1e-6)
    assert all(parameter.grad is None for parameter in copy.parameters())
    names = {f"momentum_vit.{name}" for name in model.vit.state_dict()} | {"seen"}
    assert names <= model.objectives["semmim"].state_dict().keys()      # for a run that continues


def test_the_contrast_comes_first(code_of, small_config):
    """Of 9 steps the first three train it alone; fine-tuning keeps its weights."""
    module, train_cfg = module_of("contrast_first", code_of, "train.py"), TrainConfig(steps=9)
    cfg = small_config(itc=2.0, mim=0.5)
    for step in range(9):
        weights = module.settings_at(step, cfg, train_cfg).loss_weights
        assert weights == ({"mlm": 0, "mim": 0, "itm": 0, "itc": 2} if step < 3 else
                           {"mlm": 1, "mim": 0.5, "itm": 1, "itc": 0})
    for task in "vqa", "cls", "irtr":
        cfg = small_config(task=task, itc=1.0)
        assert module.settings_at(0, cfg, train_cfg).loss_weights == loss_weights(cfg)


def test_no_contrast_chooses_the_best_of_contrast_first(code_of, tmp_path, monkeypatch):
    write_pack(tmp_path / "pack", CAPTIONS, {"train": 16, "val": 8})
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--steps", "3", "--eval_every", "1",
                                      "--data", str(tmp_path / "pack"), "--out", str(tmp_path / "x")])
    module_of("contrast_first", code_of, "train.py").main()
    lines = list(map(json.loads, open(tmp_path / "x" / "metrics.jsonl")))
    trained = [line for line in lines if line["split"] == "train"]
    assert trained[0]["loss"] == pytest.approx(trained[0]["itc_loss"], rel=1e-5)
    for line in trained[1:]:
        total = line["mlm_loss"] + line["mim_loss"] + line["itm_loss"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    for line in lines:
        if line["split"] == "val":
            score = line["itm_acc"] + line["mlm_acc"] - line["mim_loss"]
            assert line["score"] == pytest.approx(score, rel=1e-5)


# ------------------------------------------------------------------------------------------- table

def test_the_table_holds_what_has_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(ablate, "ROOT", tmp_path)
    for name, gains in ("unchanged", (0.125, 0.25)), ("no_mlm", (None,)):
        for seed, gain in enumerate(gains):
            for which, run in ablate.runs(name, seed).items():
                metrics = {"acc": 0.5, "low_acc": 0.48, "high_acc": 0.52}
                if which == "pretrain":
                    metrics = {"mlm_gain_hard": gain} if gain else {}
                (tmp_path / run.out).mkdir(parents=True)
                line = json.dumps({"step": 9, "split": "test", **metrics})
                (tmp_path / run.out / "metrics.jsonl").write_text(line + "\n")
    for row in "no_mlm", "mine":       # the second has only begun
        (tmp_path / ablate.OUT / "ablations" / row).mkdir(exist_ok=True)
        (tmp_path / ablate.OUT / "ablations" / row / "applied.diff").write_text("")

    ablate.write_tables()
    text = (tmp_path / ablate.OUT / "ablations.md").read_text()
    assert "| the default (`unchanged`) | 2 | 18.8 (12.5–25.0) |" in text
    assert "| words are not restored (`no_mlm`) | 1 | – | – | 50.0 (50.0–50.0) |" in text
    assert text.endswith("| half of a seed's 95 % interval | | – | – | ±2.0 | ±2.0 |\n")
    with Image.open(tmp_path / ablate.OUT / "ablations.png") as image:
        assert ablate.GREEN in {colour for _, colour in image.getcolors(1 << 16)}


def test_bars_of_runs_that_learned_nothing(tmp_path):
    ablate.bars({"unchanged": {"questions": [[0.0] * 3]}, "no_mim": {"classes": [[0.0] * 3]}},
                tmp_path / "bars.png")
    assert Image.open(tmp_path / "bars.png").size[0] > 800


@pytest.mark.parametrize("name", ablate.FLAGS)
def test_a_row_of_flags_changes_a_setting(name, monkeypatch):
    default, changed = (
        parsed(train, ablate.runs(row, 3)["pretrain"].command.split()[1:], monkeypatch)
        for row in ("unchanged", name))
    assert "--seed 3" in ablate.runs(name, 3)["vqa"].command
    assert (default == changed) == (name == "unchanged")


def test_a_diff_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "OUT", tmp_path)
    with pytest.raises(UserError, match="no .*nothing.diff: give a file, or one of unchanged, no_m"):
        ablate.copy_code("nothing")

    (tmp_path / "no_mim.diff").touch()
    with pytest.raises(UserError, match="no_mim is already a row of flags: rename your file"):
        ablate.copy_code(str(tmp_path / "no_mim.diff"))

    mine = tmp_path / "mine.diff"
    mine.write_text("--- a/m3ae_mini/model.py\n+++ b/m3ae_mini/model.py\n"
                    "@@ -1 +1 @@\n-no such line\n+new\n")
    with pytest.raises(UserError, match="mine.diff does not apply to this code"):
        ablate.copy_code(str(mine))

    mine.write_text("--- /dev/null\n+++ b/m3ae_mini/new.py\n@@ -0,0 +1 @@\n+1\n")
    assert ablate.copy_code(str(mine)) == ablate.copy_code(str(mine)) == "mine"
    assert ablate.what("mine") == "mine"
    run = ablate.runs("mine", 0)["vqa"]
    assert (run.code / "m3ae_mini" / "new.py").read_text() == "1\n"
    assert (run.code / "finetune.py").is_file()
    mine.write_text("what it changes\n" + mine.read_text().replace("+1\n", "+2\n"))
    with pytest.raises(UserError, match="mine.diff has changed since its row was begun"):
        ablate.copy_code(str(mine))
