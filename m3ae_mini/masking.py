"""Which patches, which words, which wrong image: the paper's asymmetric masking, and matching's other rows.

No generator is carried from draw to draw. Each is a pure function of seed, step, chunk (the samples of one
forward pass) and row: a run resumes by its step number alone, and the number of processes changes nothing."""
import numpy as np

# What a draw is for. Two purposes never share numbers.
ORDER, MIM_MASK, MLM_MASK, NEGATIVES, CROP, DROPOUT = range(6)
VALIDATION = 1 << 62        # validation's step number: its noise never meet training's


def uniform(seed, purpose, step, chunk, shape):
    """Uniform numbers in [0, 1) of `shape`, float64. Row i depends on (seed, purpose, step, chunk, i) alone,
    as long as a row's own shape stays the same: rows are filled one after the other."""
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, 0, chunk, step], dtype=np.uint64)       # the two zeros count the numbers drawn
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(shape)


def torch_seed(seed, step, chunk):
    """The seed for dropout in the forward pass of one chunk."""
    return int(uniform(seed, DROPOUT, step, chunk, ()) * 2 ** 53)


def epoch_order(seed, epoch, size):
    """The order in which epoch `epoch` visits `size` samples, int64 (size,)."""
    return np.argsort(uniform(seed, ORDER, epoch, 0, size), kind="stable")


def random_masking(noise, ratio):
    """noise (B, L) -> ids_keep (B, K), ids_restore (B, L), MAE's ids_keep and ids_restore: the int(L·(1 - ratio))
    patches of least noise stay visible, ordered by it; ids_restore[b, l]: patch l's place in [kept ; hidden]."""
    order = noise.argsort(dim=1, stable=True)                                          # (B, L)
    ids_restore = order.argsort(dim=1)                                                     # (B, L)
    return order[:, :int(noise.shape[1] * (1 - ratio))], ids_restore


def sample_word_mask(starts, maskable, noise, ratio, whole_word=True):
    """Which tokens are hidden. starts, maskable: bool (B, T), where a word starts and which tokens may be
    hidden (no padding, no special ones); noise: uniform (B, T+1) -> bool (B, T).

    Words are taken in random order until `ratio` of the row's maskable tokens is reached, at least one word a
    row (the release drew single tokens, padding included, and hid nothing in a quarter of short captions)."""
    if not whole_word:
        starts = np.ones_like(starts)                                       # each token is a word of its own
    word = starts.cumsum(axis=1)                                            # (B, T) number of a token's word
    draw = np.where(maskable, np.take_along_axis(noise, word, axis=1), 2.0)     # (B, T) one draw a word
    before = (draw[:, None, :] < draw[:, :, None]).sum(axis=2)              # (B, T) tokens of earlier words
    wanted = np.round(ratio * maskable.sum(axis=1, keepdims=True))              # (B, 1) tokens
    return maskable & (before < np.maximum(wanted, 1))


def corrupt_tokens(ids, chosen, noise, mask_id, non_special_ids):
    """What replaces the hidden tokens: 80 % the mask token, 10 % a random token of `non_special_ids` (the ids of no
    special token), 10 % the token itself. ids, chosen (B, T), noise (B, T, 2) uniform -> ids (B, T)."""
    random_ids = non_special_ids[(noise[..., 1] * len(non_special_ids)).astype(np.int64)]            # (B, T)
    put = np.where(noise[..., 0] < 0.8, mask_id, np.where(noise[..., 0] < 0.9, random_ids, ids))
    return np.where(chosen, put, ids)


def sample_negatives(image, text, noise, amount, group=None):
    """For every row of a chunk, `amount` (at most B) other rows that differ from it in image *and* in text,
    drawn without repeats -> int64 (B, amount); where there are too few, the row's own number stands instead.

    image, text: int (B,), equal where two rows share an image or a text; noise: uniform (B, B);
    group: int (B,), where given only rows of the same group count."""
    fits = (image[:, None] != image) & (text[:, None] != text)                     # (B, B)
    if group is not None:
        fits &= group[:, None] == group
    order = np.argsort(np.where(fits, noise, 2.0), axis=1, kind="stable")[:, :amount]
    return np.where(np.take_along_axis(fits, order, axis=1), order, np.arange(len(image))[:, None])


def sample_itm_pairs(image, text, noise, group, hard_negatives=0.0):
    """Image-text matching: the image each text goes with, int64 (B,). Half of the rows, rounded down, get
    another row's image; one without a partner stays a match. A share `hard_negatives` of the wrong images is of the
    text's own group where there is one, so that the kind does not tell. noise: uniform (B, B+2)."""
    random_index = sample_negatives(image, text, noise[:, 2:], 1)[:, 0]                         # (B,) the partner
    hard_index = sample_negatives(image, text, noise[:, 2:], 1, group)[:, 0]                  # (B,)
    own = np.arange(len(image))
    wrong = np.where((noise[:, 1] < hard_negatives) & (hard_index != own), hard_index, random_index)         # (B,)
    half = np.argsort(noise[:, 0], kind="stable")[:len(own) // 2]                      # (B // 2,)
    return np.where(np.isin(own, half), wrong, own)
