"""Masks and wrong images: pure functions of (seed, step, chunk, position), in the shares of the paper."""
import itertools

import numpy as np
import pytest
import torch

from m3ae_mini import masking
from m3ae_mini.masking import (
    MIM_MASK, VALIDATION, MLM_MASK, NEGATIVES, sample_word_mask, epoch_order, corrupt_tokens, sample_itm_pairs, random_masking,
    torch_seed, uniform, sample_negatives)


# -------------------------------------------------------------------------------- noise

def test_a_draw_is_pure():
    first = uniform(7, MLM_MASK, 3, 1, (4, 5))
    uniform(7, MLM_MASK, 4, 1, (9,))
    assert np.array_equal(uniform(7, MLM_MASK, 3, 1, (4, 5)), first)
    assert first.dtype == np.float64 and 0 <= first.min() and first.max() < 1


def test_a_row_does_not_know_how_many_there_are():
    assert np.array_equal(uniform(7, MLM_MASK, 3, 1, (64, 5))[:4], uniform(7, MLM_MASK, 3, 1, (4, 5)))


def test_every_place_has_numbers_of_its_own():
    purposes = [masking.ORDER, masking.MIM_MASK, masking.MLM_MASK, masking.NEGATIVES, masking.CROP, masking.DROPOUT]
    steps = [0, 1, 2, VALIDATION, VALIDATION + 1]
    places = list(itertools.product([0, 1, 2 ** 32], purposes, steps, [0, 1, 2]))
    numbers = np.concatenate([uniform(*place, (50,)) for place in places])
    assert len(np.unique(numbers)) == len(numbers)                             # nor a part of another place's
    assert abs(numbers.mean() - 0.5) < 0.01


def test_torch_seed():
    seeds = {torch_seed(seed, step, chunk) for seed in range(5) for step in range(20) for chunk in range(4)}
    assert len(seeds) == 400 and all(isinstance(seed, int) and 0 <= seed < 2 ** 53 for seed in seeds)


def test_epoch_order():
    orders = [epoch_order(seed, epoch, 100) for seed in range(3) for epoch in range(3)]
    assert all(np.array_equal(np.sort(order), np.arange(100)) for order in orders)
    assert all(not np.array_equal(one, other) for one, other in itertools.combinations(orders, 2))
    assert np.array_equal(epoch_order(2, 2, 100), orders[-1])
    # Every sample is as likely to come first.
    first = np.bincount([epoch_order(0, epoch, 10)[0] for epoch in range(2000)], minlength=10)
    assert abs(first - 200).max() < 70                                         # five standard deviations


# -------------------------------------------------------------------------------- patches

@pytest.mark.parametrize("patches, ratio, visible", [(16, 0.75, 4), (324, 0.75, 81), (10, 0.33, 6)])
def test_split_patches(patches, ratio, visible):
    noise = torch.from_numpy(uniform(0, MIM_MASK, 0, 0, (3, patches))).float()
    ids_keep, ids_restore = random_masking(noise, ratio)
    assert ids_keep.shape == (3, visible) and ids_restore.shape == (3, patches)
    for b in range(3):
        order = sorted(range(patches), key=noise[b].tolist().__getitem__)
        assert ids_keep[b].tolist() == order[:visible]
        assert [order[place] for place in ids_restore[b]] == list(range(patches))


def test_split_patches_of_equal_noise():
    ids_keep, ids_restore = random_masking(torch.zeros(1, 16), 0.75)
    assert ids_keep[0].tolist() == [0, 1, 2, 3] and ids_restore[0].tolist() == list(range(16))


# -------------------------------------------------------------------------------- words

def texts(rows, words, lengths, columns, first_is_special=True, specials_start=True):
    """Texts of special token, `words` words of a length drawn from `lengths`, special token, padding ->
    starts, real, word: the number of each token's word or -1, (B, T) each"""
    rng = np.random.default_rng(0)
    word = np.full((rows, columns), -1)
    starts = np.zeros((rows, columns), bool)
    for b in range(rows):
        numbers = np.repeat(np.arange(words), rng.choice(lengths, words))[:columns - 2]
        word[b, first_is_special:first_is_special + len(numbers)] = numbers
    starts[:, 1:] = word[:, 1:] != word[:, :-1]
    starts[:, 0] = True
    if not specials_start:
        starts &= word >= 0
    return starts, word >= 0, word


