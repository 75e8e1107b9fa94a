"""The masks of patches and words, and the negatives of matching.

All functions are pure. Random numbers are a pure function of (seed, purpose, step, micro-batch,
row), so a run resumes by its step number alone, and the number of processes changes nothing."""
import numpy as np
from torch import Tensor

# What random numbers are for. Two purposes never share numbers.
ORDER, MIM_MASK, MLM_MASK, NEGATIVES, CROP, DROPOUT, AUGMENT = range(7)
VALIDATION = 1 << 62        # validation's step number, which training never reaches


# ----------------------------------------------------------------------------------- random numbers

def uniform(seed: int, purpose: int, step: int, micro_batch_index: int, shape) -> np.ndarray:
    """Uniform numbers in [0, 1) of `shape`, float64.

    Row i depends on (seed, purpose, step, micro_batch_index, i) alone, as long as a row's own shape
    stays the same: rows are filled one after the other."""
    key = np.array([seed, purpose], dtype=np.uint64)
    # The two zeros are Philox's own counter of the numbers drawn.
    counter = np.array([0, 0, micro_batch_index, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(shape)


def torch_seed(seed: int, step: int, micro_batch_index: int) -> int:
    """The seed of dropout in the forward pass of one micro-batch."""
    return int(uniform(seed, DROPOUT, step, micro_batch_index, ()) * 2 ** 53)


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order in which epoch `epoch` visits `size` samples, int64 (size,)."""
    return np.argsort(uniform(seed, ORDER, epoch, 0, size), kind="stable")


# ------------------------------------------------------------------------------------------ patches

def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """noise (B, L) -> ids_keep (B, K), ids_restore (B, L), as in MAE

    The K = int(L·(1 - mask_ratio)) patches of lowest noise stay visible, in the order of their
    noise. ids_restore[b, l] is the position of patch l in [visible ; hidden]."""
    ids_shuffle = noise.argsort(dim=1, stable=True)                   # (B, L)
    ids_restore = ids_shuffle.argsort(dim=1)                          # (B, L)
    num_visible = int(noise.shape[1] * (1 - mask_ratio))
    return ids_shuffle[:, :num_visible], ids_restore


# -------------------------------------------------------------------------------------------- words

def sample_word_mask(starts: np.ndarray, maskable: np.ndarray, noise: np.ndarray, mlm_ratio: float,
                     whole_word: bool = True) -> np.ndarray:
    """Which tokens to mask: bool (B, T).

    starts, maskable: bool (B, T), where a word starts and which tokens may be masked (no padding,
    no special tokens); noise: uniform (B, T+1). Words are taken in random order until `mlm_ratio`
    of the row's maskable tokens is reached, at least one word a row. (The release draws single
    tokens, padding included, and masks nothing in a quarter of short captions.)"""
    if not whole_word:
        starts = np.ones_like(starts)                                         # each token is a word
    # The tokens of a word share one number, so they are masked together. Words are taken in the
    # order of their numbers, while fewer than `wanted` tokens have been taken before.
    word = starts.cumsum(axis=1)                                      # (B, T) index of its word
    word_noise = np.take_along_axis(noise, word, axis=1)              # (B, T) one number a word
    word_noise = np.where(maskable, word_noise, 2.0)                  # (B, T) 2 sorts last
    before = word_noise[:, None, :] < word_noise[:, :, None]          # (B, T, T)
    before = before.sum(axis=2)                                       # (B, T) tokens taken before
    wanted = np.round(mlm_ratio * maskable.sum(axis=1, keepdims=True))  # (B, 1) tokens to mask
    return maskable & (before < np.maximum(wanted, 1))


def corrupt_tokens(ids: np.ndarray, masked: np.ndarray, noise: np.ndarray, mask_id: int,
                   non_special_ids: np.ndarray) -> np.ndarray:
    """BERT's corruption of the masked tokens: 80 % mask token, 10 % random token, 10 % unchanged.

    ids, masked (B, T), noise (B, T, 2) uniform -> ids (B, T). Random tokens come from
    `non_special_ids`."""
    random_ids = non_special_ids[(noise[..., 1] * len(non_special_ids)).astype(np.int64)]  # (B, T)
    # Below 0.8 the mask token, below 0.9 a random token, else the token itself.
    unchanged_or_random = np.where(noise[..., 0] < 0.9, random_ids, ids)  # (B, T)
    corrupted = np.where(noise[..., 0] < 0.8, mask_id, unchanged_or_random)  # (B, T)
    return np.where(masked, corrupted, ids)


# ---------------------------------------------------------------------------------------- negatives

def sample_negatives(image: np.ndarray, text: np.ndarray, noise: np.ndarray, amount: int,
                     group: np.ndarray | None = None) -> np.ndarray:
    """For each sample `amount` others that differ in image *and* text: int64 (B, amount).

    They are drawn without repeats. Rows with too few negatives are padded with their own index.
    image, text: int (B,), equal if two rows share an image or a text; noise: uniform (B, B);
    group: int (B,), if given only rows of the same group count (hard negatives); amount: at most
    B."""
    allowed = (image[:, None] != image) & (text[:, None] != text)     # (B, B)
    if group is not None:
        allowed &= group[:, None] == group
    noise = np.where(allowed, noise, 2.0)                             # (B, B) negatives first
    order = np.argsort(noise, axis=1, kind="stable")[:, :amount]      # (B, amount)
    is_negative = np.take_along_axis(allowed, order, axis=1)          # (B, amount)
    return np.where(is_negative, order, np.arange(len(image))[:, None])


def sample_itm_pairs(image: np.ndarray, text: np.ndarray, noise: np.ndarray, group: np.ndarray,
                     hard_negatives: float = 0.0) -> np.ndarray:
    """Image-text matching: the row whose image each text gets, int64 (B,).

    Half of the rows, rounded down, get another row's image; a row without a negative keeps its own.
    A share `hard_negatives` of the wrong images comes from the text's own group, if it has another
    pair: then the group alone does not give the answer. noise: uniform (B, B+2). Column 0 chooses
    the rows that get a wrong image, 1 decides for a hard negative, the others choose negatives."""
    positive_index = np.arange(len(image))                            # (B,)
    random_index = sample_negatives(image, text, noise[:, 2:], 1)[:, 0]  # (B,)
    hard_index = sample_negatives(image, text, noise[:, 2:], 1, group)[:, 0]  # (B,)
    use_hard = (noise[:, 1] < hard_negatives) & (hard_index != positive_index)  # (B,)
    negative_index = np.where(use_hard, hard_index, random_index)     # (B,)
    swapped = np.argsort(noise[:, 0], kind="stable")[:len(image) // 2]  # (B // 2,)
    return np.where(np.isin(positive_index, swapped), negative_index, positive_index)
