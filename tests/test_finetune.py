"""finetune.py as users start it: the three tasks, what they leave, resuming, what they refuse."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
import train
from data import Row, prepare
from data.pack import Pack
from data.task_metrics import answer_columns, figure_intervals, figures, read_table
from data import ranking
from m3ae_mini import M3AE, checkpoint
from m3ae_mini.config import UserError
from test_loader import FINDINGS, SIDES, SIZES
from test_train import SMALL, logged

ROOT = Path(__file__).resolve().parents[1]
COUNTS = {"train": 40, "val": 13, "test": 11}


def labelled_rows(folder, task, counts=COUNTS, outside=()):
    """Rows of a task on random images: each image twice, one answer a finding, half of them closed."""
    rng = np.random.default_rng(0)
    splits = [split for split, count in counts.items() for _ in range(count)]
    for n, split in enumerate(splits):
        path = folder / f"{n // 2}.png"
        if not path.exists():
            Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(path)
        finding, side, size = FINDINGS[n % 4], SIDES[n % 2], SIZES[n % len(SIZES)]
        row = Row(split, path, f"{size} {finding} on the {side}, number {n // 3}.")
        if task == "vqa":
            answer = outside[n % len(outside)] if outside and split == "test" else finding
            row = row._replace(text=f"What is seen on the {side}, {n}?", answer=answer, closed=n % 2 == 0)
        yield row._replace(label=finding) if task == "cls" else row


def packed(rows, out, task, root):
    prepare.write_pack(rows, out=out, name="test", task=task, size=16, root=root, workers=1)


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """{task: folder of a pack}, all on the same images."""
    folder = tmp_path_factory.mktemp("packs")
    for task in ("pretrain", "vqa", "cls", "irtr"):
        packed(labelled_rows(folder, task), folder / task, task, folder)
    return {task: folder / task for task in ("pretrain", "vqa", "cls", "irtr")}


@pytest.fixture(scope="module")
def pretrained(packs, tmp_path_factory):
    """The folder of a short pre-training run."""
    out = tmp_path_factory.mktemp("runs") / "pretrain"
    with pytest.MonkeyPatch.context() as patch:
        flags = [*SMALL, "--data", str(packs["pretrain"]), "--out", str(out), "--steps", "2"]
        patch.setattr(sys, "argv", ["train.py", *flags])
        train.main()
    return out


def started(monkeypatch, task, *flags):
    """Call finetune.main() as `python finetune.py task flags` would."""
    monkeypatch.setattr(sys, "argv", ["finetune.py", task, *SMALL, *map(str, flags)])
    finetune.main()


@pytest.mark.parametrize("task", ["vqa", "cls", "irtr"])
def test_a_run_leaves_what_it_promises(packs, pretrained, tmp_path, monkeypatch, capsys, task):
    out = tmp_path / "run"
    started(monkeypatch, task, "--data", packs[task], "--init", pretrained, "--out", out, "--steps", 4,
            "--eval_every", 2)

    val, (test,) = logged(out, "val"), logged(out, "test")
    assert [line["step"] for line in val] == [2, 4] and all(0 <= line["score"] <= 1 for line in val)
    assert test["step"] == max(val, key=lambda line: line["score"])["step"]         # the first of the best
    names = {"vqa": {"acc", "acc_open", "acc_closed", "answer_not_in_list"},
             "cls": {"acc", "macro_f1", "mean_auroc", "recall of nodule", "AUROC of nodule"},
             "irtr": {"t2i_r1", "i2t_r10", "t2i_median_rank"}}[task]
    assert names <= test.keys()
    # Every figure, and its interval, comes from the file alone.
    table = read_table(out / "test_predictions.csv")
    found, ranges = figures(table, task), figure_intervals(table, task)
    other = ("step", "split", "score", "most_frequent_label")
    logged_figures = {name: value for name, value in test.items() if name not in other}
    assert logged_figures == pytest.approx(
        found | {f"low_{name}": low for name, (low, _) in ranges.items()}
        | {f"high_{name}": high for name, (_, high) in ranges.items()}, abs=1e-6)
    assert all(low <= found[name] <= high for name, (low, high) in ranges.items())
    assert (out / "plots" / "confusion.png").exists() == (task == "cls")
    if task != "irtr":                                       # what the most frequent training label gets
        key = {"vqa": "answer", "cls": "label"}[task]
        trained = [line[key] for line in Pack(packs[task]).lines("train")]
        most = max(dict.fromkeys(trained) if task == "vqa" else sorted(set(trained)), key=trained.count)
        assert test["most_frequent_label"] == pytest.approx(np.mean(table["target"] == most))
    card = (out / "card.md").read_text()
    assert card.startswith("# Model card of run\n") and f"- `--init {pretrained}`" in card
    assert f"**{packs[task]}** (test, fingerprint {Pack(packs[task]).fingerprint()})" in card
    assert "- samples: 40 train, 13 val, 11 test" in card
    rows = COUNTS["test"] if task != "irtr" else len(set(table["text"])) + len(set(table["source"]))
    assert len(table["source"]) == rows
    assert set(table["source"]) <= {line["source"] for line in Pack(packs[task]).lines("test")}
    state = torch.load(out / "best.pt", weights_only=True)["model"]
    assert any(name.startswith(f"objectives.{task}") for name in state)
    printed = capsys.readouterr().out
    assert f"--init {pretrained}" in printed and f"On {COUNTS['test']} test samples" in printed


@pytest.mark.release
def test_it_learns_and_starts_from_the_weights_of_init(packs, pretrained, tmp_path, monkeypatch):
    """The classes are in the texts, so a few steps suffice; and the backbone is the pre-trained one."""
    begun, fit = [], train.fit
    monkeypatch.setattr(finetune, "fit", lambda model, *rest: begun.append(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}) or fit(model, *rest))
    started(monkeypatch, "cls", "--data", packs["cls"], "--init", pretrained, "--out", tmp_path / "run",
            "--steps", 120, "--lr", 3e-3, "--head_lr_mult", 1, "--fusion_lr_mult", 1, "--dropout", 0,
            "--attn_dropout", 0)
    backbone = torch.load(pretrained / "best.pt", weights_only=True)["model"]
    shared = begun[0].keys() & backbone.keys()
    assert "fusion.text_layers.1.cross.q.weight" in shared and "vit.pos_embed" in shared
    assert all(torch.equal(begun[0][name], backbone[name]) for name in shared)
    assert logged(tmp_path / "run", "test")[0]["acc"] > 0.9


@pytest.mark.parametrize("task", ["vqa", "irtr"])
def test_resume_equals_a_run_that_never_stopped(packs, pretrained, tmp_path, monkeypatch, task):
    flags = ["--data", packs[task], "--init", pretrained, "--save_every", 2, "--min_crop_area", 0.9]
    started(monkeypatch, task, *flags, "--out", tmp_path / "whole", "--steps", 4)
    with monkeypatch.context() as patch:                     # the second checkpoint is never written
        save = checkpoint.save_checkpoint
        patch.setattr(checkpoint, "save_checkpoint", lambda out, model, optimizer, scaler, step, best: save(
            out, model, optimizer, scaler, step, best) if step < 4 else exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            started(patch, task, *flags, "--out", tmp_path / "parts", "--steps", 4)
    started(monkeypatch, task, *flags, "--out", tmp_path / "parts", "--steps", 4, "--resume")

    whole, parts = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
                    for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    whole, parts = ([line["loss"] for line in logged(tmp_path / name)] for name in ("whole", "parts"))
    assert whole == parts


def test_two_processes_equal_one(packs, pretrained, tmp_path):
    """The same losses and the same metrics of every task."""
    for task in ("vqa", "irtr"):
        flags = ["--data", packs[task], "--init", pretrained, "--steps", 3]
        for gpus, out in (0, "one"), (2, "two"):
            flags += ["--gpus", gpus, "--out", tmp_path / task / out]
            command = [sys.executable, "finetune.py", task, *SMALL, *flags]
            done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        for split in ("train", "val", "test"):
            one, two = (logged(tmp_path / task / out, split) for out in ("one", "two"))
            for a, b in zip(one, two, strict=True):
                for name in a.keys() - {"samples_per_s", "norm"}:
                    assert a[name] == pytest.approx(b[name], abs=1e-5), (task, split, name)


def test_blind_sees_nothing(packs, pretrained, tmp_path, monkeypatch):
    """The model sees one image alone, the mean of the training images."""
    seen = []
    forward = M3AE.encode_image
    monkeypatch.setattr(M3AE, "encode_image", lambda self, image, *rest: (
        seen.append(image) if not image.is_meta else None) or forward(self, image, *rest))
    started(monkeypatch, "vqa", "--data", packs["vqa"], "--init", pretrained, "--out", tmp_path / "blind",
            "--steps", 2, "--blind")
    assert len(seen) >= 4 and all(torch.equal(image, seen[0][:1].expand_as(image)) for image in seen)


def test_each_task_learns_its_own_labels(pretrained, tmp_path, monkeypatch):
    """A pack of your own table may hold answers and labels: vqa learns the answers, cls the labels."""
    folder = tmp_path / "images"
    folder.mkdir()
    rows = [row._replace(answer="yes#no", closed=True) for row in labelled_rows(folder, "cls")]
    packed(rows, tmp_path / "pack", "cls", folder)
    for task, labels in ("cls", sorted(FINDINGS)), ("vqa", ["yes", "no"]):
        out = tmp_path / task
        flags = "--data", tmp_path / "pack", "--init", pretrained, "--out", out, "--steps", 1
        started(monkeypatch, task, *flags)
        assert json.loads((out / "config.json").read_text())["data"]["labels"] == labels


def test_retrieval_scores_are_not_rounded_to_ties(packs, pretrained, tmp_path, monkeypatch):
    """In bf16 too: bf16's 8 bits would make many scores equal, and a tie with a wrong candidate is no hit."""
    caught, ranks = [], ranking.first_right
    monkeypatch.setattr(ranking, "first_right", lambda *args: caught.append(args[0]) or ranks(*args))
    started(monkeypatch, "irtr", "--data", packs["irtr"], "--init", pretrained, "--out", tmp_path / "zero",
            "--zero_shot", "--dtype", "bfloat16")
    assert (caught[0] != caught[0].bfloat16().float()).float().mean() > 0.9


