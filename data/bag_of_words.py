"""What ITC's bag of words knows before training: TF-IDF and principal components of the words.

The same statistics serve a linear model of texts (latent semantic analysis); nothing is learned by
gradients."""
import numpy as np
import torch

from m3ae_mini import M3AE
from m3ae_mini.config import require
from m3ae_mini.distributed import DistEnv
from m3ae_mini.loader import Samples

LEAST = 4                              # a token counts if so many training texts have it
MOST_TOKENS = 4000                     # of those, the most frequent
MOST_TEXTS = 20_000                    # training texts that are read, evenly spaced
SMALLEST = 1e-6                        # variance of a component, as a share of the largest


def fit_bag_of_words(model: M3AE, train: Samples, dist_env: DistEnv, resumed: bool) -> None:
    """Fill the buffers of ITC's BagOfWords, unless it has none or --init has filled them.

    Its words are tokens. All ranks compute the same."""
    itc = model.objectives["itc"] if "itc" in model.objectives else None
    if itc is None or itc.words is None or resumed:                   # a checkpoint will fill them
        return
    if itc.words.idf.any():
        dist_env.print("bag of words of ITC: the one of --init is kept")
        return
    words, count = itc.words, min(train.n, MOST_TEXTS)
    longest = train.cfg.max_text_len - 2                              # as the model reads them
    texts = [np.unique(train.token_ids(n)[:longest] >> 1)
             for n in np.arange(count) * train.n // count]

    # The tokens that count, and their weight: rare ones tell more.
    occurs = np.zeros(len(words.idf), int)                            # (V,) texts with each token
    for tokens in texts:
        occurs[tokens] += 1
    words_only = np.isin(np.arange(len(occurs)), train.tokenizer.non_special_ids)
    occurs *= words_only                                              # without "unknown"
    kept = np.argsort(-occurs, kind="stable")[:MOST_TOKENS]           # (K,)
    kept = kept[occurs[kept] >= LEAST]
    require(len(kept), f"no token stands in {LEAST} training texts: leave out --itc_words")
    idf = np.zeros(len(occurs))                                       # (V,)
    idf[kept] = np.log(count / occurs[kept])

    # TF-IDF of all texts, each of length 1; its mean and principal components.
    table = np.zeros((count, len(kept)), np.float32)                  # (n, K)
    column = np.full(len(occurs), -1)
    column[kept] = np.arange(len(kept))
    for row, tokens in zip(table, texts):
        tokens = tokens[column[tokens] >= 0]
        row[column[tokens]] = idf[tokens]
    table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)
    mean = table.mean(0, dtype=np.float64)                            # (K,)
    covariance = (table.T @ table) / count - np.outer(mean, mean)     # (K, K)
    values, vectors = np.linalg.eigh(covariance)                      # ascending
    dims = min(words.components.shape[1], int((values > SMALLEST * values[-1]).sum()))
    values = values[::-1][:dims]                                      # (dims,)
    vectors = vectors[:, ::-1][:, :dims]                              # (K, dims)

    # Every component gets variance 1 / dims, so that a text's vector has a length of about 1.
    words.idf.copy_(torch.from_numpy(idf))
    words.mean[kept] = torch.from_numpy(mean).float()
    scale = np.sqrt(values * dims)                                    # (dims,)
    words.components[torch.tensor(kept), :dims] = torch.from_numpy(vectors / scale).float()
    dist_env.print(f"bag of words of ITC: {len(kept):,} tokens that stand in {LEAST} training "
                   f"texts or more, {dims} components")
