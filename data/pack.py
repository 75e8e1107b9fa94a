"""The pack on disk, as prepare.py writes it: pictures, texts and what is known of them, ready to be read."""
import contextlib
import hashlib
import json
import os
import threading
from itertools import islice
from pathlib import Path

import numpy as np

from m3ae_mini.config import UserError

PACK_VERSION = 1
SAMPLE_DTYPE = np.dtype([("picture", "<i4"), ("text", "<i4"), ("label", "<i4"), ("group", "<i4"),
                         ("closed", "<i1"), ("line", "<i8")])
SPLITS = ("train", "val", "test")


class Pack:
    """A folder made by data/prepare.py, opened by its version and the sizes of its files.

    meta: the dict of meta.json; samples: SAMPLE_DTYPE (N,), mapped from disk: train, then val, then test."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "meta.json").is_file():
            raise UserError(f"there is no pack at {folder}: make one with python -m data.prepare NAME --root "
                            f"DIR --out {folder}")
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            version, self.size = self.meta["version"], int(self.meta["size"])
            ends = np.cumsum([0] + [int(self.meta["samples"].get(split, 0)) for split in SPLITS])
            sizes = {name: entry["bytes"] for name, entry in self.meta["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}/meta.json is damaged ({error!r}): prepare the pack again") from None
        if version != PACK_VERSION:
            raise UserError(f"{folder} is a pack of version {version}, this code reads {PACK_VERSION}: "
                            "prepare it again")
        for name, size in sizes.items():
            there = (self.folder / name).stat().st_size if (self.folder / name).is_file() else 0
            if there != size:
                raise UserError(f"{self.folder / name} has {there} bytes instead of {size}: the pack is "
                                "damaged, prepare it again")

        self.samples = np.load(self.folder / "samples.npy", mmap_mode="r", allow_pickle=False)
        self.offsets = np.load(self.folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
        self.split = {split: range(ends[i], ends[i + 1]) for i, split in enumerate(SPLITS)}
        self.images = open(self.folder / "images.bin", "rb", buffering=0)
        self.lock = threading.Lock()               # one file position, several readers (training, validation)

    def read_picture(self, number, out):
        """Read picture `number` into out, uint8 (3, S, S); a grey one is broadcast to three channels."""
        start, end = int(self.offsets[number]), int(self.offsets[number + 1])
        area = self.size * self.size
        grey = end - start == area
        flat = out.reshape(-1)[:area] if grey else out.reshape(-1)
        with self.lock:
            self.images.seek(start)
            got = self.images.readinto(memoryview(flat))
        if got != flat.nbytes or end - start not in (area, 3 * area):
            raise UserError(f"{self.folder}/images.bin ends within picture {number}: the pack is damaged, "
                            "prepare it again")
        if grey:
            out[1:] = out[0]

    def line(self, row):
        """Everything that samples.jsonl says of sample `row`: a dict with "text" and more."""
        with open(self.folder / "samples.jsonl", "rb") as file:
            file.seek(int(self.samples["line"][row]))
            return json.loads(file.readline())

    def lines(self, split=None):
        """The dicts of one split's samples (default: of all), in order."""
        rows = range(len(self.samples)) if split is None else self.split[split]
        if len(rows):
            with open(self.folder / "samples.jsonl", "rb") as file:
                file.seek(int(self.samples["line"][rows[0]]))
                for _ in rows:
                    yield json.loads(file.readline())

    def tokens(self, tokenizer):
        """-> (offsets (N+1,), tokens (n,)), uint32, mapped from disk: sample r has
        tokens[offsets[r]:offsets[r+1]], each 2·id + 1 where a word starts, else 2·id. Made on first use and
        kept in the pack under the tokenizer's hash."""
        path, count = self.folder / f"tokens.{tokenizer.hash}.npy", len(self.samples)
        if path.is_file():
            try:
                table = np.load(path, mmap_mode="r", allow_pickle=False)
                if table.ndim == 1 and len(table) > count and len(table) == count + 1 + table[count]:
                    return table[:count + 1], table[count + 1:]
            except (ValueError, EOFError):
                pass                               # left by a kill or a full disk: made again

        lengths, parts, lines = [0], [], self.lines()
        while texts := [line["text"] for line in islice(lines, 4096)]:
            for ids, starts in tokenizer.encode(texts):
                lengths.append(len(ids))
                parts.append((2 * ids + starts).astype(np.uint32))
        table = np.concatenate([np.cumsum(lengths).astype(np.uint32), *parts])
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):         # a pack on a read-only disk: the tokens stay in memory
            with open(beside, "wb") as file:
                np.save(file, table)
            os.replace(beside, path)
        return table[:count + 1], table[count + 1:]

    def verify(self):
        """Read every byte and compare the check sums of meta.json; UserError names the first damaged file."""
        for name, entry in self.meta["files"].items():
            with open(self.folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise UserError(f"{self.folder / name} does not have the check sum it was written with: "
                                    "the pack is damaged, prepare it again")

    def fingerprint(self):
        """What tells this pack from another: the check sums of its files, as one short text."""
        sums = json.dumps({name: entry["sha256"] for name, entry in sorted(self.meta["files"].items())})
        return hashlib.sha256(sums.encode()).hexdigest()[:16]


def open_packs(names, size, task="pretrain"):
    """--data -> the packs. The name `phantoms` stands for the embedded data set, drawn on first use."""
    packs = []
    for name in names.split(","):
        if name == "phantoms":
            name = f"packs/phantoms-{task}-{size}"
            if not Path(name).exists():
                from data import phantoms, prepare         # they read packs, too: imported when needed
                prepare.pack(phantoms.rows(None, task), out=name, name="phantoms", task=task, size=size)
        packs.append(Pack(name))
    return packs