def test_zero_shot_ranks_by_the_matching_head(packs, pretrained, tmp_path, monkeypatch):
    started(monkeypatch, "irtr", "--data", packs["irtr"], "--init", pretrained, "--out", tmp_path / "zero",
            "--zero_shot")
    (line,) = logged(tmp_path / "zero", "test")
    assert line["step"] == 0 and 0 <= line["t2i_r5"] <= line["t2i_r10"] <= 1
    started(monkeypatch, "cls", "--data", packs["cls"], "--init", pretrained, "--out", tmp_path / "cls",
            "--steps", 1, "--test_samples", 0)
    assert not logged(tmp_path / "cls", "test")             # no report was asked for
    for unmatched in "none", tmp_path / "cls":
        tokenizer = ["--tokenizer", pretrained] * (unmatched == "none")
        with pytest.raises(UserError, match="--zero_shot is for irtr, with an --init that has the head"):
            started(monkeypatch, "irtr", "--zero_shot", "--data", packs["irtr"], "--init", unmatched,
                    "--out", tmp_path / "x", *tokenizer)


@pytest.fixture(scope="module")
def contrasted(packs, tmp_path_factory):
    """The folder of a short pre-training with the contrast."""
    out = tmp_path_factory.mktemp("runs") / "contrasted"
    with pytest.MonkeyPatch.context() as patch:
        flags = [*SMALL, "--data", packs["pretrain"], "--out", out, "--steps", 2, "--itc", 1]
        patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        train.main()
    return out


