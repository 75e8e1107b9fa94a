"""Metrics of the downstream tasks: predictions against what is right in the packs."""
import numpy as np

from m3ae_mini import M3AE
from m3ae_mini.distributed import DistEnv
from m3ae_mini.evaluate import task_logits
from m3ae_mini.loader import Samples
from m3ae_mini.retrieval import Ranking, retrieval_metrics


def task_metrics(model: M3AE, samples: Samples, labels: list[str], dist_env: DistEnv, limit: int,
                 ranking: Ranking) -> dict[str, float]:
    """All metrics of a downstream task over at most `limit` samples, and `score`.

    labels: the answer list or the classes. score: accuracy, or the mean of the recalls."""
    if model.cfg.task == "irtr":
        model.eval()
        metrics = retrieval_metrics(model, samples, dist_env, limit, ranking)
        model.train()
        return metrics | {"score": sum(metrics.values()) / len(metrics)}
    indices, logits = task_logits(model, samples, dist_env, limit)    # (n,), (n, A)
    predictions = [labels[i] for i in logits.argmax(-1).tolist()]
    lines = [samples.line(n) for n in indices]
    metrics = answer_metrics(predictions, lines, labels, model.cfg.task)
    return metrics | {"score": metrics["acc"]}


def targets(line: dict, task: str) -> list[str]:
    """The right answers of a sample ("#" separates alternatives), or its class."""
    return line["answer"].split("#") if task == "vqa" else [line["label"]]


def answer_metrics(predictions: list[str], lines: list[dict], labels: list[str],
                   task: str) -> dict[str, float]:
    """Predictions for samples, given as lines of their packs -> {name: value}

    vqa: accuracy on all, open and closed questions, and the share of answers that are not in the
    list and so count as wrong. cls: accuracy, and the recall of each class. A metric that counted
    nothing is left out."""
    names = [targets(line, task) for line in lines]
    right = np.array([answer in known for answer, known in zip(predictions, names)])  # (n,)
    if task == "cls":
        rows = {f"recall of {label}": [label in known for known in names] for label in labels}
    else:
        closed = [line.get("closed") for line in lines]               # None: not known
        rows = {"acc_open": [flag is False for flag in closed],
                "acc_closed": [flag is True for flag in closed]}
    metrics = {"acc": right.mean()}
    metrics |= {name: right[chosen].mean() for name, chosen in rows.items() if any(chosen)}
    if task == "vqa":
        metrics["answer_not_in_list"] = np.mean([set(labels).isdisjoint(known) for known in names])
    return {name: float(value) for name, value in metrics.items()}
