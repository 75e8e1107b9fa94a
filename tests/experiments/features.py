"""What linear.py knows of an image or a text. Nothing here is trained.

Of an image: simple features of its pixels, or what a run's image encoder makes of it. Of a text:
its words, or what a text encoder makes of it."""
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from data.pack import Pack
from m3ae_mini.config import require

SIDE = 112                             # pixels of an image from which features are made
MEANS, CELLS = 14, 7                   # cells along a side: of grey means, of gradient histograms
DIRECTIONS, GREYS = 8, 32              # bins of the histograms
MAX_WORDS = 2000                       # of more words, the most frequent are used
MAX_TOKENS = 128                       # of a text, for a text encoder


# ---------------------------------------------------------------------------------------- of images

def read_images(pack: Pack, size: int) -> Iterator[Image.Image]:
    """All images of a pack, RGB, resized to (size, size)."""
    pixels = np.empty((3, pack.size, pack.size), np.uint8)
    for index in range(len(pack.offsets) - 1):
        pack.read_image(index, pixels)
        image = Image.fromarray(pixels.transpose(1, 2, 0))
        yield image.resize((size, size), Image.Resampling.BICUBIC)


def pixel_features(pack: Pack) -> np.ndarray:
    """Grey means, gradient histograms and the grey histogram of each image: (images, 620)

    A gradient histogram is that of a cell: how strong the gradients of each direction are, with
    norm 1 but for flat cells. Directions that differ by half a turn are one."""
    side = np.arange(SIDE) * CELLS // SIDE                            # (S,) cell of each pixel
    cell = (side[:, None] * CELLS + side) * DIRECTIONS                # (S, S)
    features = []
    for image in read_images(pack, SIDE):
        grey = np.asarray(image.convert("L")) / 255                   # (S, S)
        means = grey.reshape(MEANS, SIDE // MEANS, MEANS, SIDE // MEANS).mean((1, 3))

        dy, dx = np.gradient(grey)
        turn = np.arctan2(dy, dx) % np.pi / np.pi                     # (S, S) 0 … 1
        bins = cell + (turn * DIRECTIONS).astype(int).clip(0, DIRECTIONS - 1)
        gradients = np.bincount(bins.ravel(), np.hypot(dx, dy).ravel(), CELLS ** 2 * DIRECTIONS)
        gradients = gradients.reshape(CELLS ** 2, DIRECTIONS)
        gradients /= np.linalg.norm(gradients, axis=1, keepdims=True) + 0.5

        greys = np.sqrt(np.histogram(grey, GREYS, (0, 1))[0] / grey.size)
        features.append(np.concatenate([means.ravel(), gradients.ravel(), greys]))
    return np.array(features)


def encoder_features(pack: Pack, folder: Path) -> np.ndarray:
    """What a run's image encoder makes of each image: the class token, and the means of the patch
    tokens in its four quarters, (images, 5D)"""
    import torch                       # pixels alone need none of these

    from data.predict import BATCH, load_run
    from m3ae_mini.loader import normalise
    from m3ae_mini.objectives import quarter_means

    trained = load_run(folder, "cuda" if torch.cuda.is_available() else "cpu")
    size, fit = trained.cfg.image_size, pack.meta.get("fit", "crop")
    if size != pack.size:
        print(f"{pack.folder}: images of {pack.size} pixels are resized to {size} for the encoder")
    if fit != trained.fit:
        print(f"warning: {pack.folder} was prepared with --fit {fit}, {folder} was trained with "
              f"--fit {trained.fit}", file=sys.stderr)

    features, images = [], read_images(pack, size)
    while part := [np.asarray(image) for image in islice(images, BATCH)]:
        pixels = torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2)         # (B, 3, S, S)
        with torch.no_grad():
            tokens = trained.model.encode_image(normalise(pixels.to(trained.device)))
        both = torch.cat([tokens[:, 0], quarter_means(tokens)], dim=1)        # (B, 5D)
        features.append(both.double().cpu().numpy())
    return np.concatenate(features)


