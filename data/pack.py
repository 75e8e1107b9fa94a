"""Read a pack: a folder of images and texts, ready for training. write_pack.py makes it.

    meta.json       version, counts, names of labels and groups, rows skipped by reason, checksums
    images.bin      uint8: an image is one plane of size × size if it is grey, else three (R, G, B)
    offsets.npy     where each image begins in images.bin, and where the last one ends
    samples.jsonl   one line per (image, text) pair: train, then val, then test
    samples.npy     the same as numbers (SAMPLE_DTYPE)
    skipped.jsonl   every row that was left out, and why
    summary.txt     what a person should know of it, as printed when it was made
"""
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
from typing import Iterator

import numpy as np

from data.progress import progress
from m3ae_mini.config import UserError, require

PACK_VERSION = 2
SPLITS = ("train", "val", "test")
REQUIRED_FILES = {"images.bin", "offsets.npy", "samples.jsonl", "samples.npy"}

# A row of samples.npy. image, text: equal numbers for equal ones; label, group: index into the
# names of meta.json, or -1; closed: 1, 0, or -1 if unknown; line: its start in samples.jsonl.
SAMPLE_DTYPE = np.dtype([("image", "<i4"), ("text", "<i4"), ("label", "<i4"), ("group", "<i4"),
                         ("closed", "<i1"), ("line", "<i8")])

# What a line of samples.jsonl may hold.
KEY_TYPES = {"image": int, "text": str, "split": str, "answer": str, "closed": bool,
             "label": str, "group": str, "patient": str, "source": str}
PHANTOM_SOURCE = re.compile(r"Phantom\(seed=\d{1,9}, number=\d{1,9}\)|"
                            r"ShiftedPhantom\(seed=\d{1,9}, number=\d{1,9}, shift=[123]\)")


