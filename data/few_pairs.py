"""The recipe for a few thousand image-text pairs of your own, from a table to a report.

    python -m data.few_pairs reports.csv --out runs/mine --init_text MINILM

A few thousand pairs are too few to learn all at once. So the model learns in stages, each a run of
train.py in a folder below --out. The commands are printed: copy one to change a stage.

    images      masked image modelling, without texts: what the images look like
    contrast    ITC: which image belongs to which text. The text encoder stays as it is, here and
                below: it has read more elsewhere (--init_text). TF-IDF of the words helps it
    all         MLM, MIM, ITM and ITC, from these weights: for questions, classes, matching

The same command continues where it stopped. At the end stands what a linear model gets on the same
pairs. If your model is below it, it has learned nothing yet."""
import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from m3ae_mini.checkpoint import read_log
from m3ae_mini.config import require
from m3ae_mini.distributed import run

SIZE = 96                              # pixels
MODEL = f"--preset small --image_size {SIZE} --patch_size 12 --vit_blocks 6 --max_text_len 128"
CONTRAST = "--itc 1 --itc_pool mean --itc_words 200 --itc_soft 0.5"
STAGES = {                             # name: flags of train.py
    "images": "--mlm 0 --itm 0 --mim_layer 0 --epochs 100 --lr 1e-3 --eval_every 0",
    "contrast": f"--mlm 0 --mim 0 --itm 0 {CONTRAST} --text_lr_mult 0 --min_crop_area 0.5 "
                "--augment --epochs 24 --batch_size 128 --micro_batch 128 --eval_every 1000000",
    "all": f"{CONTRAST} --text_lr_mult 0 --vit_lr_mult 0.1 --mlm_ratio 0.3 --min_crop_area 0.5 "
           "--augment --epochs 24 --eval_every 0"}


def main() -> None:
    args = command_line().parse_args()
    data, out = Path(args.data), Path(args.out)
    require(data.exists(), f"there is no {data}: give a table, its folder, or a pack")
    require(not args.init_text or Path(args.init_text).is_dir(),
            f"--init_text {args.init_text} is no folder: give one of BERT or RoBERTa")

    # The pack.
    pack = data
    if not (data / "meta.json").is_file():
        pack = out / "pack"
        if not pack.exists():
            call("-m data.prepare table", f"--root {shlex.quote(str(data))}",
                 f"--size {SIZE} --out {shlex.quote(str(pack))}")

    # The stages; each starts from the one before.
    init = ["--init_text", args.init_text] if args.init_text else []
    if not args.init_text:
        print("the text encoder stays random, beside TF-IDF of the words: --init_text FOLDER, a "
              "small BERT such as all-MiniLM-L6-v2, gave better results (tests/README.md)")
    for name, flags in STAGES.items():
        stage = out / name
        if not any(line["split"] == "test" for line in read_log(stage)):
            call("train.py", MODEL, flags, f"--data {shlex.quote(str(pack))}",
                 shlex.join(init), f"--seed {args.seed} --device {args.device}",
                 f"--gpus {args.gpus}" if args.gpus else "",
                 f"--out {shlex.quote(str(stage))} --resume")
        init = ["--init", str(stage)]

    print("\nA linear model on the same pairs:")
    call("tests/experiments/linear.py", shlex.quote(str(pack)))
    print(f"\nThe model: {out / 'all'}. Its card: {out / 'all' / 'card.md'}")


def command_line() -> argparse.ArgumentParser:
    """The parser of all flags."""
    parser = argparse.ArgumentParser(prog="python -m data.few_pairs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", help="a table (CSV or JSON lines) of images and texts, or a pack of 96 pixels")
    add("--out", required=True, help="the folder of all stages")
    add("--init_text", default="", help="a folder of BERT or RoBERTa for the texts")
    add("--seed", type=int, default=0)
    add("--gpus", type=int, default=0, help="as in train.py")
    add("--device", default="auto", help="as in train.py")
    return parser


def call(*parts: str) -> None:
    """Print a command and run it; end as it does where it fails."""
    command = " ".join(filter(None, parts))
    print(f"\npython {command}", flush=True)
    done = subprocess.run([sys.executable, *shlex.split(command)])
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    run(main)
