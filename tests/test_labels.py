"""Several labels a row, from the table to predictions for new images."""
import csv

import numpy as np
import pytest
import torch
from PIL import Image

from data import table
from data.labels import join_labels, split_labels
from data.pack import Pack
from data.task_metrics import figure_intervals, figures, label_columns, read_table, report_table
from m3ae_mini.config import UserError
from test_finetune import started
from test_silence import prepared
from test_train import logged

NAMES = "Effusion", "Mass", "Pneumothorax"


def draw(pixels, name):
    """What shows a label."""
    box = {"Effusion": (slice(10, 16), slice(0, 8)), "Mass": (slice(0, 6), slice(0, 6)),
           "Pneumothorax": (slice(0, 8), slice(11, 16))}[name]
    pixels[box] = 250


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A table of 440 images with up to three labels each, and its images."""
    folder, random = tmp_path_factory.mktemp("labels"), np.random.default_rng(0)
    rows = []
    for i in range(440):
        pixels = random.integers(0, 160, (16, 16), dtype=np.uint8)
        shown = [name for name in NAMES if random.random() < 0.4]
        for name in shown:
            draw(pixels, name)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        split = "train" if i < 320 else "val" if i < 380 else "test"
        rows.append((f"{i}.png", "Chest X-ray.", "|".join(reversed(shown)) or "No Finding", split))
    with open(folder / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "text", "label", "split"), *rows])
    return folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run that has learned them."""
    from data import prepare
    out = tmp_path_factory.mktemp("runs")
    assert prepare.main(["table", "--root", str(folder / "t.csv"), "--task", "cls", "--size", "16",
                         "--out", str(out / "pack")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        started(patch, "cls", "--data", out / "pack", "--init", "none", "--steps", 150, "--batch_size", 32,
                "--micro_batch", 32, "--lr", 2e-3, "--eval_every", 75, "--out", out / "run")
    return out / "run"


def test_a_cell_of_labels():
    assert split_labels("Mass | Effusion|Mass|") == ["Mass", "Effusion"]
    assert split_labels("no finding") == split_labels("No Finding") == []
    assert join_labels(["Mass", "Effusion"]) == "Mass|Effusion" and join_labels([]) == "No Finding"
    with pytest.raises(UserError, match="x.csv, line 3: the label 'Mass.No Finding' holds 'No Finding' and a"):
        split_labels("Mass|No Finding", "x.csv, line 3: ")


def test_the_pack_lists_single_labels(folder, run):
    meta = Pack(run.parent / "pack").meta
    assert meta["labels"] == sorted(NAMES) and meta["several_labels"]
    summary = (run.parent / "pack" / "summary.txt").read_text()
    assert "labels (samples): " in summary and "No Finding" in summary
    assert Pack(run.parent / "pack").line(0)["label"] in ("|".join(c) for c in _all_cells())


def _all_cells():
    """All ways to write the labels, each at most once."""
    from itertools import permutations
    return [("No Finding",), *(cell for n in (1, 2, 3) for cell in permutations(NAMES, n))]


def test_one_label_a_row_stays_a_class(tmp_path, capsys):
    """Then "No Finding" is a class like any other."""
    (tmp_path / "t.csv").write_text("image,text,label,split\n" + "".join(
        f"{i}.png,Chest {i}.,{label},train\n" for i, label in enumerate(["Mass", "No Finding", "Mass"])))
    for i in range(3):
        Image.fromarray(np.full((16, 16), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    prepared(capsys, tmp_path / "t.csv", tmp_path / "pack", task="cls")
    meta = Pack(tmp_path / "pack").meta
    assert meta["labels"] == ["Mass", "No Finding"] and not meta["several_labels"]


def test_a_known_answer_is_learned(run, capsys):
    (logged_test,) = logged(run, "test")
    assert logged_test["mean_auroc"] > 0.95
    assert logged_test["low_mean_auroc"] <= logged_test["mean_auroc"] <= logged_test["high_mean_auroc"]
    assert all(0.2 < logged_test[f"share of {name}"] < 0.6 for name in NAMES)
    assert not (run / "plots" / "confusion.png").exists()


def test_all_figures_come_from_the_table(run):
    (logged_test,) = logged(run, "test")
    found = read_table(run / "test_predictions.csv")
    assert {name: logged_test[name] for name in figures(found, "cls")} == pytest.approx(figures(found, "cls"))
    for name, (low, high) in figure_intervals(found, "cls").items():
        assert (logged_test[f"low_{name}"], logged_test[f"high_{name}"]) == pytest.approx((low, high))
    likely = [join_labels([name for name in sorted(NAMES) if found[f"p: {name}"][i] >= 0.5]) for i in range(60)]
    assert found["prediction"].tolist() == likely


def test_predictions_for_new_images(run, tmp_path, monkeypatch, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for name in NAMES:
        pixels = np.random.default_rng(1).integers(0, 160, (16, 16), dtype=np.uint8)
        draw(pixels, name)
        Image.fromarray(pixels).save(images / f"{name}.png")
    (images / "broken.png").write_bytes(b"no image")
    started(monkeypatch, "cls", "--init", run, "--predict", images, "Chest X-ray.", "--out", tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="") as file:
        rows = {row["image"].rsplit("/", 1)[-1]: row for row in csv.DictReader(file)}
    for name in NAMES:
        row = rows[f"{name}.png"]
        assert row["prediction"] == name and row["error"] == "" and float(row[f"p: {name}"]) > 0.5
    broken = rows["broken.png"]
    assert broken["error"] and not broken["prediction"] and not any(broken[f"p: {name}"] for name in NAMES)


def columns(targets, probabilities):
    lines = [{"label": target} for target in targets]
    found = label_columns(lines, np.array(probabilities), ["A", "B"])
    return found | {"source": np.array(targets), "cluster": np.array([str(i) for i in range(len(targets))])}


def test_auroc_at_its_edges():
    """By hand: ties count half; a label that all rows or none have has no AUROC, and the report says so."""
    ties = figures(columns(["A", "No Finding", "A|B", "B"], [[.5, .9], [.5, .1], [.5, .9], [.2, .9]]), "cls")
    assert ties["AUROC of A"] == ties["AUROC of B"] == (0.5 + 1 + 0.5 + 1) / 4
    assert ties["mean_auroc"] == 0.75 and ties["share of A"] == 0.5

    absent = columns(["A", "No Finding"], [[.9, .5], [.1, .5]])
    found = figures(absent, "cls")
    assert found["AUROC of A"] == found["mean_auroc"] == 1 and "AUROC of B" not in found
    report = report_table(found, figure_intervals(absent, "cls"), absent)
    assert "AUROC needs rows with the label and rows without it: not defined for B" in report
    assert "nan" not in report.lower()

    one = columns(["A|B"], [[.9, .5]])
    found = figures(one, "cls")
    assert found == {"share of A": 1, "share of B": 1}
    assert "not defined for A, B" in report_table(found, figure_intervals(one, "cls"), one)


def test_validation_without_a_choice_is_refused(folder, tmp_path, monkeypatch, capsys):
    """All validation rows alike: no label has an AUROC, so no checkpoint is the best."""
    text = (folder / "t.csv").read_text().splitlines()
    kept = [line for line in text if not line.endswith("val")]
    val = [line for line in text if line.endswith(",Mass,val")]
    assert val
    changed = tmp_path / "t.csv"
    changed.write_text("\n".join([*kept, *val]))
    for image in folder.glob("*.png"):
        (tmp_path / image.name).symlink_to(image)
    from data import prepare
    # The links lead out of the folder, so the rows are packed from Python.
    prepare.write_pack(table.rows(changed, "cls"), tmp_path / "pack", "test", "cls", 16, workers=1)
    with pytest.raises(UserError, match="no label is present in some validation samples and absent in others"):
        started(monkeypatch, "cls", "--data", tmp_path / "pack", "--init", "none", "--steps", 1,
                "--out", tmp_path / "run")


def test_the_loss_is_that_of_a_sigmoid_each(small_config, random_batch):
    from m3ae_mini import M3AE
    cfg = small_config(task="cls", num_classes=3)
    model = M3AE(cfg).eval()
    batch = random_batch(cfg, rows=2)
    batch["cls_labels"] = torch.tensor([[1., 0, 1], [0, 0, 0]])
    out = model(batch)
    p = out["cls_logits"].sigmoid().double()
    truth = batch["cls_labels"].double()
    wanted = -(truth * p.log() + (1 - truth) * (1 - p).log()).mean()
    assert out["cls_loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
