"""The recipe for a few thousand image-text pairs of your own, from a table to a report.

    python -m data.few_pairs reports.csv --out runs/mine --init_text MINILM

A few thousand pairs are too few to learn all at once. So the model learns in stages, each a run of
train.py in a folder below --out. The commands are printed: copy one to change a stage.

    images      masked image modelling, without texts: what the images look like
    contrast    ITC: which image belongs to which text. Here and below the text encoder is frozen:
                --init_text loads one that has learned from much more text; without it, it is
                random. ITC also uses TF-IDF of the words
    all         MLM, MIM, ITM and ITC, from these weights. On 1,556 pairs recall rises by 2 or 3
                points; the other losses are far from their end

The same command continues where it stopped. At the end stand the figures of a linear model on
the same pairs, and those of the stages. If those are lower, training has not paid off yet."""
import argparse
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from data.pack import Pack
from data.pair_metrics import PAIR_METRICS
from m3ae_mini.checkpoint import read_log, saved_settings
from m3ae_mini.config import read_json, require
from m3ae_mini.distributed import run

SIZE = 96                              # pixels
BATCH = 128                            # pairs of a step of "contrast"
FEW = 1000                             # training pairs; fewer were not measured
MODEL = f"--preset small --image_size {SIZE} --patch_size 12 --vit_blocks 6 --max_text_len 128"
CONTRAST = "--itc 1 --itc_pool mean --itc_words 200 --itc_soft 0.5"
# ITC's validation loss rises while its ranking still gets better. So there is one validation, at
# the end, and best.pt is the last step.
VALIDATE_ONCE = "--eval_every 1000000"
STAGES = {                             # name: flags of train.py
    "images": f"--mlm 0 --itm 0 --mim_layer 0 --epochs 100 --lr 1e-3 {VALIDATE_ONCE}",
    "contrast": f"--mlm 0 --mim 0 --itm 0 {CONTRAST} --text_lr_mult 0 --min_crop_area 0.5 "
                f"--augment --epochs 24 --batch_size {BATCH} {VALIDATE_ONCE}",
    "all": f"--mim_layer 1 {CONTRAST} --text_lr_mult 0 --vit_lr_mult 0.1 --mlm_ratio 0.3 "
           f"--min_crop_area 0.5 --augment --epochs 8 {VALIDATE_ONCE}"}


def main() -> None:
    args = command_line().parse_args()
    data, out = Path(args.data), Path(args.out)
    require(data.exists(), f"there is no {data}: give a table, its folder, or a pack")
    require(not args.init_text or Path(args.init_text).is_dir(),
            f"--init_text {args.init_text} is no folder: give one of BERT or RoBERTa")
    require(BATCH % max(1, args.gpus) == 0, f"--gpus {args.gpus}: use a divisor of {BATCH}")
    keep_settings(out / "few_pairs.json", {"data": str(data), "init_text": args.init_text,
                                           "seed": args.seed})

    # The pack.
    pack = data
    if not (data / "meta.json").is_file():
        pack = out / "pack"
        if not pack.exists():
            call("-m data.prepare table", f"--root {shlex.quote(str(data))}",
                 f"--size {SIZE} --out {shlex.quote(str(pack))}")
    check_pack(pack)

    # The stages; each starts from the one before.
    init = ["--init_text", args.init_text] if args.init_text else []
    if not args.init_text:
        print("the text encoder stays random, so ITC relies on TF-IDF of the words. --init_text "
              "FOLDER, a small BERT such as all-MiniLM-L6-v2, gave better results "
              "(tests/README.md)")
    share = BATCH // max(1, args.gpus)
    for name, flags in STAGES.items():
        stage = out / name
        if name == "contrast":
            flags += f" --micro_batch {share}"
            if share < BATCH:
                print(f"{args.gpus} processes: each pair has {share - 1} negatives, not "
                      f"{BATCH - 1}")
        if not is_finished(stage):
            call("train.py", MODEL, flags, f"--data {shlex.quote(str(pack))}",
                 shlex.join(init), f"--seed {args.seed} --device {args.device}",
                 f"--gpus {args.gpus}" if args.gpus else "",
                 f"--out {shlex.quote(str(stage))} --resume")
        require(is_finished(stage), f"the stage {name} was stopped: the same command continues it")
        init = ["--init", str(stage)]

    print("\nA linear model on the same pairs:")
    call("tests/experiments/linear.py", shlex.quote(str(pack)),
         shlex.join(["--init_text", args.init_text] if args.init_text else []))
    print("\nBeside it, by the same measures:\n")
    print("| pairs, % |", " | ".join(PAIR_METRICS.values()), "|")
    print("|---" * (1 + len(PAIR_METRICS)) + "|")
    for name in STAGES:
        if row := test_figures(out / name):
            print(f"| test: after the stage {name} | {row} |")
    print(f"\nThe model: {out / 'all'}")


