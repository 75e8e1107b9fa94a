"""What holds for any model. After an edit of one file: `python -m pytest -m invariants tests`.

The losses are those that the model and the log name. An edit that needs flags of train.py gives
them: `--flags "--mlm 0 --mim 0 --itm 0"`."""
import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import finetune
import train
from m3ae_mini import M3AE, weights
from m3ae_mini.config import UserError
from test_finetune import COUNTS, labelled_rows, packed
from test_train import SMALL, logged

pytestmark = pytest.mark.invariants

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("vqa", "cls", "irtr")


# ------------------------------------------------------------------------------------------ losses

@pytest.fixture
def batch_of(random_batch):
    """A function: cfg -> a random batch, with all that the loader makes."""
    def make(cfg):
        batch = random_batch(cfg)
        other = torch.arange(len(batch["image"])).roll(1)             # (B,)
        positions = (batch["mlm_labels"].flatten() != -100).nonzero()[:, 0]  # (M,)
        return batch | {"mlm_positions": positions, "random_negative_index": other,
                        "hard_negative_index": other}
    return make


def check_finite(model: M3AE, batch: dict, where: str) -> None:
    """Fail naming the losses that are not finite, or the parameters whose gradient is not."""
    model.zero_grad()
    out = model(batch)
    bad = [name for name, value in out.items() if name.endswith("loss") and not value.isfinite()]
    assert not bad, f"{', '.join(bad)} of {model.cfg.task} is not finite {where}"
    out["loss"].backward()
    bad = [name for name, parameter in model.named_parameters()
           if parameter.grad is not None and not parameter.grad.isfinite().all()]
    assert not bad, f"the gradient of {', '.join(bad)} is not finite {where}"


@pytest.mark.parametrize("task", ["pretrain", *TASKS])
def test_losses_are_finite(task, small_config, batch_of):
    torch.manual_seed(0)
    model = M3AE(small_config(task=task))
    check_finite(model, batch_of(model.cfg), "on a random batch")


@pytest.mark.parametrize("task", ["pretrain", *TASKS])
def test_losses_are_finite_where_there_is_little_to_learn(task, small_config, batch_of):
    torch.manual_seed(0)
    model = M3AE(small_config(task=task))
    batch = batch_of(model.cfg)
    nothing_masked = {"mlm_ids": batch["text_ids"],
                      "mlm_labels": torch.full_like(batch["mlm_labels"], -100),
                      "mlm_positions": torch.zeros(0, dtype=torch.long)}
    check_finite(model, batch | nothing_masked, "where nothing is masked")

    own = torch.arange(len(batch["image"]))                           # (B,)
    no_negatives = {"itm_index": own, "random_negative_index": own, "hard_negative_index": own,
                    "false_text_index": own[:, None].expand(-1, 2)}
    check_finite(model, batch | no_negatives, "where no row has a negative")


# ------------------------------------------------------------------------------------------ fusion