# Tokenizers differ in whether special tokens and padding count as starts of words; nothing may depend on it.
LAYOUTS = {"specials start": dict(), "specials do not": dict(specials_start=False),
           "no special in front": dict(specials_start=False, first_is_special=False)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_whole_words_are_hidden(layout):
    starts, real, word = texts(200, 9, [1, 2, 3], 40, **layout)
    chosen = sample_word_mask(starts, real, uniform(0, MLM_MASK, 0, 0, (200, 41)), 0.15)
    assert chosen.any(axis=1).all()
    assert not chosen[~real].any()
    for b in range(200):
        hidden = np.unique(word[b][chosen[b]])
        assert np.array_equal(np.isin(word[b], hidden), chosen[b])             # all tokens of a word or none
        tokens = chosen[b].sum()
        wanted = max(1, np.round(0.15 * real[b].sum()))
        last = max((word[b] == w).sum() for w in hidden)
        assert wanted <= tokens < wanted + last                                # no word more than it takes


@pytest.mark.parametrize("ratio", [0.15, 0.4])
def test_share_of_hidden_tokens(ratio):
    starts, real, _ = texts(2000, 40, [1, 1, 1, 2], 64)
    chosen = sample_word_mask(starts, real, uniform(0, MLM_MASK, 0, 0, (2000, 65)), ratio)
    assert ratio <= chosen.sum() / real.sum() < ratio + 0.01                   # the last word may go beyond


def test_single_tokens():
    starts, real, word = texts(2000, 12, [2, 3], 40)
    chosen = sample_word_mask(starts, real, uniform(0, MLM_MASK, 0, 0, (2000, 41)), 0.15, whole_word=False)
    assert not chosen[~real].any()
    assert np.array_equal(chosen.sum(axis=1), np.round(0.15 * real.sum(axis=1)))
    split = [0 < chosen[b][word[b] == w].sum() < (word[b] == w).sum() for b in range(50) for w in range(12)]
    assert any(split)


@pytest.mark.parametrize("whole_word", [True, False])
@pytest.mark.parametrize("tokens_per_word", [1, 2])
def test_every_word_is_as_likely(tokens_per_word, whole_word):
    starts, real, _ = texts(8000, 10, [tokens_per_word], 24)
    chosen = sample_word_mask(starts, real, uniform(0, MLM_MASK, 0, 0, (8000, 25)), 0.2, whole_word)
    share = chosen[:, 1:1 + 10 * tokens_per_word].mean(axis=0)
    assert abs(share - 0.2).max() < 5 * (0.2 * 0.8 / 8000) ** 0.5


def test_short_texts_have_a_hidden_word():
    starts, real, word = texts(50, 1, [1, 2, 3], 8)
    numbers = uniform(0, MLM_MASK, 0, 0, (50, 9))
    assert np.array_equal(sample_word_mask(starts, real, numbers, 0.15), real)     # the only word
    assert (sample_word_mask(starts, real, numbers, 0.15, whole_word=False).sum(axis=1) == 1).all()


def test_text_without_words_hides_nothing():
    nothing = np.zeros((2, 8), bool)
    assert not sample_word_mask(nothing, nothing, uniform(0, MLM_MASK, 0, 0, (2, 9)), 0.15).any()


def test_padding_does_not_change_which_words():
    """The loader cuts texts to the longest of a chunk; the choice among the same numbers is the same."""
    starts, real, _ = texts(100, 6, [1, 2], 30)
    numbers = uniform(0, MLM_MASK, 0, 0, (100, 31))
    whole = sample_word_mask(starts, real, numbers, 0.15)
    short = sample_word_mask(starts[:, :16], real[:, :16], numbers[:, :17], 0.15)
    assert not real[:, 16:].any() and np.array_equal(whole[:, :16], short)


def test_what_stands_for_hidden_tokens():
    non_special_ids = np.arange(10, 1000)
    ids = np.full((400, 100), 5)
    chosen = np.arange(100) % 2 == np.zeros((400, 1))
    put = corrupt_tokens(ids, chosen, uniform(0, MLM_MASK, 0, 1, (400, 100, 2)), 4, non_special_ids)
    assert put.dtype == ids.dtype and (put[~chosen] == 5).all()

    put = put[chosen]
    random = put[(put != 4) & (put != 5)]
    for count, share in (((put == 4).sum(), 0.8), (len(random), 0.1), ((put == 5).sum(), 0.1)):
        assert abs(count / len(put) - share) < 5 * (share * (1 - share) / len(put)) ** 0.5
    assert np.isin(random, non_special_ids).all() and random.min() < 40 and random.max() > 970
    assert abs(random.mean() - non_special_ids.mean()) < 5 * non_special_ids.std() / len(random) ** 0.5


def test_limits_of_the_numbers():
    """0.8 and 0.9 belong to the next kind; the largest number still is an non_special_ids token."""
    numbers = np.array([[[0.0, 0.0], [0.8, 0.0], [np.nextafter(1, 0), 0.0], [0.85, np.nextafter(1, 0)]]])
    put = corrupt_tokens(np.full((1, 4), 7), np.ones((1, 4), bool), numbers, 4, np.array([20, 30]))
    assert put.tolist() == [[4, 20, 7, 30]]


# -------------------------------------------------------------------------------- wrong images

def chunk(rows=16):
    """Rows of which some share an image, some a text -> image, text, group (B,)"""
    return np.arange(rows) // 2, np.arange(rows) % 5, np.arange(rows) % 3


@pytest.mark.parametrize("grouped", [False, True])
def test_wrong_rows_differ_in_both(grouped):
    image, text, group = chunk()
    seen = np.zeros((16, 16), int)
    for step in range(300):
        numbers = uniform(0, NEGATIVES, step, 0, (16, 16))
        wrong = sample_negatives(image, text, numbers, 3, group if grouped else None)
        assert wrong.shape == (16, 3) and wrong.dtype == np.int64
        for i, row in enumerate(wrong.tolist()):
            others = [j for j in row if j != i]
            assert len(set(others)) == len(others)                             # no repeats
            seen[i, others] += 1

    fits = (image[:, None] != image) & (text[:, None] != text)
    if grouped:
        fits &= group[:, None] == group
    assert np.array_equal(seen > 0, fits)                                      # each that fits, no other,
    for i in range(16):                                                        # and all as often
        expected = 300 * min(3, fits[i].sum()) / fits[i].sum()
        assert abs(seen[i, fits[i]] - expected).max() < 5 * expected ** 0.5 + 1e-9


def test_wrong_rows_where_there_are_too_few():
    image, text = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])
    wrong = sample_negatives(image, text, uniform(0, NEGATIVES, 0, 0, (4, 4)), 3)
    # Row 1 shares its image with row 0 and its text with all others; rows 2 and 3 differ from row 0 alone.
    assert sorted(wrong[0].tolist()) == [0, 2, 3]
    assert wrong[1:].tolist() == [[1, 1, 1], [0, 2, 2], [0, 3, 3]]