def recalls(out):
    """The recalls of the report, {t2i_r1: …, i2t_r10: …}."""
    (line,) = logged(out, "test")
    found = {name: line[name] for name in line if name.startswith(("t2i_r", "i2t_r"))}
    assert len(found) == 6 and all(0 <= value <= 1 for value in found.values())
    return found


def test_retrieval_keeps_and_trains_the_contrast(packs, contrasted, tmp_path, monkeypatch):
    begun, fit = [], train.fit
    monkeypatch.setattr(finetune, "fit", lambda model, *rest: begun.append(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}) or fit(model, *rest))
    flags = ["--data", packs["irtr"], "--init", contrasted, "--steps", 2]
    started(monkeypatch, "irtr", *flags, "--out", tmp_path / "itc", "--rank", "itc")
    learned, tuned = (torch.load(out / "best.pt", weights_only=True)["model"]
                      for out in (contrasted, tmp_path / "itc"))
    names = [name for name in learned if name.startswith("objectives.itc.")]
    assert len(names) == 3
    for name in names:
        assert torch.equal(begun[0][name], learned[name])
        assert not torch.equal(tuned[name], learned[name])
    assert all(line["itc_loss"] > 0 and line["irtr_loss"] > 0 for line in logged(tmp_path / "itc"))
    recalls(tmp_path / "itc")

    # The best candidates ranked again by the fusion; and by the fusion alone.
    started(monkeypatch, "irtr", *flags, "--out", tmp_path / "again", "--rank", "itc", "--rerank", 3)
    recalls(tmp_path / "again")
    started(monkeypatch, "irtr", *flags, "--out", tmp_path / "match")
    recalls(tmp_path / "match")
    assert "itc_loss" in logged(tmp_path / "match")[0]


