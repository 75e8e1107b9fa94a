"""The README's tables: what pre-training brings to the three tasks, over several seeds.

    python tests/tables.py phantoms                                 the embedded data set
    python tests/tables.py vqa_rad --vqa_rad DIR --medpix DIR       questions on real images
    python tests/tables.py medpix --medpix DIR                      classes and retrieval on real images

A table is made of runs of train.py and finetune.py, `--jobs` of them at once with one thread each. A run that
was stopped goes on and one that has finished is kept, so the same command goes on with a table. When it is
whole, runs/tables/NAME.md and NAME.json hold it.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from m3ae_mini import loop
from m3ae_mini.config import require

OUT = Path("runs/tables")


LABELS = {"vqa": 900, "cls": 300, "irtr": 400}           # training samples of each task on phantoms


def on_phantoms(task, seed):
    """The command of fine-tuning with few labels, validation at the end alone."""
    return (f"finetune.py {task} --device cpu --seed {seed} --train_samples {LABELS[task]} "
            "--eval_every 100000")


def phantoms(args, seed):
    """Few labels, each seed after the default pre-training by the same seed."""
    start = Run(f"phantoms/pretrain-{seed}", f"train.py --device cpu --seed {seed}")
    rates = "--lr 1e-3 --head_lr_mult 3 --fusion_lr_mult 1"          # random weights take higher ones
    pretrained, none = f"--init {start.out}", f"--init none --tokenizer {start.out}"
    for task in LABELS:
        for row, flags in (("pre-trained", pretrained), ("from scratch", f"{none} {rates}"),
                           ("blind", f"{pretrained} --blind")):
            name = f"phantoms/{task}-{row.replace(' ', '-')}-{seed}"
            yield task, row, Run(name, f"{on_phantoms(task, seed)} {flags}", start)


REAL = "--device cpu --image_size 96 --patch_size 16"      # the tiny preset for real images
READ = "--tokenizer_vocab 2000 --hard_negatives 0.5 --mlm_ratio 0.25 --dropout 0.1"        # pre-training on real captions


def vqa_rad(args, seed):
    """VQA-RAD, after pre-training on MedPix (without the images that both have) and on VQA-RAD's training
    questions with their answers. The seeds share the pre-training. With --text, the same from scratch but for
    the text encoder."""
    rad, medpix = folder(args, "vqa_rad"), folder(args, "medpix")
    packs = {"packs/medpix-96": f"medpix --root {medpix} --exclude {rad}/images --size 96",
             "packs/rad-captions-96": f"vqa_rad --root {rad} --task pretrain --size 96",
             "packs/rad-96": f"vqa_rad --root {rad} --task vqa --size 96"}
    start = Run("vqa_rad/pretrain", f"train.py {REAL} --data packs/medpix-96,packs/rad-captions-96 "
                f"{READ} --steps 2400 --eval_every 600", packs=packs)
    common = (f"finetune.py vqa {REAL} --seed {seed} --data packs/rad-96 --batch_size 16 --micro_batch 16 "
              "--grad_clip 0 --dropout 0.2 --eval_every 688")
    rates = "--epochs 50 --lr 3e-4 --head_lr_mult 5 --fusion_lr_mult 2"
    none = f"--init none --tokenizer {start.out} {rates}"
    pretrained = f"--init {start.out} {rates}"
    rows = {"pre-trained": pretrained, "from scratch": none, "blind": f"{pretrained} --blind"}
    if args.text:
        rows["from scratch, text encoder of --text"] = (
            f"--init none --init_text {folder(args, 'text')} "
            "--epochs 20 --lr 1e-4 --vit_lr_mult 4 --head_lr_mult 15 --fusion_lr_mult 6")         # ten times the weights
    for i, (row, flags) in enumerate(rows.items()):
        yield "vqa", row, Run(f"vqa_rad/{i}-{seed}", f"{common} {flags}", start)


def medpix(args, seed):
    """The part of the body from image and caption, and retrieval, after pre-training on the same training
    images. The seeds share the pre-training; nothing is drawn in zero-shot retrieval."""
    packs = {f"packs/medpix-{task}-96": f"medpix --root {folder(args, 'medpix')} --task {task} --size 96"
             for task in ("pretrain", "cls", "irtr")}
    start = Run("medpix/pretrain", f"train.py {REAL} --data packs/medpix-pretrain-96 {READ} "
                "--steps 1200 --eval_every 300", packs=packs)
    none = f"--init none --tokenizer {start.out}"
    pretrained = f"--init {start.out}"
    rows = {"pre-trained": pretrained, "from scratch": none, "blind": f"{pretrained} --blind"}
    settings = {"cls": "--dropout 0.2 --epochs 15 --lr 1e-3 --head_lr_mult 3 --fusion_lr_mult 1 --eval_every 78",
                "irtr": "--dropout 0.2 --epochs 5"}
    for task, more in settings.items():
        common = f"finetune.py {task} {REAL} --seed {seed} --data packs/medpix-{task}-96 {more}"
        for row, flags in rows.items():
            yield task, row, Run(f"medpix/{task}-{row.replace(' ', '-')}-{seed}", f"{common} {flags}", start)
    if not seed:
        zero = f"{common} {rows['pre-trained']} --zero_shot"
        yield "irtr", "zero-shot", Run("medpix/zero-shot", zero, start)


def folder(args, name):
    """What --name says, as an absolute path that a command line can hold."""
    require(getattr(args, name), f"this table needs --{name}, the folder of that data set")
    return shlex.quote(os.path.abspath(getattr(args, name)))


TABLES = {"phantoms": phantoms, "vqa_rad": vqa_rad, "medpix": medpix}


class Run:
    """A run of train.py or finetune.py in its folder below runs/tables: after another, whose weights or
    tokenizer it needs, and after packs, {folder: flags of data.prepare}. code: the folder of the script."""

    def __init__(self, name, command, after=None, packs={}, code=ROOT):
        self.out, self.command, self.after, self.packs, self.code = OUT / name, command, after, packs, code

    def found(self):
        """The line of metrics.jsonl that the test split gave, or None where the run has not finished."""
        log = ROOT / self.out / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        return next((line for line in lines if line["split"] == "test"), None)

    def make(self):
        """Run it to its end, if it has not got there. What it prints goes to a file beside its folder."""
        if self.found():
            return
        for pack, flags in self.packs.items():
            if not (ROOT / pack).exists():
                self.call("-m", f"data.prepare {flags} --out {pack}")
        self.call(self.code / self.command.split()[0],
                  f"{self.command.partition(' ')[2]} --out {self.out} --resume")
        require(self.found(), f"{self.out} was stopped before its end: the same command goes on with it")

    def call(self, script, flags):
        """Run a script with one thread, its output to the end of a file. UserError where it fails."""
        log = ROOT / f"{self.out}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            done = subprocess.run([sys.executable, script, *shlex.split(flags)], cwd=ROOT, stdout=file,
                                  stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
        require(not done.returncode, f"{script} {flags} failed: read {log}")


def make_all(runs, jobs, after_each=lambda: None):
    """All runs, `jobs` at once, the first in the list first, but none before the one that it starts from."""
    waiting = list({run.out: run for one in runs for run in (one.after, one) if run}.values())
    going, finished = {}, set()
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or going:
            ready = [run for run in waiting if not run.after or run.after.out in finished]
            for run in ready[:jobs - len(going)]:
                waiting.remove(run)
                going[pool.submit(run.make)] = run
            for future in wait(going, return_when=FIRST_COMPLETED).done:
                finished.add(going.pop(future).out)
                future.result()                            # or its UserError
                after_each()


def as_table(cells):
    """[(task, row, run)] over all seeds -> Markdown, and the same as plain values. A cell is the mean over
    the seeds with the least and the greatest."""
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
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TABLES)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, … [3]")
    parser.add_argument("--tasks", nargs="+", choices=("vqa", "cls", "irtr"), default=("vqa", "cls", "irtr"),
                        help="the part of the table that these tasks give [all of it]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once [one a core]")
    for name in "vqa_rad", "medpix":
        parser.add_argument(f"--{name}", metavar="DIR", help="the folder of this data set")
    parser.add_argument("--text", metavar="DIR", help="vqa_rad: a Hugging Face folder, for one more row")
    args, start = parser.parse_args(), time.perf_counter()
    cells = [cell for seed in range(args.seeds) for cell in TABLES[args.name](args, seed)
             if cell[0] in args.tasks]
    require(cells, f"the table {args.name} has no row of {', '.join(args.tasks)}: leave --tasks out")
    make_all([run for _, _, run in cells], args.jobs)
    text, found = as_table(cells)
    (ROOT / OUT / f"{args.name}.md").write_text(text)
    (ROOT / OUT / f"{args.name}.json").write_text(json.dumps(found, indent=1))
    print(f"{text}\nThis call took {time.perf_counter() - start:,.0f} s.")


if __name__ == "__main__":
    distributed.run(main)
