"""Figures of the downstream tasks, all computed from one table with a row per test row,
or, in retrieval, per query.

The table is a dict of columns (n,). finetune.py writes it to test_predictions.csv; `figures` of
that file gives the report. Columns of every task: source (the image's file), text, cluster (the
patient where the data tell, else the image), and of
  vqa   target ("#" separates alternatives), prediction, probability, right, kind (open, closed or
        neither), in_list: is the right answer in the answer list?
  cls   target, prediction, probability, right, and "p: LABEL", the probability of each class
        or, with several labels a row: target, prediction (the labels of probability 0.5 and more),
        "t: LABEL", 1 if the row has it, and "p: LABEL"
  irtr  direction (t2i: the text is the query; i2t: the image), rank of the first right candidate"""
import csv
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from data.labels import join_labels, several_labels, targets
from data.ranking import retrieval_ranks
from data.scores import (
    auroc, confusion_matrix, intervals, macro_f1, weighted_mean, weighted_median)
from m3ae_mini import M3AE
from m3ae_mini.checkpoint import write_atomic
from m3ae_mini.distributed import DistEnv
from m3ae_mini.loader import VAL_SEED, Samples, load, validation_micro_batches

# Columns of numbers, as are "p: …" and "t: …".
NUMBERS = ("probability", "right", "in_list", "rank")
Table = dict[str, np.ndarray]
FEW_ROWS = 50                          # a warning is printed for smaller test sets


# ---------------------------------------------------------------------------------------- the table

def predict_table(model: M3AE, samples: Samples, labels: list[str], dist_env: DistEnv, limit: int,
                  ranking: tuple[str, int]) -> Table:
    """The table of at most `limit` samples, evenly spaced, on every rank.

    labels: the answer list or the classes; ranking: see retrieval_ranks."""
    task = model.cfg.task
    if task == "irtr":
        model.eval()
        ranks = retrieval_ranks(model, samples, dist_env, limit, ranking)
        model.train()
        parts = [known_columns(samples, indices) | {
            "direction": np.full(len(indices), direction), "rank": ranks_of_queries.numpy()}
            for direction, (indices, ranks_of_queries) in ranks.items()]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    indices, logits = task_logits(model, samples, dist_env, limit)    # (n,), (n, A)
    known, lines = known_columns(samples, indices), [samples.line(n) for n in indices]
    if several_labels(samples.packs, task):
        return known | label_columns(lines, logits.sigmoid().numpy(), labels)
    probabilities = (logits.sigmoid() if task == "vqa" else logits.softmax(-1)).numpy()
    return known | answer_columns(lines, probabilities, labels, task)


@torch.no_grad()
def task_logits(model: M3AE, samples: Samples, dist_env: DistEnv,
                limit: int) -> tuple[np.ndarray, torch.Tensor]:
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


def known_columns(samples: Samples, indices: np.ndarray) -> Table:
    """The columns that no prediction changes."""
    lines = [samples.line(n) for n in indices]
    return {"source": np.array([line["source"] for line in lines]),
            "text": np.array([line["text"] for line in lines]),
            "cluster": np.array(clusters(samples, indices))}


def clusters(samples: Samples, indices: np.ndarray) -> list[str]:
    """What each sample belongs to: its patient where the data tell, else its image."""
    lines = [samples.line(n) for n in indices]
    names = [samples.packs[pack].meta["name"] for pack, _ in samples.location[indices]]
    return [f"{name} {line['patient']}" if "patient" in line else f"image {pack} {line['image']}"
            for name, line, (pack, _) in zip(names, lines, samples.location[indices])]


def answer_columns(lines: list[dict], probabilities: np.ndarray, labels: list[str],
                   task: str) -> Table:
    """The columns of vqa, and of cls with one label. lines: of the pack; probabilities: (n, A)."""
    names = [targets(line, task) for line in lines]
    best = probabilities.argmax(1)                                    # (n,)
    predictions = [labels[i] for i in best]
    columns = {"target": np.array(["#".join(known) for known in names]),
               "prediction": np.array(predictions),
               "probability": np.take_along_axis(probabilities, best[:, None], 1)[:, 0],
               "right": np.array([float(p in known) for p, known in zip(predictions, names)])}
    if task == "vqa":
        kinds = {True: "closed", False: "open", None: ""}
        columns["kind"] = np.array([kinds[line.get("closed")] for line in lines])
        columns["in_list"] = np.array([float(not set(labels).isdisjoint(known)) for known in names])
        return columns
    return columns | {f"p: {label}": probabilities[:, i] for i, label in enumerate(labels)}


def label_columns(lines: list[dict], probabilities: np.ndarray, labels: list[str]) -> Table:
    """The columns of cls with several labels a row. probabilities: (n, C)."""
    names = [targets(line, "cls", several=True) for line in lines]
    columns = {"target": np.array([join_labels(known) for known in names]),
               "prediction": np.array([likely_labels(row, labels) for row in probabilities])}
    for i, label in enumerate(labels):
        columns[f"t: {label}"] = np.array([float(label in known) for known in names])
        columns[f"p: {label}"] = probabilities[:, i]
    return columns


def likely_labels(probabilities: np.ndarray, labels: list[str]) -> str:
    """The labels of probability 0.5 and more, (C,) -> "A|B"."""
    return join_labels([label for label, p in zip(labels, probabilities) if p >= 0.5])


