"""The loader: samples to batches, in a background thread.

Images were resized when they were packed (data/prepare.py) and lie as raw bytes in one file. The
thread reads each image straight into its row of a pinned buffer, masks words and patches, and
starts the copy to the device on a stream of its own. The device normalises the batch. Which sample
stands in which row, and what is masked of it, follows from the step number alone (masking.py):
there is no state to save."""
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from . import masking
from .config import ModelConfig, TrainConfig, require

MEAN = (0.48145466, 0.4578275, 0.40821073)         # CLIP's, of R, G, B in 0 … 1
STD = (0.26862954, 0.26130258, 0.27577711)
VAL_MICRO_BATCH = 32                             # samples of a validation micro-batch, in every run
VAL_SEED = 0                                       # validation masks are the same in every run
CROP_THREADS = 4                      # that crop and augment the images of a training batch
ROTATION, CONTRAST = 10, 0.3           # --augment: degrees, share; at most, to either side
BRIGHTNESS, NOISE = 20, 14             # --augment: grey levels of 255, at most, to either side
FALSE_TEXTS = 15                              # negatives of each right text in fine-tuned retrieval


class Settings(NamedTuple):
    """The settings that may change during training (`settings_at` in train.py)."""
    mask_ratio: float                              # share of the patches that is hidden
    mlm_ratio: float                               # share of the tokens that is masked
    hard_negatives: float                      # share of ITM's wrong images of the text's own group
    loss_weights: dict[str, float]                 # weight of each objective


class LoadedBatch(NamedTuple):
    """A micro-batch as the loader yields it."""
    step: int
    micro_batch_index: int                         # which micro-batch of the step
    indices: np.ndarray                                               # (B,) samples it holds
    batch: dict[str, torch.Tensor]                 # the model's input


# ------------------------------------------------------------------------------------------ samples

