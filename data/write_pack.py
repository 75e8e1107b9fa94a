"""Write a pack: filter the rows of a reader, decode every image once, write the files.

write_pack does it all; the other functions are its stages. pack.py describes the files.
"""
import json
import os
from array import array
from collections import Counter
from contextlib import closing
from functools import lru_cache, partial
from pathlib import Path
from typing import Iterable

import numpy as np

from data import Row, Source, clean_text
from data.answers import collect_spellings
from data.decode import Window
from data.images import decoder_version, store_image
from data.labels import split_labels
from data.leaks import refuse_leaks
from data.pack import PACK_VERSION, SAMPLE_DTYPE, SPLITS
from data.partial import Done, HashedFile, open_part
from data.progress import progress
from data.summary import (
    MISSING, OUTSIDE, UNREADABLE, PackedImages, TableReport, source_name, summarise)
from m3ae_mini.config import require

MAX_BAD_SHARE = 0.05   # of the images: if more are missing or unreadable, no pack is written

# What to do about an image that cannot be packed.
ADVICE = {OUTSIDE: "move the table into a folder that holds the images, or give that folder as "
                   "--root",
          MISSING: "put them into the data set's folder",
          UNREADABLE: "replace or convert them"}


def write_pack(rows: Iterable[Row], out: Path | str, name: str, task: str, size: int, *,
               root: Path | None = None, workers: int | None = None,
               allow_missing: bool = False, overwrite: bool = False,
               fit: str = "crop", window: Window | None = None,
               table: TableReport | None = None, allow_leaks: bool = False,
               several_labels: bool = False, wait: bool = False) -> dict:
    """Write the pack `out` with images of `size` × `size` pixels -> its meta.json

    root: images outside this folder are refused. fit, window: as in images.square and
    decode.decode. table: what the reader of a user's table fills in while `rows` are read.
    several_labels: a row may have several, though none of these has (else the rows tell). wait:
    for another process that writes `out`.

    UserError if `out` exists (unless it is a pack and `overwrite` is set) or cannot be written,
    if more than 5 % of the images are missing or unreadable (unless `allow_missing`), if the
    table's own splits leak (leaks.py; unless `allow_leaks`), or if no training row is left.
    `out` appears when it is whole. A call that ends before that leaves the images decoded so far
    in OUT.part, where an equal call continues (partial.py).
    """
    out = Path(out)
    require(overwrite or not out.exists(),
            f"{out} exists already: choose another --out, or replace it with --overwrite")
    require(not out.exists() or (out / "meta.json").is_file(),
            f"{out} is not a pack, so --overwrite does not touch it: choose another --out")

    # Missing images, and leaks between files, are found now: decoding may take hours.
    with collect_spellings() as spellings:
        kept, skipped = filter_rows(progress(rows, "reading", "rows"), task)
    bad = find_bad_images(kept, root, allow_missing)
    refuse = table is not None and table.split_given and not allow_leaks
    if refuse:
        refuse_leaks(kept, task, content=str)

    settings = {"version": PACK_VERSION, "size": size, "fit": fit, "window": window,
                "decoder": decoder_version()}
    with open_part(out, overwrite, settings, wait) as part:
        # Decode and write the images. Those that cannot be read join the bad ones.
        files: dict[str, dict] = {}   # name: {"bytes": …, "sha256": …}
        good = [source for source in dict.fromkeys(row.image for row in kept) if source not in bad]
        store = partial(store_image, size=size, fit=fit, window=window)
        with closing(part.images(store, good, workers, files)) as results:
            images = write_offsets(part.pack, files, zip(good, results, strict=True), bad)

        # Rows without an image are skipped, too. What is left must be enough to train on.
        skipped += [skip_entry(row, *bad[row.image]) for row in kept if row.image in bad]
        kept = [row for row in kept if row.image not in bad]
        if refuse:
            refuse_leaks(kept, task, images.content)
        several_labels |= any("|" in row.label for row in kept if row.label)
        meta = describe(kept, skipped, name, task, size, fit, window, several_labels)

        # Write the texts and what is known of them, the rows that were skipped, the summary.
        folder = part.pack
        write_samples(folder, files, kept, images.index, meta["labels"], meta["groups"], root)
        with HashedFile(folder / "skipped.jsonl", files) as file:
            for entry in skipped:
                file.write(json_line(entry))
        with HashedFile(folder / "summary.txt", files) as file:
            summary = summarise(meta, kept, images, spellings, table, root)
            file.write(summary.encode("utf-8", "replace"))

        # meta.json comes last: it holds the checksums of all other files.
        meta["files"] = files
        with HashedFile(folder / "meta.json", {}) as file:
            file.write(json.dumps(meta, indent=1).encode())
    return meta