# ----------------------------------------------------------------------------------------- of texts

class BagOfWords:
    """Texts as vectors of norm 1, one number a word: 0 where a text lacks it, else its weight.

    Words are those in at least `count` training texts. With `idf` a word that is in n of N training
    texts has the weight log(N / n), else 1. UserError if there are no words."""

    def __init__(self, texts: list[str], count: int, idf: bool):
        held_by = Counter(word for text in texts for word in self._words(text))
        frequent = [word for word, n in held_by.most_common() if n >= count]
        require(frequent, f"no word occurs in {count} training texts: a linear model learns "
                          "nothing from these texts, so give a larger pack")
        if len(frequent) > MAX_WORDS:
            print(f"of {len(frequent):,} words the {MAX_WORDS:,} most frequent are used")
        frequent = frequent[:MAX_WORDS]
        self.index = {word: i for i, word in enumerate(frequent)}
        shares = np.array([held_by[word] for word in frequent]) / len(texts)      # (V,)
        self.weights = -np.log(shares) if idf else np.ones(len(frequent))         # (V,)

    def __call__(self, texts: list[str]) -> np.ndarray:
        """n texts -> (n, V)"""
        table = np.zeros((len(texts), len(self.index)))
        for row, text in zip(table, texts):
            known = [self.index[word] for word in self._words(text) if word in self.index]
            row[known] = self.weights[known]
        return unit(table)

    @staticmethod
    def _words(text: str) -> dict[str, None]:
        """Each word of a text once, in order. Numbers are none."""
        return dict.fromkeys(re.findall(r"[^\W\d_]+", text))


def sentence_features(folder: str) -> Callable[[list[str]], np.ndarray]:
    """The text encoder in a folder of BERT or RoBERTa -> a function: texts -> the mean of the
    tokens of each, with norm 1: (n, D)

    UserError if the folder's tokenizer is not that of its weights."""
    import torch

    from data.predict import BATCH, read_texts
    from m3ae_mini import ModelConfig, weights
    from m3ae_mini.model import TextEncoder
    from m3ae_mini.tokenizer import Tokenizer

    arch, state = weights.load_text(folder)
    tokenizer = Tokenizer.load(folder)
    require(tokenizer.kind == arch["text_kind"] and tokenizer.vocab_size <= arch["vocab_size"],
            f"{folder} holds the tokenizer of another model, of {tokenizer.vocab_size:,} tokens: "
            f"put the one of its weights there, of {arch['vocab_size']:,}")
    longest = min(MAX_TOKENS, arch["text_max_positions"] - 2)         # RoBERTa counts from 2
    encoder = TextEncoder(ModelConfig.preset("tiny", **arch)).eval()
    encoder.load_state_dict({name.removeprefix("text."): tensor for name, tensor in state.items()})

    @torch.no_grad()
    def encode(texts: list[str]) -> np.ndarray:
        vectors, num_truncated = [], 0
        for start in range(0, len(texts), BATCH):
            ids, mask, truncated = read_texts(texts[start:start + BATCH], tokenizer, longest)
            tokens, mask = encoder(ids, mask), mask[..., None]        # (B, T, D), (B, T, 1)
            vectors.append(((tokens * mask).sum(1) / mask.sum(1)).double().numpy())
            num_truncated += truncated
        if num_truncated:
            print(f"{num_truncated:,} of {len(texts):,} texts have more than {longest} tokens: "
                  "the rest is not read")
        return unit(np.concatenate(vectors))
    return encode


# ------------------------------------------------------------------------------------------ scaling

def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (n, D) with norm 1; zeros stay."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def standardise(features: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Features (images, D) with mean 0 and deviation 1 over the training samples' images (n,)"""
    rows = features[train]
    return (features - rows.mean(0)) / (rows.std(0) + 1e-6)
