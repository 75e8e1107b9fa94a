"""The recipe for a few thousand pairs: one command from a table to a report, which continues where it stopped."""
import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import few_pairs
from m3ae_mini.checkpoint import read_log, saved_settings
from m3ae_mini.config import UserError
from test_loader import CAPTIONS

ROOT = Path(__file__).resolve().parents[1]
SHORT = {name: f"{flags} --steps 2 --epochs 0 --batch_size 16 --log_every 1"
         for name, flags in few_pairs.STAGES.items()}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of 90 images; and a small model that takes two steps a stage."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(few_pairs, "MODEL", "--preset tiny --image_size 96 --patch_size 24 --max_text_len 48")
    monkeypatch.setattr(few_pairs, "STAGES", SHORT)
    monkeypatch.setattr(few_pairs, "BATCH", 16)
    random = np.random.default_rng(0)
    with open(tmp_path / "t.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "text", "split"])
        for i in range(90):
            pixels = random.integers(0, 256, (24, 24), dtype=np.uint8)
            Image.fromarray(pixels).resize((96, 96)).save(tmp_path / f"{i}.png")
            split = "train" if i < 60 else "val" if i < 75 else "test"
            rows.writerow([f"{i}.png", f"{CAPTIONS[i % len(CAPTIONS)]} Case {i}.", split])
    return tmp_path / "t.csv"


def started(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["few_pairs", *map(str, arguments)])
    few_pairs.main()


def test_from_a_table_to_a_report(table, tmp_path, monkeypatch, capfd):
    out = tmp_path / "run"
    started(monkeypatch, table, "--out", out, "--device", "cpu")
    printed = capfd.readouterr().out
    assert "gave better results" in printed                   # without --init_text
    for name in "images", "contrast", "all":
        assert [line["step"] for line in read_log(out / name) if line["split"] == "test"] == [2]
        assert (out / name / "card.md").is_file()
    assert "bag of words of ITC" in printed and "A linear model on the same pairs:" in printed
    assert printed.count("right above wrong") >= 3            # two stages, the linear model
    assert "warning: 60 training pairs are few" in printed
    tested = read_log(out / "all")[-1]
    row = f"| test: after the stage all | {100 * tested['above']:.1f} ({100 * tested['low_above']:.1f} to "
    assert row in printed and "| test: after the stage contrast |" in printed

    # Each stage starts from the one before, and trains what it says.
    settings = {name: saved_settings(out / name) for name in SHORT}
    assert settings["contrast"]["train"]["init"] == str(out / "images")
    assert settings["all"]["train"]["init"] == str(out / "contrast")
    assert read_log(out / "images")[0].keys() >= {"mim_loss"} and "itc_loss" not in read_log(out / "images")[0]
    assert "mim_loss" not in read_log(out / "contrast")[0] and "itc_loss" in read_log(out / "contrast")[0]
    assert read_log(out / "all")[0].keys() >= {"mlm_loss", "mim_loss", "itm_loss", "itc_loss"}

    assert settings["images"]["model"]["mim_layer"] == 0 and settings["all"]["model"]["mim_layer"] == 1
    assert settings["contrast"]["train"]["micro_batch"] == 16

    # Other settings would mix with what is there.
    with pytest.raises(UserError, match=r"was begun with seed 0 \(now 1\): give the same, or another --out"):
        started(monkeypatch, table, "--out", out, "--device", "cpu", "--seed", 1)

    # What has finished is not made again.
    kept = {name: (out / name / "last.pt").stat().st_mtime_ns for name in SHORT}
    called = []
    monkeypatch.setattr(few_pairs, "call", lambda *parts: called.append(" ".join(filter(None, parts))))
    started(monkeypatch, table, "--out", out, "--device", "cpu")
    assert {name: (out / name / "last.pt").stat().st_mtime_ns for name in kept} == kept
    assert called == [f"tests/experiments/linear.py {out / 'pack'}"]


def test_mistakes(table, tmp_path, monkeypatch, capfd):
    with pytest.raises(UserError, match="there is no .*none.csv: give a table, its folder, or a pack"):
        started(monkeypatch, tmp_path / "none.csv", "--out", tmp_path / "run")
    with pytest.raises(UserError, match="is no folder: give one of BERT or RoBERTa"):
        started(monkeypatch, table, "--out", tmp_path / "run", "--init_text", tmp_path / "none")
    with pytest.raises(UserError, match="--gpus 3: use a divisor of 16"):
        started(monkeypatch, table, "--out", tmp_path / "run", "--gpus", 3)
    assert not (tmp_path / "run").exists()
    table.write_text("image,text,split\nnone.png,A chest.,train\n")
    with pytest.raises(SystemExit) as caught:                 # the command that failed has said why
        started(monkeypatch, table, "--out", tmp_path / "run", "--device", "cpu")
    assert caught.value.code == 2 and "images cannot be packed" in capfd.readouterr().err


def test_a_pack_of_another_size(table, tmp_path, monkeypatch):
    pack = tmp_path / "pack"
    few_pairs.call("-m data.prepare table", f"--root {table} --size 48 --out {pack}")
    with pytest.raises(UserError, match="holds images of 48 pixels: prepare it with --size 96, or give the table"):
        started(monkeypatch, pack, "--out", tmp_path / "run", "--device", "cpu")