def describe(kept: list[Row], skipped: list[dict], name: str, task: str, size: int, fit: str,
             window: Window | None, several_labels: bool) -> dict:
    """meta.json, but for the checksums. UserError if no training row is left."""
    reasons = dict(sorted(Counter(entry["reason"] for entry in skipped).items()))
    samples = {split: sum(row.split == split for row in kept) for split in SPLITS}
    why = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items()) or "no rows"
    require(samples["train"], f"{name} has no training rows to pack ({why}): "
                              "correct --root or --task")
    labels = {label for row in kept if row.label
              for label in (split_labels(row.label) if several_labels else [row.label])}
    return {"version": PACK_VERSION, "name": name, "task": task, "size": size, "fit": fit,
            "window": window and list(window), "images": len({row.image for row in kept}),
            "samples": samples, "labels": sorted(labels), "several_labels": several_labels,
            "groups": sorted({row.group for row in kept if row.group}), "skipped": reasons}


# ------------------------------------------------------------------------------- which rows, images

def filter_rows(rows: Iterable[Row], task: str) -> tuple[list[Row], list[dict]]:
    """Rows to pack, in the order train, val, test, with clean texts -> (rows, skipped entries)

    For "pretrain" and "irtr" a pair that occurs twice within a split counts once. Questions and
    classes stay as published: the training split of VQA-RAD repeats 465 questions.
    """
    kept: list[Row] = []
    skipped: list[dict] = []
    seen: set[tuple] = set()                                # (split, image, text) of every row kept
    for row in rows:
        row = row._replace(text=clean_text(row.text), answer=clean_text(row.answer) or None,
                           label=clean_text(row.label) or None,
                           group=clean_text(row.group) or None,
                           patient=clean_text(row.patient) or None)
        pair = (row.split, row.image, row.text)
        reason, _, detail = (row.skip or "").partition(": ")
        if not reason and not row.text:
            reason = "no text"
        elif not reason and task == "vqa" and row.answer is None:
            reason = "no answer"
        elif not reason and task == "cls" and row.label is None:
            reason = "no label"
        elif not reason and task in ("pretrain", "irtr") and pair in seen:
            reason = "duplicate"

        if reason:
            skipped.append(skip_entry(row, reason, detail))
        else:
            seen.add(pair)
            kept.append(row)
    return sorted(kept, key=lambda row: SPLITS.index(row.split)), skipped


def skip_entry(row: Row, reason: str, detail: str | None = None) -> dict:
    """An entry of skipped.jsonl."""
    entry = {"split": row.split, "image": str(row.image), "text": row.text, "reason": reason}
    return entry | ({"detail": detail} if detail else {})


def unusable(source: Source, root: Path | None) -> str | None:
    """Why an image cannot be used, as far as is known without opening it; None if it can.

    Its file may be missing. Or its name in the annotations (an absolute path, "..", a link)
    leads out of the data set's folder `root`, a real path.
    """
    if callable(source):
        return None
    try:
        if root is not None and not _real_path(source).is_relative_to(root):
            return OUTSIDE
    except ValueError:   # no system call takes a NUL, or half a surrogate pair
        return MISSING
    return None if os.path.isfile(source) else MISSING


