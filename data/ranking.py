"""Retrieval: rank texts for an image and images for a text (paper, section 3.3)."""
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from m3ae_mini import M3AE, masking
from m3ae_mini.distributed import DistEnv
from m3ae_mini.loader import VAL_SEED, Samples, load, validation_micro_batches

PAIRS = 128                                     # (image, text) pairs of one pass through the fusion


@torch.no_grad()
def retrieval_ranks(model: M3AE, samples: Samples, dist_env: DistEnv, limit: int,
                    ranking: tuple[str, int]) -> dict[str, tuple[np.ndarray, Tensor]]:
    """Rank texts for images and images for texts, among at most `limit` samples

    Returns {"t2i": (samples of the text queries (Q,), rank of the first right image of each (Q,)),
    "i2t": the same for the images (P,)}. Each image and each text is encoded once a process.
    ranking: ("match", 0), the fusion scores every pair; or ("itc", k), all scores are one matrix
    product, and the fusion ranks the k best candidates of each query again (as in ALBEF)."""
    # The images and the texts among the samples, each once.
    indices = np.concatenate([n for _, _, n in validation_micro_batches(samples, limit)])  # (n,)
    image_id, text_id, _ = samples.identities(indices)                # (n,) each
    _, first_image = np.unique(image_id, return_index=True)           # (P,)
    _, first_text = np.unique(text_id, return_index=True)             # (Q,)
    right = torch.zeros(len(first_text), len(first_image), dtype=torch.bool)  # (Q, P)
    right[text_id, image_id] = True

    with dist_env.autocast():
        # Texts (Q, T, D), their ids and masks (Q, T), images (P, 1+L, D).
        texts, text_batch = encode_texts(model, samples, indices[first_text], dist_env)
        images = encode_images(model, samples, indices[first_image], dist_env)
        masks = text_batch["text_mask"]
        by, count = ranking
        if by == "match":
            candidates = torch.arange(len(texts)).expand(len(images), -1)     # (P, Q)
            t2i = i2t = pair_scores(model, texts, masks, images, candidates, "i2t", dist_env).T
        else:
            itc = model.objectives["itc"]
            scores = itc.scores(itc.text_features(texts, text_batch),
                                itc.image_features(images))           # (Q, P)
            t2i = rerank(model, scores, texts, masks, images, count, "t2i", dist_env)
            i2t = rerank(model, scores, texts, masks, images, count, "i2t", dist_env)
    return {"t2i": (indices[first_text], first_right(t2i, right)),
            "i2t": (indices[first_image], first_right(i2t.T, right.T))}


def rerank(model: M3AE, scores: Tensor, texts: Tensor, masks: Tensor, images: Tensor, count: int,
           direction: str, dist_env: DistEnv) -> Tensor:
    """scores (Q, P) of ITC -> (Q, P), in which the best `count` candidates of each query come
    first, in the order of their matching score. t2i: texts are the queries; i2t: images."""
    if not count:
        return scores.cpu()
    by_query = (scores if direction == "t2i" else scores.T).cpu()     # (queries, candidates)
    best = by_query.topk(min(count, by_query.shape[1]), dim=1).indices  # (queries, k)
    new = pair_scores(model, texts, masks, images, best, direction, dist_env)  # (queries, k)

    # Above all others: matching scores are unbounded, so shift them above the best ITC score.
    by_query = by_query.scatter(1, best, by_query.max() + 1 + new - new.min())
    return by_query if direction == "t2i" else by_query.T


def pair_scores(model: M3AE, texts: Tensor, masks: Tensor, images: Tensor, candidates: Tensor,
                direction: str, dist_env: DistEnv) -> Tensor:
    """The retrieval head's score of each query with its candidates (queries, k): (queries, k)

    The processes share the queries: texts (t2i) or images (i2t). In float32: wrong candidates win
    ties, and bf16 makes many scores equal."""
    fc = model.objectives["irtr"].fc
    scores = torch.zeros(candidates.shape, device=dist_env.device)    # (queries, k)
    own = range(dist_env.rank, len(candidates), dist_env.world_size)
    for query in tqdm(own, desc="pairs", leave=False, disable=None if dist_env.is_main else True):
        for start in range(0, candidates.shape[1], PAIRS):
            one, many = slice(query, query + 1), candidates[query, start:start + PAIRS]
            text, image = (one, many) if direction == "t2i" else (many, one)
            pair = model.pooled_pair(texts[text], images[image], masks[text]).float()  # (B, 2D)
            scores[query, start:start + PAIRS] = (pair * fc.weight).sum(1) + fc.bias
    return dist_env.all_reduce(scores).cpu()


def encode_images(model: M3AE, samples: Samples, indices: np.ndarray, dist_env: DistEnv) -> Tensor:
    """Images of the samples `indices` (P,) -> encodings (P, 1+L, D)"""
    batches = batches_of(samples, indices, dist_env)
    return torch.cat([model.encode_image(batch["image"]) for batch in batches])


def encode_texts(model: M3AE, samples: Samples, indices: np.ndarray,
                 dist_env: DistEnv) -> tuple[Tensor, dict[str, Tensor]]:
    """Texts of the samples `indices` (Q,) -> encodings (Q, T, D); their text_ids, text_mask (Q, T),
    T the longest"""
    texts, parts = [], []
    for batch in batches_of(samples, indices, dist_env):
        padding = samples.cfg.max_text_len - batch["text_ids"].shape[1]
        text = model.encode_text(batch["text_ids"], batch["text_mask"])  # (B, T', D)
        texts.append(F.pad(text, (0, 0, 0, padding)))                 # (B, T, D)
        pad_id = samples.tokenizer.pad_id
        parts.append((F.pad(batch["text_ids"], (0, padding), value=pad_id),   # (B, T)
                      F.pad(batch["text_mask"], (0, padding))))       # (B, T)
    ids, masks = (torch.cat(part) for part in zip(*parts))
    return torch.cat(texts), {"text_ids": ids, "text_mask": masks}


def batches_of(samples: Samples, indices: np.ndarray,
               dist_env: DistEnv) -> Iterator[dict[str, Tensor]]:
    """The batches of the samples `indices`, PAIRS at a time."""
    micro_batches = ((masking.VALIDATION, 0, indices[start:start + PAIRS])
                     for start in range(0, len(indices), PAIRS))
    for loaded in load(samples, micro_batches, VAL_SEED, dist_env.device):
        yield loaded.batch


def first_right(scores: Tensor, right: Tensor) -> Tensor:
    """scores (Q, C), right bool (Q, C) -> the rank, from 1, of each query's first right one (Q,)

    Wrong candidates win ties, and scores that are not numbers: a model that scores all alike finds
    nothing."""
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)  # (Q, 1)
    return 1 + (~(scores < best) & ~right).sum(1)
