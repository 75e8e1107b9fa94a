"""tests/tables.py: what has finished is kept, what fails is named, a cell is a mean with least and most."""
import argparse
import json
import shlex

import pytest

import finetune
import tables
import train
from data import prepare
from m3ae_mini.config import UserError
from test_readme import parsed


def finished(monkeypatch, folder, name, **found):
    """A run whose log says that its test split gave `found`."""
    monkeypatch.setattr(tables, "ROOT", folder)
    run = tables.Run(name, "no_such_script.py")
    (folder / run.out).mkdir(parents=True)
    lines = [{"step": 1, "split": "val", "acc": 0.0}, {"step": 2, "split": "test", "score": 1.0, **found}]
    (folder / run.out / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return run


def test_a_cell_is_the_mean_with_its_least_and_greatest(tmp_path, monkeypatch):
    cells = [("cls", row, finished(monkeypatch, tmp_path, f"{row}-{seed}", acc=acc))
             for row, accs in (("pre-trained", (0.5, 0.7, 0.9)), ("blind", (0.25, 0.25, 0.25)))
             for seed, acc in enumerate(accs)]
    text, found = tables.as_table(cells)
    assert "| cls | acc |" in text
    assert "| pre-trained | 70.0 (50.0 to 90.0) |" in text and "| blind | 25.0 (25.0 to 25.0) |" in text
    assert found["cls"]["pre-trained"]["acc"] == [0.5, 0.7, 0.9]


def test_what_has_finished_is_kept_and_what_fails_is_named(tmp_path, monkeypatch):
    done = finished(monkeypatch, tmp_path, "done", acc=1.0)
    tables.make_all([done], 1)                             # its script does not exist: nothing was started
    missing = tables.Run("missing", "no_such_script.py")
    with pytest.raises(UserError, match="no_such_script.py.*missing.* failed: read .*missing.log"):
        tables.make_all([done, missing], 2)
    assert "no_such_script.py" in (tmp_path / tables.OUT / "missing.log").read_text()


@pytest.mark.parametrize("name", tables.TABLES)
def test_rows_of_a_table_are_commands_that_the_scripts_take(name, monkeypatch):
    args = argparse.Namespace(vqa_rad="a folder", medpix="another", text="a third")
    cells = {(task, row): run for task, row, run in tables.TABLES[name](args, 0)}
    more = {"vqa_rad": {"from scratch, text encoder of --text"}, "medpix": {"zero-shot"}}.get(name, set())
    assert {row for _, row in cells} == {"pre-trained", "from scratch", "blind"} | more
    assert len({run.out for run in cells.values()}) == len(cells)
    for run in cells.values():
        assert "--seed 0" in run.command
        assert str(run.after.out) in run.command or "--init_text" in run.command
        for one in run, run.after:                         # the scripts take these flags
            script, *flags = shlex.split(one.command)
            parsed({"train.py": train, "finetune.py": finetune}[script], flags, monkeypatch)
        for pack, flags in run.after.packs.items():
            assert prepare.command_line().parse_args([*shlex.split(flags), "--out", pack]).size == 96


def test_a_folder_that_is_not_given():
    with pytest.raises(UserError, match="needs --medpix"):
        list(tables.vqa_rad(argparse.Namespace(vqa_rad="here", medpix=None, text=None), 0))