@pytest.fixture
def streams(small_config, random_batch):
    """A model in eval mode, and what its fusion reads: text (4, T, D), image (4, N, D), mask."""
    torch.manual_seed(0)
    cfg = small_config()
    model = M3AE(cfg).eval()
    mask = random_batch(cfg)["text_mask"]                             # (4, T)
    assert 0 < mask.sum() < mask.numel()
    num_tokens = 1 + (cfg.image_size // cfg.patch_size) ** 2
    text = torch.randn(*mask.shape, cfg.fusion_width)
    return model, text, torch.randn(len(mask), num_tokens, cfg.fusion_width), mask


def fuse(model: M3AE, text: Tensor, image: Tensor, mask: Tensor, **limits) -> list[Tensor]:
    """Both streams, padding left out: [the real text tokens (R, D), image (B, N, D)]"""
    torch.manual_seed(1)                                              # dropout, where it is on
    with torch.no_grad():
        new_text, new_image = model.fuse(text, image, mask, **limits)
    return [new_text[mask.expand(len(new_text), -1).bool()], new_image]


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Are both streams the same to rounding?"""
    return all(a.shape == b.shape and (a - b).abs().max() <= 1e-4 * max(1, b.abs().max())
               for a, b in zip(found, wanted))


def test_the_fusion_returns_both_streams_in_the_same_shapes(streams):
    model, text, image, mask = streams
    new_text, new_image = model.fuse(text, image, mask)
    assert (new_text.shape, new_image.shape) == (text.shape, image.shape), (
        f"the fusion returns {tuple(new_text.shape)} and {tuple(new_image.shape)} for a text "
        f"{tuple(text.shape)} and an image {tuple(image.shape)}")


def test_rows_do_not_change_each_other(streams):
    model, text, image, mask = streams
    new_text, new_image = model.fuse(text, image, mask)
    for row in range(len(text)):
        rows = slice(row, row + 1)
        together = [new_text[rows][mask[rows].bool()], new_image[rows]]
        alone = fuse(model, text[rows], image[rows], mask[rows])
        assert equal(together, alone), ("the fusion mixes rows of the batch: a row comes out "
                                        "differently alone and among others")

    # In training, too, where layers may take means over the batch: change all rows but the first.
    model.train()
    first = fuse(model, text, image, mask)
    new_text, new_image = text.clone(), image.clone()
    new_text[1:] += 1
    new_image[1:] -= 1
    other = fuse(model, new_text, new_image, mask)
    count = int(mask[0].sum())
    assert equal([first[0][:count], first[1][:1]], [other[0][:count], other[1][:1]]), (
        "the fusion mixes rows of the batch in training: one row changes with the others")


def test_padding_changes_no_real_token(streams):
    model, text, image, mask = streams
    garbage = torch.where(mask[..., None].bool(), text, 9 * torch.randn_like(text))
    assert equal(fuse(model, garbage, image, mask), fuse(model, text, image, mask)), (
        "the fusion sees padding: what stands where text_mask is 0 changes the real tokens")


@pytest.mark.parametrize("what", ["one image and many texts", "one text and many images"])
def test_one_beside_many_is_that_one_repeated(what, streams):
    model, text, image, mask = streams
    if what == "one image and many texts":
        image, repeated = image[:1], (text, image[:1].expand_as(image), mask)
    else:
        repeated = text[:1].expand_as(text), image, mask[:1].expand_as(mask)
        text, mask = text[:1], mask[:1]
    try:
        found = fuse(model, text, image, mask)
    except Exception as error:
        pytest.fail(f"the fusion fails with {what}: {error}")
    assert equal(found, fuse(model, *repeated)), (
        f"with {what} the fusion returns something else than with that one repeated")


def test_limits_only_save_work(streams):
    model, text, image, mask = streams
    whole_text, whole_image = model.fuse(text, image, mask)
    few_text, few_image = model.fuse(text, image, mask, num_queries=1)
    assert equal([few_text[:, :1], few_image[:, :1]], [whole_text[:, :1], whole_image[:, :1]]), (
        "num_queries=1 changes the fusion's first tokens")
    text_alone, _ = model.fuse(text, image, mask, streams=("text",))
    _, image_alone = model.fuse(text, image, mask, streams=("image",))
    assert equal([text_alone, image_alone], [whole_text, whole_image]), (
        "streams=(...) changes the stream that it names")


# -------------------------------------------------------------------------------------------- runs

def started(script, *flags) -> str:
    """Call the script's main() as a command line would -> what it printed"""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
        script.main()
    return printed.getvalue()


def read_losses(out: Path, split: str) -> list[dict]:
    """Each line of the log, its losses alone."""
    return [{name: value for name, value in line.items() if name.endswith("loss")}
            for line in logged(out, split)]


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """{task: folder of a pack}"""
    folder = tmp_path_factory.mktemp("packs")
    for task in ("pretrain", *TASKS):
        packed(labelled_rows(folder, task), folder / task, task, folder)
    return {task: folder / task for task in ("pretrain", *TASKS)}


@pytest.fixture(scope="module")
def flags(packs, request):
    """The flags of a short pre-training."""
    return [*SMALL, "--data", packs["pretrain"], "--steps", 4, "--eval_every", 1,
            "--save_every", 2, *request.config.getoption("--flags").split()]


@pytest.fixture(scope="module")
def pretrained(flags, tmp_path_factory):
    """The folder of a short pre-training, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "pretrain"
    return out, started(train, *flags, "--out", out)


def test_every_loss_is_logged_validated_and_reported(pretrained):
    out, printed = pretrained
    cfg, _ = weights.load_m3ae(out)
    names = {f"{name}_loss" for name in M3AE(cfg).objectives}
    assert [line["step"] for line in logged(out)] == [1, 2, 3, 4]
    for split, count in ("train", 4), ("val", 4), ("test", 1):
        lines = read_losses(out, split)
        assert len(lines) == count and all(names <= line.keys() for line in lines), (
            f"a loss of {', '.join(names)} is missing in a {split} line of the log")
        bad = {name for line in lines for name, value in line.items() if value is None}
        assert not bad, f"{', '.join(bad)} was not finite in a {split} line of the log"
    assert f"On {COUNTS['test']} test samples" in printed
    assert (out / "plots" / "curves.png").is_file()


def test_best_is_the_checkpoint_of_the_highest_score(pretrained):
    out, _ = pretrained
    best = max(logged(out, "val"), key=lambda line: line["score"])   # the first of the highest
    assert torch.load(out / "best.pt", weights_only=True)["step"] == best["step"], (
        "best.pt is not the checkpoint of the highest validation score")
    assert logged(out, "test")[0]["step"] == best["step"]


def test_a_resumed_run_ends_in_the_same_bits(pretrained, flags, tmp_path):
    whole, _ = pretrained
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)                 # as a stop after step 2 leaves it
    (parts / "last.pt").unlink()
    (parts / "best.pt").unlink()
    assert torch.load(parts / "prev.pt", weights_only=True)["step"] == 2
    assert "step 2" in started(train, *flags, "--out", parts, "--resume")
    states = [torch.load(out / "last.pt", weights_only=True) for out in (whole, parts)]
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), f"resuming changes {name}"
    assert states[0]["step"] == states[1]["step"] == 4
    for split in "train", "val":
        assert read_losses(whole, split) == read_losses(parts, split), "resuming changes a loss"


def test_two_processes_equal_one(pretrained, flags, tmp_path):
    one, _ = pretrained
    command = [sys.executable, "train.py", *flags, "--out", tmp_path / "two", "--gpus", 2]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for split in "train", "val", "test":
        for a, b in zip(read_losses(one, split), read_losses(tmp_path / "two", split), strict=True):
            for name in a:
                assert a[name] == pytest.approx(b[name], abs=1e-4), (
                    f"two processes and one differ in {name} ({split})")


@pytest.fixture(scope="module")
def tuned(packs, pretrained, tmp_path_factory):
    """A function: task -> the folder of a short fine-tuning, and what it printed."""
    base, done = tmp_path_factory.mktemp("tuned"), {}

    def run(task):
        if task not in done:
            done[task] = base / task, started(
                finetune, task, *SMALL, "--data", packs[task], "--init", pretrained[0],
                "--out", base / task, "--steps", 2, "--eval_every", 1)
        return done[task]
    return run


@pytest.mark.parametrize("task", TASKS)
def test_fine_tuning_trains_and_tests(task, tuned):
    out, printed = tuned(task)
    assert [line["step"] for line in logged(out)] == [1, 2] and len(logged(out, "val")) == 2
    for split in "train", "val", "test":
        bad = {name for line in logged(out, split) for name, value in line.items() if value is None}
        assert not bad, f"{', '.join(bad)} of {task} was not finite in a {split} line of the log"
    test, = logged(out, "test")
    assert 0 <= test.get("acc", test.get("t2i_r10")) <= 1 and f"On {COUNTS['test']} test samples" in printed


@pytest.mark.parametrize("task", ["vqa", "cls"])
def test_prediction_prints_answers_and_a_map_if_there_is_one(task, tuned, packs):
    out, _ = tuned(task)
    image = packs["pretrain"].parent / "0.png"
    *answers, last = started(finetune, task, "--init", out, "--predict", image,
                             "large nodule").splitlines()
    assert answers and all("%" in line for line in answers)
    drawn = list((out / "plots").glob("*-attention.png"))
    assert last == f"attention: {drawn[0]}" if drawn else "no attention_map" in last


def test_zero_shot_retrieval_where_matching_was_learned(packs, pretrained, tmp_path):
    flags = [*SMALL, "--data", packs["irtr"], "--init", pretrained[0], "--out", tmp_path / "zero",
             "--zero_shot"]
    _, state = weights.load_m3ae(pretrained[0])
    if "objectives.itm.fc.weight" not in state:
        with pytest.raises(UserError, match="--zero_shot"):
            started(finetune, "irtr", *flags)
        return
    assert f"On {COUNTS['test']} test samples (step 0)" in started(finetune, "irtr", *flags)
    recalls, = logged(tmp_path / "zero", "test")
    assert all(0 <= recalls[f"{way}_r{k}"] <= 1 for way in ("t2i", "i2t") for k in (1, 5, 10))


def test_export_works_or_is_refused_in_one_sentence(pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["weights.py", "export", str(pretrained[0]),
                                      str(tmp_path / "released.pt")])
    try:
        weights.export()
    except UserError as error:
        assert "can't be exported" in str(error) and "\n" not in str(error)
        assert not (tmp_path / "released.pt").exists()
        return
    _, state = weights.load_m3ae(tmp_path / "released.pt")
    _, own = weights.load_m3ae(pretrained[0])
    assert state.keys() == own.keys() and all(torch.equal(state[name], own[name]) for name in own)
