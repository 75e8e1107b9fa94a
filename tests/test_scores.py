"""Scores by hand, and against scikit-learn where it is installed."""
import numpy as np
import pytest
from PIL import Image

from data import scores
from data.confusion import draw_confusion
from data.scores import (
    auroc, confusion_matrix, intervals, macro_f1, weighted_mean, weighted_median)
from m3ae_mini.plots import BACK, GREEN


def ones(n):
    return np.ones(n)


def test_auroc_by_hand():
    positive = np.array([True, False, True, False])
    assert auroc(np.array([3.0, 1, 2, 0]), positive, ones(4)) == 1
    assert auroc(np.array([0.0, 1, 2, 3]), positive, ones(4)) == 1 / 4
    assert auroc(np.zeros(4), positive, ones(4)) == 1 / 2             # all alike: ties count half
    assert auroc(np.array([2.0, 1, 1, 0]), positive, ones(4)) == (2 + 1.5) / 4
    assert np.isnan(auroc(np.zeros(2), np.array([True, True]), ones(2)))
    assert np.isnan(auroc(np.zeros(1), np.array([True]), ones(1)))


def test_weights_are_repeats():
    """A row of weight 2 counts as two rows."""
    random = np.random.default_rng(0)
    values, positive = random.integers(0, 9, 40).astype(float), random.random(40) < 0.4
    targets, predictions = random.integers(0, 3, 40), random.integers(0, 3, 40)
    weights = random.integers(0, 3, 40)
    again = np.repeat(np.arange(40), weights)
    n = len(again)
    assert auroc(values, positive, weights) == pytest.approx(auroc(values[again], positive[again], ones(n)))
    assert np.array_equal(confusion_matrix(targets, predictions, weights, 3),
                          confusion_matrix(targets[again], predictions[again], ones(n), 3))
    assert weighted_mean(values, weights, positive) == pytest.approx(values[again][positive[again]].mean())
    assert weighted_median(values, weights) == np.sort(values[again])[(n - 1) // 2]


def test_nothing_that_counts_has_no_median():
    assert np.isnan(weighted_median(np.array([1.0, 2]), np.zeros(2)))
    assert weighted_median(np.array([3.0, 1, 2]), ones(3)) == 2


def test_macro_f1_by_hand():
    confusion = np.array([[2.0, 1, 0], [0, 1, 0], [0, 0, 0]])         # class 2 occurs nowhere
    assert macro_f1(confusion) == pytest.approx((2 * 2 / 5 + 2 * 1 / 3) / 2)
    assert np.isnan(macro_f1(np.zeros((2, 2))))


def test_scores_equal_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(1)
    for n in 7, 50, 400:
        targets, predictions = random.integers(0, 4, n), random.integers(0, 4, n)
        values, positive = random.integers(0, 20, n) / 20, random.random(n) < 0.3
        positive[:2] = True, False
        assert auroc(values, positive, ones(n)) == pytest.approx(metrics.roc_auc_score(positive, values))
        confusion = confusion_matrix(targets, predictions, ones(n), 4)
        assert np.array_equal(confusion, metrics.confusion_matrix(targets, predictions, labels=range(4)))
        assert macro_f1(confusion) == pytest.approx(metrics.f1_score(targets, predictions, average="macro"))


def test_an_interval_covers_the_truth_in_about_95_of_100(monkeypatch):
    monkeypatch.setattr(scores, "RESAMPLES", 200)
    covered = 0
    for seed in range(200):
        right = (np.random.default_rng(seed).random(100) < 0.7).astype(float)
        found = intervals(lambda w: {"acc": weighted_mean(right, w)}, list(map(str, range(100))), seed)
        low, high = found["acc"]
        assert 0.1 < high - low < 0.25                       # ± 2 standard errors of 4.6 points
        covered += low <= 0.7 <= high
    assert 180 <= covered <= 198


def test_rows_of_one_patient_are_drawn_together():
    """Ten patients of ten equal rows: as unsure as ten rows, not as a hundred."""
    right = np.repeat(np.arange(10) < 7, 10).astype(float)
    patients = [str(i // 10) for i in range(100)]
    low, high = intervals(lambda w: {"acc": weighted_mean(right, w)}, patients)["acc"]
    assert high - low > 0.45
    assert intervals(lambda w: {"acc": np.nan}, patients) == {}


def test_a_confusion_matrix_is_drawn(tmp_path):
    """Greener the larger the share of its row: 3 of 4, 1 of 4, none."""
    names = np.array(["a"] * 4 + ["a long name of a class"])
    table = {"target": names, "prediction": np.array(["a", "a", "a", names[4], names[4]]),
             "p: a": np.zeros(5), f"p: {names[4]}": np.zeros(5)}
    draw_confusion(table, tmp_path / "c.png")
    sheet = Image.open(tmp_path / "c.png")
    cells = [[sheet.getpixel((sheet.width - 12 - (2 - j) * 64 + 5, 54 + i * 64 + 5)) for j in (0, 1)]
             for i in (0, 1)]
    red = [[pixel[0] for pixel in row] for row in cells]
    assert red[1][1] == GREEN[0] and red[1][0] == BACK[0]
    assert red[0] == [round(BACK[0] + share * (GREEN[0] - BACK[0])) for share in (0.75, 0.25)]
