"""What a linear model gets on a pack: the least that a trained model must beat.

    python tests/experiments/linear.py packs/medpix packs/rad               seconds each, one core
    python tests/experiments/linear.py packs/medpix --init runs/pretrain    linear probe of a run
    python tests/experiments/linear.py packs/medpix --init_text MINILM      also texts as read

The pack's task decides. Everything is fitted on train and chosen on val. Nothing is random but the
resampling for the intervals, which has a fixed seed.

pretrain, irtr: image features and TF-IDF of the captions, each reduced by PCA; the singular vectors
of their cross-covariance (a CCA, regularised by the PCA); cosine. Figures: data/pair_metrics.py.
Where samples have groups, ridge regression guesses the group from the image.
vqa, cls: ridge regression to the right answers or classes, from words, image, and both; with
questions also from the identity of the image, that is which one it is. "words + pixels" adds what
each says; "words × pixels" has all products of a word and a pixel feature, too: it answers as a
similar question on a similar image was answered. Figures: data/task_metrics.py.

Image features are simple ones of the pixels: `pixel_features`. With --init a second set comes from
the image encoder of a run, nothing of which is trained: `encoder_features`. With --init_text there
are more rows, of texts as vectors of that text encoder ("read"): `sentence_features`. Pairs: a row
with these vectors instead of TF-IDF, and one with the mean of both scores. Questions and classes:
these vectors alone ("read"), and beside the words ("words, read").
"""
import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
from features import (BagOfWords, encoder_features, pixel_features, sentence_features, standardise,
                      unit)

from data.pack import SPLITS, Pack
from data.pair_metrics import PAIR_METRICS, chance_figures, pair_figures, pair_intervals
from data.scores import auroc, intervals
from data.labels import several_labels, targets
from data.task_metrics import METRIC_NAMES, answer_columns, figures
from m3ae_mini.config import require
from m3ae_mini.distributed import run

IMAGE_DIMS, TEXT_DIMS = 60, 200        # principal components
CCA_DIMS = 30                          # singular vectors of the cross-covariance
WORD_COUNT = 4                         # training texts in which a word must occur; questions: 1
MAX_IMAGES = 2000                      # training images whose identity is a feature
MAX_PAIRS = 1000                       # pairs of a split that are scored, evenly spaced
MAX_PRODUCTS = 6000                    # training samples of a ridge with products: a matrix of n × n
STRENGTHS = 10.0 ** np.arange(-2, 3.5, 0.5)    # of the ridge, from which val chooses

Cell = list[float]                     # a figure, and the two ends of its interval if it has one
Rows = dict[str, dict[str, Cell]]      # {features: {figure: cell}}


class Split(NamedTuple):
    """The samples of one split of a pack."""
    lines: list[dict]                  # of samples.jsonl
    images: np.ndarray                                                # (n,) index of each image

    def texts(self) -> list[str]:
        return [line["text"].lower() for line in self.lines]

    def clusters(self) -> list[str]:
        """What is drawn for an interval: the patient where the data tell, else the image."""
        return [line.get("patient") or f"image {image}"
                for line, image in zip(self.lines, self.images)]


def read_splits(pack: Pack) -> dict[str, Split]:
    """{split: its samples}, of the splits that hold any. UserError without train or val."""
    found = {split: Split(list(pack.lines(split)), np.array(pack.samples["image"][rows]))
             for split, rows in pack.split.items() if len(rows)}
    for split in "train", "val":
        require(split in found, f"{pack.folder} holds no {split} samples: a linear model is fitted "
                                "on train and chosen on val, so prepare a pack with both")
    return found


# ----------------------------------------------------------------------------------- linear models

def pca(train: np.ndarray, dims: int) -> Callable[[np.ndarray], np.ndarray]:
    """train (n, D) -> a function: (m, D) -> its first principal components (m, dims), or fewer if
    train has fewer, each with variance 1 over train."""
    mean = train.mean(0)
    centred = train - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / len(train))        # (D,), (D, D)
    kept = np.flatnonzero(values > 1e-9 * values[-1])[::-1][:dims]
    scaled = vectors[:, kept] / np.sqrt(values[kept])                 # (D, dims)
    return lambda rows: (rows - mean) @ scaled


