"""Packs a data set: every image decoded, resized and stored once, so that training has nothing left to do.

    python -m data.prepare medpix --root MedPix-2-0 --out packs/medpix
    python -m data.prepare --show packs/medpix
    python -m data.prepare --verify packs/medpix

A pack is a folder, written beside its place and renamed when whole:

    meta.json       version, counts, names of labels and groups, rows skipped by reason, check sums
    images.bin      uint8: an image is one plane of size × size where it is grey, else three (R, G, B)
    offsets.npy     where each image begins in images.bin, and where the last one ends
    samples.jsonl   one line per (image, text) pair: train, then val, then test
    samples.npy     the same as numbers (SAMPLE_DTYPE)
    skipped.jsonl   every row that was left out, and why
"""
import argparse
import glob
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import textwrap
import time
import warnings
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Iterable, Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from data import Row
from data.pack import PACK_VERSION, SAMPLE_DTYPE, SPLITS, Pack
from m3ae_mini.config import UserError

READERS = "medicat medpix melinda phantoms roco slake table vqa_med_2019 vqa_rad".split()
BAD_SHARE = 0.05   # of the images may be missing or unreadable before preparation gives up
CHUNK = 16         # images a worker decodes at a time
# Pillow's other formats are left alone: for PostScript it starts a program, and none of them is medical.
FORMATS = "BMP GIF JPEG JPEG2000 PNG PPM TIFF WEBP".split()


# ---------------------------------------------------------------------------------------------- one image

