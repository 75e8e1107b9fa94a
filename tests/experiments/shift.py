"""Is a run robust to less contrast, more blur and noise? Its accuracy on shifted phantoms.

    python tests/experiments/shift.py runs/vqa
    python tests/experiments/shift.py runs/tables/ablations/*/vqa-pre-trained-0

Each run of finetune.py vqa or cls on phantoms is tested on the test images as they are and in three
strengths of the shift (SHIFTS in data/phantom_images.py). Questions and scenes stay the same.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import m3ae_mini                       # before torch: it sets how threads wait

from data.labels import label_ids, list_labels
from data.pack import Pack
from data.phantom_images import SHIFTS
from data.predict import LoadedRun, load_run
from data.prepare import phantom_pack
from data.task_metrics import figure_intervals, figures, predict_table
from m3ae_mini.config import RunConfig, TrainConfig, require
from m3ae_mini.distributed import DistEnv
from m3ae_mini.distributed import run as run_main
from m3ae_mini.loader import Samples


def accuracy(run: LoadedRun, shift: int, dist_env: DistEnv) -> tuple[float, float, float]:
    """Accuracy of a run on the shifted test images, and its 95 % interval: value, low, high."""
    task = run.cfg.task
    pack = Pack(phantom_pack(run.cfg.image_size, task, shift))
    require(set(list_labels([pack], task, "train")) <= set(run.labels),
            f"{run.folder} was not fine-tuned on phantoms: give a run that was")
    samples = Samples([pack], "test", run.tokenizer, run.cfg, TrainConfig())
    samples.label_ids = label_ids(samples, run.labels)
    table = predict_table(run.model, samples, run.labels, dist_env, samples.n, ("match", 0))
    return figures(table, task)["acc"], *figure_intervals(table, task)["acc"]


def row(folder: str, dist_env: DistEnv) -> str:
    """A line of the table: the run, then its accuracy without a shift and in each strength."""
    run = load_run(folder, dist_env.device)
    require(run.cfg.task in ("vqa", "cls") and run.labels,
            f"{folder} is not a run of finetune.py vqa or cls without --blind: give one")
    cells = [accuracy(run, shift, dist_env) for shift in (0, *SHIFTS)]
    shown = [f"{100 * value:.1f} ({100 * low:.1f}–{100 * high:.1f})"
             for value, low, high in cells]
    return f"| {folder} | {' | '.join(shown)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder of finetune.py vqa or cls")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu [auto]")
    args = parser.parse_args()

    # float32 everywhere, so that a machine without bf16 gives the same figures.
    dist_env = DistEnv(RunConfig(device=args.device, dtype="float32"))
    print("| test accuracy, %: run | no shift | "
          + " | ".join(f"shift {shift}" for shift in SHIFTS) + " |")
    print("|---" * (2 + len(SHIFTS)) + "|")
    for folder in args.runs:
        print(row(folder, dist_env), flush=True)


if __name__ == "__main__":
    run_main(main)