def check_pack(pack: Path) -> None:
    """UserError where the pack's images have another size; a warning where it has few pairs."""
    opened = Pack(pack)
    require(opened.size == SIZE, f"{pack} holds images of {opened.size} pixels: prepare it with "
            f"--size {SIZE}, or give the table")
    count = len(opened.split["train"])
    if count < FEW:
        print(f"warning: {count:,} training pairs are few: the recipe was chosen on 1,556, and may "
              "do worse than the linear model below")


def test_figures(stage: Path) -> str:
    """The stage's figures of test pairs with their intervals, as cells; "" where it has none."""
    tested = [line for line in read_log(stage) if line["split"] == "test" and "above" in line]
    if not tested:
        return ""
    cells = []
    for name in PAIR_METRICS:
        value, low, high = (100 * tested[-1][key + name] for key in ("", "low_", "high_"))
        cells.append(f"{value:.1f} ({low:.1f} to {high:.1f})")
    return " | ".join(cells)


def keep_settings(path: Path, settings: dict) -> None:
    """Save the settings. UserError if an earlier call here had others: stages would mix."""
    saved = read_json(path)
    changed = ", ".join(f"{name} {saved.get(name)!r} (now {value!r})"
                        for name, value in settings.items() if saved and saved.get(name) != value)
    require(not changed, f"{path.parent} was begun with {changed}: give the same, or another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))


def is_finished(stage: Path) -> bool:
    """Has it validated its last step and saved best.pt?"""
    steps = (saved_settings(stage) or {}).get("train", {}).get("steps")
    log = read_log(stage)
    validated = any(line["split"] == "val" and line["step"] == steps for line in log)
    return validated and (stage / "best.pt").is_file()


def command_line() -> argparse.ArgumentParser:
    """The parser of all flags."""
    parser = argparse.ArgumentParser(prog="python -m data.few_pairs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", help="a table (CSV or JSON lines) of images and texts, or a pack of 96 pixels")
    add("--out", required=True, help="the folder of all stages")
    add("--init_text", default="", help="a folder of BERT or RoBERTa for the texts")
    add("--seed", type=int, default=0, help="random seed [0]")
    add("--gpus", type=int, default=0, help="as in train.py")
    add("--device", default="auto", help="as in train.py")
    return parser


def call(*parts: str) -> None:
    """Print a command and run it; exit with its status if it fails.

    A signal to stop is left to the command, which ends its step and saves."""
    command = " ".join(filter(None, parts))
    print(f"\npython {command}", flush=True)
    with subprocess.Popen([sys.executable, *shlex.split(command)]) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        while process.returncode is None:
            try:
                process.wait()
            except KeyboardInterrupt:  # a terminal has sent it to the command, too
                continue
        signal.signal(signal.SIGTERM, before)
    if process.returncode:
        sys.exit(process.returncode)


if __name__ == "__main__":
    run(main)