def write_table(table: Table, path: Path) -> None:
    """Write the table as CSV."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(table)
    rows.writerows(zip(*(column.tolist() for column in table.values())))
    data = text.getvalue().encode("utf-8", "replace")
    write_atomic(path, lambda file: file.write(data))


def read_table(path: Path) -> Table:
    """A table that write_table has written."""
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    columns = dict(zip(header, map(np.array, zip(*rows))))
    return {name: column.astype(float) if name in NUMBERS or name[:3] in ("p: ", "t: ") else column
            for name, column in columns.items()}


# -------------------------------------------------------------------------------------- the figures

def figures(table: Table, task: str, weights: np.ndarray | None = None) -> dict[str, float]:
    """{name: value} of a table; a figure that counts nothing is left out.

    vqa: accuracy on all, open and closed questions; answer_not_in_list, the share of right answers
    that are not in the answer list and so count as wrong. cls: accuracy, macro F1, AUROC and recall
    of each class, the mean AUROC; with several labels a row: AUROC of each label and their mean,
    the share of rows that have it. irtr: recall at 1, 5, 10 and the median rank, both directions.
    weights (n,): how often each row counts, 1 by default."""
    weights = np.ones(len(table["source"])) if weights is None else weights
    if task == "irtr":
        found = {}
        for direction in ("t2i", "i2t"):
            rows = table["direction"] == direction
            for k in (1, 5, 10):
                found[f"{direction}_r{k}"] = weighted_mean(table["rank"] <= k, weights, rows)
            found[f"{direction}_median_rank"] = weighted_median(table["rank"], weights * rows)
    elif task == "vqa":
        right, kind = table["right"], table["kind"]
        found = {"acc": weighted_mean(right, weights),
                 "acc_open": weighted_mean(right, weights, kind == "open"),
                 "acc_closed": weighted_mean(right, weights, kind == "closed"),
                 "answer_not_in_list": weighted_mean(1 - table["in_list"], weights)}
    elif "right" not in table:
        found = label_figures(table, weights)
    else:
        found = class_figures(table, weights)
    return {name: value for name, value in found.items() if not np.isnan(value)}


def class_figures(table: Table, weights: np.ndarray) -> dict[str, float]:
    """The figures of cls; see `figures`."""
    labels = [name.removeprefix("p: ") for name in table if name.startswith("p: ")]
    by_name = {label: i for i, label in enumerate(labels)}
    target = np.array([by_name[label] for label in table["target"]])  # (n,)
    prediction = np.array([by_name[label] for label in table["prediction"]])
    confusion = confusion_matrix(target, prediction, weights, len(labels))  # (C, C)
    areas = {f"AUROC of {label}": auroc(table[f"p: {label}"], target == i, weights)
             for i, label in enumerate(labels)}
    found = {"acc": weighted_mean(table["right"], weights), "macro_f1": macro_f1(confusion),
             "mean_auroc": mean_known(areas.values())}
    recall = {f"recall of {label}": weighted_mean(table["right"], weights, target == i)
              for i, label in enumerate(labels)}
    return found | recall | areas


def label_figures(table: Table, weights: np.ndarray) -> dict[str, float]:
    """The figures of cls with several labels a row; see `figures`."""
    labels = [name.removeprefix("p: ") for name in table if name.startswith("p: ")]
    areas = {f"AUROC of {label}": auroc(table[f"p: {label}"], table[f"t: {label}"] == 1, weights)
             for label in labels}
    shares = {f"share of {label}": weighted_mean(table[f"t: {label}"], weights) for label in labels}
    return {"mean_auroc": mean_known(areas.values())} | areas | shares


def mean_known(values: Iterable[float]) -> float:
    """The mean of the values that are no NaN; NaN if there is none."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else np.nan


def score(found: dict[str, float], task: str) -> float:
    """What chooses best.pt: accuracy, the mean AUROC (several labels), or the mean recall."""
    if task != "irtr":
        return found["acc"] if "acc" in found else found.get("mean_auroc", 0.0)
    recalls = [found[f"{direction}_r{k}"] for direction in ("t2i", "i2t") for k in (1, 5, 10)]
    return sum(recalls) / len(recalls)


def figure_intervals(table: Table, task: str) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of all figures, by patient or image: {name: (low, high)}."""
    return intervals(lambda weights: figures(table, task, weights), table["cluster"])


METRIC_NAMES = {                       # in the report; others as they are
    "acc": "accuracy", "acc_open": "on open questions", "acc_closed": "on closed questions",
    "answer_not_in_list": "right answer not in the list", "macro_f1": "macro F1",
    "mean_auroc": "mean AUROC",
    **{f"{direction}_{figure}": f"{words}, {what}"
       for direction, words in (("t2i", "text to image"), ("i2t", "image to text"))
       for figure, what in (("r1", "recall at 1"), ("r5", "recall at 5"), ("r10", "recall at 10"),
                            ("median_rank", "median rank"))}}


def report_table(found: dict[str, float], ranges: dict[str, tuple[float, float]],
                 table: Table) -> str:
    """A line for each figure: its name, its value, its interval."""
    lines = []
    for name, value in found.items():
        number = "{:.1f}" if name.endswith("median_rank") else "{:.1%}"
        low, high = map(number.format, ranges.get(name, (value, value)))
        lines.append(f"  {METRIC_NAMES.get(name, name):32}{number.format(value):>7}  "
                     f"({low} to {high})")
    undefined = [name.removeprefix("p: ") for name in table if name.startswith("p: ")
                 and f"AUROC of {name.removeprefix('p: ')}" not in found]
    if undefined:
        lines.append(f"  AUROC needs rows with the label and rows without it: not defined for "
                     f"{', '.join(undefined)}")
    num_rows = len(table["source"])
    if num_rows < FEW_ROWS:
        lines.append(f"  warning: {num_rows} rows are few: intervals of so few are too narrow")
    return "\n".join(lines)