def open_image(path: Path) -> Image.Image:
    """The image as it is meant to be seen, in mode L or RGB: turned as its EXIF says, grey of more than
    8 bits stretched from its own least and greatest value to 0 … 255, transparency over black, the rest
    converted (colour of 16 bits keeps the upper 8). Raises what Pillow raises on a damaged file, a truncated
    one, or one of over 89 megapixels; ValueError on several images in one file, and on 16 bits of grey
    beside transparency, of which Pillow reads 8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                  # odd tags, which no pixel depends on
        warnings.simplefilter("error", Image.DecompressionBombWarning)   # the 89 megapixels
        with Image.open(path, formats=FORMATS) as file:
            if file.format != "MPO" and getattr(file, "n_frames", 1) > 1:      # MPO: a JPEG and its preview
                raise ValueError(f"it holds {file.n_frames} images: export the one that is meant")
            if any(str(tile[3]).startswith("LA;16") for tile in file.tile):
                raise ValueError("it is of 16 bits with transparency: export it without transparency")
            white_is_zero = getattr(file, "tag_v2", {}).get(262) == 0      # Pillow minds it at 8 bits alone
            image = ImageOps.exif_transpose(file)   # decodes it whole

        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            values = np.asarray(image, dtype=np.float64)
            return _stretched(-values if white_is_zero else values)
        if image.has_transparency_data:
            black = Image.new("RGBA", image.size, (0, 0, 0, 255))
            image = Image.alpha_composite(black, image.convert("RGBA"))
        return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _stretched(values: np.ndarray) -> Image.Image:
    """Grey values (H, W) of any range -> mode L. One that is not a number turns black."""
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("no pixel is a number")
    low, high = values[finite].min(), values[finite].max()
    share = np.where(finite, values - low, 0) / max(high - low, np.finfo(float).tiny)
    return Image.fromarray(np.rint(share * 255).astype(np.uint8))


def square(image: Image.Image, size: int) -> Image.Image:
    """The centre square: the shorter side is resized to `size` (bicubic), the longer in proportion and
    rounded down, the square begins at round((longer - size) / 2), halves to the even number. These are
    torchvision's rules, by which the released models were trained."""
    short = min(image.size)
    width, height = (size * side // short for side in image.size)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} is too elongated")
    left, top = round((width - size) / 2), round((height - size) / 2)
    whole = image.resize((width, height), Image.Resampling.BICUBIC)
    return whole.crop((left, top, left + size, top + size))


def stored(source: Any, size: int) -> bytes:
    """An image as images.bin holds it: one plane of size² bytes where R = G = B everywhere, else three."""
    image = square(source(size) if callable(source) else open_image(source), size)
    pixels = np.asarray(image)   # (S, S) or (S, S, 3)
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    return pixels.tobytes() if pixels.ndim == 2 else pixels.transpose(2, 0, 1).tobytes()


# --------------------------------------------------------------------------------------------- all images

def decode(sources: list, size: int, workers: int | None) -> Iterator[bytes | str]:
    """What `stored` gives for each source, in order, or why the file could not be read. `workers` processes
    share the work; None means one per core."""
    starts = range(0, len(sources), CHUNK)
    chunks = (sources[start:start + CHUNK] for start in starts)
    workers = min(workers or getattr(os, "process_cpu_count", os.cpu_count)(), len(starts))
    if workers <= 1:
        for chunk in chunks:
            yield from _decode_chunk(chunk, size)
        return

    pool = ProcessPoolExecutor(workers, initializer=_leave_signals_to_parent)
    try:
        # Two chunks a worker are under way: one to work on, one to go on with. So memory stays flat.
        under_way = deque(pool.submit(_decode_chunk, chunk, size) for chunk in islice(chunks, 2 * workers))
        while under_way:
            yield from under_way.popleft().result()
            for chunk in islice(chunks, 1):
                under_way.append(pool.submit(_decode_chunk, chunk, size))
    except BrokenProcessPool:
        raise UserError("a decoding process was killed, perhaps for memory: try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_chunk(sources: list, size: int) -> list[bytes | str]:
    results: list[bytes | str] = []
    for source in sources:
        try:
            results.append(stored(source, size))
        except Exception as error:   # Pillow's formats raise all kinds on a damaged file
            if callable(source):
                raise
            results.append(f"{type(error).__name__}: {error}")
    return results


def _leave_signals_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ------------------------------------------------------------------------------------------------- the rows

def clean(text: str | None) -> str:
    """White space, line breaks among it, becomes one blank; none is left at the ends."""
    return " ".join((text or "").split())


def sift(rows: Iterable[Row], task: str) -> tuple[list[Row], list[dict]]:
    """Rows worth packing (train, val, test; texts cleaned), and an entry of skipped.jsonl for each other row.

    For "pretrain" and "irtr" a pair that occurs twice within a split counts once. Questions and classes stay
    as published: the training part of VQA-RAD repeats 465 questions."""
    kept, skipped, seen = [], [], set()
    for row in rows:
        row = row._replace(text=clean(row.text), answer=clean(row.answer) or None,
                           label=clean(row.label) or None, group=clean(row.group) or None)
        pair = (row.split, row.image, row.text)
        reason = row.skip
        if not reason and not row.text:
            reason = "no text"
        elif not reason and task == "vqa" and row.answer is None:
            reason = "no answer"
        elif not reason and task == "cls" and row.label is None:
            reason = "no label"
        elif not reason and task in ("pretrain", "irtr") and pair in seen:
            reason = "duplicate"

        if reason:
            skipped.append(skip_entry(row, reason))
        else:
            seen.add(pair)
            kept.append(row)
    return sorted(kept, key=lambda row: SPLITS.index(row.split)), skipped


def excluding(rows: Iterable[Row], folder: Path) -> Iterator[Row]:
    """Marks the rows whose image is also one of `folder`, known by its file's stem or what follows the last
    underscore of it: "MPX1007_synpic46719.png" of MedPix is "synpic46719.jpg" of VQA-RAD."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} to exclude the images of")
    stems, found = {file.stem for file in folder.rglob("*")}, False
    for row in rows:
        stem = row.image.stem if isinstance(row.image, Path) else None
        known = stem is not None and (stem in stems or stem.rsplit("_", 1)[-1] in stems)
        found |= known
        yield row._replace(skip=row.skip or "excluded") if known else row
    if not found:
        raise UserError(f"none of the images is in {folder} or below it: give the folder that holds the "
                        "image files, or leave --exclude out")


def unusable(source: Any, root: Path | None) -> str | None:
    """Why an image cannot be used, known without opening it: its file is missing, or a name from the
    annotations (an absolute one, one with "..", a link) leads out of the data set's folder."""
    if callable(source):
        return None
    try:
        if root is not None and not Path(os.path.realpath(source)).is_relative_to(root):
            return "outside the data set's folder"
    except ValueError:   # a name that no system call takes: with a NUL, or half a surrogate pair
        return "missing image"
    return None if os.path.isfile(source) else "missing image"


# ------------------------------------------------------------------------------------------------- the pack

def pack(rows: Iterable[Row], out: Path | str, name: str, task: str, size: int, *, root: Path | None = None,
         workers: int | None = None, allow_missing: bool = False, overwrite: bool = False) -> dict:
    """Writes the pack `out` and returns its meta.json. With `root`, images outside that folder are refused.

    UserError where `out` exists (unless it is a pack and `overwrite` is set) or cannot be written, where more
    than 5 % of the images cannot be used (unless `allow_missing`), and where nothing is left to train on.
    Whatever goes wrong, nothing half-written stays, but for the folder NAME.tmp-… after a SIGKILL."""
    out = Path(out)
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already: choose another --out, or replace it with --overwrite")
    if out.exists() and not (out / "meta.json").is_file():
        raise UserError(f"{out} is no pack, so --overwrite does not touch it: choose another --out")

    kept, skipped = sift(rows, task)
    sources = list(dict.fromkeys(row.image for row in kept))
    limit = len(sources) if allow_missing else BAD_SHARE * len(sources)

    # What is missing is known at once, before any image is decoded.
    real_root = root and Path(os.path.realpath(root))
    bad = {source: (reason,) for source in sources if (reason := unusable(source, real_root))}
    give_up_beyond(limit, bad, len(sources))

    files: dict[str, dict] = {}
    with draft(out, overwrite) as folder:
        usable = [source for source in sources if source not in bad]
        number, offsets = {}, [0]   # number: which image of images.bin a source is
        with (Sealed(folder / "images.bin", files) as file,
              closing(decode(usable, size, workers)) as results,
              tqdm(total=len(usable), desc=name, unit="image") as progress):
            for source, result in zip(usable, results):
                progress.update()
                if isinstance(result, str):
                    bad[source] = ("unreadable image", result)
                    give_up_beyond(limit, bad, len(sources))
                else:
                    file.write(result)
                    offsets.append(offsets[-1] + len(result))
                    number[source] = len(number)

        skipped += [skip_entry(row, *bad[row.image]) for row in kept if row.image in bad]
        kept = [row for row in kept if row.image not in bad]
        reasons = dict(sorted(Counter(entry["reason"] for entry in skipped).items()))
        samples = {split: sum(row.split == split for row in kept) for split in SPLITS}
        if not samples["train"]:
            why = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items()) or "there are none"
            raise UserError(f"{name} has no training rows to pack ({why}): look at --root and --task")

        labels = sorted({row.label for row in kept if row.label})
        groups = sorted({row.group for row in kept if row.group})
        table, lines = tabulate(kept, number, labels, groups, root)
        for file_name, array in ("offsets.npy", np.array(offsets, dtype=np.int64)), ("samples.npy", table):
            with Sealed(folder / file_name, files) as file:
                np.save(file, array)
        for file_name, entries in ("samples.jsonl", lines), ("skipped.jsonl", map(json_line, skipped)):
            with Sealed(folder / file_name, files) as file:
                file.write(b"".join(entries))

        meta = {"version": PACK_VERSION, "name": name, "task": task, "size": size, "images": len(number),
                "samples": samples, "labels": labels, "groups": groups, "skipped": reasons, "files": files}
        with Sealed(folder / "meta.json", {}) as file:
            file.write(json.dumps(meta, indent=1).encode())
    return meta


def give_up_beyond(limit: float, bad: dict, total: int) -> None:
    """UserError where more than `limit` of the `total` images are in `bad`: {image: (reason, detail)}."""
    if len(bad) > limit:
        image, why = next(iter(bad.items()))
        raise UserError(f"{len(bad):,} of {total:,} images cannot be packed, the first is {image} "
                        f"({why[-1]}): put them into the data set's folder, or go on without them by "
                        "--allow_missing")


def tabulate(kept: list[Row], number: dict[Any, int], labels: list[str], groups: list[str],
             root: Path | None) -> tuple[np.ndarray, list[bytes]]:
    """The rows twice: as numbers (N,) SAMPLE_DTYPE for samples.npy, and as the N lines of samples.jsonl."""
    table, lines, start = np.zeros(len(kept), dtype=SAMPLE_DTYPE), [], 0
    label_number = {label: i for i, label in enumerate(labels)}
    group_number = {group: i for i, group in enumerate(groups)}
    text_number: dict[str, int] = {}

    for i, row in enumerate(kept):
        entry = {"image": number[row.image], "text": row.text, "split": row.split}
        known = {"answer": row.answer, "closed": row.closed, "label": row.label, "group": row.group}
        entry |= {key: value for key, value in known.items() if value is not None}
        on_disk = root is not None and isinstance(row.image, Path)
        entry["source"] = os.path.relpath(row.image, root) if on_disk else str(row.image)

        closed = -1 if row.closed is None else row.closed
        table[i] = (number[row.image], text_number.setdefault(row.text, len(text_number)),
                    label_number.get(row.label, -1), group_number.get(row.group, -1), closed, start)
        lines.append(json_line(entry))
        start += len(lines[-1])
    return table, lines


def skip_entry(row: Row, reason: str, detail: str | None = None) -> dict:
    """An entry of skipped.jsonl."""
    entry = {"split": row.split, "image": str(row.image), "text": row.text, "reason": reason}
    return entry | ({"detail": detail} if detail else {})


def json_line(entry: dict) -> bytes:
    # Half a surrogate pair is legal in JSON but not in UTF-8: it turns into a question mark.
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "replace")


