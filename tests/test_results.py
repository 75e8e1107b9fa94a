"""results.py: finished runs are kept, failing ones named; a cell is a mean, least and greatest."""
import argparse
import json
import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import finetune
import results
import train
from data import prepare
from m3ae_mini.config import UserError
from test_readme import parsed


def finished(monkeypatch, folder, name, **metrics):
    """A run whose log has `metrics` of the test split."""
    monkeypatch.setattr(results, "ROOT", folder)
    run = results.Run(name, "no_such_script.py")
    (folder / run.out).mkdir(parents=True)
    lines = [{"step": 1, "split": "val", "acc": 0.0},
             {"step": 2, "split": "test", "score": 1.0, **metrics}]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / run.out / "metrics.jsonl").write_text(text)
    return run


def test_a_cell_is_the_mean_with_its_least_and_greatest(tmp_path, monkeypatch):
    rows = {"pre-trained": (0.5, 0.7, 0.9), "blind": (0.25, 0.25, 0.25)}
    cells = [("cls", row, finished(monkeypatch, tmp_path, f"{row}-{seed}", acc=acc))
             for row, accs in rows.items() for seed, acc in enumerate(accs)]
    text, found = results.make_table(cells)
    assert "| cls | acc |" in text
    assert "| pre-trained | 70.0 (50.0–90.0) |" in text
    assert "| blind | 25.0 (25.0–25.0) |" in text
    assert found["cls"]["pre-trained"]["acc"] == [(0.5,) * 3, (0.7,) * 3, (0.9,) * 3]


def test_a_cell_has_half_the_interval_of_a_seed(tmp_path, monkeypatch):
    """Ranks are no shares, and figures of single classes are left out."""
    metrics = {"acc": 0.5, "low_acc": 0.42, "high_acc": 0.56, "t2i_median_rank": 3.0, "AUROC of CT": 0.9}
    text, found = results.make_table([("irtr", "one", finished(monkeypatch, tmp_path, "one", **metrics))])
    assert "| one | 50.0 (50.0–50.0) ±7.0 | 3.0 (3.0–3.0) |" in text
    assert found["irtr"]["one"].keys() == {"acc", "t2i_median_rank"}


def test_a_metric_that_a_row_lacks_is_a_dash(tmp_path, monkeypatch):
    cells = [("vqa", "one", finished(monkeypatch, tmp_path, "one", acc=0.5, acc_open=0.25)),
             ("vqa", "other", finished(monkeypatch, tmp_path, "other", acc=0.5))]
    assert "| other | 50.0 (50.0–50.0) | – |" in results.make_table(cells)[0]


def test_a_finished_run_is_kept_and_a_failing_one_named(tmp_path, monkeypatch):
    done = finished(monkeypatch, tmp_path, "done", acc=1.0)
    results.make_all([done], 1)        # its script does not exist: nothing was started
    missing = results.Run("missing", "no_such_script.py")
    with pytest.raises(UserError, match="no_such_script.py.*missing.* failed: read .*missing.log"):
        results.make_all([done, missing], 2)
    assert "no_such_script.py" in (tmp_path / results.OUT / "missing.log").read_text()


def test_a_run_waits_for_the_one_that_it_needs(monkeypatch):
    made = []
    monkeypatch.setattr(results.Run, "make", lambda run: made.append(run.command))
    first = results.Run("first", "first")
    second = results.Run("second", "second", first)
    results.make_all([results.Run("a", "a", second), results.Run("b", "b", second)], 2)
    assert made[:2] == ["first", "second"] and sorted(made[2:]) == ["a", "b"]


@pytest.mark.parametrize("name", results.TABLES)
def test_rows_of_a_table_are_commands_that_the_scripts_take(name, monkeypatch):
    args = argparse.Namespace(vqa_rad="a folder", medpix="another", text="a third")
    cells = {(task, row): run for task, row, run in results.TABLES[name](args, 0)}
    other = "from scratch" if name == "phantoms" else "without the stages"
    assert {row for _, row in cells} == {"pre-trained", other, "blind"}
    assert len({run.out for run in cells.values()}) == len(cells)
    for run in cells.values():
        assert "--seed 0" in run.command
        assert str(run.after.out) in run.command or "--init_text" in run.command
        for one in run.chain():
            script, *flags = shlex.split(one.command)
            parsed({"train.py": train, "finetune.py": finetune}[script], flags, monkeypatch)
        for pack, flags in run.chain()[0].packs.items():
            flags = [*shlex.split(flags), "--out", pack]
            assert prepare.command_line().parse_args(flags).size == 96


def test_a_folder_that_is_not_given():
    with pytest.raises(UserError, match="needs --medpix"):
        list(results.TABLES["vqa_rad"](argparse.Namespace(vqa_rad="here", medpix=None, text=None), 0))
