"""The report of a pre-training: each metric on the test split, its interval, a trivial baseline."""
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.baselines import trivial_baselines
from data.card import write_card
from data.pair_metrics import PAIR_METRICS, chance_figures, pair_figures, pair_intervals
from data.scores import intervals
from data.task_metrics import clusters
from m3ae_mini import M3AE, checkpoint, evaluate
from m3ae_mini.distributed import DistEnv
from m3ae_mini.loader import VAL_SEED, Samples, load, validation_micro_batches
from m3ae_mini.objectives import loss_weights


def report_pretraining(model: M3AE, train: Samples, out: Path, limit: int,
                       dist_env: DistEnv) -> None:
    """Test the best checkpoint of the run `out` on at most `limit` samples; log and print it."""
    best = checkpoint.load_best(out, dist_env)
    model.load_state_dict(best["model"])
    test = Samples(train.packs, "test", train.tokenizer, train.cfg, train.train_cfg)
    indices, table = evaluate.pretraining_rows(model, test, dist_env, limit)
    if not dist_env.is_main:
        return

    metrics = evaluate.means(table)
    metrics["score"] = evaluate.score(metrics, loss_weights(model.cfg))
    ranges = intervals(lambda weights: evaluate.means(table, weights), clusters(test, indices))
    metrics |= trivial_baselines(train, test, limit, dist_env.device)
    pairs = NO_PAIRS
    if "itc" in model.objectives:
        pairs = pair_report(model, train, test, min(limit, MOST_PAIRS), dist_env)
    checkpoint.Log(out, math.inf).write(best["step"], "test", **metrics, **pairs.figures,
                                        **log_names(ranges | pairs.ranges))
    print(f"\nOn {len(indices):,} test samples (step {best['step']:,}), with 95 % intervals:")
    print(pretraining_table(metrics, ranges))
    for name, value in pairs.figures.items():
        print(table_line(PAIR_METRICS[name], SHARE, value, pairs.ranges[name],
                         f"chance: {pairs.chance[name]:.1%}"))
    if pairs.figures:
        print(f"  The last four: by ITC, with the mean feature of each image and {SHIFTS ** 2} "
              "crops of it (data/pair_metrics.py)")
    write_card(out, train.packs)
    print(f"Plots: {out / 'plots'}")
    print(f"Model card: {out / 'card.md'}")


