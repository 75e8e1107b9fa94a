"""linear.py finds the relations that made-up packs have, and no others."""
import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import features
import linear
from data import Row, scores as scores_module
from data.pack import Pack
from data.pair_metrics import pair_figures
from data.predict import load_run
from data.write_pack import write_pack
from m3ae_mini.config import UserError
from m3ae_mini.loader import normalise
from m3ae_mini.weights import load_text
from test_finetune import packs, pretrained                            # fixtures
from test_weights import CFG, hugging_face, other_model

SIZE = 16
CORNERS = "north", "east", "south", "west"
COUNTS = {"train": 160, "val": 60, "test": 60}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals take most of the time."""
    monkeypatch.setattr(scores_module, "RESAMPLES", 20)


# ------------------------------------------------------------------------------------ parts of linear.py

def test_ridge_is_the_closed_form_whichever_matrix_is_smaller():
    random = np.random.default_rng(4)
    for n, dims in (30, 7), (7, 30):
        x, y = random.normal(size=(n, dims)) + 5, random.normal(size=(n, 2)) - 3
        for strength, predict in zip(linear.STRENGTHS, linear.fit_ridge(x, y)):
            # The same as least squares with rows that pull all but the intercept to 0.
            left = np.block([[x, np.ones((n, 1))], [np.sqrt(strength) * np.eye(dims), np.zeros((dims, 1))]])
            weights = np.linalg.lstsq(left, np.concatenate([y, np.zeros((dims, 2))]), rcond=None)[0]
            assert np.allclose(predict(x), x @ weights[:-1] + weights[-1], atol=1e-6)


def test_products_are_those_of_the_features_one_by_one():
    """Kernel ridge against ridge on [a, b, all products of a and b], all centred by their maker."""
    random = np.random.default_rng(7)
    a, b, y = random.normal(size=(40, 3)), random.normal(size=(40, 4)), random.normal(size=(30, 2))
    parts = {"train": slice(0, 30), "val": slice(30, 40)}
    found, strength = linear.best_ridge([[a], [b]], parts, y, lambda outputs: -np.square(outputs).mean())

    a, b = linear.join([a], 30), linear.join([b], 30)
    x = np.concatenate([a, b, np.einsum("ni,nj->nij", a, b).reshape(40, -1)], axis=1)
    weights = np.linalg.solve(x[:30].T @ x[:30] + strength * np.eye(x.shape[1]), x[:30].T @ (y - y.mean(0)))
    assert np.allclose(found, x @ weights + y.mean(0))


def test_principal_components_are_uncorrelated_and_no_more_than_there_are():
    random = np.random.default_rng(5)
    rows = random.normal(size=(50, 4)) @ random.normal(size=(4, 9)) + 2
    found = linear.pca(rows, 30)(rows)
    assert np.allclose(found.T @ found / 50, np.eye(4))
    assert np.allclose(linear.pca(rows, 2)(rows), found[:, :2])


def test_words_are_weighted_and_unknown_ones_ignored():
    encode = features.BagOfWords(["a b", "a c", "a b 12", "d"], 2, idf=True)
    assert list(encode.index) == ["a", "b"]
    weights = np.log([4 / 3, 4 / 2])
    assert np.allclose(encode(["b a a x", "x"]), [weights / np.linalg.norm(weights), [0, 0]])
    assert np.allclose(features.BagOfWords(["a b"], 1, idf=False)(["b a"]), np.sqrt([[1 / 2, 1 / 2]]))


def test_only_the_most_frequent_words_are_used(monkeypatch, capsys):
    monkeypatch.setattr(features, "MAX_WORDS", 1)
    assert list(features.BagOfWords(["a b", "b"], 1, idf=True).index) == ["b"]
    assert "of 2 words the 1 most frequent are used" in capsys.readouterr().out


def test_a_gradient_falls_into_the_bin_of_its_direction(tmp_path):
    ramp = np.tile(np.arange(0, 240, 15, dtype=np.uint8), (SIZE, 1))
    for name, pixels in (("0.png", ramp), ("1.png", ramp.T)):
        Image.fromarray(pixels).save(tmp_path / name)
    rows = [Row("train", tmp_path / name, "a") for name in ("0.png", "1.png")]
    across, down = features.pixel_features(made(rows, tmp_path / "pack", "pretrain"))
    assert across.shape == (196 + 392 + 32,)
    for row, direction in (across, 0), (down, 4):
        histograms = row[196:588].reshape(49, 8)
        assert histograms.argmax(1).tolist() == [direction] * 49
        assert histograms.sum() == pytest.approx(histograms[:, direction].sum())
    assert np.allclose(across[:196].reshape(14, 14), down[:196].reshape(14, 14).T, atol=0.01)


# ------------------------------------------------------------------------------------------ made-up packs

def made(rows, out, task):
    """The pack of these rows."""
    write_pack(rows, out=out, name="test", task=task, size=SIZE, workers=1)
    return Pack(out)


def corners(folder, bits, seed):
    """An image file: a corner is bright where its bit is 1; a little noise."""
    pixels = np.random.default_rng(seed).integers(0, 30, (SIZE, SIZE), dtype=np.uint8)
    for i, bit in enumerate(bits):
        top, left = i // 2 * 8, i % 2 * 8
        pixels[top:top + 8, left:left + 8] += np.uint8(150 * bit)
    path = folder / f"{seed}.png"
    Image.fromarray(pixels).save(path)
    return path


def scenes(counts=COUNTS):
    """(split, number, four random bits) of each sample"""
    random = np.random.default_rng(6)
    splits = [split for split, count in counts.items() for _ in range(count)]
    return [(split, n, random.integers(0, 2, 4)) for n, split in enumerate(splits)]


def report(pack, capsys, init=None):
    """(what linear.py finds on a pack, what it prints)"""
    capsys.readouterr()
    return linear.report(pack.folder, init)["tables"], capsys.readouterr().out


def value(table, split, row, figure):
    return table[split][row][figure][0]


@pytest.mark.parametrize("task", ["pretrain", "irtr"])
def test_captions_that_say_what_is_seen(task, tmp_path, capsys):
    """Each bright corner is named; the group is one corner."""
    rows = [Row(split, corners(tmp_path, bits, n), "seen: " + " ".join(
                word for word, bit in zip(CORNERS, bits) if bit), group="bright" if bits[0] else "dark")
            for split, n, bits in scenes()]
    tables, printed = report(made(rows, tmp_path / "pack", task), capsys)
    for split in "val", "test":
        assert value(tables["pairs"], split, "pixels", "above") > 0.97
        assert value(tables["pairs"], split, "pixels", "matching") > 0.93
        assert value(tables["pairs"], split, "pixels", "i2t_r10") == 1
        assert value(tables["pairs"], split, "chance", "matching") == 0.5
        assert value(tables["group"], split, "pixels", "acc") == 1
        assert 0.3 < value(tables["group"], split, "most frequent", "acc") < 0.7
    assert "| test: chance | 50.0 | 50.0 | " in printed and "160 training pairs of 16 texts" in printed


def test_captions_of_other_images(tmp_path, capsys):
    drawn = scenes()
    rows = [Row(split, corners(tmp_path, bits, n), "seen: " + " ".join(
                word for word, bit in zip(CORNERS, drawn[(7 * n + 11) % len(drawn)][2]) if bit))
            for split, n, bits in drawn]
    tables, _ = report(made(rows, tmp_path / "pack", "pretrain"), capsys)
    for split, figure in product(("val", "test"), ("above", "matching")):
        assert 0.4 < value(tables["pairs"], split, "pixels", figure) < 0.6
    assert "group" not in tables


def test_questions_that_need_words_or_an_image(tmp_path, capsys):
    """Open ones need the words alone; closed ones the image, which is one of eight of train."""
    images = [corners(tmp_path, (n % 2, 1, 0, n // 2 % 2), n) for n in range(8)]
    rows = []
    for split, n, bits in scenes():
        image = n % 8
        rows.append(Row(split, images[image], "Is it bright?", "yes" if image % 2 else "no", closed=True))
        organ = ("heart", "lung", "bone")[n % 3]
        rows.append(Row(split, images[int(bits @ (1, 2, 4, 0))], f"What is in the {organ}?",
                        f"{organ}#the {organ}", closed=False))
    tables, printed = report(made(rows, tmp_path / "pack", "vqa"), capsys)
    for split in "val", "test":
        table = tables["answers"][split]
        assert table["words"]["acc_open"][0] == 1 and table["words"]["acc_closed"][0] < 0.6
        for block in "pixels", "identity":
            assert table[f"words + {block}"]["acc"][0] == 1
            assert table[block]["acc_open"][0] < 0.6
        assert table["most frequent"]["acc_open"][0] == 0
        assert table["words"]["answer_not_in_list"] == [0, 0, 0]
    assert "100% of val, 100% of test" in printed and "answer_not_in_list" not in printed


def test_questions_whose_words_and_image_must_meet(tmp_path, monkeypatch, capsys):
    """Bright or dark, asked either way: neither words nor image nor their sum tell the answer."""
    rows = [Row(split, corners(tmp_path, [bits[0]] * 4, n), f"Is it {('dark', 'bright')[bits[1]]}?",
                "yes" if bits[0] == bits[1] else "no", closed=True) for split, n, bits in scenes()]
    pack = made(rows, tmp_path / "pack", "vqa")
    tables, _ = report(pack, capsys)
    for split in "val", "test":
        assert value(tables["answers"], split, "words × pixels", "acc") == 1
        assert value(tables["answers"], split, "words + pixels", "acc") < 0.75
    monkeypatch.setattr(linear, "MAX_PRODUCTS", 159)
    tables, printed = report(pack, capsys)
    assert "words × pixels" not in tables["answers"]["test"]
    assert "no rows with products: 160 training samples are more than 159" in printed


def test_questions_on_new_images_have_no_identity(tmp_path, capsys):
    rows = [Row(split, corners(tmp_path, bits, n), "Is it bright?", "yes" if bits[0] else "no", closed=True)
            for split, n, bits in scenes()]
    pack = made(rows, tmp_path / "pack", "vqa")
    tables, _ = report(pack, capsys)
    assert list(tables["answers"]["test"]) == ["most frequent", "words", "pixels", "words + pixels",
                                                "words × pixels"]
    assert value(tables["answers"], "test", "words + pixels", "acc_closed") == 1
    again, _ = report(pack, capsys)
    assert again == tables                                            # nothing is random


def classed(tmp_path, label):
    """A pack for cls: label(bright: bool, word) is the class."""
    rows = []
    for split, n, bits in scenes():
        word = ("cough", "fever")[bits[1]]
        rows.append(Row(split, corners(tmp_path, [bits[0]] * 4, n), f"Patient with {word}.",
                        label=label(bool(bits[0]), word)))
    return made(rows, tmp_path / "pack", "cls")


def test_classes_that_need_both(tmp_path, capsys):
    tables, _ = report(classed(tmp_path, lambda bright, word: f"{word} {bright}"), capsys)
    for split in "val", "test":
        table = tables["classes"][split]
        assert table["words + pixels"]["acc"][0] == table["words + pixels"]["mean_auroc"][0] == 1
        assert table["words"]["acc"][0] < 0.7 and table["pixels"]["acc"][0] < 0.7
        assert table["most frequent"]["mean_auroc"][0] == 0.5


def test_several_labels_a_sample(tmp_path, capsys):
    """Bright and fever are labels; a sample without either has none."""
    def label(bright, word):
        return "|".join(["Bright"] * bright + ["Fever"] * (word == "fever")) or "No Finding"
    tables, printed = report(classed(tmp_path, label), capsys)
    for split in "val", "test":
        table = tables["classes"][split]
        assert set(table["words"]) == {"AUROC of Bright", "AUROC of Fever", "mean_auroc"}
        assert table["words"]["AUROC of Fever"][0] == table["pixels"]["AUROC of Bright"][0] == 1
        assert 0.35 < table["words"]["AUROC of Bright"][0] < 0.65
        assert table["words + pixels"]["mean_auroc"][0] == 1
    assert "2 labels, several a sample" in printed


# ------------------------------------------------------------------------------ a run, the command line

def test_the_image_encoder_of_a_run(packs, pretrained, tmp_path, monkeypatch, capsys):
    """Class token and the means of quarters, standardised; as one by one."""
    out = tmp_path / "found.json"
    flags = [packs["pretrain"], packs["cls"], "--init", pretrained, "--json", out]
    monkeypatch.setattr(sys, "argv", ["linear.py", *map(str, flags)])
    linear.main()
    found = json.loads(out.read_text())
    pairs = found[str(packs["pretrain"])]["tables"]["pairs"]
    assert set(pairs["test"]) == {"chance", "pixels", "encoder"}
    assert all(len(pairs["test"]["encoder"][name]) == 3 for name in ("above", "matching"))
    classes = found[str(packs["cls"])]["tables"]["classes"]["val"]
    assert {"encoder", "words + encoder"} <= set(classes)
    assert "| val: words + encoder |" in capsys.readouterr().out

    pack, run = Pack(packs["pretrain"]), load_run(pretrained)
    vectors = features.encoder_features(pack, pretrained)
    pixels, half = np.empty((3, 16, 16), np.uint8), 16 // run.cfg.patch_size // 2
    for index in 0, len(pack.offsets) - 2:
        pack.read_image(index, pixels)
        tokens = run.model.encode_image(normalise(torch.from_numpy(pixels)[None]))[0]     # (1+L, D)
        rows = tokens[1:].view(2, half, 2, half, -1)                    # (top | bottom, row, left | right, column, D)
        by_hand = torch.cat([tokens[0], rows.mean((1, 3)).flatten(0, 1).T.flatten()]).numpy()
        assert np.allclose(vectors[index], by_hand, atol=1e-2)
    train = np.arange(10)
    scaled = features.standardise(vectors, train)[train]
    assert np.allclose(scaled.mean(0), 0, atol=1e-6) and np.allclose(scaled.std(0), 1, atol=0.01)


def test_the_threshold_of_val_is_the_one_of_test(packs, monkeypatch):
    given, found = [], []

    def watched(scores, texts, threshold, images):
        given.append(threshold)
        figures = pair_figures(scores, texts, threshold, images)
        found.append(figures["threshold"])
        return figures
    monkeypatch.setattr(linear, "pair_figures", watched)
    linear.report(packs["pretrain"], None)
    assert given == [None, found[0]] and found[1] == found[0]


def test_many_pairs_are_thinned_evenly(packs, monkeypatch, capsys):
    monkeypatch.setattr(linear, "MAX_PAIRS", 10)
    _, printed = report(Pack(packs["pretrain"]), capsys)
    assert "val: 10 of 13 pairs, evenly spaced" in printed
    assert "test: 10 of 11 pairs, evenly spaced" in printed


@pytest.mark.parametrize("make, sentence", [
    (lambda folder: folder / "missing", "there is no pack at"),
    (lambda folder: made([Row("train", corners(folder, (0, 1, 0, 0), 0), "a b")], folder / "pack",
                         "pretrain").folder, "holds no val samples"),
    (lambda folder: made([Row(split, corners(folder, (0, 1, 0, 0), 0), split) for split in COUNTS],
                         folder / "pack", "pretrain").folder, "no word occurs in 4 training texts")])
def test_what_cannot_be_fitted(make, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        linear.report(make(tmp_path), None)


def test_a_json_file_without_a_folder(packs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["linear.py", str(packs["cls"]), "--json", "no/such/folder.json"])
    with pytest.raises(UserError, match="the folder is not there: make it first"):
        linear.main()


def bert_folder(folder):
    """A text encoder with random weights, and a tokenizer that knows the words of the captions."""
    folder.mkdir()
    hugging_face(folder, "bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "seen", ":", *CORNERS]
    words += [f"filler{i}" for i in range(50 - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words))
    return folder


def test_captions_as_a_text_encoder_reads_them(tmp_path, monkeypatch, capsys):
    folder = bert_folder(tmp_path / "bert")
    monkeypatch.setattr(features, "MAX_TOKENS", 6)
    vectors = features.sentence_features(str(folder))(["seen: north", "seen: east west south north"])
    assert "1 of 2 texts have more than 6 tokens: the rest is not read" in capsys.readouterr().out
    fields, state = load_text(folder)
    net = other_model(replace(CFG, **fields)).eval()
    net.load_state_dict(state, strict=False)
    for vector, ids in zip(vectors, ([2, 5, 6, 7, 3], [2, 5, 6, 8, 10, 3])):
        tokens = net.text(torch.tensor([ids]), torch.ones(1, len(ids)).long())
        mean = tokens[0].mean(0).detach().numpy()
        assert np.allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)

    # As many tokens as it has positions; a tokenizer of its own.
    monkeypatch.setattr(features, "MAX_TOKENS", 128)
    features.sentence_features(str(folder))(["seen: " + "north " * 30])
    longest = fields["text_max_positions"] - 2
    assert f"1 of 1 texts have more than {longest} tokens" in capsys.readouterr().out
    with open(folder / "vocab.txt", "a") as file:
        file.write("\nanother")
    with pytest.raises(UserError, match="the tokenizer of another model, of 51 tokens: .*, of 50"):
        features.sentence_features(str(folder))
    bert_folder(folder.with_name("again"))
    folder = folder.with_name("again")

    scored = []

    def watched(scores, *rest):
        scored.append(scores)
        return pair_figures(scores, *rest)
    monkeypatch.setattr(linear, "pair_figures", watched)
    rows = [Row(split, corners(tmp_path, bits, n), "seen: " + " ".join(
                word for word, bit in zip(CORNERS, bits) if bit)) for split, n, bits in scenes()]
    pack = made(rows, tmp_path / "pack", "pretrain")
    pairs = linear.report(pack.folder, None, str(folder))["tables"]["pairs"]
    assert list(pairs["test"]) == ["chance", "pixels", "pixels, texts as read", "pixels, mean of both"]
    assert value(pairs, "test", "pixels, texts as read", "above") > 0.9
    for split in range(2):                                             # each row has val, then test
        assert np.allclose(scored[split + 4], (scored[split] + scored[split + 2]) / 2)


def test_questions_as_a_text_encoder_reads_them(tmp_path):
    folder = bert_folder(tmp_path / "bert")
    rows = [Row(split, corners(tmp_path, [bits[0]] * 4, n), CORNERS[bits[1]],
                "yes" if bits[0] == bits[1] else "no", closed=True) for split, n, bits in scenes()]
    pack = made(rows, tmp_path / "pack", "vqa")
    table = linear.report(pack.folder, None, str(folder))["tables"]["answers"]["test"]
    assert list(table) == ["most frequent", "words", "read", "pixels", "words + pixels", "words × pixels",
                           "words, read + pixels", "words, read × pixels"]
    assert table["words, read × pixels"]["acc"][0] == 1 > 0.75 > table["read"]["acc"][0]
