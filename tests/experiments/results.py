"""What does pre-training bring to the three tasks? The figures of tests/README.md, over seeds.

    python tests/experiments/results.py phantoms
    python tests/experiments/results.py vqa_rad --vqa_rad DIR --medpix DIR --text MINILM
    python tests/experiments/results.py medpix --vqa_rad DIR --medpix DIR --text MINILM

phantoms: the data set that is drawn; vqa_rad: questions on real images; medpix: classes of real
images with their captions.

A table is made of runs of train.py and finetune.py, `--jobs` of them at once with one thread each.
A run that was stopped continues, and one that has finished is kept: the same command continues a
table. When it is complete, runs/tables/NAME.md and NAME.json hold it.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.few_pairs import BATCH, MODEL, SIZE, STAGES
from m3ae_mini.config import require
from m3ae_mini.distributed import run as run_main

OUT = Path("runs/tables")


# ----------------------------------------------------------------------------------------- the runs

class Run:
    """A run of train.py or finetune.py, in a folder below runs/tables.

    after: the run whose weights or tokenizer it needs; packs: {folder: flags of data.prepare};
    code: the folder of the script, another one in ablate.py."""

    def __init__(self, name: str, command: str, after: "Run | None" = None,
                 packs: dict[str, str] | None = None, code: Path = ROOT):
        self.out = OUT / name
        self.command = command
        self.after = after
        self.packs = packs or {}
        self.code = code

    def chain(self) -> "list[Run]":
        """The runs that it depends on, in their order, then itself."""
        return [*(self.after.chain() if self.after else []), self]

    def test_metrics(self) -> dict | None:
        """The last line of metrics.jsonl of the test split; None where the run has not finished."""
        log = ROOT / self.out / "metrics.jsonl"
        text = log.read_text() if log.is_file() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        return next((line for line in reversed(lines) if line["split"] == "test"), None)

    def make(self) -> None:
        """Run it to its end, unless it has finished. What it prints goes to a file beside its
        folder."""
        for pack, flags in self.packs.items():             # later runs need them, too
            if not (ROOT / pack).exists():
                self.call("-m", f"data.prepare {flags} --out {pack}")
        if self.test_metrics():
            return
        script, _, flags = self.command.partition(" ")
        self.call(self.code / script, f"{flags} --out {self.out} --resume")
        require(self.test_metrics(),
                f"{self.out} was stopped before its end: the same command continues it")

    def call(self, script: Path | str, flags: str) -> None:
        """Run a script with one thread and append what it prints to a file. UserError where it
        fails."""
        log = ROOT / f"{self.out}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            done = subprocess.run(
                [sys.executable, script, *shlex.split(flags)],
                cwd=ROOT, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
        require(not done.returncode, f"{script} {flags} failed: read {log}")


def make_all(runs: list[Run], jobs: int, after_each: Callable = lambda: None) -> None:
    """Make all runs, `jobs` at once, in their order, but none before the one that it needs."""
    waiting = list({run.out: run for one in runs for run in one.chain()}.values())
    running, finished = {}, set()
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            ready = [run for run in waiting if not run.after or run.after.out in finished]
            for run in ready[:jobs - len(running)]:
                waiting.remove(run)
                running[pool.submit(run.make)] = run
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                finished.add(running.pop(future).out)
                future.result()                            # or its UserError
                after_each()


# --------------------------------------------------------------------------- which runs a table has

Cell = tuple[str, str, Run]                                # task, row, run

LABELS = {"vqa": 900, "cls": 300, "irtr": 400}             # training samples on phantoms
QUESTIONS = "--max_text_len 48 --epochs 25 --eval_every 430"   # five epochs, of finetune.py vqa
CAPTIONS = "--epochs 6 --dropout 0.3 --eval_every 98"          # two epochs, of finetune.py cls


def task_on_phantoms(task: str, seed: int) -> str:
    """The command of fine-tuning with few labels, validated only at its end."""
    return (f"finetune.py {task} --device cpu --seed {seed} --train_samples {LABELS[task]} "
            "--eval_every 100000")


def phantoms(args: argparse.Namespace, seed: int) -> Iterator[Cell]:
    """Few labels, after the default pre-training with the same seed."""
    start = Run(f"phantoms/pretrain-{seed}", f"train.py --device cpu --seed {seed}")
    scratch = (f"--init none --tokenizer {start.out} "
               "--lr 1e-3 --head_lr_mult 3 --fusion_lr_mult 1")      # random weights need more
    rows = {"pre-trained": f"--init {start.out}",
            "from scratch": scratch,
            "blind": f"--init {start.out} --blind"}
    for task in LABELS:
        for row, flags in rows.items():
            name = f"phantoms/{task}-{row.replace(' ', '-')}-{seed}"
            yield task, row, Run(name, f"{task_on_phantoms(task, seed)} {flags}", start)


def real(args: argparse.Namespace, seed: int, name: str) -> Iterator[Cell]:
    """VQA-RAD's questions, or the part of the body from MedPix's images and captions, after the
    stages of data.few_pairs on MedPix. All of MedPix is without VQA-RAD's images and patients. Both
    encoders stay frozen. Without the stages only the text encoder has learned before. Seeds and
    tables share the stages."""
    rad, medpix, text = (folder(args, flag) for flag in ("vqa_rad", "medpix", "text"))
    medpix_flags = f"medpix --root {medpix} --exclude {rad}/images"
    task, pack_flags, task_flags = {
        "vqa_rad": ("vqa", f"vqa_rad --root {rad}", QUESTIONS),
        "medpix": ("cls", medpix_flags, CAPTIONS)}[name]
    packs = {"packs/medpix-96": f"{medpix_flags} --size {SIZE}",
             f"packs/{name}-{task}-96": f"{pack_flags} --task {task} --size {SIZE}"}

    start = None
    for stage, flags in STAGES.items():
        init = f"--init {start.out}" if start else f"--init_text {text}"
        micro_batch = f"--micro_batch {BATCH}" if stage == "contrast" else ""
        start = Run(f"few_pairs/{stage}", f"train.py {MODEL} {flags} {micro_batch} {init} "
                                          "--device cpu --data packs/medpix-96", start, packs)
    rows = {"pre-trained": f"--init {start.out}",
            "without the stages": f"--init none --init_text {text}",
            "blind": f"--init {start.out} --blind"}
    for i, (row, init) in enumerate(rows.items()):
        yield task, row, Run(
            f"{name}/{i}-{seed}",
            f"finetune.py {task} {MODEL} {init} --device cpu --seed {seed} "
            f"--data packs/{name}-{task}-96 --text_lr_mult 0 --vit_lr_mult 0 --batch_size 32 "
            f"--lr 5e-4 {task_flags}", start)


def folder(args: argparse.Namespace, name: str) -> str:
    """The folder of --name, as an absolute path, quoted for a command line."""
    path = getattr(args, name)
    require(path, f"this table needs --{name}, the folder of that data set")
    return shlex.quote(os.path.abspath(path))


TABLES = {"phantoms": phantoms, "vqa_rad": partial(real, name="vqa_rad"),
          "medpix": partial(real, name="medpix")}


# ---------------------------------------------------------------------------------------- the table

def make_table(cells: list[Cell]) -> tuple[str, dict]:
    """Finished runs of all seeds -> Markdown, and {task: {row: {metric: [(value, low, high)]}}}.

    A cell is as format_seeds has it. Figures of single classes are left out."""
    found: dict = {}
    for task, row, run in cells:
        logged = run.test_metrics()
        for name, value in logged.items():
            other = ("step", "split", "loss", "score", "most_frequent_label")
            if (name not in other and " " not in name and not name.startswith(("low_", "high_"))):
                metrics = found.setdefault(task, {}).setdefault(row, {})
                metrics.setdefault(name, []).append(with_interval(logged, name))

    lines = []
    for task, rows in found.items():
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        lines += ["", f"| {task} | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
        for row, metrics in rows.items():
            shown = [format_seeds(metrics[name], 1 if name.endswith("median_rank") else 100)
                     if name in metrics else "–" for name in names]
            lines.append(f"| {row} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n", found


def with_interval(logged: dict, name: str) -> tuple[float, float, float]:
    """A test metric as logged, and the ends of its 95 % interval."""
    value = logged[name]
    return value, logged.get(f"low_{name}", value), logged.get(f"high_{name}", value)


def format_seeds(seeds: list[tuple[float, float, float]], scale: float = 100) -> str:
    """(value, low, high) of each seed -> "72.0 (70.0–75.0) ±2.1": mean, least and greatest value,
    and half the width of a seed's 95 % interval by bootstrap, the mean over seeds."""
    half = sum(scale * (high - low) / 2 for _, low, high in seeds) / len(seeds)
    return format_spread([scale * value for value, _, _ in seeds]) + f" ±{half:.1f}" * (half > 0)


