"""Which of the design choices matter? The tiny model with one change, pre-trained and fine-tuned on phantoms.

    python tests/ablate.py                             every row that is shipped: the README's, and others
    python tests/ablate.py no_mim contrastive          some of them
    python tests/ablate.py mine.diff                   one of your own, as `git diff` wrote it

A row is a flag of train.py, or a file tests/ablations/NAME.diff, whose first line says what it changes and
which is applied to a copy of the code in runs/tables/ablations/NAME/code. Each row is the default
pre-training and fine-tuning with few labels (tests/tables.py), over `--seeds`, `--jobs` runs at once with one
thread each. What has finished is kept, so the same command goes on. runs/tables/ablations.md, .json and .png
hold the table of all rows that have finished, and its bars.
"""
import argparse
import json
import math
import os
import shutil
import subprocess
import time
from pathlib import Path

from tables import OUT, ROOT, Run, make_all, on_phantoms

from PIL import Image, ImageDraw

from m3ae_mini import loop
from m3ae_mini.config import require
from m3ae_mini.plots import BACK, FONT, GREEN, GREY, INK

DIFFS = ROOT / "tests" / "ablations"
FLAGS = {                              # name: (what it changes, flags of train.py)
    "unchanged": ("the default", ""),
    "no_mim": ("pixels are not reconstructed", "--mim 0"),
    "no_mlm": ("words are not restored", "--mlm 0"),
    "no_itm": ("no image-text matching", "--itm 0"),
    "mask_50_50": ("half of the patches and of the words are hidden", "--mask_ratio 0.5 --mlm_ratio 0.5"),
    "mask_15_15": ("15 % of the patches and of the words are hidden", "--mask_ratio 0.15"),
    "pixels_last": ("pixels are decoded after the last fusion layer", "--mim_layer -1"),
    "pixels_first": ("pixels are decoded before the fusion", "--mim_layer 0"),
    "raw_pixels": ("pixels are not normalised within a patch", "--no-norm_pix_loss"),
    "single_tokens": ("single tokens are hidden, not whole words", "--no-whole_word"),
}
FIGURES = {                            # (which run, its figure): head of the column
    ("pretrain", "mlm_gain_hard"): "words: gain over an image of the same kind",
    ("pretrain", "itm_acc_hard"): "matching within the kind",
    ("vqa", "acc"): "questions",
    ("cls", "acc"): "classes"}


def begin(name):
    """A row's name -> its short name, with a copy of this checkout and the row's diff in its folder, so that
    nobody's edits disturb it. UserError where the diff does not apply, or is not the one it began with."""
    path = Path(name) if name.endswith(".diff") else DIFFS / f"{name}.diff"
    require(name in FLAGS or path.stem not in FLAGS, f"{path}: {path.stem} is a row of flags: rename your file")
    require(name in FLAGS or path.is_file(), f"{path} is not there: use a file, or one of {', '.join(names())}")
    patch = b"" if name in FLAGS else path.read_bytes()
    row = ROOT / OUT / "ablations" / path.stem
    kept, code = row / "applied.diff", row / "code"
    if kept.is_file():
        require(kept.read_bytes() == patch, f"{path} has changed since its row began: remove {row} to "
                                         "measure it anew, or give it another name")
        return path.stem
    shutil.rmtree(code, ignore_errors=True)
    for part in "m3ae_mini", "data":
        shutil.copytree(ROOT / part, code / part, ignore=shutil.ignore_patterns("__pycache__"))
    for script in "train.py", "finetune.py":
        shutil.copy(ROOT / script, code)
    if patch:
        apply(path, code)
    checkpoint.write_atomic(kept, lambda file: file.write(patch))
    return path.stem


def apply(patch, code):
    """Apply a diff to the copy in the folder `code`. UserError where it does not fit."""
    alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(code.parent)}      # no part of this repository
    done = subprocess.run(["git", "apply", patch.resolve()], cwd=code, env=alone, capture_output=True,
                          text=True)
    require(not done.returncode, f"{patch} does not apply to this code: {done.stderr.strip()}")


def runs(row, seed):
    """A row's runs with one seed: {"pretrain", "vqa", "cls": Run}. The unchanged row is tables.py's own."""
    flags = FLAGS[row][1] if row in FLAGS else ""
    folder, code = f"ablations/{row}", ROOT / OUT / "ablations" / row / "code"
    if row == "unchanged":
        folder, code = "phantoms", ROOT
    start = Run(f"{folder}/pretrain-{seed}", f"train.py --device cpu --seed {seed} {flags}", code=code)
    tasks = {task: Run(f"{folder}/{task}-pre-trained-{seed}",
                       f"{on_phantoms(task, seed)} --init {start.out}", start, code=code)
             for task in ("vqa", "cls")}
    return {"pretrain": start, **tasks}


