"""Which design choices matter? The tiny model with one change, pre-trained and fine-tuned.

    python tests/experiments/ablate.py                          every row that is shipped
    python tests/experiments/ablate.py no_mim mask_schedule     some of them
    python tests/experiments/ablate.py mine.diff                your own, as `git diff` wrote it

A row is a flag of train.py, or a file ablations/NAME.diff, whose first line says what it changes.
A diff is applied to a copy of the code in runs/tables/ablations/NAME/code. Each row is the default
pre-training and fine-tuning with few labels on phantoms (results.py), over `--seeds`, `--jobs` runs
at once with one thread each. What has finished is kept: the same command continues. The table and
bars of all rows that have finished stand in runs/tables/ablations.md, .json and .png.
"""
import argparse
import json
import math
import os
import shutil
import subprocess
import time
from pathlib import Path

from results import OUT, ROOT, Run, format_spread, make_all, task_on_phantoms, with_interval

from PIL import Image, ImageDraw

from m3ae_mini.checkpoint import write_atomic
from m3ae_mini.config import require
from m3ae_mini.distributed import run as run_main
from m3ae_mini.plots import BACK, FONT, GREEN, GREY, INK

DIFFS = Path(__file__).resolve().parent / "ablations"
FLAGS = {                              # name: (what it changes, flags of train.py)
    "unchanged": ("the default", ""),
    "no_mim": ("pixels are not reconstructed", "--mim 0"),
    "no_mlm": ("words are not restored", "--mlm 0"),
    "no_itm": ("no image-text matching", "--itm 0"),
    "mask_50_50": ("half of the patches and of the words are hidden",
                   "--mask_ratio 0.5 --mlm_ratio 0.5"),
    "mask_15_15": ("15 % of the patches and of the words are hidden", "--mask_ratio 0.15"),
    "mask_50": ("half of the patches are hidden", "--mask_ratio 0.5"),
    "words_30": ("30 % of the words are hidden", "--mlm_ratio 0.3"),
    "words_50": ("half of the words are hidden", "--mlm_ratio 0.5"),
    "pixels_last": ("pixels are decoded after the last fusion layer", "--mim_layer -1"),
    "pixels_first": ("pixels are decoded before the fusion", "--mim_layer 0"),
    "raw_pixels": ("pixels are not normalised within a patch", "--no-norm_pix_loss"),
    "single_tokens": ("single tokens are hidden, not whole words", "--no-whole_word"),
    "itc": ("a fourth loss: image-text contrast", "--itc 1"),
    "itc_words_50": ("the contrast, and half of the words are hidden", "--itc 1 --mlm_ratio 0.5")}
COLUMNS = {                            # (which run, its test metric): head of the column
    ("pretrain", "mlm_gain_hard"): "MLM gain over a hard negative",
    ("pretrain", "itm_acc_hard"): "matching, hard negatives",
    ("vqa", "acc"): "questions",
    ("cls", "acc"): "classes"}


# ----------------------------------------------------------------------------------------- the rows

def row_names() -> list[str]:
    """Every row that this project ships."""
    return [*FLAGS, *sorted(path.stem for path in DIFFS.glob("*.diff"))]


def row_folder(row: str) -> Path:
    return ROOT / OUT / "ablations" / row


def copy_code(name: str) -> str:
    """A row's name, or a file *.diff -> the row's short name.

    Copies the code of this checkout into the row's folder and applies its diff, so that later edits
    don't disturb it. UserError where the diff does not apply, or has changed since."""
    path = Path(name) if name.endswith(".diff") else DIFFS / f"{name}.diff"
    require(name in FLAGS or path.stem not in FLAGS,
            f"{path}: {path.stem} is already a row of flags: rename your file")
    require(name in FLAGS or path.is_file(),
            f"there is no {path}: give a file, or one of {', '.join(row_names())}")
    diff = b"" if name in FLAGS else path.read_bytes()
    folder = row_folder(path.stem)
    applied, code = folder / "applied.diff", folder / "code"
    if applied.is_file():
        require(applied.read_bytes() == diff,
                f"{path} has changed since its row was begun: remove {folder} to measure it anew, "
                "or rename the file")
        return path.stem

    shutil.rmtree(code, ignore_errors=True)
    for part in "m3ae_mini", "data":
        shutil.copytree(ROOT / part, code / part, ignore=shutil.ignore_patterns("__pycache__"))
    for script in "train.py", "finetune.py":
        shutil.copy(ROOT / script, code)
    if diff:
        apply(path, code)
    write_atomic(applied, lambda file: file.write(diff))
    return path.stem


def apply(diff: Path, code: Path) -> None:
    """Apply a diff to the copy in the folder `code`. UserError where it does not fit."""
    # The copy may lie in a repository: git must not look for one above it.
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(code.parent)}
    done = subprocess.run(["git", "apply", diff.resolve()], cwd=code, env=outside,
                          capture_output=True, text=True)
    require(not done.returncode, f"{diff} does not apply to this code: {done.stderr.strip()}")


def runs(row: str, seed: int) -> dict[str, Run]:
    """A row's runs with one seed, "pretrain", "vqa" and "cls". The unchanged row's are those of
    results.py."""
    flags = FLAGS[row][1] if row in FLAGS else ""
    folder, code = f"ablations/{row}", row_folder(row) / "code"
    if row == "unchanged":
        folder, code = "phantoms", ROOT
    start = Run(f"{folder}/pretrain-{seed}", f"train.py --device cpu --seed {seed} {flags}",
                code=code)
    found = {"pretrain": start}
    for task in "vqa", "cls":
        command = f"{task_on_phantoms(task, seed)} --init {start.out}"
        found[task] = Run(f"{folder}/{task}-pre-trained-{seed}", command, start, code=code)
    return found


