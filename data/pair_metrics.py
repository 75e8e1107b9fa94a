"""How well scores tell which image and text belong together: four figures of a table of results.

scores[i, j] says how well the image of row i fits the text of row j, for n rows, each a right
(image, text) pair; the higher the better. A pair (i, j) is right if any row has the image of row i
and the text of row j, else it is wrong: equal texts, and the other texts of an image, are never
wrong. t is a threshold. w_i is the weight of row i: 1, or how often a bootstrap sample drew it.
[…] is 1 if … holds, else 0. Sums over j, or over ij, are over the wrong pairs.

    above     mean of above_i over rows i, with the weights w_i, where
              above_i = Σ_j w_j ([s_ij < s_ii] + [s_ij = s_ii] / 2) / Σ_j w_j
    matching  (accepted + rejected) / 2: right and wrong pairs count half each, where
              accepted = Σ_i w_i [s_ii > t] / Σ_i w_i
              rejected = Σ_ij w_i w_j [s_ij <= t] / Σ_ij w_i w_j
    i2t_r10   share of the distinct images with a right text among the ten best distinct texts
    t2i_r10   share of the distinct texts with a right image among the ten best distinct images

A row whose image has no wrong text does not count in `above`. In both recalls the rank of a query
is 1 + the number of wrong candidates that score as high as its best right one, or higher: wrong
candidates win ties. A query has the mean weight of its rows; the candidates are always all.

Unless it is given, t is the one of the highest `matching`, all weights being 1: halfway between
two neighbouring scores, or the highest score, which rejects all. Of equally good ones it is the
lowest. Test takes the t of val: `pair_figures(scores, texts, val["threshold"])`.
"""
from collections.abc import Callable, Hashable, Sequence
from math import comb

import numpy as np

from data.scores import intervals, weighted_mean
from m3ae_mini.config import require

RECALL_AT = 10
PAIR_METRICS = {"above": "right above wrong", "matching": "right or wrong pair",
                "i2t_r10": "image to text, R@10", "t2i_r10": "text to image, R@10"}
Figures = dict[str, float]


def pair_figures(scores: np.ndarray, texts: Sequence[Hashable], threshold: float | None = None,
                 images: Sequence[Hashable] | None = None) -> Figures:
    """scores (n, n) of image i with text j -> {"above", "matching", "i2t_r10", "t2i_r10",
    "threshold"}; see above.

    texts (n,): equal for rows that share a text; images (n,): the same for images, which are all
    different by default. UserError if all pairs are right, or a score is not a finite number."""
    threshold, by_weights = _prepare(scores, texts, threshold, images)
    return by_weights(np.ones(len(texts))) | {"threshold": threshold}