class Sealed:
    """A file to write to: hashed on the way, safe on the disk at the end, when `files` gets size and sum."""

    def __init__(self, path: Path, files: dict[str, dict]):
        self.name, self.files = path.name, files
        self.file, self.digest = open(path, "wb"), hashlib.sha256()

    def __enter__(self) -> "Sealed":
        return self

    def write(self, part: bytes) -> None:
        self.file.write(part)
        self.digest.update(part)

    def __exit__(self, kind, *_) -> None:
        with self.file:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
                self.files[self.name] = {"bytes": self.file.tell(), "sha256": self.digest.hexdigest()}


@contextmanager
def draft(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well and is removed when it does not.
    UserError where, without `overwrite`, somebody else's pack has appeared there by then."""
    place = out.resolve()   # behind a link, and with a name where `out` is "."
    for kind, mend in (("tmp", "remove it"), ("old", f"remove it, or, where {out} is gone, rename it back")):
        for other in place.parent.glob(f"{glob.escape(place.name)}.{kind}-*"):
            print(f"prepare: {other} is of another preparation: if that one was killed, {mend}",
                  file=sys.stderr)
    folder = place.with_name(f"{place.name}.tmp-{os.getpid()}")
    replaced = place.with_name(f"{place.name}.old-{os.getpid()}")
    try:
        folder.mkdir(parents=True)
        yield folder
        if place.exists():
            if not overwrite:
                raise UserError(f"{out} has appeared while this one was prepared, and is left as it is")
            place.rename(replaced)
        folder.rename(place)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{out} cannot be written ({why}): make room or choose another --out") from None
    finally:
        if replaced.exists() and not place.exists():   # stopped between the two renames
            replaced.rename(place)
        for left in folder, replaced:
            shutil.rmtree(left, ignore_errors=True)


def contact_sheet(pack: Pack, count: int = 24, columns: int = 6, cell: int = 208) -> Image.Image:
    """`count` samples, evenly spaced from the pack's first to its last, what is known of each below it."""
    count = min(count, len(pack.samples))
    numbers = np.linspace(0, len(pack.samples) - 1, count).astype(int)
    samples = [pack.line(row) for row in numbers]
    captions = []   # lines of text
    for sample in samples:
        facts = " · ".join(sample[key] for key in ("split", "group", "answer", "label")
                           if key in sample)
        captions.append(textwrap.wrap(facts, 32, max_lines=2, placeholder=" …")
                        + textwrap.wrap(sample["text"], 32, max_lines=9, placeholder=" …"))

    font, line_height, margin = ImageFont.load_default(12), 15, 8
    rows = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
    heights = [cell + margin + line_height * max(len(captions[i]) for i in row) for row in rows]
    sheet = Image.new("RGB", (columns * cell + margin, sum(heights) + margin), "white")
    pen, side, top = ImageDraw.Draw(sheet), cell - margin, margin
    planes = np.empty((3, pack.size, pack.size), dtype=np.uint8)
    for row, height in zip(rows, heights):
        for column, i in enumerate(row):
            left = margin + column * cell
            pack.read_image(pack.samples["image"][numbers[i]], planes)
            image = Image.fromarray(planes.transpose(1, 2, 0))
            sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), (left, top))
            pen.text((left, top + side + 2), "\n".join(captions[i]), "black", font)
        top += height
    return sheet