def format_spread(values: list[float]) -> str:
    """Values of all seeds -> "72.0 (70.0–75.0)": mean, least and greatest."""
    return f"{sum(values) / len(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", choices=TABLES)
    add("--seeds", type=int, default=3, help="seeds 0, 1, … [3]")
    add("--tasks", nargs="+", choices=tuple(LABELS), default=tuple(LABELS),
        help="only the part of the table for these tasks [all]")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once [one a core]")
    add("--vqa_rad", metavar="DIR", help="the folder of VQA-RAD")
    add("--medpix", metavar="DIR", help="the folder of MedPix 2.0")
    add("--text", metavar="DIR", help="the folder of all-MiniLM-L6-v2")
    args = parser.parse_args()

    start = time.perf_counter()
    cells = [cell for seed in range(args.seeds) for cell in TABLES[args.name](args, seed)
             if cell[0] in args.tasks]
    require(cells, f"the table {args.name} has no rows for {', '.join(args.tasks)}: leave --tasks "
            "out")
    make_all([run for _, _, run in cells], args.jobs)
    text, found = make_table(cells)
    (ROOT / OUT / f"{args.name}.md").write_text(text)
    (ROOT / OUT / f"{args.name}.json").write_text(json.dumps(found, indent=1))
    print(f"{text}\nThis call took {time.perf_counter() - start:,.0f} s.")


if __name__ == "__main__":
    run_main(main)