def fit_cca(images: np.ndarray,
            texts: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Image features (n, D) and text features (n, V) of right pairs -> a function of the same of
    others: the score of each image with each text, the cosine of their projections. A dimension
    counts as much as its singular value."""
    project_image, project_text = pca(images, IMAGE_DIMS), pca(texts, TEXT_DIMS)
    cross = project_image(images).T @ project_text(texts) / len(images)
    left, strength, right = np.linalg.svd(cross, full_matrices=False)
    left, right = (left * strength)[:, :CCA_DIMS], (right.T * strength)[:, :CCA_DIMS]

    def score(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        return unit(project_image(images) @ left) @ unit(project_text(texts) @ right).T
    return score


def fit_ridge(x: np.ndarray, y: np.ndarray) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """Features x (n, D), targets y (n, C) -> for each of STRENGTHS a function: (m, D) -> (m, C)

    In closed form, with an intercept: (xᵀx + strength)⁻¹ xᵀy for centred x and y, or, which is the
    same, xᵀ (xxᵀ + strength)⁻¹ y if that matrix is smaller."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    wide = x.shape[1] > len(x)
    gram, right = (x @ x.T, y) if wide else (x.T @ x, x.T @ y)
    for strength in STRENGTHS:
        solved = np.linalg.solve(gram + strength * np.eye(len(gram)), right)
        weights = x.T @ solved if wide else solved                    # (D, C)
        yield lambda rows, weights=weights: (rows - x_mean) @ weights + y_mean


def fit_kernel_ridge(kernel: np.ndarray,
                     y: np.ndarray) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """The same from inner products alone: kernel (n, n) of the n training samples with each other,
    y (n, C) -> for each of STRENGTHS a function: (m, n), those of m samples with them -> (m, C).
    The intercept is the mean of y."""
    y_mean = y.mean(0)
    for strength in STRENGTHS:
        weights = np.linalg.solve(kernel + strength * np.eye(len(kernel)), y - y_mean)     # (n, C)
        yield lambda rows, weights=weights: rows @ weights + y_mean


def join(blocks: list[np.ndarray], train: int) -> np.ndarray:
    """Blocks of features (n, …), each centred and scaled to a mean squared norm of 1 over the first
    `train` rows, which are those of train, side by side: (n, D)"""
    centred = [block - block[:train].mean(0) for block in blocks]
    return np.concatenate([block / max(1e-9, np.sqrt((block[:train] ** 2).sum(1).mean()))
                           for block in centred], axis=1)


def best_ridge(factors: list[list[np.ndarray]], parts: dict[str, slice], y: np.ndarray,
               score: Callable[[np.ndarray], float]) -> tuple[np.ndarray, float]:
    """The outputs (n, C) for all rows of the ridge with the highest score on val, and its strength.

    factors: each a list of blocks, features (n, …) of all rows; of two factors also the products
    are features; parts: the rows of each split; y (rows of train, C); score: outputs of val -> how
    good they are. Of equally good ones the strongest is taken."""
    train = parts["train"]
    joined = [join(blocks, train.stop) for blocks in factors]
    x, fit = joined[0], fit_ridge
    if len(joined) > 1:
        # (1 + a·a')(1 + b·b') - 1 is the inner product of [a, b, all products of a and b].
        x = np.prod([1 + one @ one[train].T for one in joined], axis=0) - 1   # (n, rows of train)
        fit = fit_kernel_ridge
    best = (-np.inf, x[:0], 0.0)
    for strength, predict in zip(STRENGTHS, fit(x[train], y)):
        outputs = predict(x)
        reached = score(outputs[parts["val"]])
        best = max(best, (reached, outputs, strength), key=lambda one: (one[0], one[2]))
    return best[1:]


# ------------------------------------------------------------------ pairs of an image and a caption

def pair_rows(splits: dict[str, Split], image_sets: dict[str, np.ndarray],
              init_text: str) -> dict[str, Rows]:
    """{split: rows of the four figures of pair_metrics}, for val and test"""
    train = splits["train"]
    encode = BagOfWords(train.texts(), WORD_COUNT, idf=True)
    print(f"{len(train.lines):,} training pairs of {len(set(train.texts())):,} texts, "
          f"{len(encode.index):,} words")
    parts = {split: thinned(part, split) for split, part in splits.items() if split != "train"}

    # Text features {name: {split: (n, V)}}. A row's score is the mean over those that it uses.
    all_parts = {"train": train} | parts
    text_sets = {"words": {split: encode(part.texts()) for split, part in all_parts.items()}}
    members = {"": ["words"]}          # {end of the row's name: text features}
    if init_text:
        encode = sentence_features(init_text)
        text_sets["read"] = {split: encode(part.texts()) for split, part in all_parts.items()}
        members |= {", texts as read": ["read"], ", mean of both": ["words", "read"]}

    print("rows: gradient histograms of the pixels with TF-IDF of the words; \"texts as read\": "
          "with vectors of --init_text; \"mean of both\": of the two scores. Right above wrong: how "
          "often a pair scores higher than its image with a wrong text")
    found: dict[str, Rows] = {}
    for name, (suffix, used) in product(image_sets, members.items()):
        features, threshold = image_sets[name], None
        fitted = [fit_cca(features[train.images], text_sets[text]["train"]) for text in used]
        for split, part in parts.items():
            texts, images = part.texts(), part.images.tolist()
            scores = np.mean([score(features[part.images], text_sets[text][split])
                              for score, text in zip(fitted, used)], axis=0)
            values = pair_figures(scores, texts, threshold, images)
            ranges = pair_intervals(scores, texts, part.clusters(), threshold, images)
            threshold = values.pop("threshold")                       # test takes that of val
            rows = found.setdefault(split, {"chance": cells(chance_figures(texts, images))})
            rows[name + suffix] = cells(values, ranges)
    return found


def thinned(part: Split, split: str) -> Split:
    """At most MAX_PAIRS samples, evenly spaced, as --test_samples of train.py takes them."""
    n = len(part.lines)
    if n <= MAX_PAIRS:
        return part
    print(f"{split}: {MAX_PAIRS:,} of {n:,} pairs, evenly spaced")
    indices = np.arange(MAX_PAIRS) * n // MAX_PAIRS
    return Split([part.lines[i] for i in indices], part.images[indices])


# ------------------------------------------------------------------------------ answers and classes

Judge = Callable[[Split, np.ndarray], Callable[[np.ndarray], dict[str, float]]]


def judge_answers(task: str, labels: list[str]) -> Judge:
    """A function: the n samples of a split, outputs (n, C) -> a function: how often each sample was
    drawn (n,) -> the figures of task_metrics."""
    def judge(part: Split, outputs: np.ndarray):
        table = answer_columns(part.lines, outputs, labels, task)
        table["source"] = np.array([line.get("source", "") for line in part.lines])
        return lambda weights: figures(table, task, weights)
    return judge


def judge_findings(labels: list[str]) -> Judge:
    """The same where a sample has several labels: AUROC of each label, and the mean of those that
    are defined."""
    def judge(part: Split, outputs: np.ndarray):
        truth = multi_hot([targets(line, "cls", several=True) for line in part.lines], labels) == 1   # (n, C)

        def areas(weights: np.ndarray) -> dict[str, float]:
            found = {f"AUROC of {label}": auroc(outputs[:, i], truth[:, i], weights)
                     for i, label in enumerate(labels)}
            found = {name: area for name, area in found.items() if not np.isnan(area)}
            return {"mean_auroc": float(np.mean(list(found.values())))} | found if found else {}
        return areas
    return judge


def multi_hot(names: list[list[str]], labels: list[str]) -> np.ndarray:
    """The right labels of n samples -> 1 where a label is right, else 0: (n, C)"""
    index = {label: i for i, label in enumerate(labels)}
    y = np.zeros((len(names), len(labels)))
    for row, right in zip(y, names):
        row[[index[name] for name in right if name in index]] = 1
    return y


def label_rows(splits: dict[str, Split], y: np.ndarray, blocks: dict[str, dict[str, np.ndarray]],
               judge: Judge) -> dict[str, Rows]:
    """{split: rows of figures}, for val and test

    y (rows of train, C); blocks: {name: {split: features (n, …)}}; those called words or read are
    of the text. There is a row for each block; for words, and for words and read together, with each
    other block, with and without products; and for the most frequent label, which needs no
    features. The strength is the one of the highest accuracy on val; of several labels a sample,
    mean AUROC."""
    ends = np.cumsum([0, *(len(part.lines) for part in splits.values())])
    rows_of = {split: slice(*ends[i:i + 2]) for i, split in enumerate(splits)}

    def values(split: str, outputs: np.ndarray) -> dict[str, float]:
        return judge(splits[split], outputs)(np.ones(len(splits[split].lines)))

    def score(outputs: np.ndarray) -> float:
        found = values("val", outputs)
        return found.get("acc", found.get("mean_auroc", 0.0))

    texts = [name for name in ("words", "read") if name in blocks]
    products = len(y) <= MAX_PRODUCTS
    if texts and not products:
        print(f"no rows with products: {len(y):,} training samples are more than {MAX_PRODUCTS:,}")
    sets: dict[str, list[list[str]]] = {"most frequent": []} | {name: [[name]] for name in blocks}
    for used, name in product([texts[:i + 1] for i in range(len(texts))], blocks):
        if name not in texts:
            sets[f"{', '.join(used)} + {name}"] = [[*used, name]]
            if products:
                sets[f"{', '.join(used)} × {name}"] = [used, [name]]
    found: dict[str, Rows] = {split: {} for split in SPLITS[1:] if split in splits}
    for name, factors in sets.items():
        outputs = np.tile(y.mean(0), (ends[-1], 1))                   # (n, C)
        if factors:
            stacked = [[np.concatenate([blocks[member][split] for split in splits])
                        for member in factor] for factor in factors]
            outputs, _ = best_ridge(stacked, rows_of, y, score)
        for split, rows in found.items():
            ranges = intervals(judge(splits[split], outputs[rows_of[split]]),
                               splits[split].clusters())
            rows[name] = cells(values(split, outputs[rows_of[split]]), ranges)
    return found


def image_blocks(splits: dict[str, Split], image_sets: dict[str, np.ndarray]):
    """{name: {split: features (n, D)}} of the sets of image features (images, D)"""
    return {name: {split: features[part.images] for split, part in splits.items()}
            for name, features in image_sets.items()}


def text_blocks(splits: dict[str, Split], encode: BagOfWords, init_text: str):
    """{"words" and, with --init_text, "read": {split: features (n, V)}}"""
    encoders = {"words": encode} | ({"read": sentence_features(init_text)} if init_text else {})
    return {name: {split: encoder(part.texts()) for split, part in splits.items()}
            for name, encoder in encoders.items()}


def question_rows(splits: dict[str, Split], image_sets: dict[str, np.ndarray],
                  init_text: str) -> dict[str, Rows]:
    """Answers from the text of the question, from the image, from both. Where images of val or
    test are also training images: from their identity, one feature an image."""
    train = splits["train"]
    names = [targets(line, "vqa") for line in train.lines]
    labels = list(dict.fromkeys(name for right in names for name in right))
    encode = BagOfWords(train.texts(), 1, idf=False)
    print(f"{len(train.lines):,} training questions, {len(labels):,} answers, "
          f"{len(encode.index):,} words")
    blocks = text_blocks(splits, encode, init_text) | image_blocks(splits, image_sets)

    known = np.unique(train.images)
    again = {split: np.isin(part.images, known) for split, part in splits.items()}
    if any(again[split].any() for split in again if split != "train"):
        shares = ", ".join(f"{again[split].mean():.0%} of {split}" for split in again
                           if split != "train")
        print(f"questions on an image of train: {shares}")
        if len(known) <= MAX_IMAGES:
            blocks["identity"] = {split: (part.images[:, None] == known).astype(float)
                                  for split, part in splits.items()}
        else:
            print(f"no row for their identity: {len(known):,} images are more than {MAX_IMAGES:,}")
    return label_rows(splits, multi_hot(names, labels), blocks, judge_answers("vqa", labels))


def class_rows(splits: dict[str, Split], image_sets: dict[str, np.ndarray],
               init_text: str, several: bool) -> dict[str, Rows]:
    """Classes from the text, from the image, from both. With several labels a sample, one
    regression each."""
    train, lines = splits["train"], [line for part in splits.values() for line in part.lines]
    labels = sorted({name for line in lines for name in targets(line, "cls", several)})
    encode = BagOfWords(train.texts(), WORD_COUNT, idf=True)
    print(f"{len(train.lines):,} training samples, {len(labels):,} "
          f"{'labels, several a sample' if several else 'classes'}, {len(encode.index):,} words")
    blocks = text_blocks(splits, encode, init_text) | image_blocks(splits, image_sets)
    judge = judge_findings(labels) if several else judge_answers("cls", labels)
    y = multi_hot([targets(line, "cls", several) for line in train.lines], labels)
    return label_rows(splits, y, blocks, judge)


def group_rows(splits: dict[str, Split], image_sets: dict[str, np.ndarray]) -> dict[str, Rows]:
    """The group of a sample from its image; {} where a split has no groups, or train only one."""
    grouped = {}
    for split, part in splits.items():
        rows = [i for i, line in enumerate(part.lines) if line.get("group")]
        lines = [part.lines[i] | {"label": part.lines[i]["group"]} for i in rows]
        grouped[split] = Split(lines, part.images[rows])
    names = {split: {line["label"] for line in part.lines} for split, part in grouped.items()}
    if len(names["train"]) < 2 or not all(names.values()):
        return {}
    counts = [f"{len(grouped[split].lines):,} of {len(part.lines):,} in {split}"
              for split, part in splits.items()]
    print(f"samples with a group: {', '.join(counts)}; {len(names['train'])} groups in train")
    labels = sorted(set().union(*names.values()))
    y = multi_hot([[line["label"]] for line in grouped["train"].lines], labels)
    return label_rows(grouped, y, image_blocks(grouped, image_sets), judge_answers("cls", labels))


# ------------------------------------------------------------------------------------------- report

def cells(values: dict[str, float], ranges: dict[str, tuple[float, float]] | None = None):
    """{figure: [value, low, high]}, or [value] without an interval"""
    return {name: [value, *(ranges or {}).get(name, ())] for name, value in values.items()}


def print_table(title: str, tables: dict[str, Rows]) -> None:
    """The figures in percent, those of single classes left out: a line for each row of a split."""
    names = {name: None for rows in tables.values() for row in rows.values() for name in row}
    heads = {name: (METRIC_NAMES | PAIR_METRICS).get(name, name) for name in names
             if " of " not in name and name != "answer_not_in_list"}
    print(f"\n| {title}, % | {' | '.join(heads.values())} |\n|{'---|' * (1 + len(heads))}")
    for split, rows in tables.items():
        for name, row in rows.items():
            shown = []
            for value, *ends in (row.get(head, [np.nan]) for head in heads):
                ends = " ({:.1f} to {:.1f})".format(*(100 * end for end in ends)) if ends else ""
                shown.append("–" if np.isnan(value) else f"{100 * value:.1f}{ends}")
            print(f"| {split}: {name} | {' | '.join(shown)} |")


def report(folder: Path, init: Path | None, init_text: str = "") -> dict:
    """Fit, print, and return what --json keeps of a pack."""
    pack = Pack(folder)
    task, splits = pack.meta.get("task"), read_splits(pack)
    require(task in ("pretrain", "irtr", "vqa", "cls"),
            f"{folder} names no task that is known: prepare it again")
    key = {"vqa": "answer", "cls": "label"}.get(task, "text")
    require(all(key in line for part in splits.values() for line in part.lines),
            f"{folder} holds samples without {key}: prepare it with --task {task}")
    print(f"\n{folder}: {pack.meta['name']} for {task}")

    image_sets = {"pixels": pixel_features(pack)}
    if init:
        image_sets["encoder"] = encoder_features(pack, init)
    train = splits["train"].images
    image_sets = {name: standardise(features, train) for name, features in image_sets.items()}

    several = several_labels([pack], task)
    make = {"vqa": question_rows, "cls": partial(class_rows, several=several)}.get(
        task, pair_rows)
    tables = {{"vqa": "answers", "cls": "classes"}.get(task, "pairs"):
              make(splits, image_sets, init_text)}
    if task in ("pretrain", "irtr"):
        tables["group"] = group_rows(splits, image_sets)
    tables = {title: rows for title, rows in tables.items() if rows}
    for title, rows in tables.items():
        print_table(title, rows)
    return {"task": task, "fingerprint": pack.fingerprint(), "tables": tables}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("packs", nargs="+", type=Path, metavar="PACK", help="folders that data.prepare has written")
    add("--init", type=Path, metavar="RUN",
        help="also use the image encoder of this run: what has it learned?")
    add("--init_text", default="", metavar="FOLDER",
        help="also read the texts with this text encoder of BERT or RoBERTa")
    add("--json", type=Path, metavar="FILE", help="write all figures and intervals to this file")
    args = parser.parse_args()
    require(not args.json or args.json.absolute().parent.is_dir(),
            f"--json {args.json}: the folder is not there: make it first")
    found = {str(folder): report(folder, args.init, args.init_text) for folder in args.packs}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    run(main)
