"""The pack on disk, as prepare.py writes it: images, texts and what is known of them, ready to be read."""
import contextlib
import hashlib
import json
import os
import re
import sys
import threading
import zlib
from itertools import islice
from pathlib import Path

import numpy as np

from m3ae_mini.config import UserError

PACK_VERSION = 1
SAMPLE_DTYPE = np.dtype([("image", "<i4"), ("text", "<i4"), ("label", "<i4"), ("group", "<i4"),
                         ("closed", "<i1"), ("line", "<i8")])
SPLITS = ("train", "val", "test")
FILES = {"images.bin", "offsets.npy", "samples.jsonl", "samples.npy"}
LINE = {"image": int, "closed": bool} | dict.fromkeys(     # what a line of samples.jsonl may hold
    ("text", "split", "answer", "label", "group", "source"), str)
PHANTOM = re.compile(r"Phantom\(seed=\d{1,9}, number=\d{1,9}\)")


class Pack:
    """A folder made by data/prepare.py, opened by its version, its files' sizes and whether they fit each
    other. A pack may be damaged or come from a stranger: what can be known without reading images and texts
    is known when it is opened, the rest when it is read. UserError names the file.

    meta: the dict of meta.json; samples: SAMPLE_DTYPE (N,), mapped from disk: train, then val, then test."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "meta.json").is_file():
            raise UserError(f"there is no pack at {folder}: make one with python -m data.prepare NAME --root "
                            f"DIR --out {folder}")
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            version, self.size = self.meta["version"], self.meta["size"]
            counts, groups = [self.meta["samples"][split] for split in SPLITS], self.meta["groups"]
            self.files = {name: (entry["bytes"], entry["sha256"])
                          for name, entry in self.meta["files"].items()}
            names = {*map(type, (self.meta["name"], *groups))} == {str} and FILES <= self.files.keys()
            numbers = {*map(type, (self.size, *counts))} == {int} and min(counts) >= 0
            if not (names and numbers and 0 < self.size < 2 ** 15):
                raise ValueError("a number or a name is not what it must be")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.damaged("meta.json", f"is not what was written ({repr(error)[:200]})")
        if version != PACK_VERSION:
            raise UserError(f"{folder} is a pack of version {version}, this code reads {PACK_VERSION}: "
                            "prepare it again")
        for name, (size, _) in self.files.items():
            path = self.folder / name
            there = path.stat().st_size if "/" not in name and path.is_file() else 0
            if there != size:
                self.damaged(name, f"has {there} bytes instead of {size}")

        self.samples = self.array("samples.npy", SAMPLE_DTYPE, sum(counts))
        self.offsets = self.array("offsets.npy", np.int64)
        self.text_bytes, self.area = self.files["samples.jsonl"][0], self.size ** 2
        ends = np.cumsum([0, *counts])
        self.split = {split: range(ends[i], ends[i + 1]) for i, split in enumerate(SPLITS)}
        self.check(len(groups))
        self.images = open(self.folder / "images.bin", "rb", buffering=0)
        self.texts = open(self.folder / "samples.jsonl", "rb")
        self.lock = threading.Lock()               # one file position, several readers (training, validation)

    def damaged(self, name, what):
        raise UserError(f"{self.folder / name} {what}: the pack is damaged, prepare it again") from None

    def array(self, name, dtype, length=None):
        """A file of numpy's, one-dimensional, mapped from disk. One that holds a pickle is refused."""
        try:
            table = np.lib.format.open_memmap(self.folder / name, mode="r")
            if table.dtype == dtype and table.ndim == 1 and length in (None, len(table)):
                return table
        except Exception:                          # numpy's reader of headers raises all kinds
            pass
        self.damaged(name, "does not hold the numbers that belong there")

    def check(self, groups):
        """What samples.npy and offsets.npy point at must be there."""
        lengths, starts = np.diff(self.offsets), self.samples["line"]
        count, end = len(lengths), self.files["images.bin"][0]
        sound = np.isin(lengths, (self.area, 3 * self.area)).all()     # one channel, or three
        if count < 1 or not sound or (self.offsets[0], self.offsets[-1]) != (0, end):
            self.damaged("offsets.npy", "does not fit images.bin")
        for name, most in ("image", count), ("group", groups):
            least = -1 if name == "group" else 0
            if not ((least <= self.samples[name]) & (self.samples[name] < most)).all():
                self.damaged("samples.npy", f"names a {name} that is not there")
        if not (np.diff(starts, prepend=0, append=self.text_bytes)[1:] > 0).all() or starts[:1].any():
            self.damaged("samples.npy", "does not fit samples.jsonl")

    def read_image(self, number, out):
        """Read image `number` into out, uint8 (3, S, S); a grey one is broadcast to three channels."""
        start, end = int(self.offsets[number]), int(self.offsets[number + 1])
        grey = end - start == self.area
        flat = out.reshape(-1)[:self.area] if grey else out.reshape(-1)
        with self.lock:
            self.images.seek(start)
            got = self.images.readinto(memoryview(flat))
        if got != flat.nbytes:
            self.damaged("images.bin", f"ends within image {number}")
        if grey:
            out[1:] = out[0]

    def line(self, row):
        """Everything that samples.jsonl says of sample `row`: a dict with "text" and more."""
        return next(self.lines(rows=range(row, row + 1)))

    def lines(self, split=None, rows=None):
        """The dicts of one split's samples (default: of all), in order."""
        rows = rows or (range(len(self.samples)) if split is None else self.split[split])
        starts = [*self.samples["line"][rows.start:rows.stop + 1].tolist(), self.text_bytes]
        for row, start, end in zip(rows, starts, starts[1:]):
            with self.lock:
                self.texts.seek(start)
                raw = self.texts.read(end - start)
            try:
                line = json.loads(raw)
                known = {key: type(value) for key, value in line.items()}
                if b"\\u" in raw:                  # half a surrogate pair is no text
                    json.dumps(line, ensure_ascii=False).encode()
            except (ValueError, AttributeError, RecursionError):
                known = {}
            right = known.get("text") is str and all(LINE.get(key) is kind for key, kind in known.items())
            if self.meta["name"] == "phantoms":    # which are drawn anew, without noise, for a comparison
                right = right and PHANTOM.fullmatch(line.get("source", ""))
            if not right:
                self.damaged("samples.jsonl", f"is not what was written, in line {row + 1}")
            yield line

    def tokens(self, tokenizer):
        """-> (offsets (N+1,), tokens (n,)), uint32, mapped from disk: sample r has
        tokens[offsets[r]:offsets[r+1]], each 2·id + 1 where a word starts, else 2·id. Made on first use and
        kept in the pack, under a name that tells tokenizer and texts."""
        path, count = self.token_file(tokenizer), len(self.samples)
        if path.is_file():
            with contextlib.suppress(UserError):
                table = self.array(path.name, np.uint32)
                fits = len(table) > count + 2 and table[count] == len(table) - count - 2
                if fits and zlib.crc32(table[:-1]) == table[-1]:
                    return table[:count + 1], table[count + 1:-1]
            print(f"warning: {path} is damaged or of an older form: made again", file=sys.stderr)

        lengths, parts, lines = [0], [], self.lines()
        while texts := [line["text"] for line in islice(lines, 4096)]:
            for ids, starts in tokenizer.encode(texts):
                lengths.append(len(ids))
                parts.append((2 * ids + starts).astype(np.uint32))
        table = np.concatenate([np.cumsum(lengths).astype(np.uint32), *parts])
        table = np.append(table, np.uint32(zlib.crc32(table)))
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):         # a pack on a read-only disk: the tokens stay in memory
            try:
                with open(beside, "wb") as file:
                    np.save(file, table)
                os.replace(beside, path)
            finally:
                beside.unlink(missing_ok=True)     # a disk that is full needs the room
        return table[:count + 1], table[count + 1:-1]

    def token_file(self, tokenizer):
        """Where `tokens` keeps what it made. Another pack's file, left or copied here, has another name."""
        told = f"{tokenizer.hash} {self.files['samples.jsonl'][1]}"
        return self.folder / f"tokens.{hashlib.sha256(told.encode('utf-8', 'replace')).hexdigest()[:16]}.npy"

    def verify(self):
        """Read every byte and compare the check sums of meta.json; UserError names the first damaged file."""
        for name, (_, sha256) in self.files.items():
            with open(self.folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    self.damaged(name, "does not have the check sum it was written with")

    def fingerprint(self):
        """What tells this pack from another: the check sums of its files, as one short text."""
        sums = json.dumps({name: sha256 for name, (_, sha256) in sorted(self.files.items())})
        return hashlib.sha256(sums.encode()).hexdigest()[:16]


def open_packs(names, size, crop, task="pretrain"):
    """--data -> the packs, of images of `size` pixels, or larger ones where crops are taken (crop < 1). The
    name `phantoms` stands for the embedded data set, drawn on first use."""
    packs = []
    for name in names.split(","):
        if name == "phantoms":
            name = f"packs/phantoms-{task}-{size}"
            if not Path(name).exists():
                from data import phantoms, prepare         # they read packs, too: imported when needed
                try:
                    prepare.pack(phantoms.rows(None, task), out=name, name="phantoms", task=task, size=size)
                except UserError:
                    if not Path(name).exists():            # else another process has drawn the same ones
                        raise
        packs.append(Pack(name))
        if packs[-1].size != size and not (packs[-1].size > size and crop < 1):
            raise UserError(f"{name} holds images of {packs[-1].size} pixels, not {size}: prepare it with "
                            f"--size {size}, or use --image_size {packs[-1].size}")
    return packs