def _real_path(path: Path) -> Path:
    """The path without links and ".."; a folder is looked up once, as many images share it."""
    folder, name = os.path.split(path)
    real = os.path.join(_real_folder(folder), name)
    return Path(os.path.realpath(real) if name == ".." or os.path.islink(real) else real)


@lru_cache(1024)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def find_bad_images(rows: list[Row], root: Path | None, allow_missing: bool) -> "BadImages":
    """The images of the rows that cannot be used, as far as is known without opening them."""
    _real_folder.cache_clear()   # links may have changed since an earlier call
    sources = list(dict.fromkeys(row.image for row in rows))
    bad = BadImages(len(sources), allow_missing)
    real_root = root and Path(os.path.realpath(root))
    for source in progress(sources, "checking", "images", len(sources)):
        if reason := unusable(source, real_root):
            bad[source] = (reason, None)
    bad.check()
    return bad


class BadImages(dict):
    """The images that cannot be packed: {source: (reason, detail or None)}."""

    def __init__(self, total: int, allow_missing: bool):
        super().__init__()
        self.total = total
        self.limit = total if allow_missing else MAX_BAD_SHARE * total

    def check(self) -> None:
        """UserError if more images are bad than allowed."""
        source, (reason, detail) = next(iter(self.items()), (None, (None, None)))
        require(len(self) <= self.limit,
                f"at least {len(self):,} of {self.total:,} images cannot be packed, the first is "
                f"{source} ({detail or reason}): {ADVICE.get(reason)}, or leave them out with "
                "--allow_missing")


# ---------------------------------------------------------------------------------------- the files

def write_offsets(folder: Path, files: dict[str, dict], results: Iterable[tuple[Source, Done]],
                  bad: BadImages) -> PackedImages:
    """Go through the images, then write offsets.npy -> those that could be read."""
    images = PackedImages()
    offsets = array("q", [0])
    for source, done in results:
        if done.why is not None:
            bad[source] = (UNREADABLE, done.why)
            bad.check()
        else:
            offsets.append(offsets[-1] + done.length)
            images.add(source, bytes.fromhex(done.sha256), done.notes, done.cut)
    with HashedFile(folder / "offsets.npy", files) as file:
        np.save(file, np.array(offsets, dtype=np.int64))
    return images


def write_samples(folder: Path, files: dict[str, dict], rows: list[Row],
                  image_index: dict[Source, int], labels: list[str], groups: list[str],
                  root: Path | None) -> None:
    """Write the rows twice: as numbers to samples.npy, and as lines to samples.jsonl."""
    table = np.zeros(len(rows), dtype=SAMPLE_DTYPE)                   # (N,)
    label_index = {label: i for i, label in enumerate(labels)}
    group_index = {group: i for i, group in enumerate(groups)}
    text_index: dict[str, int] = {}

    with HashedFile(folder / "samples.jsonl", files) as file:
        for i, row in enumerate(progress(rows, "writing", "rows", len(rows))):
            # The line, with the keys that are known.
            line = {"image": image_index[row.image], "text": row.text, "split": row.split}
            optional = {"answer": row.answer, "closed": row.closed, "label": row.label,
                        "group": row.group, "patient": row.patient}
            line |= {key: value for key, value in optional.items() if value is not None}
            line["source"] = source_name(row.image, root)

            # The same as numbers; -1 means unknown.
            table["image"][i] = image_index[row.image]
            table["text"][i] = text_index.setdefault(row.text, len(text_index))
            table["label"][i] = label_index.get(row.label, -1)
            table["group"][i] = group_index.get(row.group, -1)
            table["closed"][i] = -1 if row.closed is None else row.closed
            table["line"][i] = file.file.tell()
            file.write(json_line(line))

    with HashedFile(folder / "samples.npy", files) as file:
        np.save(file, table)


def json_line(entry: dict) -> bytes:
    """A line of a JSON lines file, in UTF-8."""
    # Half a surrogate pair is legal in JSON but not in UTF-8: it turns into a question mark.
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "replace")