class Samples:
    """One split of one or several packs, as one list; `batch` makes a micro-batch of it.

    n: number of samples, `limit` at most (0: all), taken evenly spaced; label_ids: int64 (n,), the
    right answer or class of each sample, or float32 (n, C), which labels it has, set by the script
    that knows them; constant_image: uint8 (3, S, S), shown in place of every image if it is set
    (--blind)."""

    def __init__(self, packs: list, split: str, tokenizer, cfg: ModelConfig, train_cfg: TrainConfig,
                 limit: int = 0):
        self.packs, self.tokenizer = packs, tokenizer
        self.cfg, self.train_cfg = cfg, train_cfg
        self.tokens = [pack.tokens(tokenizer) for pack in packs]
        self.label_ids = self.constant_image = None

        # Where each sample is: (n, 2), the index of its pack and its row there.
        rows = [np.array(pack.split[split], dtype=np.int64) for pack in packs]
        pack_index = np.repeat(np.arange(len(packs)), [len(part) for part in rows])
        self.location = np.stack([pack_index, np.concatenate(rows)], axis=1)  # (n, 2)
        names = ", ".join(str(pack.folder) for pack in packs)
        require(len(self.location), f"{names} holds no {split} samples: prepare a pack with some")
        if 0 < limit < len(self.location):
            self.location = self.location[np.arange(limit) * len(self.location) // limit]
        self.n = len(self.location)

    def token_ids(self, n: int) -> np.ndarray:
        """The tokens of sample n, as Pack.tokens has them, not truncated."""
        pack_index, row = self.location[n]
        offsets, tokens = self.tokens[pack_index]
        return tokens[offsets[row]:offsets[row + 1]]

    def line(self, n: int) -> dict:
        """Everything that the pack knows of sample n: "text", "source" and more."""
        pack_index, row = self.location[n]
        return self.packs[pack_index].line(row)

    def batch(self, indices: np.ndarray, seed: int, step: int, micro_batch_index: int,
              images: np.ndarray, settings: Settings | None = None) -> dict[str, np.ndarray]:
        """The micro-batch of samples `indices` (B,): a dict of arrays.

        Every task: text_ids, text_mask (B, T); a task's labels (B,) or, several a row, (B, C); or
        false_text_index (B, F);
        with --itc image_id, text_id (B,), equal if two rows share an image or a text.
        Pre-training: mlm_ids, mlm_labels (B, T), mlm_positions (M,), mim_noise (B, L), itm_index,
        random_negative_index, hard_negative_index (B,). Fills images, uint8 (B, 3, S, S). Random
        numbers follow from seed, step, micro_batch_index and row. settings: those of the training
        step; None in validation, which uses the configured ones."""
        cfg, size = self.cfg, len(indices)

        def uniform(purpose, *shape):
            return masking.uniform(seed, purpose, step, micro_batch_index, shape)

        # 1. Images, in training perhaps cropped and augmented.
        crop = settings is not None and self.train_cfg.min_crop_area < 1
        augment = settings is not None and self.train_cfg.augment
        crop_noise = uniform(masking.CROP, size, 8, 4) if crop else [None] * size
        augment_noise = (uniform(masking.AUGMENT, size, 4 + cfg.image_size ** 2) if augment
                         else [None] * size)
        # This takes time, so several threads share it; the result does not depend on that.
        read = ThreadPoolExecutor(CROP_THREADS).map if crop or augment else map
        list(read(self.read_image, indices, images, crop_noise, augment_noise))

        # 2. Texts: truncated, between their special tokens, padded.
        token_ids = [self.token_ids(n)[:cfg.max_text_len - 2].astype(np.int64) for n in indices]
        ids, starts, maskable = self.pad_texts(token_ids)             # (B, T) each
        batch = {"text_ids": ids, "text_mask": (ids != self.tokenizer.pad_id).astype(np.int64)}

        # 3. Downstream tasks: labels, or the false texts of retrieval.
        image, text, group = self.identities(indices)                 # (B,) each
        if cfg.task == "irtr":
            noise = uniform(masking.NEGATIVES, size, size)
            batch["false_text_index"] = masking.sample_negatives(image, text, noise,
                                                                 min(FALSE_TEXTS, size))
        if self.label_ids is not None:
            batch[f"{cfg.task}_labels"] = self.label_ids[indices]
        if cfg.itc and cfg.task in ("pretrain", "irtr"):
            batch |= {"image_id": image, "text_id": text}
        if cfg.task != "pretrain":
            return batch

        # 4. Pairs of ITM; for validation a random and a hard negative per row.
        hard_negatives = settings.hard_negatives if settings else self.train_cfg.hard_negatives
        noise = uniform(masking.NEGATIVES, size, 3 * size + 2)
        itm, random, hard = np.split(noise, [size + 2, 2 * size + 2], axis=1)
        batch["itm_index"] = masking.sample_itm_pairs(image, text, itm, group, hard_negatives)
        batch["random_negative_index"] = masking.sample_negatives(image, text, random, 1)[:, 0]
        batch["hard_negative_index"] = masking.sample_negatives(image, text, hard, 1, group)[:, 0]

        # 5. Masks of patches and words.
        num_patches = (cfg.image_size // cfg.patch_size) ** 2
        batch["mim_noise"] = uniform(masking.MIM_MASK, size, num_patches).astype(np.float32)
        # Drawn for the longest text, so that the masks do not depend on T. Channel 0 orders the
        # words, 1 decides between mask, random and same token, 2 draws the random token.
        noise = uniform(masking.MLM_MASK, size, cfg.max_text_len + 1, 3)[:, :ids.shape[1] + 1]
        return batch | self.mask_words(ids, starts, maskable, noise, settings)

    def read_image(self, n: int, out: np.ndarray, crop_noise: np.ndarray | None = None,
                   augment_noise: np.ndarray | None = None) -> None:
        """Read the image of sample n into out, uint8 (3, S, S).

        crop_noise: uniform (8, 4); it chooses a box of min_crop_area to 1 of the area, which Pillow
        resizes. augment_noise: uniform (4 + S²,), for `perturb` and an angle."""
        if self.constant_image is not None:
            out[:] = self.constant_image
            return
        pack_index, row = self.location[n]
        pack, side = self.packs[pack_index], out.shape[-1]
        number = pack.samples["image"][row]
        if crop_noise is None and augment_noise is None and pack.size == side:
            pack.read_image(number, out)
            return

        stored = np.empty((3, pack.size, pack.size), dtype=np.uint8)
        pack.read_image(number, stored)
        box = crop_box(pack.size, self.train_cfg.min_crop_area, crop_noise)
        image = Image.fromarray(stored.transpose(1, 2, 0))
        if augment_noise is not None:
            angle = ROTATION * (2 * augment_noise[0] - 1)             # degrees
            image = image.rotate(angle, Image.Resampling.BICUBIC)
        image = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
        out[:] = np.asarray(image).transpose(2, 0, 1)
        if augment_noise is not None:
            out[:] = perturb(out, augment_noise[1:])

    def example(self) -> dict[str, torch.Tensor]:
        """A batch of the first two samples, on the CPU."""
        return next(load(self, [(0, 0, np.array([0, 1 % self.n]))], 0, "cpu")).batch

    def pad_texts(self, token_ids: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids as packed (2·id + starts a word) -> ids, starts, maskable, (B, T) each

        T is one of four lengths, so that shapes repeat. maskable: no special token, no padding."""
        tokenizer, longest = self.tokenizer, self.cfg.max_text_len
        unit = 1 + (longest - 1) // 4
        needed = max(map(len, token_ids)) + 2
        length = min(longest, (1 + (needed - 1) // unit) * unit)

        ids = np.full((len(token_ids), length), tokenizer.pad_id)     # (B, T)
        starts = np.zeros(ids.shape, dtype=bool)                      # (B, T)
        maskable = np.zeros(ids.shape, dtype=bool)                    # (B, T)
        for row, tokens in enumerate(token_ids):
            end = len(tokens) + 1
            ids[row, 0] = tokenizer.cls_id
            ids[row, 1:end] = tokens >> 1
            ids[row, end] = tokenizer.sep_id
            starts[row, 1:end] = tokens & 1
            maskable[row, 1:end] = True
        return ids, starts, maskable

    def identities(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which samples share an image, a text, a group: three int (B,), equal if shared.

        Texts are compared whole, though the model may see their first tokens only. A row without a
        group is a group of its own."""
        texts = [self.token_ids(n).tobytes() for n in indices]
        images, groups = [], []
        for row, (pack_index, pack_row) in enumerate(self.location[indices]):
            pack = self.packs[pack_index]
            sample = pack.samples[pack_row]
            images.append((pack_index, int(sample["image"])))
            groups.append(pack.meta["groups"][sample["group"]] if sample["group"] >= 0 else row)
        return factorize(images), factorize(texts), factorize(groups)

    def mask_words(self, ids: np.ndarray, starts: np.ndarray, maskable: np.ndarray,
                   noise: np.ndarray, settings: Settings | None) -> dict[str, np.ndarray]:
        """ids, starts, maskable (B, T), noise (B, T+1, 3) -> mlm_ids, mlm_labels, mlm_positions"""
        tokenizer, train_cfg = self.tokenizer, self.train_cfg
        mlm_ratio = settings.mlm_ratio if settings else train_cfg.mlm_ratio
        masked = masking.sample_word_mask(starts, maskable, noise[..., 0], mlm_ratio,
                                          train_cfg.whole_word)       # (B, T)
        noise = noise[:, :ids.shape[1], 1:]                           # (B, T, 2)
        mlm_ids = masking.corrupt_tokens(ids, masked, noise, tokenizer.mask_id,
                                         tokenizer.non_special_ids)   # (B, T)
        # Zeros pad the positions to a multiple of B, so that shapes repeat. 0 is never masked.
        positions = np.flatnonzero(masked)                            # (M,)
        positions = np.pad(positions, (0, -len(positions) % len(ids)))  # (M,)
        mlm_labels = np.where(masked, ids, -100)                      # (B, T)
        return {"mlm_ids": mlm_ids, "mlm_labels": mlm_labels, "mlm_positions": positions}


def factorize(keys: Iterable[Hashable]) -> np.ndarray:
    """Equal numbers for equal keys: int64 (n,)."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys])


def crop_box(side: int, min_area: float, noise: np.ndarray | None) -> tuple[int, int, int, int]:
    """A random crop of a square image: (left, top, right, bottom) in pixels.

    Each row of noise, uniform (8, 4), proposes a box of `min_area` to 1 of the area with an aspect
    of 3/4 to 4/3. The first one that lies within the square is taken, else the whole square."""
    for scale, aspect, x, y in [] if noise is None else noise:
        area = side * side * (min_area + (1 - min_area) * scale)
        ratio = np.exp(np.log(3 / 4) + aspect * np.log(16 / 9))
        width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < width <= side and 0 < height <= side:
            left, top = int(x * (side - width + 1)), int(y * (side - height + 1))
            return left, top, left + width, top + height
    return 0, 0, side, side


def perturb(image: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """image uint8 (3, S, S), noise uniform (3 + S²,) -> another contrast, brightness, and noise

    The first three numbers choose how much of each, the others are the noise of the pixels."""
    contrast, brightness, amount = noise[:3]
    pixels = (2 * noise[3:] - 1).reshape(image.shape[1:])             # (S, S) in -1 … 1
    mean = image.mean()
    changed = (image - mean) * (1 + CONTRAST * (2 * contrast - 1)) + mean
    changed += BRIGHTNESS * (2 * brightness - 1) + NOISE * amount * pixels
    return changed.clip(0, 255).round().astype(np.uint8)


# -------------------------------------------------------------------------------------------- order

def training_micro_batches(samples: Samples, train_cfg: TrainConfig, start: int, rank: int = 0,
                           world_size: int = 1) -> Iterator[tuple[int, int, np.ndarray]]:
    """This rank's micro-batches from step `start`: (step, micro_batch_index, indices (B,)).

    Sample n of the one global stream is step · batch_size + its position in the batch. Epochs
    follow each other without a gap; nothing is dropped."""
    order = lru_cache(1)(lambda epoch: masking.epoch_order(train_cfg.seed, epoch, samples.n))
    batch_size, micro_batch = train_cfg.batch_size, train_cfg.micro_batch
    for step in range(start, train_cfg.steps):
        for index in range(rank, batch_size // micro_batch, world_size):
            positions = step * batch_size + index * micro_batch + np.arange(micro_batch)
            yield step, index, np.array([order(n // samples.n)[n % samples.n] for n in positions])


def validation_micro_batches(samples: Samples, limit: int, rank: int = 0,
                             world_size: int = 1) -> Iterator[tuple[int, int, np.ndarray]]:
    """At most `limit` samples, evenly spaced: (VALIDATION, micro_batch_index, indices (B,))."""
    count = min(limit, samples.n)
    indices = np.arange(count) * samples.n // count
    for index in range(rank, 1 + (count - 1) // VAL_MICRO_BATCH, world_size):
        start = index * VAL_MICRO_BATCH
        yield masking.VALIDATION, index, indices[start:start + VAL_MICRO_BATCH]


# --------------------------------------------------------------------------------------- the thread

def load(samples: Samples, micro_batches: Iterable[tuple[int, int, np.ndarray]], seed: int,
         device: torch.device | str, settings_of: Callable[[int], Settings] | None = None,
         ahead: int = 3) -> Iterator[LoadedBatch]:
    """Yield the micro-batches as tensors on `device`; `image` is float32 (B, 3, S, S), normalised.

    micro_batches: (step, micro_batch_index, indices) each. settings_of: in training, the settings
    of a step. One thread works `ahead` of the caller. For a GPU it copies from pinned buffers; a
    buffer is filled again only after its copy has ended."""
    device, side = torch.device(device), samples.cfg.image_size
    cuda = device.type == "cuda"
    stream = torch.cuda.Stream(device) if cuda else None

    def make_batch(step, index, indices, buffer=None, copied=None):
        # Fill a buffer, an old one where it has the right size and its copy has ended.
        if buffer is None or len(buffer) != len(indices):
            buffer = torch.empty(len(indices), 3, side, side, dtype=torch.uint8, pin_memory=cuda)
        elif cuda:
            copied.synchronize()
        settings = settings_of(step) if settings_of else None
        arrays = samples.batch(indices, seed, step, index, buffer.numpy(), settings)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch["image"] = buffer

        if cuda:
            # A thread starts on GPU 0: name the device.
            with torch.cuda.device(stream.device), torch.cuda.stream(stream):
                batch = {name: tensor.pin_memory().to(device, non_blocking=True)
                         for name, tensor in batch.items()}
                copied = stream.record_event()
        return LoadedBatch(step, index, indices, batch), buffer, copied

    micro_batches = iter(micro_batches)
    with ThreadPoolExecutor(1) as thread:
        pending = deque(thread.submit(make_batch, *item) for item in islice(micro_batches, ahead))
        while pending:
            loaded, buffer, copied = pending.popleft().result()
            batch = to_device(loaded.batch, device, copied)

            # The buffer is free: the thread fills it again while the caller computes.
            for item in islice(micro_batches, 1):
                pending.append(thread.submit(make_batch, *item, buffer, copied))
            yield loaded._replace(batch=batch)


def to_device(batch: dict, device: torch.device, copied=None) -> dict[str, torch.Tensor]:
    """Normalise the image, on the device. On a GPU, first wait for the copy."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        stream.wait_event(copied)
        for tensor in batch.values():
            tensor.record_stream(stream)           # made on the copy's stream, used on this one
    return batch | {"image": normalise(batch["image"])}


def normalise(image: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, S, S) -> float32, by CLIP's mean and deviation."""
    image = image.float()
    mean, std = 255 * torch.tensor([MEAN, STD])
    for channel, m, s in zip(image.unbind(1), mean.tolist(), std.tolist()):  # no sync
        channel.sub_(m).div_(s)
    return image
