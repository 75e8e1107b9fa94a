"""Validation metrics of pre-training.

A metric is collected as (sum, count) of each row. They add up over micro-batches and processes, and
rows can be drawn again for intervals."""
import numpy as np
import torch
from torch import Tensor

from .distributed import DistEnv
from .loader import VAL_SEED, Samples, load, validation_micro_batches
from .objectives import M3AE, MIM, NEVER, loss_weights

Table = dict[str, np.ndarray]          # {metric: (n, 2), sum and count of each sample}


def per_row(values: Tensor, counts: Tensor | None = None) -> Tensor:
    """values (B, …): what is averaged; counts: bool, which of them count -> sum, count: (B, 2)"""
    values = values.float().reshape(len(values), -1)                  # (B, N)
    counts = torch.ones_like(values) if counts is None else counts.float().reshape(values.shape)
    return torch.stack([(values * counts).sum(1), counts.sum(1)], dim=1)  # (B, 2)


# ------------------------------------------------------------------------------------- pre-training

def pretraining(model: M3AE, samples: Samples, dist_env: DistEnv, limit: int) -> dict[str, float]:
    """Means over at most `limit` samples, each counted once, with fixed masks; and `score`."""
    metrics = means(pretraining_rows(model, samples, dist_env, limit)[1])
    return metrics | {"score": score(metrics, loss_weights(model.cfg))}


@torch.no_grad()
def pretraining_rows(model: M3AE, samples: Samples, dist_env: DistEnv,
                     limit: int) -> tuple[np.ndarray, Table]:
    """The indices (n,) of at most `limit` samples, and the table of their metrics, on all ranks."""
    model.eval()
    indices = np.concatenate([n for _, _, n in validation_micro_batches(samples, limit)])  # (n,)
    sums: dict[str, Tensor] = {}
    micro_batches = validation_micro_batches(samples, limit, dist_env.rank, dist_env.world_size)
    for loaded in load(samples, micro_batches, VAL_SEED, dist_env.device):
        rows = np.searchsorted(indices, loaded.indices)               # (B,)
        with dist_env.autocast():
            for name, pairs in validation_metrics(model, loaded.batch).items():
                sums.setdefault(name, pairs.new_zeros(len(indices), 2))[rows] = pairs
    model.train()
    return indices, {name: np.array(pairs) for name, pairs in dist_env.reduce_sums(sums).items()}


def means(table: Table, weights: np.ndarray | float = 1.0) -> dict[str, float]:
    """The mean of each metric; one that counted nothing is left out. weights (n,): of the rows."""
    totals = {name: (pairs.T * weights).sum(1) for name, pairs in table.items()}      # (2,) each
    return {name: float(total / count) for name, (total, count) in totals.items() if count}


def score(metrics: dict[str, float], weights: dict[str, float]) -> float:
    """What chooses best.pt, the higher the better.

    MLM, MIM, ITM, or any of them: the accuracies of matching and words less the pixel loss, as in
    the release. With any other loss: minus the weighted sum of the validation losses."""
    if weights.keys() <= {"mlm", "mim", "itm"}:
        return metrics.get("itm_acc", 0) + metrics.get("mlm_acc", 0) - metrics.get("mim_loss", 0)
    return -sum(weight * metrics[f"{name}_loss"] for name, weight in weights.items())