def test_ranking_all_candidates_again_equals_matching(packs, contrasted, tmp_path, monkeypatch):
    flags = ["--data", packs["irtr"], "--init", contrasted, "--zero_shot"]
    started(monkeypatch, "irtr", *flags, "--out", tmp_path / "match")
    started(monkeypatch, "irtr", *flags, "--out", tmp_path / "itc", "--rank", "itc", "--rerank", 99)
    assert recalls(tmp_path / "itc") == pytest.approx(recalls(tmp_path / "match"))

    command = [sys.executable, "finetune.py", "irtr", *SMALL, *flags, "--out", tmp_path / "two",
               "--rank", "itc", "--rerank", 99, "--gpus", 2]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert recalls(tmp_path / "two") == pytest.approx(recalls(tmp_path / "itc"))


def test_ranking_by_a_contrast_that_was_not_learned_is_refused(packs, pretrained, tmp_path,
                                                               monkeypatch):
    flags = ["--data", packs["irtr"], "--init", pretrained, "--out", tmp_path / "never"]
    for more, words in (
            (["--rank", "itc"], "--rank itc needs an ITC head: give an --init trained with --itc"),
            (["--rank", "itc", "--zero_shot"], "--zero_shot is for irtr, with an --init that has"),
            (["--rank", "cosine"], "--rank cosine: use match or itc"),
            (["--rerank", 3], "--rerank needs --rank itc")):
        with pytest.raises(UserError, match=words):
            started(monkeypatch, "irtr", *flags, *more)
    # --itc 1 trains it from random weights.
    started(monkeypatch, "irtr", "--data", packs["irtr"], "--init", pretrained, "--steps", 1,
            "--out", tmp_path / "new", "--rank", "itc", "--itc", 1)
    recalls(tmp_path / "new")