def what(row: str) -> str:
    """What a row changes, in words: for a diff, its first line."""
    if row in FLAGS:
        return FLAGS[row][0]
    applied = row_folder(row) / "applied.diff"
    diff = applied if applied.is_file() else DIFFS / f"{row}.diff"
    first_line = diff.read_text().partition("\n")[0]
    return row if first_line.startswith(("diff ", "--- ")) else first_line


# ---------------------------------------------------------------------------------------- the table

def measured() -> dict[str, dict[str, list[list[float]]]]:
    """Rows and seeds of which all runs have finished -> {row: {head: [[percent, low, high]]}}."""
    shipped = row_names()
    begun = {path.parent.name for path in (ROOT / OUT / "ablations").glob("*/applied.diff")}
    begun = sorted(begun | {"unchanged"},
                   key=lambda row: (shipped.index(row) if row in shipped else math.inf, row))
    rows: dict = {}
    for row in begun:
        for seed in range(20):
            metrics = {which: run.test_metrics() for which, run in runs(row, seed).items()}
            if not all(metrics.values()):
                continue
            for (which, name), head in COLUMNS.items():
                if name in metrics[which]:
                    values = rows.setdefault(row, {}).setdefault(head, [])
                    values.append([100 * x for x in with_interval(metrics[which], name)])
    return rows


def table(rows: dict[str, dict[str, list[list[float]]]]) -> str:
    """Markdown: the mean over the seeds, the least and the greatest; below, how far the choice of
    test samples leaves a seed open: half of its 95 % interval, mean of all that have one."""
    lines = [f"| | seeds | {' | '.join(COLUMNS.values())} |",
             "|---" * (2 + len(COLUMNS)) + "|"]
    for name, row in rows.items():
        cells = [format_spread([value for value, _, _ in row[head]]) if head in row else "–"
                 for head in COLUMNS.values()]
        seeds = max(map(len, row.values()))
        lines.append(f"| {what(name)} (`{name}`) | {seeds} | {' | '.join(cells)} |")

    halves = {head: [(high - low) / 2 for row in rows.values()
                     for _, low, high in row.get(head, []) if high > low] for head in COLUMNS.values()}
    if any(halves.values()):
        cells = [f"±{sum(half) / len(half):.1f}" if half else "–" for half in halves.values()]
        lines.append(f"| half of a seed's 95 % interval | | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def bars(rows: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """A panel for each column: the mean of each row as a bar, a line from its least to its greatest
    seed, and across all rows a line at the mean of the unchanged model."""
    left, wide, right, high, gap = 160, 260, 44, 26, 30    # pixels; right: for the number
    panel_width, panel_height = left + wide + right + gap, gap * 2 + high * len(rows)
    num_rows = (len(COLUMNS) + 1) // 2
    sheet = Image.new("RGB", (2 * panel_width, num_rows * panel_height), BACK)
    draw = ImageDraw.Draw(sheet)

    for i, head in enumerate(COLUMNS.values()):
        x, y = i % 2 * panel_width + left, i // 2 * panel_height + gap
        columns = {name: [seed[0] for seed in row[head]] for name, row in rows.items()
                   if head in row}
        highest = max([1e-9, *(max(values) for values in columns.values())])
        draw.text((x, y - 6), f"{head}, %", INK, FONT, "ls")

        def x_of(value):
            return x + wide * max(0.0, value) / highest

        for j, name in enumerate(rows):
            middle, values = y + j * high + high // 2, columns.get(name)
            draw.text((x - 6, middle), name, INK, FONT, "rm")
            if not values:
                continue
            mean = sum(values) / len(values)
            colour = GREEN if name == "unchanged" else GREY
            draw.rectangle((x, middle - 8, x_of(mean), middle + 8), fill=colour)
            draw.line((x_of(min(values)), middle, x_of(max(values)), middle), INK, 2)
            draw.text((x + wide + right, middle), f"{mean:.1f}", INK, FONT, "rm")
            if name == "unchanged":
                draw.line((x_of(mean), y, x_of(mean), y + high * len(rows)), GREEN)
    sheet.save(path, optimize=True)


def write_tables() -> None:
    """Write the table and the bars of all that has finished by now."""
    rows = measured()
    if rows:
        (ROOT / OUT / "ablations.md").write_text(table(rows))
        (ROOT / OUT / "ablations.json").write_text(json.dumps(rows, indent=1))
        bars(rows, ROOT / OUT / "ablations.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", default=row_names(),
        help="rows to measure [all], or files *.diff")
    add("--seeds", type=int, default=3, help="seeds 0, 1, … [3]")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once [one a core]")
    args = parser.parse_args()

    start = time.perf_counter()
    rows = [copy_code(name) for name in args.names]
    todo = [run for row in rows for seed in range(args.seeds) for run in runs(row, seed).values()]
    make_all(todo, args.jobs, write_tables)
    print(f"{table(measured())}\nBars: {OUT / 'ablations.png'}\n"
          f"This call took {time.perf_counter() - start:,.0f} s.")


if __name__ == "__main__":
    run_main(main)