def pair_intervals(scores: np.ndarray, texts: Sequence[Hashable], clusters: list[str],
                   threshold: float | None = None,
                   images: Sequence[Hashable] | None = None) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of the four figures: {name: (low, high)}; arguments as above.

    clusters (n,): the patient or image of each row. All rows of a cluster are drawn together, with
    their images and texts. The threshold, also one found here, stays the same in all samples."""
    _, by_weights = _prepare(scores, texts, threshold, images)
    return intervals(by_weights, clusters)


def chance_figures(texts: Sequence[Hashable], images: Sequence[Hashable] | None = None) -> Figures:
    """The mean of the four figures over all random orders of the candidates.

    A query with m right ones among N candidates finds none of them among ten with probability
    C(N - m, 10) / C(N, 10)."""
    _, _, right = _distinct(texts, images)                            # (P, Q)

    def recall(right_of_query: np.ndarray, candidates: int) -> float:
        ways = comb(candidates, RECALL_AT)
        missed = [comb(candidates - int(m), RECALL_AT) / ways if ways else 0
                  for m in right_of_query]
        return 1 - sum(missed) / len(missed)

    num_images, num_texts = right.shape
    return {"above": 0.5, "matching": 0.5, "i2t_r10": recall(right.sum(1), num_texts),
            "t2i_r10": recall(right.sum(0), num_images)}


def _distinct(texts: Sequence[Hashable], images: Sequence[Hashable] | None):
    """Which distinct image and text each row has, (n,) each, and which belong together, (P, Q)."""
    image_of_row = _factorize(range(len(texts)) if images is None else images)
    text_of_row = _factorize(texts)
    right = np.zeros((image_of_row.max() + 1, text_of_row.max() + 1), bool)
    right[image_of_row, text_of_row] = True
    return image_of_row, text_of_row, right


def _factorize(keys: Sequence[Hashable]) -> np.ndarray:
    """Equal numbers for equal keys, in the order of their first rows: (n,)"""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys])


def _prepare(scores: np.ndarray, texts: Sequence[Hashable], threshold: float | None,
             images: Sequence[Hashable] | None) -> tuple[float, Callable[[np.ndarray], Figures]]:
    """The threshold, and a function: weights of the rows (n,) -> the four figures."""
    scores = np.asarray(scores, np.float64)
    n = len(texts)
    require(n and scores.shape == (n, n) and (images is None or len(images) == n),
            f"the scores have the shape {scores.shape}: {n} texts need ({n}, {n})")
    require(np.isfinite(scores).all(), "some scores are not finite numbers: mend the model first")
    image_of_row, text_of_row, right = _distinct(texts, images)
    wrong = ~right[image_of_row][:, text_of_row]                      # (n, n)
    require(wrong.any(), "all pairs share an image or a text, so none is wrong: give more of them")
    own = scores.diagonal()                                           # (n,)
    if threshold is None:
        threshold = _best_threshold(own, scores[wrong])

    # What no weight changes: how each pair and each query fares.
    below = wrong * ((scores < own[:, None]) + (scores == own[:, None]) / 2)  # (n, n)
    rejected, accepted = wrong & (scores <= threshold), own > threshold
    pairs = np.stack([wrong, below, rejected]).astype(np.float32)     # (3, n, n)
    first_image, first_text = (np.unique(rows, return_index=True)[1]
                               for rows in (image_of_row, text_of_row))
    candidates = scores[first_image][:, first_text]                   # (P, Q)
    queries = {"i2t_r10": (image_of_row, _found(candidates, right)),
               "t2i_r10": (text_of_row, _found(candidates.T, right.T))}

    def by_weights(weights: np.ndarray) -> Figures:
        num_wrong, num_below, num_rejected = pairs @ weights.astype(np.float32)  # (n,) each
        share = num_below / np.maximum(num_wrong, 1e-9)
        figures = {"above": weighted_mean(share, weights, num_wrong > 0)}
        total = (weights * num_wrong).sum()
        rejection = (weights * num_rejected).sum() / total if total else np.nan
        figures["matching"] = float(weighted_mean(accepted, weights) + rejection) / 2
        for name, (query_of_row, found) in queries.items():
            query_weights = np.bincount(query_of_row, weights) / np.bincount(query_of_row)
            figures[name] = weighted_mean(found, query_weights)
        return figures
    return threshold, by_weights


def _best_threshold(right: np.ndarray, wrong: np.ndarray) -> float:
    """The threshold of the best matching accuracy: scores of right pairs (n,), wrong ones (m,)."""
    levels, index = np.unique(np.concatenate([right, wrong]), return_inverse=True)   # (k,)
    gains = np.repeat([-1 / len(right), 1 / len(wrong)], [len(right), len(wrong)])   # (n+m,)
    accuracy = np.cumsum(np.bincount(index, gains))                   # (k,) t at each level
    best = int(np.argmax(accuracy > accuracy.max() - 1e-9))           # sums are rounded
    return float(levels[best:best + 2].mean())


def _found(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """scores, right (Q, C) -> whether each query's first right candidate is among the best (Q,)"""
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)     # (Q, 1)
    return ((scores >= best) & ~right).sum(1) < RECALL_AT
