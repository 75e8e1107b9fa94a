"""Scores of predictions, and how sure they are: accuracy, F1, AUROC, bootstrap intervals.

Rows may have weights (n,): a bootstrap sample is the table itself with other weights. A score that
is not defined, as no row counts, is NaN."""
from collections.abc import Callable

import numpy as np

RESAMPLES = 1000                       # bootstrap samples of an interval


def weighted_mean(values: np.ndarray, weights: np.ndarray, rows: np.ndarray | None = None) -> float:
    """The mean of values (n,) over the rows that are True in `rows`, all by default."""
    weights = weights if rows is None else weights * rows
    return float((values * weights).sum() / weights.sum()) if weights.sum() else np.nan


def confusion_matrix(targets: np.ndarray, predictions: np.ndarray, weights: np.ndarray,
                     num_classes: int) -> np.ndarray:
    """How many rows of class i were predicted as class j: (C, C)"""
    cells = np.bincount(targets * num_classes + predictions, weights, num_classes ** 2)
    return cells.reshape(num_classes, num_classes)


def macro_f1(confusion: np.ndarray) -> float:
    """The mean F1 of the classes that occur as a target or a prediction; confusion: (C, C)."""
    total = confusion.sum(0) + confusion.sum(1)                       # (C,)
    f1 = 2 * confusion.diagonal() / np.where(total > 0, total, np.nan)  # (C,)
    return float(np.nanmean(f1)) if total.any() else np.nan


def auroc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> float:
    """The share of (positive, negative) pairs in which the positive row scores higher; a tie counts
    half. scores (n,), positive: bool (n,). NaN where one of both is missing."""
    _, level = np.unique(scores, return_inverse=True)                 # (n,) equal for equal scores
    positives = np.bincount(level, weights * positive)                # per level
    negatives = np.bincount(level, weights * ~positive)
    pairs = positives.sum() * negatives.sum()
    below = np.cumsum(negatives) - negatives / 2
    return float((positives * below).sum() / pairs) if pairs else np.nan


def weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    """The smallest value up to which half of the weight lies."""
    if not weights.sum():
        return np.nan
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order]) >= weights.sum() / 2
    return float(values[order][np.argmax(reached)])


def intervals(figures: Callable[[np.ndarray], dict[str, float]], clusters: list[str],
              seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals (low, high) of all that figures(weights (n,)) returns.

    clusters: what each row belongs to, a patient or an image: whole clusters are drawn, as their
    rows are not independent."""
    names, cluster = np.unique(clusters, return_inverse=True)         # (n,)
    random = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {}
    for _ in range(RESAMPLES):
        counts = np.bincount(random.integers(len(names), size=len(names)), minlength=len(names))
        for name, value in figures(counts[cluster].astype(float)).items():
            drawn.setdefault(name, []).append(value)
    return {name: tuple(map(float, np.nanpercentile(values, (2.5, 97.5))))
            for name, values in drawn.items() if not np.isnan(values).all()}