def test_retrieval_scores_every_pair_as_one_by_one(packs, pretrained, tmp_path, monkeypatch):
    """Encoding each once gives the scores that each pair gets by itself; shared captions are all right."""
    caught = []
    ranks = ranking.first_right
    monkeypatch.setattr(ranking, "first_right", lambda *args: caught.append(args) or ranks(*args))
    models, report = [], finetune.report
    monkeypatch.setattr(finetune, "report", lambda model, *rest, **step: models.append(model) or report(
        model, *rest, **step))
    monkeypatch.setattr(ranking, "PAIRS", 3)                # several blocks
    started(monkeypatch, "irtr", "--data", packs["irtr"], "--init", pretrained, "--out", tmp_path / "zero",
            "--zero_shot")
    (scores, right), (turned, _) = caught
    assert torch.equal(scores.T, turned)

    lines = list(Pack(packs["irtr"]).lines("test"))
    texts = list(dict.fromkeys(line["text"] for line in lines))
    shown = list(dict.fromkeys(line["image"] for line in lines))
    assert scores.shape == (len(texts), len(shown)) == right.shape
    pairs = {(line["text"], line["image"]) for line in lines}
    assert right.sum() == len(pairs)
    assert all(right[texts.index(text), shown.index(image)] for text, image in pairs)

    from m3ae_mini.loader import normalise
    from m3ae_mini.tokenizer import Tokenizer
    tokenizer, pack, model = Tokenizer.load(tmp_path / "zero"), Pack(packs["irtr"]), models[0].eval()
    for t, p in (0, 0), (3, 4), (len(texts) - 1, 1):
        pixels = np.empty((1, 3, 16, 16), dtype=np.uint8)
        pack.read_image(shown[p], pixels[0])
        (ids, _), = tokenizer.encode([texts[t]])
        ids = torch.tensor([[tokenizer.cls_id, *ids[:model.cfg.max_text_len - 2], tokenizer.sep_id]])
        with torch.no_grad():
            mask, image = torch.ones_like(ids), normalise(torch.from_numpy(pixels))
            feature = model.pooled_pair(model.encode_text(ids, mask), model.encode_image(image), mask)
            assert model.objectives["irtr"].fc(feature).item() == pytest.approx(scores[t, p].item(), abs=1e-5)