class Pack:
    """A pack opened for reading. It may be damaged or untrusted.

    Opening checks version, file sizes, indices and offsets, but reads no images or texts. Those
    are checked when read. UserError names the damaged file.

    folder: Path; meta: the dict of meta.json; size: side of an image in pixels;
    samples: SAMPLE_DTYPE (N,), mapped from disk; split: {"train": range of its samples, …}.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        sample_count = self._read_meta()
        self._check_file_sizes()

        # Map the two tables from disk.
        self.samples = self._map_array("samples.npy", SAMPLE_DTYPE, sample_count)
        self.offsets = self._map_array("offsets.npy", np.int64)
        self._check_tables()

        # Training and validation read from two threads, but a file has one position.
        self._lock = threading.Lock()
        self._image_file = open(self.folder / "images.bin", "rb", buffering=0)
        self._text_file = open(self.folder / "samples.jsonl", "rb")

    def _damaged(self, name: str, what: str) -> str:
        """UserError text: which file of the pack is damaged, and how."""
        return f"{self.folder}/{name} {what}: the pack is damaged, prepare it again"

    # --------------------------------------------------------------------------------------- checks

    def _read_meta(self) -> int:
        """Read meta.json -> number of samples."""
        path = self.folder / "meta.json"
        require(not self.folder.is_file(), f"{self.folder} is a file: make a pack of a table with "
                f"python -m data.prepare table --root {self.folder} --out packs/NAME (--task, "
                "--size), and give that")
        require(path.is_file(), f"there is no pack at {self.folder}: make one with "
                                f"python -m data.prepare NAME --root DIR --out {self.folder}")
        try:
            self.meta = json.loads(path.read_text())
            version = self.meta["version"]
            require(version == PACK_VERSION,
                    f"{self.folder} is a pack of version {version}, this code reads version "
                    f"{PACK_VERSION}: delete it, then prepare it again (phantoms are packed "
                    "on first use)")

            self.size = self.meta["size"]
            self.files = {name: (entry["bytes"], entry["sha256"])
                          for name, entry in self.meta["files"].items()}
            counts = [self.meta["samples"][split] for split in SPLITS]
            names = [self.meta["name"], *self.meta["groups"]]
            numbers = [self.size, *counts, *(size for size, _ in self.files.values())]
            sound = (all(type(value) is str for value in names)
                     and all(type(value) is int for value in numbers)
                     and min(counts) >= 0 and 0 < self.size < 2 ** 15
                     and REQUIRED_FILES <= self.files.keys())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"is not valid ({repr(error)[:200]})"
            raise UserError(self._damaged("meta.json", what)) from None
        require(sound, self._damaged("meta.json", "holds an invalid number or name"))

        # Samples are in the order of SPLITS.
        ends = np.cumsum([0, *counts])
        self.split = {split: range(ends[i], ends[i + 1]) for i, split in enumerate(SPLITS)}
        return sum(counts)

    def _check_file_sizes(self) -> None:
        """Check that each file exists and has the size given in meta.json."""
        for name, (size, _) in self.files.items():
            path = self.folder / name
            inside = "/" not in name   # an untrusted pack may name files elsewhere
            found = path.stat().st_size if inside and path.is_file() else 0
            require(found == size, self._damaged(name, f"has {found} bytes instead of {size}"))

    def _map_array(self, name: str, dtype, length: int | None = None) -> np.ndarray:
        """A .npy file of one dimension, mapped from disk. One that holds a pickle is refused."""
        try:
            array = np.lib.format.open_memmap(self.folder / name, mode="r")
            sound = array.dtype == dtype and array.ndim == 1 and length in (None, len(array))
        except Exception:   # numpy raises many types on a damaged header
            sound = False
        require(sound, self._damaged(name, "has the wrong type or length"))
        return array

    def _check_tables(self) -> None:
        """Check that samples.npy and offsets.npy point only at what exists."""
        # An image has one plane or three, and together they fill images.bin.
        lengths = np.diff(self.offsets)
        right_lengths = np.isin(lengths, (self.size ** 2, 3 * self.size ** 2)).all()
        require(len(lengths) > 0 and right_lengths and self.offsets[0] == 0
                and self.offsets[-1] == self.files["images.bin"][0],
                self._damaged("offsets.npy", "does not fit images.bin"))

        # Group -1 means none.
        bounds = {"image": (0, len(lengths)), "group": (-1, len(self.meta["groups"]))}
        for name, (least, end) in bounds.items():
            inside = (least <= self.samples[name]) & (self.samples[name] < end)
            require(inside.all(), self._damaged("samples.npy", f"refers to a missing {name}"))

        # Lines follow one another from the start of samples.jsonl to its end.
        starts = self.samples["line"]
        lengths = np.diff(starts, append=self.files["samples.jsonl"][0])
        require((lengths > 0).all() and not starts[:1].any(),
                self._damaged("samples.npy", "does not fit samples.jsonl"))

    def verify(self) -> None:
        """Read every byte and compare checksums. UserError names the first damaged file."""
        for name, (_, sha256) in self.files.items():
            with open(self.folder / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            require(found == sha256, self._damaged(name, "does not match its checksum"))

    def fingerprint(self) -> str:
        """A short text that identifies this pack, made from its checksums."""
        sums = json.dumps({name: sha256 for name, (_, sha256) in sorted(self.files.items())})
        return hashlib.sha256(sums.encode()).hexdigest()[:16]

    # --------------------------------------------------------------------------------------- images

    def read_image(self, index: int, out: np.ndarray) -> None:
        """Read an image into out, uint8 (3, S, S). A grey one is copied to all channels."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        flat = out.reshape(-1)[:end - start]
        with self._lock:
            self._image_file.seek(start)
            count = self._image_file.readinto(memoryview(flat))
        require(count == flat.nbytes, self._damaged("images.bin", f"ends within image {index}"))
        if flat.nbytes < out.nbytes:
            out[1:] = out[0]

    # ---------------------------------------------------------------------------------------- texts

    def line(self, row: int) -> dict:
        """All that samples.jsonl says of sample `row`: a dict with "text" and more."""
        return next(self._read_lines(range(row, row + 1)))

    def lines(self, split: str | None = None) -> Iterator[dict]:
        """The dicts of one split's samples, or of all, in order."""
        return self._read_lines(range(len(self.samples)) if split is None else self.split[split])

    def _read_lines(self, rows: range) -> Iterator[dict]:
        """The dicts of these rows. UserError if a line is not valid."""
        text_end = self.files["samples.jsonl"][0]
        starts = [*self.samples["line"][rows.start:rows.stop + 1].tolist(), text_end]
        for row, start, end in zip(rows, starts, starts[1:]):
            with self._lock:
                self._text_file.seek(start)
                raw = self._text_file.read(end - start)
            line = self._parse_line(raw)
            what = f"is not valid in line {row + 1}"
            require(line is not None, self._damaged("samples.jsonl", what))
            yield line

    def _parse_line(self, raw: bytes) -> dict | None:
        """The dict of a line, or None if write_pack writes no such line."""
        try:
            line = json.loads(raw)
            known = all(KEY_TYPES.get(key) is type(value) for key, value in line.items())
            if b"\\u" in raw:   # half a surrogate pair is legal in JSON, but not in a text
                json.dumps(line, ensure_ascii=False).encode()
        except (ValueError, AttributeError, RecursionError):
            return None
        if not known or "text" not in line:
            return None

        # train.py draws phantoms again from their source, to show them without noise.
        drawn = self.meta["name"] == "phantoms"
        if drawn and not PHANTOM_SOURCE.fullmatch(line.get("source", "")):
            return None
        return line

    # --------------------------------------------------------------------------------------- tokens

    def tokens(self, tokenizer) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of all texts by an m3ae_mini Tokenizer: offsets (N+1,), tokens (n,), uint32.

        Sample r has tokens[offsets[r]:offsets[r+1]], each 2·id + 1 where a word starts, else
        2·id. They are computed on first use and kept in the pack, mapped from disk.
        """
        path = self.token_file(tokenizer)
        table = self._cached_tokens(path) if path.is_file() else None
        if table is None:
            table = self._encode_texts(tokenizer)
            _save_if_possible(path, table)
        offset_count = len(self.samples) + 1
        return table[:offset_count], table[offset_count:-1]

    def token_file(self, tokenizer) -> Path:
        """Where `tokens` are kept. The name depends on tokenizer and texts, so that a file of
        another pack, left or copied here, is not taken."""
        key = f"{tokenizer.hash} {self.files['samples.jsonl'][1]}".encode("utf-8", "replace")
        return self.folder / f"tokens.{hashlib.sha256(key).hexdigest()[:16]}.npy"

    def _cached_tokens(self, path: Path) -> np.ndarray | None:
        """The table that _encode_texts made, or None with a warning if it is damaged."""
        count = len(self.samples)
        with contextlib.suppress(UserError):
            table = self._map_array(path.name, np.uint32)
            fits = len(table) > count + 2 and table[count] == len(table) - count - 2
            if fits and zlib.crc32(table[:-1]) == table[-1]:
                return table
        print(f"warning: {path} is damaged or of an older version: it is rebuilt",
              file=sys.stderr)
        return None

    def _encode_texts(self, tokenizer) -> np.ndarray:
        """Offsets (N+1,), tokens (n,) and their checksum in one table, uint32 (N + n + 2,)."""
        lengths, parts = [0], []
        lines = progress(self.lines(), "encoding", "texts", len(self.samples))
        while texts := [line["text"] for line in islice(lines, 4096)]:
            for ids, starts in tokenizer.encode(texts):
                lengths.append(len(ids))
                parts.append((2 * ids + starts).astype(np.uint32))
        table = np.concatenate([np.cumsum(lengths).astype(np.uint32), *parts])
        return np.append(table, np.uint32(zlib.crc32(table)))


def _save_if_possible(path: Path, table: np.ndarray) -> None:
    """Write a .npy file atomically. If the disk is full or read-only, nothing is left there."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        try:
            with open(temporary, "wb") as file:
                np.save(file, table)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
