"""Retrieval: rank texts for an image and images for a text (paper, section 3.3)."""
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from . import masking
from .distributed import DistEnv
from .loader import VAL_SEED, Samples, load, validation_micro_batches
from .objectives import M3AE

PAIRS = 128                                     # (image, text) pairs of one pass through the fusion


class Ranking(NamedTuple):
    """How retrieval ranks the candidates of a query."""
    by: str = "match"                  # match: the fusion scores every pair; itc: ITC does
    rerank: int = 0                    # itc: how many best candidates the fusion ranks again


def retrieval_metrics(model: M3AE, samples: Samples, dist_env: DistEnv, limit: int,
                      ranking: Ranking) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions among at most `limit` samples (paper, section 3.3).

    Each image is encoded once, each text once a process. By "match" the fusion runs for every pair,
    and the processes share the images. By "itc" all scores are one matrix product; then the fusion
    runs for the `rerank` best candidates of each query (as in ALBEF)."""
    # The images and the texts among the samples, each once.
    indices = np.concatenate([n for _, _, n in validation_micro_batches(samples, limit)])  # (n,)
    token_ids = [samples.token_ids(n)[:samples.cfg.max_text_len - 2] for n in indices]
    image_id, text_id, _ = samples.identities(indices, token_ids)     # (n,) each
    _, first_image = np.unique(image_id, return_index=True)           # (P,)
    _, first_text = np.unique(text_id, return_index=True)             # (Q,)
    right = torch.zeros(len(first_text), len(first_image), dtype=torch.bool)  # (Q, P)
    right[text_id, image_id] = True

    with dist_env.autocast():
        # Texts (Q, T, D), their masks (Q, T), and the score of every pair (Q, P).
        texts, masks = encode_texts(model, samples, indices[first_text], dist_env)
        if ranking.by == "match":
            scores = matching_scores(model, samples, indices[first_image], texts, masks, dist_env)
            return {**recall(scores, right, "t2i"), **recall(scores.T, right.T, "i2t")}

        images = encode_images(model, samples, indices[first_image], dist_env)  # (P, 1+L, D)
        itc = model.objectives["itc"]
        scores = itc.scores(itc.text_features(texts), itc.image_features(images))  # (Q, P)
        t2i = rerank(model, scores, texts, masks, images, ranking.rerank, "t2i", dist_env)
        i2t = rerank(model, scores, texts, masks, images, ranking.rerank, "i2t", dist_env)
    return {**recall(t2i, right, "t2i"), **recall(i2t.T, right.T, "i2t")}


def rerank(model: M3AE, scores: Tensor, texts: Tensor, masks: Tensor, images: Tensor, count: int,
           direction: str, dist_env: DistEnv) -> Tensor:
    """scores (Q, P) of ITC -> (Q, P), in which the best `count` candidates of each query come
    first, in the order of their matching score. t2i: texts are the queries; i2t: images."""
    if not count:
        return scores.cpu()
    by_query = scores if direction == "t2i" else scores.T             # (queries, candidates)
    best = by_query.topk(min(count, by_query.shape[1]), dim=1).indices  # (queries, k)
    new = torch.zeros(best.shape, device=scores.device)               # (queries, k)
    for query in range(dist_env.rank, len(best), dist_env.world_size):
        one, many = slice(query, query + 1), best[query]
        text, image = (one, many) if direction == "t2i" else (many, one)
        new[query] = match_scores(model, texts[text], images[image], masks[text])  # (k,)
    new = dist_env.all_reduce(new)

    # Above all others: matching scores are unbounded, so shift them above the best ITC score.
    by_query = by_query.scatter(1, best, by_query.max() + 1 + new - new.min())
    return (by_query if direction == "t2i" else by_query.T).cpu()


def match_scores(model: M3AE, texts: Tensor, images: Tensor, masks: Tensor) -> Tensor:
    """The retrieval head's score of pairs; the texts or the images may be a single one: (B,)

    In float32: wrong candidates win ties, and bf16 makes many scores equal."""
    fc = model.objectives["irtr"].fc
    return (model.pooled_pair(texts, images, masks).float() * fc.weight).sum(1) + fc.bias


def encode_images(model: M3AE, samples: Samples, indices: np.ndarray, dist_env: DistEnv) -> Tensor:
    """Images of the samples `indices` (P,) -> encodings (P, 1+L, D)"""
    batches = batches_of(samples, indices, dist_env)
    return torch.cat([model.encode_image(batch["image"]) for batch in batches])


def encode_texts(model: M3AE, samples: Samples, indices: np.ndarray,
                 dist_env: DistEnv) -> tuple[Tensor, Tensor]:
    """Texts of the samples `indices` (Q,) -> encodings (Q, T, D), masks (Q, T), T the longest"""
    texts, masks = [], []
    for batch in batches_of(samples, indices, dist_env):
        padding = samples.cfg.max_text_len - batch["text_ids"].shape[1]
        text = model.encode_text(batch["text_ids"], batch["text_mask"])  # (B, T', D)
        texts.append(F.pad(text, (0, 0, 0, padding)))                 # (B, T, D)
        masks.append(F.pad(batch["text_mask"], (0, padding)))         # (B, T)
    return torch.cat(texts), torch.cat(masks)


def matching_scores(model: M3AE, samples: Samples, indices: np.ndarray, texts: Tensor,
                    masks: Tensor, dist_env: DistEnv) -> Tensor:
    """The retrieval head's score of every text with every image: (Q, P)"""
    own = np.arange(dist_env.rank, len(indices), dist_env.world_size)        # this process's images
    scores = torch.zeros(len(texts), len(indices), device=dist_env.device)  # (Q, P)
    bar = tqdm(total=len(own) * len(texts), desc="pairs", leave=False, disable=not dist_env.is_main)
    columns = iter(own)
    for batch in batches_of(samples, indices[own], dist_env):
        for image in model.encode_image(batch["image"]):              # (1+L, D)
            column = next(columns)
            for start in range(0, len(texts), PAIRS):
                rows = slice(start, start + PAIRS)
                scores[rows, column] = match_scores(model, texts[rows], image[None], masks[rows])
                bar.update(len(texts[rows]))
    bar.close()
    return dist_env.all_reduce(scores).cpu()


def batches_of(samples: Samples, indices: np.ndarray,
               dist_env: DistEnv) -> Iterator[dict[str, Tensor]]:
    """The batches of the samples `indices`, PAIRS at a time."""
    micro_batches = ((masking.VALIDATION, 0, indices[start:start + PAIRS])
                     for start in range(0, len(indices), PAIRS))
    for loaded in load(samples, micro_batches, VAL_SEED, dist_env.device):
        yield loaded.batch


def recall(scores: Tensor, right: Tensor, direction: str) -> dict[str, float]:
    """scores (Q, C), right bool (Q, C) -> {direction_r1, direction_r5, direction_r10}

    Recall at k is the share of queries with a right candidate among the first k. Wrong candidates
    win ties, and scores that are not numbers: a model that scores all alike finds nothing."""
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)  # (Q, 1)
    before = (~(scores < best) & ~right).sum(1)                       # (Q,)
    return {f"{direction}_r{k}": (before < k).float().mean().item() for k in (1, 5, 10)}
