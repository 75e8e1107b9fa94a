"""The four figures of pairs: by hand, against chance, and their intervals."""
import numpy as np
import pytest

from data import pair_metrics, scores as scores_module
from data.pair_metrics import chance_figures, pair_figures, pair_intervals
from m3ae_mini.config import UserError


@pytest.fixture
def at_one(monkeypatch):
    """Recall at 1, so that three candidates are enough."""
    monkeypatch.setattr(pair_metrics, "RECALL_AT", 1)


SCORES = np.array([[0.9, 0.2, 0.5],
                   [0.4, 0.3, 0.2],
                   [0.1, 0.25, 0.8]])


def test_three_pairs_by_hand(at_one):
    """Of two thresholds that reach 5/6, 0.275 and 0.65, the lower one is taken."""
    found = pair_figures(SCORES, ["a", "b", "c"])
    assert found == pytest.approx({"above": (1 + 1 / 2 + 1) / 3, "matching": (1 + 4 / 6) / 2,
                                   "i2t_r10": 2 / 3, "t2i_r10": 1, "threshold": 0.275})
    given = pair_figures(SCORES, ["a", "b", "c"], 0.4)                 # a score at it is rejected
    assert given == pytest.approx(found | {"matching": (2 / 3 + 5 / 6) / 2, "threshold": 0.4})


def test_equal_texts_are_no_wrong_pair(at_one):
    scores = np.array([[0.9, 0.2, 0.9], [0.4, 0.3, 0.4], [0.6, 0.25, 0.6]])
    assert pair_figures(scores, ["a", "b", "a"]) == pytest.approx(
        {"above": (1 + 0 + 1) / 3, "matching": (2 / 3 + 1) / 2, "threshold": 0.5,
         "i2t_r10": 2 / 3, "t2i_r10": 1})


def test_the_other_text_of_an_image_is_no_wrong_pair(at_one):
    scores = np.array([[0.9, 0.8, 0.5], [0.9, 0.8, 0.5], [0.1, 0.85, 0.7]])
    found = pair_figures(scores, ["a", "b", "c"], images=["x", "x", "y"])
    assert found == pytest.approx({"above": (1 + 1 + 1 / 2) / 3, "matching": (1 + 3 / 4) / 2,
                                   "threshold": 0.6, "i2t_r10": 1 / 2, "t2i_r10": 2 / 3})


def test_a_model_that_scores_all_alike_finds_nothing(at_one):
    found = pair_figures(np.ones((4, 4)), range(4))
    assert found == {"above": 0.5, "matching": 0.5, "i2t_r10": 0, "t2i_r10": 0, "threshold": 1}


def test_no_threshold_is_better_than_the_best():
    random = np.random.default_rng(0)
    texts = random.integers(0, 12, 20).tolist()
    scores = np.round(random.normal(size=(20, 20)), 1) + np.eye(20)
    best = pair_figures(scores, texts)
    tried = {t: pair_figures(scores, texts, t)["matching"] for t in np.arange(-3, 4, 0.05)}
    assert max(tried.values()) == pytest.approx(best["matching"])
    lowest = min(t for t, value in tried.items() if value > best["matching"] - 1e-9)
    assert abs(lowest - best["threshold"]) < 0.1


def test_a_weight_is_a_repeat():
    """For above and matching: a row of weight 2 counts as two rows, as image and as text."""
    random = np.random.default_rng(1)
    texts, scores = random.integers(0, 9, 15), random.normal(size=(15, 15))
    weights = random.integers(0, 3, 15)
    again = np.repeat(np.arange(15), weights)
    _, by_weights = pair_metrics._prepare(scores, texts, 0.3, None)
    repeated = pair_figures(scores[again][:, again], texts[again], 0.3)
    found = by_weights(weights.astype(float))
    assert {name: found[name] for name in ("above", "matching")} == pytest.approx(
        {name: repeated[name] for name in ("above", "matching")}, abs=1e-6)


def test_chance_is_the_mean_of_random_scores():
    random = np.random.default_rng(2)
    texts, images = random.integers(0, 25, 40).tolist(), random.integers(0, 30, 40).tolist()
    draws = []
    for _ in range(400):
        scores = random.normal(size=(30, 25))[images][:, texts]        # equal rows for equal images
        draws.append(pair_figures(scores, texts, 0.1, images))
    for name, value in chance_figures(texts, images).items():
        assert np.mean([draw[name] for draw in draws]) == pytest.approx(value, abs=0.01)
    assert chance_figures(range(3)) == {"above": 0.5, "matching": 0.5, "i2t_r10": 1, "t2i_r10": 1}


def test_intervals_of_pairs(monkeypatch):
    """They hold the value. Six patients of ten equally good rows are as unsure as six rows."""
    monkeypatch.setattr(scores_module, "RESAMPLES", 300)
    good = np.repeat([3, 0, 3, 0, 3, 0], 10)
    scores = np.random.default_rng(3).normal(size=(60, 60)) + np.diag(good)
    found, widths = pair_figures(scores, range(60)), {}
    for num_clusters in 60, 6:
        clusters = [str(i * num_clusters // 60) for i in range(60)]
        ranges = pair_intervals(scores, range(60), clusters)
        assert set(ranges) == {"above", "matching", "i2t_r10", "t2i_r10"}
        assert all(low < found[name] < high for name, (low, high) in ranges.items())
        widths[num_clusters] = ranges["above"][1] - ranges["above"][0]
    assert 0.05 < widths[60] < 0.25 and widths[6] > 1.7 * widths[60]


@pytest.mark.parametrize("scores, texts, sentence", [
    (np.zeros((2, 2)), ["a", "a"], "none is wrong"),
    (np.zeros((2, 3)), ["a", "b"], r"2 texts need \(2, 2\)"),
    (np.full((2, 2), np.nan), ["a", "b"], "not finite")])
def test_scores_that_have_no_figures(scores, texts, sentence):
    with pytest.raises(UserError, match=sentence):
        pair_figures(scores, texts)