def names():
    """Every row that this project ships."""
    return [*FLAGS, *sorted(path.stem for path in DIFFS.glob("*.diff"))]


def what(row):
    """What a row changes, in words: for a diff, its first line."""
    if row in FLAGS:
        return FLAGS[row][0]
    kept = ROOT / OUT / "ablations" / row / "applied.diff"
    first = (kept if kept.is_file() else DIFFS / f"{row}.diff").read_text().partition("\n")[0]
    return row if first.startswith(("diff ", "--- ")) else first


def measured():
    """Rows and seeds of which all runs have finished -> {row: {head: [values]}}."""
    begun = {path.parent.name for path in (ROOT / OUT / "ablations").glob("*/applied.diff")} | {"unchanged"}
    rows = {}
    for row in sorted(begun, key=lambda row: (names().index(row) if row in names() else math.inf, row)):
        for seed in range(20):
            found = {which: run.found() for which, run in runs(row, seed).items()}
            if all(found.values()):
                for (which, figure), head in FIGURES.items():
                    if figure in found[which]:
                        rows.setdefault(row, {}).setdefault(head, []).append(100 * found[which][figure])
    return rows


def table(rows):
    """-> Markdown: the mean over the seeds, and the least and the greatest."""
    lines = [f"| | seeds | {' | '.join(FIGURES.values())} |", "|---" * (2 + len(FIGURES)) + "|"]
    for name, row in rows.items():
        cells = (f"{sum(v) / len(v):.1f} ({min(v):.1f} to {max(v):.1f})" if v else "–"
                 for v in map(row.get, FIGURES.values()))
        lines.append(f"| {what(name)} (`{name}`) | {max(map(len, row.values()))} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def bars(rows, path):
    """A panel for each figure: the mean of each row, a line from its least to its greatest seed, and across
    all rows a line where the unchanged model stands."""
    left, wide, room, high, gap = 160, 260, 44, 26, 30                 # room: for the number behind the bar
    columns, tall = 2, gap * 2 + high * len(rows)
    size = columns * (left + wide + room + gap), (1 + (len(FIGURES) - 1) // columns) * tall
    sheet = Image.new("RGB", size, BACK)
    draw = ImageDraw.Draw(sheet)
    for number, head in enumerate(FIGURES.values()):
        x, y = number % columns * (left + wide + room + gap) + left, number // columns * tall + gap
        most = max(max(row.get(head, [0])) for row in rows.values())
        draw.text((x, y - 6), f"{head}, %", INK, FONT, "ls")

        def place(value):
            return x + wide * max(0.0, value) / most

        for i, (name, row) in enumerate(rows.items()):
            middle, values = y + i * high + high // 2, row.get(head)
            draw.text((x - 6, middle), name, INK, FONT, "rm")
            if values:
                mean = sum(values) / len(values)
                colour = GREEN if name == "unchanged" else GREY
                draw.rectangle((x, middle - 8, place(mean), middle + 8), fill=colour)
                draw.line((place(min(values)), middle, place(max(values)), middle), INK, 2)
                draw.text((x + wide + room, middle), f"{mean:.1f}", INK, FONT, "rm")
                if name == "unchanged":
                    draw.line((place(mean), y, place(mean), y + high * len(rows)), GREEN)
    sheet.save(path, optimize=True)


def write():
    """The table of all that has been measured by now."""
    if rows := measured():
        (ROOT / OUT / "ablations.md").write_text(table(rows))
        (ROOT / OUT / "ablations.json").write_text(json.dumps(rows, indent=1))
        bars(rows, ROOT / OUT / "ablations.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=names(),
                        help="rows to measure [all], or files *.diff")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, … [3]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once [one a core]")
    args, start = parser.parse_args(), time.perf_counter()
    rows = [begin(name) for name in args.names]
    todo = [run for row in rows for seed in range(args.seeds) for run in runs(row, seed).values()]
    make_all(todo, args.jobs, write)
    print(f"{table(measured())}\nBars: {OUT / 'ablations.png'}\n"
          f"This call took {time.perf_counter() - start:,.0f} s.")


if __name__ == "__main__":
    distributed.run(main)
