"""Trivial baselines: what a guess reaches that has learned nothing, or sees no image."""
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from data.phantoms import draw_clean
from m3ae_mini import masking
from m3ae_mini.evaluate import per_row
from m3ae_mini.loader import VAL_SEED, Samples, load, normalise, validation_micro_batches
from m3ae_mini.objectives import MIM

BASELINE_SAMPLES = 8192                # training images that the mean patch is taken from
BLIND_SAMPLES = 2048                   # training images whose mean --blind shows


@torch.no_grad()
def trivial_baselines(train: Samples, test: Samples, limit: int,
                      device: torch.device) -> dict[str, float]:
    """Trivial baselines on at most `limit` test samples -> {name: value}

    most_frequent_token: share of the most frequent token among the masked tokens.
    group_only: matching accuracy, against random negatives, of a guess from the group alone.
    mean_patch: error of the mean training patch (normalised) at each position.
    noise_floor: error of phantoms that are drawn again without noise, if all images are phantoms:
    the error of a perfect reconstruction."""
    cfg = test.cfg
    all_phantoms = all(pack.meta["name"] == "phantoms" for pack in test.packs)

    # The mean of the normalised training patches at each position.
    mean_patch, count = 0, 0
    for loaded in load(train, validation_micro_batches(train, BASELINE_SAMPLES), VAL_SEED, device):
        mean_patch = mean_patch + MIM.target(loaded.batch["image"], cfg).sum(0)  # (L, 3·P²)
        count += len(loaded.indices)
    mean_patch = mean_patch / count

    tokens: Counter = Counter()
    sums: dict[str, Tensor] = {}

    def add(name: str, values: Tensor, counts: Tensor) -> None:
        sums[name] = sums.get(name, 0) + per_row(values, counts).sum(0)

    for loaded in load(test, validation_micro_batches(test, limit), VAL_SEED, device):
        batch = loaded.batch
        tokens.update(batch["mlm_labels"][batch["mlm_labels"] != -100].tolist())

        # Pixels: the mean patch, and a phantom without its noise.
        target = MIM.target(batch["image"], cfg)                      # (B, L, 3·P²)
        ids_keep, ids_restore = masking.random_masking(batch["mim_noise"], cfg.mask_ratio)
        hidden = ids_restore >= ids_keep.shape[1]                     # (B, L)
        add("mean_patch", (mean_patch - target).square().mean(-1), hidden)
        if all_phantoms:
            lines = [test.line(n) for n in loaded.indices]
            clean = torch.from_numpy(draw_clean(lines, cfg.image_size))  # (B, S, S)
            clean = normalise(clean[:, None].expand(-1, 3, -1, -1))   # (B, 3, S, S)
            clean = MIM.target(clean.to(target), cfg, like=batch["image"])  # (B, L, 3·P²)
            add("noise_floor", (clean - target).square().mean(-1), hidden)

        # Matching from the group alone: "no" if the groups differ, else "yes".
        group = np.array([test.line(n).get("group", "") for n in loaded.indices])
        index = batch["random_negative_index"].cpu().numpy()          # (B,)
        accuracy = torch.from_numpy((1 + (group != group[index])) / 2)  # (B,)
        has_negative = torch.from_numpy(index != np.arange(len(index)))  # (B,)
        add("group_only", accuracy, has_negative)

    metrics = {name: (total / count).item() for name, (total, count) in sums.items()}
    return {"most_frequent_token": max(tokens.values()) / tokens.total()} | metrics


def most_frequent_label(train: Samples, targets: np.ndarray, labels: list[str]) -> float:
    """Accuracy of always giving the most frequent training label; with one label a row.

    targets (n,): the right answers of each test row, "#" between alternatives, or its class."""
    known = train.label_ids[train.label_ids >= 0]
    label = labels[np.bincount(known, minlength=len(labels)).argmax()]
    return float(np.mean([label in target.split("#") for target in targets]))


def mean_image(samples: Samples) -> np.ndarray:
    """The mean of at most BLIND_SAMPLES images, evenly spaced: uint8 (3, S, S)."""
    side, count = samples.cfg.image_size, min(BLIND_SAMPLES, samples.n)
    image, total = np.empty((3, side, side), np.uint8), np.zeros((3, side, side))
    for n in np.arange(count) * samples.n // count:
        samples.read_image(n, image)
        total += image
    return np.rint(total / count).astype(np.uint8)