def log_names(ranges: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Intervals as the log has them: {"low_acc": …, "high_acc": …}."""
    return {f"{end}_{name}": values[i] for i, end in enumerate(("low", "high"))
            for name, values in ranges.items()}


# One line per metric: its name, how it is printed, its title, and a note.
POINTS, SHARE, ERROR = "{:+.1f}", "{:.1%}", "{:.3f}"
LINES = (
    ("mlm_acc", SHARE, "masked tokens, accuracy",
     "most frequent token: {most_frequent_token:.1%}"),
    ("mlm_gain_random", POINTS, "  gain over a random image", "points"),
    ("mlm_gain_hard", POINTS, "  gain over a hard negative", "points"),
    ("itm_acc_random", SHARE, "matching, random negatives",
     "chance: 50.0%; by the group alone: {group_only:.1%}"),
    ("itm_acc_hard", SHARE, "  hard negatives", "chance, and by the group alone: 50.0%"),
    ("mim_loss", ERROR, "reconstruction error",
     "mean patch: {mean_patch:.3f} ({error_below:+.0%})"),
    ("mim_gain_random", "{:+.3f}", "  gain over a random text", ""),
    ("noise_floor", ERROR, "  noise floor", "the same image without noise"),
    ("itc_acc", SHARE, "ITC, image of a text", "chance: {itc_chance:.1%}"))


def pretraining_table(metrics: dict[str, float], ranges: dict[str, tuple[float, float]]) -> str:
    """A line for each metric that was measured. ranges: {name: its interval}."""
    notes, hidden = dict(metrics), set()
    if "mim_loss" in metrics:
        notes["error_below"] = metrics["mim_loss"] / metrics["mean_patch"] - 1
    else:
        hidden.add("noise_floor")      # nothing to compare it with
    lines = [table_line(title, number, metrics[name], ranges.get(name), note.format(**notes))
             for name, number, title, note in LINES if name in metrics and name not in hidden]

    # What is not there needs a reason; losses of your own have their value alone.
    if "mlm_loss" in metrics or "itm_loss" in metrics:
        if not metrics.keys() & {"mlm_gain_random", "itm_acc_random"}:
            lines.append("  no negatives: all pairs share an image or a text")
        elif not metrics.keys() & {"mlm_gain_hard", "itm_acc_hard"}:
            lines.append("  no hard negatives: the data have no groups, or no group has two pairs")
    lines += [table_line(name, ERROR, value, ranges.get(name), "")
              for name, value in metrics.items() if name.endswith("_loss")
              and not name.startswith(("low_", "high_"))
              and name.removesuffix("_loss") not in evaluate.METRICS]
    return "\n".join(lines)


def table_line(title: str, number: str, value: float, interval: tuple[float, float] | None,
               note: str) -> str:
    """A line of the table: title, value, interval, note."""
    scale = 100 if number == POINTS else 1
    shown = number.format(scale * value)
    low_to_high = ""
    if interval is not None:
        low, high = (number.format(scale * end).rstrip("%") for end in interval)
        low_to_high = f"({low} to {high})"
    return f"  {title:27}{shown:>7}  {low_to_high:19}{note}".rstrip()


# ----------------------------------------------------------------------- which image for which text

MOST_PAIRS = 1000                      # pairs that are scored, evenly spaced
VIEW_SIDE = 0.85                       # side of a crop, as a share of the image's
SHIFTS = 3                             # positions of crops along each side


class Pairs(NamedTuple):
    """The four figures of pair_metrics.py: {name: value} or {name: interval}."""
    figures: dict[str, float]
    ranges: dict[str, tuple[float, float]]
    chance: dict[str, float]


NO_PAIRS = Pairs({}, {}, {})


def pair_report(model: M3AE, train: Samples, test: Samples, limit: int,
                dist_env: DistEnv) -> Pairs:
    """How well ITC tells which image and text of at most `limit` test samples belong together.

    The threshold of matching comes from val. NO_PAIRS where a split has no wrong pair."""
    val = Samples(train.packs, "val", train.tokenizer, train.cfg, train.train_cfg)
    threshold = None
    for samples in (val, test):
        indices, scores = itc_scores(model, samples, limit, dist_env)
        texts = [samples.line(n)["text"].lower() for n in indices]
        images = samples.identities(indices)[0].tolist()
        if len(set(texts)) < 2 or len(set(images)) < 2:
            return NO_PAIRS
        found = pair_figures(scores, texts, threshold, images)
        threshold = found.pop("threshold")
    ranges = pair_intervals(scores, texts, clusters(test, indices), threshold, images)
    return Pairs(found, ranges, chance_figures(texts, images))


@torch.no_grad()
def itc_scores(model: M3AE, samples: Samples, limit: int,
               dist_env: DistEnv) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` samples (n,), and ITC's scores of their images with their texts (n, n)"""
    model.eval()
    itc = model.objectives["itc"]
    rows, images, texts = [], [], []
    micro_batches = validation_micro_batches(samples, limit)
    for loaded in load(samples, micro_batches, VAL_SEED, dist_env.device):
        batch = loaded.batch
        rows.append(loaded.indices)
        with dist_env.autocast():
            text = model.encode_text(batch["text_ids"], batch["text_mask"])   # (B, T, D)
            texts.append(itc.text_features(text, batch))              # (B, D)
            features = [itc.image_features(model.encode_image(view))
                        for view in views(batch["image"])]            # (B, D) each
        images.append(F.normalize(torch.stack(features).mean(0), dim=-1))  # (B, D)
    model.train()
    return np.concatenate(rows), itc.scores(torch.cat(images), torch.cat(texts)).cpu().numpy()


def views(image: Tensor) -> Iterator[Tensor]:
    """image (B, 3, S, S), then crops of it at SHIFTS² positions, (B, 3, S, S) each"""
    yield image
    size = image.shape[-1]
    side = round(VIEW_SIDE * size)
    starts = [round(i * (size - side) / (SHIFTS - 1)) for i in range(SHIFTS)]
    for top in starts:
        for left in starts:
            crop = image[:, :, top:top + side, left:left + side]      # (B, 3, side, side)
            yield F.interpolate(crop, (size, size), mode="bilinear", align_corners=False)