# -------------------------------------------------------------------------------------- the command line

def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 for a mistake of the user's making, 130 when interrupted."""
    try:
        run(command_line().parse_args(arguments))
    except UserError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    except OSError as error:   # a folder or a file that may not be read
        print(f"prepare: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare", description="Packs a data set, shows a pack, or checks one.")
    parser.add_argument("name", nargs="?", choices=READERS, metavar="NAME", help=", ".join(READERS))
    parser.add_argument("--root", type=Path, help="the folder in which the data set lies (or the table)")
    parser.add_argument("--out", type=Path, help="the pack to write; with --show, the PNG")
    parser.add_argument("--size", type=positive, default=288,
                        help="side of the stored squares in pixels; more than training uses leaves room for "
                             "crops (default: 288)")
    parser.add_argument("--task", choices=("pretrain", "vqa", "cls", "irtr"), default="pretrain",
                        help="what it is packed for: pre-training, questions, classes, retrieval")
    parser.add_argument("--exclude", type=Path, metavar="FOLDER",
                        help="leave out the images that are also in FOLDER, known by their files' names "
                             "(the part after the last underscore is enough)")
    parser.add_argument("--allow_missing", action="store_true",
                        help="go on where more than 5 %% of the images are missing or unreadable")
    parser.add_argument("--overwrite", action="store_true", help="replace the pack if there is one")
    parser.add_argument("--workers", type=positive, help="processes that decode (default: one per core)")
    parser.add_argument("--show", type=Path, metavar="PACK", help="draw a sheet of what was packed")
    parser.add_argument("--verify", type=Path, metavar="PACK", help="read every check sum of a pack")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def run(args: argparse.Namespace) -> None:
    if args.show:
        out = args.out or Path(os.path.relpath(f"{os.path.abspath(args.show)}.png"))       # "." has no name
        sheet = contact_sheet(Pack(args.show))
        try:
            sheet.save(out)
        except (OSError, ValueError) as error:
            raise UserError(f"{out} cannot be written ({error}): give a .png by --out") from None
        print(f"wrote {out}")
        return
    if args.verify:
        Pack(args.verify).verify()
        print(f"{args.verify} is whole: every check sum is right")
        return

    if args.name is None or args.out is None:
        raise UserError("give a data set's NAME and --out PACK, or --show PACK, or --verify PACK (--help)")
    if args.size ** 2 > Image.MAX_IMAGE_PIXELS:
        raise UserError(f"--size {args.size} is too large: use at most {int(Image.MAX_IMAGE_PIXELS ** 0.5)}")
    if args.root is None and args.name != "phantoms":
        raise UserError(f"say by --root where {args.name} lies")
    if args.root is not None and not args.root.exists():
        raise UserError(f"there is no {args.root}: correct --root")

    began = time.perf_counter()
    rows = importlib.import_module(f"data.{args.name}").rows(args.root, args.task)
    if args.exclude is not None:
        rows = excluding(rows, args.exclude)
    root = args.root.parent if args.root is not None and args.root.is_file() else args.root
    meta = pack(rows, args.out, args.name, args.task, args.size, root=root, workers=args.workers,
                allow_missing=args.allow_missing, overwrite=args.overwrite)
    summarize(meta, args.out, time.perf_counter() - began)


def summarize(meta: dict, out: Path, seconds: float) -> None:
    megabytes = sum(file["bytes"] for file in meta["files"].values()) / 1e6
    print(f"{out}: {meta['images']:,} images of {meta['size']} x {meta['size']}, {megabytes:,.1f} MB, "
          f"{seconds:.1f} s ({1000 * seconds / meta['images']:.1f} ms an image)")
    print("samples: " + ", ".join(f"{count:,} {split}" for split, count in meta["samples"].items()))
    if meta["skipped"]:
        print("skipped: " + ", ".join(f"{count:,} {reason}" for reason, count in meta["skipped"].items())
              + f" (listed in {out / 'skipped.jsonl'})")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # a polite kill cleans up, as Ctrl-C does
    sys.exit(main())