def test_answers_outside_the_list_count_as_wrong(packs, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    rows = list(labelled_rows(folder, "vqa", outside=("hernia", "nodule#mass", "fracture#rib")))
    packed(rows, tmp_path / "pack", "vqa", folder)
    flags = ["--data", tmp_path / "pack", "--init", "none", "--steps", 2]
    started(monkeypatch, "vqa", *flags, "--out", tmp_path / "train")
    started(monkeypatch, "vqa", *flags, "--out", tmp_path / "all", "--answers", "all")
    answers = [row.answer for row in rows if row.split == "test"]
    share = sum(answer != "nodule#mass" for answer in answers) / len(answers)
    assert logged(tmp_path / "train", "test")[0]["answer_not_in_list"] == pytest.approx(share, abs=1e-6)
    assert logged(tmp_path / "all", "test")[0]["answer_not_in_list"] == 0
    labels = json.loads((tmp_path / "all" / "config.json").read_text())["data"]["labels"]
    assert labels[:4] == list(FINDINGS) and set(labels[4:]) == {"hernia", "mass", "fracture", "rib"}


def test_a_head_that_learned_other_answers_is_not_taken(packs, pretrained, tmp_path, monkeypatch):
    started(monkeypatch, "cls", "--data", packs["cls"], "--init", pretrained, "--out", tmp_path / "first",
            "--steps", 1)
    flags = "--init", tmp_path / "first", "--steps", 1
    started(monkeypatch, "cls", "--data", packs["cls"], *flags, "--out", tmp_path / "same")
    started(monkeypatch, "vqa", "--data", packs["vqa"], *flags, "--out", tmp_path / "another-task")
    folder = tmp_path / "images"
    folder.mkdir()
    rows = [row._replace(label=f"no {row.label}") for row in labelled_rows(folder, "cls")]
    packed(rows, tmp_path / "pack", "cls", folder)
    with pytest.raises(UserError, match="first was trained with other labels: give --init the run"):
        started(monkeypatch, "cls", "--data", tmp_path / "pack", *flags, "--out", tmp_path / "other")


def test_texts_are_compared_whole(packs, pretrained, tmp_path, monkeypatch):
    """Captions that differ behind the last token that is read are different texts."""
    folder, caught = tmp_path / "images", []
    folder.mkdir()
    rows = [row._replace(text="nodule " * 40 + row.text) for row in labelled_rows(folder, "irtr")]
    packed(rows, tmp_path / "pack", "irtr", folder)
    ranks = ranking.first_right
    monkeypatch.setattr(ranking, "first_right", lambda *args: caught.append(args[1]) or ranks(*args))
    flags = "--data", tmp_path / "pack", "--init", pretrained, "--out", tmp_path / "zero"
    started(monkeypatch, "irtr", *flags, "--zero_shot")
    texts = {row.text for row in rows if row.split == "test"}
    assert caught[0].shape == (len(texts), 6) and len(texts) > 1 and not caught[0].all()


def test_a_best_checkpoint_that_is_damaged_or_missing(packs, pretrained, tmp_path, monkeypatch, capsys):
    """The run ends with the last one tested, and says so."""
    for name in "damaged", "missing":
        flags = "--data", packs["vqa"], "--init", pretrained, "--out", tmp_path / name
        started(monkeypatch, "vqa", *flags, "--steps", 2)
        best = tmp_path / name / "best.pt"
        best.write_bytes(best.read_bytes()[:-200]) if name == "damaged" else best.unlink()
        capsys.readouterr()
        started(monkeypatch, "vqa", *flags, "--steps", 2, "--resume")
        said = capsys.readouterr()
        assert "On 11 test samples (step 2)" in said.out
        warned = "best.pt can't be read" in said.err and "trying the next one" in said.err
        assert warned == (name == "damaged")


@pytest.mark.release
def test_prediction(packs, pretrained, tmp_path, monkeypatch, capsys):
    run, image = tmp_path / "run", tmp_path / "chest.png"
    started(monkeypatch, "vqa", "--data", packs["vqa"], "--init", pretrained, "--out", run, "--steps", 2)
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(image)
    capsys.readouterr()
    started(monkeypatch, "vqa", "--init", run, "--predict", image, "What is seen on the left?")
    *answers, last = capsys.readouterr().out.splitlines()
    assert len(answers) == 4 and {line.split()[-1] for line in answers} == set(FINDINGS)
    shares = [float(line.split("%")[0]) for line in answers]
    assert shares == sorted(shares, reverse=True)
    assert Image.open(run / "plots" / "chest-attention.png").width > 500 and "chest-attention.png" in last

    (tmp_path / "broken.png").write_bytes(image.read_bytes()[:200])
    for shown, asked, sentence in ((tmp_path / "broken.png", "What?", "can't be read as an image"),
                                   (tmp_path / "none.png", "What?", "there is no image"),
                                   (image, "left " * 99, "99 tokens: give one of 1 to 30"),
                                   (image, " ", "0 tokens")):
        with pytest.raises(UserError, match=sentence):
            started(monkeypatch, "vqa", "--init", run, "--predict", shown, asked)
    with pytest.raises(UserError, match="is not a run of finetune.py vqa"):
        started(monkeypatch, "vqa", "--init", pretrained, "--predict", image, "What?")
    with pytest.raises(UserError, match="is not a run of finetune.py cls without --blind"):
        started(monkeypatch, "cls", "--init", run, "--predict", image, "What?")

    config = json.loads((run / "config.json").read_text())
    blind = config | {"task": config["task"] | {"blind": True}}
    for text in (json.dumps(blind), json.dumps(config | {"data": {"labels": 3}}), json.dumps([config]),
                 "[" * 10 ** 5):
        (run / "config.json").write_text(text)
        with pytest.raises(UserError, match="is not a run of finetune.py vqa|config.json can't be read"):
            started(monkeypatch, "vqa", "--init", run, "--predict", image, "What?")
    (run / "config.json").write_text(json.dumps(config | {"data": {"labels": ["one", ["two"]]}}))
    started(monkeypatch, "vqa", "--init", run, "--predict", image, "What?")    # it has four answers
    assert len(capsys.readouterr().out.splitlines()) == 3


# -------------------------------------------------------------------------------- metrics by hand

def columns(lines, predictions, labels, task):
    """A table of these predictions, each of probability 0.9."""
    probabilities = np.full((len(lines), len(labels)), 0.1)
    probabilities[range(len(lines)), [labels.index(name) for name in predictions]] = 0.9
    return {"source": np.array(["a.png"] * len(lines))} | answer_columns(lines, probabilities, labels, task)


def test_answer_metrics_by_hand():
    lines = [{"answer": "yes", "closed": True}, {"answer": "yes", "closed": True},
             {"answer": "left#right", "closed": False}, {"answer": "4"}]
    table = columns(lines, ["yes", "no", "left", "3"], ["yes", "no", "left", "3"], "vqa")
    assert figures(table, "vqa") == {
        "acc": 2 / 4, "acc_open": 1, "acc_closed": 1 / 2, "answer_not_in_list": 1 / 4}
    assert table["target"].tolist() == ["yes", "yes", "left#right", "4"]

    lines = [{"label": "a"}, {"label": "a"}, {"label": "b"}]
    found = figures(columns(lines, ["a", "b", "b"], ["a", "b", "c"], "cls"), "cls")
    assert found == pytest.approx({                          # c occurs nowhere
        "acc": 2 / 3, "macro_f1": 2 / 3, "mean_auroc": 3 / 4, "recall of a": 1 / 2, "recall of b": 1,
        "AUROC of a": 3 / 4, "AUROC of b": 3 / 4})
    assert figures(columns(lines[:1], ["a"], ["a", "b"], "cls"), "cls") == {
        "acc": 1, "macro_f1": 1, "recall of a": 1}           # one row: no area under a curve


def test_recall_by_hand():
    scores = torch.tensor([[3.0, 1, 2, 0], [0, 1, 2, 3], [1, 1, 1, 1]])
    right = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 1], [1, 0, 0, 0]]).bool()
    assert ranking.first_right(scores, right).tolist() == [2, 1, 4]      # a tie is no hit
    table = {"source": np.array(list("abcd")), "direction": np.array(["t2i"] * 3 + ["i2t"]),
             "rank": np.array([2.0, 1, 4, 20])}
    assert figures(table, "irtr") == pytest.approx({
        "t2i_r1": 1 / 3, "t2i_r5": 1, "t2i_r10": 1, "t2i_median_rank": 2,
        "i2t_r1": 0, "i2t_r5": 0, "i2t_r10": 0, "i2t_median_rank": 20})
    for bad in scores.masked_fill(right, torch.nan), torch.full((3, 12), torch.nan):
        wide = torch.nn.functional.pad(right, (0, bad.shape[1] - right.shape[1]))
        assert ranking.first_right(bad, wide).min() > 1


