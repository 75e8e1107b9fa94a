"""The README's tables: what pre-training brings to the three tasks, over several seeds.

    python tests/tables.py phantoms                                         the embedded data set
    python tests/tables.py vqa_rad --vqa_rad DIR --medpix DIR --text DIR    questions on real pictures
    python tests/tables.py medpix --medpix DIR                              body parts, retrieval, real pictures

A table is made of runs of train.py and finetune.py, `--jobs` of them at once with one thread each. A run that was
stopped goes on and one that has finished is kept, so the same command goes on with a table. runs/tables/NAME.md and
NAME.json hold it when it is whole.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from m3ae_mini import loop
from m3ae_mini.config import UserError

OUT = Path("runs/tables")


def phantoms(args, seed):
    """Few labels, each seed after the default pre-training by the same seed."""
    start = Run(f"phantoms/pretrain-{seed}", f"train.py --device cpu --seed {seed}")
    rates = "--lr 1e-3 --head_lr 3 --fusion_lr 1"          # random weights take higher ones
    for task, samples in ("vqa", 900), ("cls", 300), ("irtr", 400):
        common = f"finetune.py {task} --device cpu --seed {seed} --train_samples {samples} --eval_every 100000"
        pretrained, none = f"--init {start.out}", f"--init none --tokenizer {start.out}"
        for row, flags in (("pre-trained", pretrained), ("from scratch", f"{none} {rates}"),
                           ("blind", f"{pretrained} --blind")):
            yield task, row, Run(f"phantoms/{task}-{row.replace(' ', '-')}-{seed}", f"{common} {flags}", start)


def vqa_rad(args, seed):
    """VQA-RAD after pre-training on MedPix (without the pictures the two share) and on VQA-RAD's training questions
    with their answers; with --text also from that text encoder. The seeds share the pre-training."""
    folder, medpix = given(args, "vqa_rad"), given(args, "medpix")
    packs = {"packs/medpix-96": f"medpix --root {medpix} --exclude {folder}/images --size 96",
             "packs/rad-pretrain-96": f"vqa_rad --root {folder} --task pretrain --size 96",
             "packs/rad-vqa-96": f"vqa_rad --root {folder} --task vqa --size 96"}
    size = "--device cpu --image_size 96 --patch_size 16 --dropout 0.1"
    learn = f"train.py {size} --data packs/medpix-96,packs/rad-pretrain-96 {RAD_PRETRAIN}"
    start = Run("vqa_rad/pretrain", learn, packs=packs)
    ask = f"finetune.py vqa {size} --data packs/rad-vqa-96 --seed {seed} {RAD_TUNE}"
    none = f"--init none --tokenizer {start.out}"
    yield "vqa", "pre-trained", Run(f"vqa_rad/pre-trained-{seed}", f"{ask} --init {start.out}", start)
    yield "vqa", "from scratch", Run(f"vqa_rad/from-scratch-{seed}", f"{ask} {none}", start)
    yield "vqa", "blind", Run(f"vqa_rad/blind-{seed}", f"{ask} {none} --blind", start)


TABLES = {"phantoms": phantoms, "vqa_rad": vqa_rad}


def given(args, name):
    """The folder that --name says, quoted for a command line."""
    if not getattr(args, name):
        raise UserError(f"the table {args.name} needs --{name}, the folder of the data")
    return shlex.quote(os.path.abspath(getattr(args, name)))


class Run:
    """A run of train.py or finetune.py in its folder below runs/tables, after another whose weights or tokenizer it
    needs, and after the packs it reads are there: {folder: flags of data.prepare}."""

    def __init__(self, name, command, after=None, packs=None):
        self.out, self.command, self.after, self.packs = OUT / name, command, after, packs or {}

    def found(self):
        """The line of metrics.jsonl that the test split gave, or None where the run has not finished."""
        log = ROOT / self.out / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        return next((line for line in lines if line["split"] == "test"), None)

    def make(self):
        """Run it to its end, unless it has got there before; what it prints stands in a file beside its folder."""
        if not self.found():
            call(f"{self.command} --out {self.out} --resume", f"{self.out}.log")


def call(command, log):
    """Run a script of the project with one thread. UserError, which names the log, where it fails."""
    Path(ROOT / log).parent.mkdir(parents=True, exist_ok=True)
    with open(ROOT / log, "ab") as file:
        done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, stdout=file, stderr=file,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"{command} failed: read {log}")


def make_all(runs, jobs):
    """Packs first, then the runs that others start from, then the rest, `jobs` at once."""
    for pack, flags in {pack: flags for run in runs for pack, flags in run.packs.items()}.items():
        if not (ROOT / pack).exists():
            call(f"-m data.prepare {flags} --out {pack}", f"{pack}.log")
    starts = {run.after.out: run.after for run in runs if run.after}
    for wave in starts.values(), runs:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(Run.make, wave))


def as_table(cells):
    """[(task, row, run)] over all seeds -> Markdown, and the same as plain values. A cell is the mean over the seeds
    with the least and the greatest."""
    found = {}
    for task, row, run in cells:
        for name, value in run.found().items():
            if name not in ("step", "split", "loss", "score"):
                found.setdefault(task, {}).setdefault(row, {}).setdefault(name, []).append(value)
    lines = []
    for task, rows in found.items():
        figures = list(dict.fromkeys(name for row in rows.values() for name in row))
        lines += ["", f"| {task} | {' | '.join(figures)} |", "|---" * (1 + len(figures)) + "|"]
        for row, values in rows.items():
            shown = (f"{100 * sum(v) / len(v):.1f} ({100 * min(v):.1f} to {100 * max(v):.1f})"
                     for v in map(values.get, figures))
            lines.append(f"| {row} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n", found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TABLES)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, … [3]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once [one a core]")
    parser.add_argument("--vqa_rad", metavar="DIR", help="VQA-RAD's folder")
    parser.add_argument("--medpix", metavar="DIR", help="MedPix 2.0's folder")
    parser.add_argument("--text", metavar="DIR", help="a Hugging Face folder of a text encoder")
    args, start = parser.parse_args(), time.perf_counter()
    cells = [cell for seed in range(args.seeds) for cell in TABLES[args.name](args, seed)]
    make_all([run for _, _, run in cells], args.jobs)
    text, found = as_table(cells)
    (ROOT / OUT / f"{args.name}.md").write_text(text)
    (ROOT / OUT / f"{args.name}.json").write_text(json.dumps(found, indent=1))
    print(f"{text}\nThis call took {time.perf_counter() - start:,.0f} s.")


if __name__ == "__main__":
    loop.run(main)