def validation_metrics(model: M3AE, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """All metrics of one micro-batch -> {name: (B, 2)}

    The cross-modal gains show whether each modality uses the other: how much accuracy falls, or
    error grows, if the other modality is swapped for that of a random or a hard negative. Rows
    without a negative don't count."""
    encoded = model.encode(batch)
    metrics: dict[str, Tensor] = {}
    for name, objective in model.objectives.items():
        inputs = {key: encoded[key] for key in objective.inputs}
        if name in METRICS:
            metrics |= METRICS[name](model, batch, **inputs)
        else:                          # an objective of your own: its loss
            loss = objective(model, batch, **inputs)[f"{name}_loss"]
            metrics[f"{name}_loss"] = per_row(loss.expand(len(batch["image"])))
    return metrics


def negatives(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Each sample's own index (B,), and the index of its negative (B,) by name."""
    positive_index = torch.arange(len(batch["image"]), device=batch["image"].device)
    return positive_index, {"random": batch["random_negative_index"],
                            "hard": batch["hard_negative_index"]}


def mlm_metrics(model: M3AE, batch: dict, masked_text: Tensor, image: Tensor) -> dict[str, Tensor]:
    """Loss and accuracy of the masked words; the same with wrong images, and the gain over them."""
    positive_index, negative_index = negatives(batch)
    out = model.objectives["mlm"](model, batch, masked_text, image)
    targets = out["mlm_targets"]                                      # (M,)
    right = out["mlm_logits"].argmax(-1) == targets                   # (M,)
    counts = targets != -100                                          # (M,) padding doesn't count
    row = batch["mlm_positions"] // batch["mlm_ids"].shape[1]        # (M,) row of each masked token

    def per_text(values: Tensor, counts: Tensor) -> Tensor:
        pairs = torch.stack([values * counts, counts], dim=1).float()  # (M, 2)
        return pairs.new_zeros(len(image), 2).index_add(0, row, pairs)  # (B, 2)

    metrics = {"mlm_loss": per_text(out["mlm_loss"].expand(len(row)), counts),
               "mlm_acc": per_text(right, counts)}
    for name, index in negative_index.items():
        swapped = model.objectives["mlm"](model, batch, masked_text, image.index_select(0, index))
        swapped_right = swapped["mlm_logits"].argmax(-1) == targets   # (M,)
        has_negative = counts & (index != positive_index)[row]        # (M,)
        gain = right.float() - swapped_right.float()                  # (M,)
        metrics[f"mlm_acc_{name}"] = per_text(swapped_right, has_negative)
        metrics[f"mlm_gain_{name}"] = per_text(gain, has_negative)
    return metrics


def mim_metrics(model: M3AE, batch: dict, text: Tensor | None = None) -> dict[str, Tensor]:
    """Error of the hidden patches, and how much it grows with a random wrong text."""
    positive_index, negative_index = negatives(batch)
    target = MIM.target(batch["image"], model.cfg)                    # (B, L, 3·P²)
    index = negative_index["random"]                                  # (B,)
    wrong_mask = batch | {"text_mask": batch["text_mask"].index_select(0, index)}
    wrong_text = None if text is None else text.index_select(0, index)  # (B, T, D)

    out = model.objectives["mim"](model, batch, text)
    swapped = model.objectives["mim"](model, wrong_mask, wrong_text)
    hidden = out["mim_hidden"].bool()                                 # (B, L)
    error = (out["mim_pred"] - target).square().mean(-1)              # (B, L)
    swapped_error = (swapped["mim_pred"] - target).square().mean(-1)  # (B, L)
    has_negative = hidden & (index != positive_index)[:, None]        # (B, L)
    return {"mim_loss": per_row(error, hidden),
            "mim_gain_random": per_row(swapped_error - error, has_negative)}


def itm_metrics(model: M3AE, batch: dict, text: Tensor, image: Tensor) -> dict[str, Tensor]:
    """Loss and accuracy of matching, and accuracy against each kind of negative."""
    positive_index, negative_index = negatives(batch)                 # rows without one don't count

    def predict_match(index):
        out = model.objectives["itm"](model, batch | {"itm_index": index}, text, image)
        return out["itm_logits"].argmax(-1) == 1, out["itm_loss"]     # (B,), ()

    mixed, loss = predict_match(batch["itm_index"])
    right, _ = predict_match(positive_index)
    metrics = {"itm_loss": per_row(loss.expand(len(mixed))),
               "itm_acc": per_row(mixed == (batch["itm_index"] == positive_index),
                                  negative_index["random"] != positive_index)}
    for name, index in negative_index.items():
        swapped, _ = predict_match(index)
        both = (right.float() + (~swapped).float()) / 2               # (B,)
        metrics[f"itm_acc_{name}"] = per_row(both, index != positive_index)
    return metrics


def itc_metrics(model: M3AE, batch: dict, text: Tensor, image: Tensor) -> dict[str, Tensor]:
    """Loss of ITC, how often the text's own image has the highest score, and chance."""
    out = model.objectives["itc"](model, batch, text, image)
    ones = torch.ones_like(out["itc_logits"][0])                      # (B,)
    candidates = (out["itc_logits"] > NEVER).sum(1)                   # (B,)
    right = out["itc_logits"].argmax(1) == torch.arange(len(ones), device=ones.device)  # (B,)
    return {"itc_loss": per_row(out["itc_loss"] * ones), "itc_acc": per_row(right),
            "itc_chance": per_row(1 / candidates)}


METRICS = {"mlm": mlm_metrics, "mim": mim_metrics, "itm": itm_metrics, "itc": itc_metrics}