# -------------------------------------------------------------------------------- bad input

def test_what_it_refuses(packs, pretrained, tmp_path, monkeypatch):
    def refused(sentence, task, *flags):
        with pytest.raises(UserError, match=sentence):
            started(monkeypatch, task, *flags, "--out", tmp_path / "never", "--steps", 2)
        checkpoint.remove_unused_run_dir(tmp_path / "never")     # as the end of the process does
        assert not (tmp_path / "never").exists()

    refused("was not trained on phantoms: give --data, a pack of cls", "cls", "--init", pretrained)
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "few_pairs.json").write_text("{}")
    refused("stages of data.few_pairs: give --init .*/all", "cls", "--init", tmp_path / "stages")
    refused("--init", "vqa", "--data", packs["vqa"])
    refused("without answer", "vqa", "--data", packs["pretrain"], "--init", "none")
    refused("without label", "cls", "--data", packs["vqa"], "--init", "none")
    refused("--answers", "vqa", "--data", packs["vqa"], "--init", "none", "--answers", "some")
    refused("no run|can't be read", "vqa", "--data", packs["vqa"], "--init", tmp_path / "nowhere")
    refused("shape", "vqa", "--data", packs["vqa"], "--init", pretrained, "--fusion_width", 64)

    folder = tmp_path / "few"
    folder.mkdir()
    some = [row for row in labelled_rows(folder, "cls") if row.split != "test"]
    packed(some, tmp_path / "untested", "cls", folder)
    rows = [row._replace(label="rare") if row.split == "val" and i % 5 == 0 else row
            for i, row in enumerate(labelled_rows(folder, "cls"))]
    packed(rows, tmp_path / "rare", "cls", folder)
    refused("no training sample has the class rare", "cls", "--data", tmp_path / "rare", "--init", "none")