@pytest.mark.parametrize("hard_negatives", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 33])
def test_half_of_the_rows_are_mismatched(rows, hard_negatives):
    numbers = uniform(0, NEGATIVES, 0, 0, (rows, rows + 2))
    index = sample_itm_pairs(np.arange(rows), np.arange(rows), numbers, np.arange(rows) % 3, hard_negatives)
    assert index.shape == (rows,) and index.dtype == np.int64
    assert (index != np.arange(rows)).sum() == rows // 2


@pytest.mark.parametrize("hard_negatives", [0.0, 0.5, 1.0])
def test_mismatched_rows_differ_in_image_and_text(hard_negatives):
    image, text, group = chunk()
    seen = np.zeros((16, 16))
    for step in range(400):
        index = sample_itm_pairs(image, text, uniform(0, NEGATIVES, step, 0, (16, 18)), group, hard_negatives)
        moved = index != np.arange(16)
        assert moved.sum() == 8
        assert (image[index] != image)[moved].all() and (text[index] != text)[moved].all()
        seen[moved, index[moved]] += 1
    assert abs(seen.sum(axis=1) - 200).max() < 50                              # every row as often (5 sd)

    # A wrong image is any that fits, or in a share `hard_negatives` of the cases any of the same group that fits.
    fits = (image[:, None] != image) & (text[:, None] != text)
    akin = fits & (group[:, None] == group)
    assert akin.any(axis=1).all()
    share = (1 - hard_negatives) * fits / fits.sum(axis=1, keepdims=True) + hard_negatives * akin / akin.sum(axis=1, keepdims=True)
    expected = 200 * share.sum(axis=0)
    assert (abs(seen.sum(axis=0) - expected) < 5 * expected ** 0.5).all()
    expected = 200 * (share * akin).sum()
    assert abs((seen * akin).sum() - expected) <= 5 * (expected * (1 - expected / 3200)) ** 0.5


def test_rows_without_a_partner_stay_a_match():
    numbers = uniform(0, NEGATIVES, 0, 0, (8, 10))
    same, different = np.zeros(8, int), np.arange(8)
    assert np.array_equal(sample_itm_pairs(same, different, numbers, same), different)
    assert np.array_equal(sample_itm_pairs(different, same, numbers, same), different)

    alone = np.array([0, 0, 0, 0, 0, 0, 0, 1])                                 # a partner: the last row alone
    for step in range(200):
        index = sample_itm_pairs(alone, alone, uniform(0, NEGATIVES, step, 0, (8, 10)), same)
        assert (alone[index] != alone).sum() == (index != different).sum() <= 4


def test_rows_without_kin_get_any_other_image():
    index = sample_itm_pairs(np.arange(8), np.arange(8), uniform(0, NEGATIVES, 0, 0, (8, 10)), np.arange(8), hard_negatives=1.0)
    assert (index != np.arange(8)).sum() == 4
