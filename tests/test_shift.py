"""shift.py: it tests finished runs on the shifted test images, and refuses what it cannot test."""
import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import finetune
import shift
from data import phantoms
from m3ae_mini.config import UserError
from test_train import SMALL

FLAGS = [*SMALL, "--steps", "4", "--lr", "1e-2", "--warmup", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with runs/vqa, runs/cls and runs/blind on few phantoms of 16 pixels."""
    folder = tmp_path_factory.mktemp("shift")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(phantoms, "LABELLED", {"train": 80, "val": 8, "test": 40})
        for task, out, more in ("vqa", "vqa", ()), ("cls", "cls", ()), ("cls", "blind", ["--blind"]):
            patch.setattr(sys, "argv", ["finetune.py", task, *FLAGS, *more, "--init", "none",
                                        "--out", f"runs/{out}"])
            finetune.main()
    return folder


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(phantoms, "LABELLED", {"train": 80, "val": 8, "test": 40})


def called(monkeypatch, *runs):
    monkeypatch.setattr(sys, "argv", ["shift.py", "--device", "cpu", *runs])
    shift.main()


def test_the_table_of_two_runs(inside, monkeypatch, capsys):
    """Without a shift it has the run's own test accuracy; each column tests its own pack."""
    predict, seen = shift.predict_table, []

    def predict_table(model, samples, *more):
        seen.append((samples.packs[0].folder.name, samples.n))
        return predict(model, samples, *more)
    monkeypatch.setattr(shift, "predict_table", predict_table)
    called(monkeypatch, "runs/vqa", "runs/cls")

    assert [name for name, _ in seen] == [
        f"phantoms-{task}-16{end}" for task in ("vqa", "cls")
        for end in ("", "-shift1", "-shift2", "-shift3")]
    assert len({n for _, n in seen[:4]}) == 1 and seen[4] == ("phantoms-cls-16", 40)
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| test accuracy, %: run | no shift | shift 1 | shift 2 | shift 3 |"
    for row, task in zip(rows, ("vqa", "cls"), strict=True):
        lines = list(map(json.loads, open(f"runs/{task}/metrics.jsonl")))
        test = next(line for line in lines if line["split"] == "test")
        own = [f"{100 * test[name]:.1f}" for name in ("acc", "low_acc", "high_acc")]
        assert row.startswith(f"| runs/{task} | {own[0]} ({own[1]}–{own[2]}) | ")
        assert len(re.findall(r"\d+\.\d \(\d+\.\d–\d+\.\d\)", row)) == 4


def test_what_is_refused(inside, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="runs/blind is not a run of finetune.py vqa or cls without"):
        called(monkeypatch, "runs/blind")
    run = shift.load_run("runs/cls")
    dist_env = shift.DistEnv(shift.RunConfig(device="cpu"))
    with pytest.raises(UserError, match="runs/cls was not fine-tuned on phantoms: give a run that"):
        shift.accuracy(run._replace(labels=["a", "b"]), 0, dist_env)