def test_a_checkpoint_without_its_tokenizer(packs, pretrained, tmp_path, monkeypatch):
    """Another tokenizer of the same size would give words the embeddings of other words."""
    (tmp_path / "best.pt").write_bytes((pretrained / "best.pt").read_bytes())
    flags = ["--data", packs["vqa"], "--steps", 1, "--test_samples", 0]
    with pytest.raises(UserError, match="best.pt has no tokenizer .*: give one with"):
        started(monkeypatch, "vqa", *flags, "--init", tmp_path / "best.pt", "--out", tmp_path / "never")
    monkeypatch.chdir(pretrained)                            # there it stands beside it
    started(monkeypatch, "vqa", *flags, "--init", "best.pt", "--out", tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == Path("tokenizer.json").read_bytes()
    monkeypatch.chdir(tmp_path)                              # a name that begins as "none" does
    Path("nonesuch").symlink_to(pretrained)
    started(monkeypatch, "vqa", *flags, "--init", "nonesuch", "--out", tmp_path / "such")


def test_a_head_is_kept_only_with_its_own_answers(packs, pretrained, tmp_path, monkeypatch):
    """As a folder or a file, trained blind or not: where its answers are known, and the same."""
    flags = ["--data", packs["vqa"], "--steps", 1, "--test_samples", 0]
    for name, more in ("seeing", []), ("blind", ["--blind"]):
        run = tmp_path / name
        started(monkeypatch, "vqa", *flags, *more, "--init", pretrained, "--out", run)
        for i, init in enumerate((run, run / "last.pt")):
            started(monkeypatch, "vqa", *flags, "--init", init, "--out", tmp_path / f"{name}{i}")
        settings = json.loads((run / "config.json").read_text())
        settings["data"]["labels"].reverse()
        (run / "config.json").write_text(json.dumps(settings))
        for init in run, run / "last.pt":
            with pytest.raises(UserError, match="was trained with other labels"):
                started(monkeypatch, "vqa", *flags, "--init", init, "--out", tmp_path / "never")
        (run / "config.json").unlink()
        with pytest.raises(UserError, match="was trained with other labels"):
            started(monkeypatch, "vqa", *flags, "--init", run / "last.pt", "--out", tmp_path / "never")


def test_another_tokenizer_than_the_checkpoints(packs, pretrained, tmp_path, monkeypatch):
    from m3ae_mini.tokenizer import Tokenizer
    other = Tokenizer.train(["other words entirely"], 270)
    (tmp_path / "tokenizer.json").write_text(other.json)
    with pytest.raises(UserError, match="--tokenizer"):
        started(monkeypatch, "vqa", "--data", packs["vqa"], "--init", pretrained, "--tokenizer", tmp_path,
                "--out", tmp_path / "run", "--steps", 2)
