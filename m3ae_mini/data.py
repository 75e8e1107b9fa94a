"""A loader that has nothing left to do.

Images were resized when they were packed (data/prepare.py) and lie as raw bytes in one file. A background
thread reads each straight into its place of a batch, hides words and patches, and starts the copy to the
device on a stream of its own; the batch is normalised there. Which sample stands where and what is hidden of
it follows from the step number alone (masking.py), so there is no state to save."""
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from PIL import Image

from . import masking
from .config import require

MEAN = (0.48145466, 0.4578275, 0.40821073)         # CLIP's, of R, G, B in 0 … 1
STD = (0.26862954, 0.26130258, 0.27577711)
VAL_MICRO_BATCH = 32                                     # samples of a validation chunk, in every run
VAL_SEED = 0                                       # validation masks are the same in every run
FALSE_TEXTS = 15                                   # negatives of each right one, where retrieval is learned


class Samples:
    """One split of one or several packs, read as one list; and the batch that any choice of its rows makes.

    n: number of samples, `limit` at most, taken at equal distances; cut: how many texts are longer than
    max_text_len. labels: int64 (n,), the right answer or class of each sample, set by who knows them."""

    def __init__(self, packs, split, tokenizer, cfg, train_cfg, limit=0):
        self.packs, self.tokenizer, self.cfg, self.train_cfg = packs, tokenizer, cfg, train_cfg
        self.tokens = [pack.tokens(tokenizer) for pack in packs]
        rows = [np.array(pack.split[split], dtype=np.int64) for pack in packs]
        which = np.repeat(np.arange(len(packs)), [len(part) for part in rows])
        self.where = np.stack([which, np.concatenate(rows)], axis=1)                   # (n, 2) pack, its row
        require(len(self.where), f"{', '.join(str(pack.folder) for pack in packs)} holds no {split} samples: "
                              "prepare a pack that has some")
        if 0 < limit < len(self.where):
            self.where = self.where[np.arange(limit) * len(self.where) // limit]
        self.n, self.labels = len(self.where), None
        lengths = [np.diff(offsets.astype(np.int64)) for offsets, _ in self.tokens]
        self.cut = sum(int((lengths[i][self.where[self.where[:, 0] == i, 1]] > cfg.max_text_len - 2).sum())
                       for i in range(len(packs)))

    def text(self, n):
        """The tokens of sample number n, as Pack.tokens has them, uncut."""
        which, row = self.where[n]
        offsets, tokens = self.tokens[which]
        return tokens[offsets[row]:offsets[row + 1]]

    def line(self, n):
        """Everything that is known of sample number n: a dict with "text", "source" and more."""
        which, row = self.where[n]
        return self.packs[which].line(row)

    def batch(self, numbers, seed, step, chunk, images, crop=False):
        """The chunk of samples `numbers` (B,): a dict of arrays; for "pretrain" text_ids, text_mask, mlm_ids,
        mlm_labels (B, T), mlm_positions (M,), mim_noise (B, L), itm_index, random_negative_index, hard_negative_index (B,).
        Fills images, uint8 (B, 3, S, S). What is random follows from seed, step, chunk and place in it."""
        cfg, tok, size = self.cfg, self.tokenizer, len(numbers)

        def uniform(purpose, *shape):
            return masking.uniform(seed, purpose, step, chunk, shape)

        # Images: straight into their places, or through a crop.
        box = uniform(masking.CROP, size, 8, 4) if crop else None
        for i, n in enumerate(numbers):
            self.image(n, images[i], box[i] if crop else None)

        # Texts: cut, framed by their special tokens, padded to one of four lengths, so that shapes repeat.
        longest, unit = cfg.max_text_len, 1 + (cfg.max_text_len - 1) // 4
        bodies = [self.text(n)[:longest - 2].astype(np.int64) for n in numbers]
        length = min(longest, (1 + (max(map(len, bodies)) + 1) // unit) * unit)
        ids = np.full((size, length), tok.pad_id)                                      # (B, T)
        starts = np.zeros((size, length), dtype=bool)
        maskable = np.zeros((size, length), dtype=bool)                                # no special token
        for i, body in enumerate(bodies):
            end = len(body) + 1
            ids[i, 0], ids[i, 1:end], ids[i, end] = tok.cls_id, body >> 1, tok.sep_id   # packed: 2·id + start
            starts[i, 1:end], maskable[i, 1:end] = body & 1, True
        batch = {"text_ids": ids, "text_mask": (ids != tok.pad_id).astype(np.int64)}

        # Who may be whose wrong partner: rows of another image *and* another text.
        rows = [(which, self.packs[which].samples[row]) for which, row in self.where[numbers]]
        image = numbered((which, int(row["image"])) for which, row in rows)
        text = numbered(body.tobytes() for body in bodies)
        if cfg.task == "irtr":
            noise = uniform(masking.NEGATIVES, size, size)
            batch["false_text_index"] = masking.sample_negatives(image, text, noise, min(FALSE_TEXTS, size))
        if cfg.task != "pretrain":
            return batch if self.labels is None else batch | {f"{cfg.task}_labels": self.labels[numbers]}

        group = numbered(self.packs[which].meta["groups"][row["group"]] if row["group"] >= 0 else place
                         for place, (which, row) in enumerate(rows))
        noise = uniform(masking.NEGATIVES, size, 3 * size + 2)      # matching's, then those of validation alone
        batch["itm_index"] = masking.sample_itm_pairs(image, text, noise[:, :size + 2], group, self.train_cfg.hard_negatives)
        batch["random_negative_index"] = masking.sample_negatives(image, text, noise[:, size + 2:2 * size + 2], 1)[:, 0]
        batch["hard_negative_index"] = masking.sample_negatives(image, text, noise[:, 2 * size + 2:], 1, group)[:, 0]

        # Hidden patches; hidden words, drawn for max_text_len places, whatever the batch's length.
        patches = (cfg.image_size // cfg.patch_size) ** 2
        batch["mim_noise"] = uniform(masking.MIM_MASK, size, patches).astype(np.float32)
        noise = uniform(masking.MLM_MASK, size, longest + 1, 3)[:, :length + 1]
        chosen = masking.sample_word_mask(starts, maskable, noise[..., 0], self.train_cfg.mlm_ratio,
                                      self.train_cfg.whole_word)                       # (B, T)
        batch["mlm_ids"] = masking.corrupt_tokens(ids, chosen, noise[:, :length, 1:], tok.mask_id, tok.non_special_ids)
        batch["mlm_labels"] = np.where(chosen, ids, -100)
        places = np.flatnonzero(chosen)  # (M,); zeros fill it up: shapes repeat, and place 0 is never hidden
        batch["mlm_positions"] = np.pad(places, (0, -len(places) % size))
        return batch

    def image(self, n, out, noise=None):
        """Read the image of sample n into out, uint8 (3, s, s). Uniform noise (8, 4) choose a crop of it: a
        box of `crop` to 1 of the area, at an aspect of 3/4 to 4/3, resized by PIL."""
        which, row = self.where[n]
        pack, side, number = self.packs[which], out.shape[-1], self.packs[which].samples["image"][row]
        if noise is None and pack.size == side:
            return pack.read_image(number, out)

        stored = np.empty((3, pack.size, pack.size), dtype=np.uint8)
        pack.read_image(number, stored)
        box = crop_box(pack.size, self.train_cfg.min_crop_area, noise if noise is not None else ())
        whole = Image.fromarray(stored.transpose(1, 2, 0))
        out[:] = np.asarray(whole.resize((side, side), Image.Resampling.BICUBIC, box=box)).transpose(2, 0, 1)


def numbered(keys):
    """Equal numbers for equal keys: int64 (n,)."""
    seen = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys])


def crop_box(side, smallest, noise):
    """The first box of the eight that `noise` (8, 4) propose which lies within the square, else the whole
    square: (left, top, right, bottom) in pixels."""
    for scale, aspect, x, y in noise:
        area = side * side * (smallest + (1 - smallest) * scale)
        ratio = np.exp(np.log(3 / 4) + aspect * np.log(16 / 9))
        width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < width <= side and 0 < height <= side:
            left, top = int(x * (side - width + 1)), int(y * (side - height + 1))
            return left, top, left + width, top + height
    return 0, 0, side, side


def normalise(image):
    """uint8 (B, 3, S, S) -> float32, by CLIP's mean and deviation, as numbers: no GPU waits for them."""
    image = image.float()
    for channel, mean, std in zip(image.unbind(1), *(255 * torch.tensor([MEAN, STD])).tolist()):
        channel.sub_(mean).div_(std)
    return image


def training_micro_batches(samples, train_cfg, start, rank=0, world=1):
    """The chunks of process `rank` from step `start` on: (step, chunk, sample numbers (micro_batch,)). Sample
    n of the one global stream is step · batch + its place; epochs follow on, nothing is dropped."""
    batch, micro = train_cfg.batch_size, train_cfg.micro_batch
    order = lru_cache(1)(lambda epoch: masking.epoch_order(train_cfg.seed, epoch, samples.n))
    for step in range(start, train_cfg.steps):
        for chunk in range(rank, batch // micro, world):
            places = step * batch + chunk * micro + np.arange(micro)
            yield step, chunk, np.array([order(n // samples.n)[n % samples.n] for n in places])


def validation_micro_batches(samples, limit, rank=0, world=1):
    """At most `limit` samples, at equal distances, in chunks of VAL_MICRO_BATCH: (step, chunk, numbers (B,))."""
    count = min(limit, samples.n)
    numbers = np.arange(count) * samples.n // count
    for chunk in range(rank, 1 + (count - 1) // VAL_MICRO_BATCH, world):
        yield masking.VALIDATION, chunk, numbers[chunk * VAL_MICRO_BATCH:(chunk + 1) * VAL_MICRO_BATCH]


def load(samples, chunks, seed, device, crop=False, ahead=3):
    """Iterate over (step, chunk, numbers, batch): numbers (B,) says which samples the chunk holds, batch is a
    dict of tensors on `device`, its image float32 (B, 3, S, S), normalised. One thread works `ahead` of the
    caller. For a GPU it copies from a pinned buffer, and refills that only after its copy's event."""
    device, side = torch.device(device), samples.cfg.image_size
    cuda = device.type == "cuda"
    stream = torch.cuda.Stream(device) if cuda else None

    def work(step, chunk, numbers, buffer=None, copied=None):
        if buffer is None or len(buffer) != len(numbers):
            buffer = torch.empty(len(numbers), 3, side, side, dtype=torch.uint8, pin_memory=cuda)
        elif cuda:
            copied.synchronize()
        batch = samples.batch(numbers, seed, step, chunk, buffer.numpy(), crop)
        batch = {name: torch.from_numpy(array) for name, array in batch.items()} | {"image": buffer}
        if cuda:
            with torch.cuda.device(stream.device), torch.cuda.stream(stream):   # a thread begins on GPU 0
                batch = {name: tensor.pin_memory().to(device, non_blocking=True)
                         for name, tensor in batch.items()}
                copied = stream.record_event()
        return step, chunk, numbers, batch, buffer, copied

    chunks = iter(chunks)
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(work, *chunk) for chunk in islice(chunks, ahead))
        while coming:
            step, chunk, numbers, batch, buffer, copied = coming.popleft().result()
            if cuda:
                now = torch.cuda.current_stream(device)
                now.wait_event(copied)
                for tensor in batch.values():
                    tensor.record_stream(now)      # made on the copy's stream, used on this one
            elif device.type != "cpu":
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
            batch["image"] = normalise(batch["image"])                                 # (B, 3, S, S)
            # This chunk's buffer is free: the thread fills it anew while the caller computes.
            coming.extend(thread.submit(work, *following, buffer, copied) for following in islice(chunks, 1))
            yield step, chunk, numbers, batch
