"""Validation metrics and report of pre-training; logits of the downstream tasks.

Metrics are collected as (sum, count) of a micro-batch. They add up over micro-batches and
processes."""
import numpy as np
import torch
from torch import Tensor

from .distributed import DistEnv
from .loader import VAL_SEED, Samples, load, validation_micro_batches
from .objectives import M3AE, MIM, loss_weights


def sum_and_count(values: Tensor, rows: Tensor | None = None) -> Tensor:
    """values, any shape: what is averaged; rows: bool, which of them count -> (sum, count), (2,)"""
    values = values.float()
    rows = torch.ones_like(values) if rows is None else rows.float()
    return torch.stack([(values * rows).sum(), rows.sum()])


def add(sums: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Add a micro-batch's (sum, count) pairs to `sums`."""
    for name, pair in new.items():
        sums[name] = sums.get(name, 0) + pair


def means(sums: dict[str, Tensor], dist_env: DistEnv) -> dict[str, float]:
    """The mean of each metric over all processes; a metric that counted nothing is left out."""
    totals = dist_env.reduce_sums(sums)
    return {name: total / count for name, (total, count) in totals.items() if count}


# ------------------------------------------------------------------------------------- pre-training

@torch.no_grad()
def pretraining(model: M3AE, samples: Samples, dist_env: DistEnv, limit: int) -> dict[str, float]:
    """Means over at most `limit` samples, each counted once, with fixed masks; and `score`."""
    model.eval()
    sums: dict[str, Tensor] = {}
    micro_batches = validation_micro_batches(samples, limit, dist_env.rank, dist_env.world_size)
    for loaded in load(samples, micro_batches, VAL_SEED, dist_env.device):
        with dist_env.autocast():
            add(sums, validation_metrics(model, loaded.batch))
    model.train()
    metrics = means(sums, dist_env)
    metrics["score"] = score(metrics, loss_weights(model.cfg))
    return metrics


def score(metrics: dict[str, float], weights: dict[str, float]) -> float:
    """What chooses best.pt, the higher the better.

    MLM, MIM, ITM, or any of them: the accuracies of matching and words less the pixel loss, as in
    the release. With any other loss: minus the weighted sum of the validation losses."""
    if weights.keys() <= {"mlm", "mim", "itm"}:
        return metrics.get("itm_acc", 0) + metrics.get("mlm_acc", 0) - metrics.get("mim_loss", 0)
    return -sum(weight * metrics[f"{name}_loss"] for name, weight in weights.items())


def validation_metrics(model: M3AE, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """All metrics of one micro-batch -> {name: (sum, count)}

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
            loss, size = objective(model, batch, **inputs)[f"{name}_loss"], len(batch["image"])
            metrics[f"{name}_loss"] = torch.stack([loss * size, loss.new_tensor(size)])
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

    metrics = {"mlm_loss": torch.stack([out["mlm_loss"] * counts.sum(), counts.sum()]),
               "mlm_acc": sum_and_count(right, counts)}
    for name, index in negative_index.items():
        swapped = model.objectives["mlm"](model, batch, masked_text, image.index_select(0, index))
        swapped_right = swapped["mlm_logits"].argmax(-1) == targets   # (M,)
        has_negative = counts & (index != positive_index)[row]        # (M,)
        gain = right.float() - swapped_right.float()                  # (M,)
        metrics[f"mlm_acc_{name}"] = sum_and_count(swapped_right, has_negative)
        metrics[f"mlm_gain_{name}"] = sum_and_count(gain, has_negative)
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
    return {"mim_loss": sum_and_count(error, hidden),
            "mim_gain_random": sum_and_count(swapped_error - error, has_negative)}


def itm_metrics(model: M3AE, batch: dict, text: Tensor, image: Tensor) -> dict[str, Tensor]:
    """Loss and accuracy of matching, and accuracy against each kind of negative."""
    positive_index, negative_index = negatives(batch)                 # rows without one don't count

    def predict_match(index):
        out = model.objectives["itm"](model, batch | {"itm_index": index}, text, image)
        return out["itm_logits"].argmax(-1) == 1, out["itm_loss"]     # (B,), ()

    mixed, loss = predict_match(batch["itm_index"])
    right, _ = predict_match(positive_index)
    metrics = {"itm_loss": torch.stack([loss * len(mixed), loss.new_tensor(len(mixed))]),
               "itm_acc": sum_and_count(mixed == (batch["itm_index"] == positive_index),
                                        negative_index["random"] != positive_index)}
    for name, index in negative_index.items():
        swapped, _ = predict_match(index)
        both = (right.float() + (~swapped).float()) / 2               # (B,)
        metrics[f"itm_acc_{name}"] = sum_and_count(both, index != positive_index)
    return metrics


def itc_metrics(model: M3AE, batch: dict, text: Tensor, image: Tensor) -> dict[str, Tensor]:
    """Loss of ITC, how often the text's own image has the highest score, and chance."""
    out = model.objectives["itc"](model, batch, text, image)
    ones = torch.ones_like(out["itc_logits"][0])                      # (B,)
    right = out["itc_logits"].argmax(1) == torch.arange(len(ones), device=ones.device)  # (B,)
    return {"itc_loss": sum_and_count(out["itc_loss"] * ones), "itc_acc": sum_and_count(right),
            "itc_chance": sum_and_count(ones / len(ones))}


METRICS = {"mlm": mlm_metrics, "mim": mim_metrics, "itm": itm_metrics, "itc": itc_metrics}


# The report: one line per metric. A metric that counted no sample is left out.
TABLE = """
  masked tokens, accuracy     {mlm_acc:6.1%}   most frequent token: {most_frequent_token:.1%}
    gain over a random image  {mlm_gain_random:+6.1f} points
    gain over a hard negative {mlm_gain_hard:+6.1f} points
  matching, random negatives  {itm_acc_random:6.1%}   chance: 50.0%; by the group alone: \
{group_only:.1%}
    hard negatives            {itm_acc_hard:6.1%}   chance, and by the group alone: 50.0%
  reconstruction error        {mim_loss:6.3f}   mean patch: {mean_patch:.3f} ({error_below:+.0%})
    gain over a random text   {mim_gain_random:+6.3f}
    noise floor               {noise_floor:6.3f}   the same image without noise
  ITC, image of a text        {itc_acc:6.1%}   chance: {itc_chance:.1%}"""


def pretraining_table(metrics: dict[str, float]) -> str:
    """The report of a pre-training: each metric and its trivial baseline."""
    shown = {name: 100 * value if name.startswith("mlm_gain") else value      # gains in points
             for name, value in metrics.items()}
    if "mim_loss" in shown:
        shown["error_below"] = shown["mim_loss"] / shown["mean_patch"] - 1
    else:
        shown.pop("noise_floor", None)                                        # nothing to compare
    lines = [line.format(**shown) for line in TABLE.splitlines()[1:]
             if line.partition("{")[2].partition(":")[0] in shown]
    if "mlm_loss" in shown or "itm_loss" in shown:
        if not shown.keys() & {"mlm_gain_random", "itm_acc_random"}:
            lines.append("  no negatives: all pairs share an image or a text")
        elif not shown.keys() & {"mlm_gain_hard", "itm_acc_hard"}:
            lines.append("  no hard negatives: the data have no groups, or no group has two pairs")
    lines += [f"  {name:27} {value:6.3f}" for name, value in shown.items()    # losses of your own
              if name.endswith("_loss") and name.removesuffix("_loss") not in METRICS]
    return "\n".join(lines)


# --------------------------------------------------------------------------------- downstream tasks

@torch.no_grad()
def task_logits(model: M3AE, samples: Samples, dist_env: DistEnv,
                limit: int) -> tuple[np.ndarray, Tensor]:
    """Logits for answers or classes of at most `limit` samples, evenly spaced

    Returns the samples' indices (n,) and the logits (n, A), on the CPU of every rank."""
    model.eval()
    indices = np.concatenate([n for _, _, n in validation_micro_batches(samples, limit)])  # (n,)
    num_labels = model.cfg.num_answers if model.cfg.task == "vqa" else model.cfg.num_classes
    logits = torch.zeros(len(indices), num_labels, device=dist_env.device)    # (n, A)
    micro_batches = validation_micro_batches(samples, limit, dist_env.rank, dist_env.world_size)
    for loaded in load(samples, micro_batches, VAL_SEED, dist_env.device):
        rows = np.searchsorted(indices, loaded.indices)               # (B,)
        with dist_env.autocast():
            logits[rows] = model(loaded.batch)[f"{model.cfg.task}_logits"]
    model.train()
    return indices, dist_env.all_reduce(logits).cpu()
