"""--exclude: leave out what another folder of images shows, also under other file names.

Data sets share images. MedPix 2.0 has 19 of VQA-RAD's under their own names, and more under
others: MPX2028_synpic34053 is VQA-RAD's synpic34054.
"""
import sys
from contextlib import closing
from pathlib import Path
from typing import Iterable, NamedTuple

import numpy as np
from PIL import Image

from data import Row, Source
from data.decode import open_image
from data.images import map_images
from data.progress import progress
from data.write_pack import unusable
from m3ae_mini.config import require

# Two images are alike if both hold. Copies of MedPix in VQA-RAD, rescaled and compressed anew,
# have a distance of at most 1 and a correlation of at least 0.999; neighbouring slices up to 4,
# and 0.97. Of two million pairs of different MedPix patients, one pair of chest CTs is alike.
MAX_DISTANCE = 4         # bits of 64 in which the difference hashes differ
MIN_CORRELATION = 0.95   # of the thumbnails
THUMBNAIL = 32           # pixels


class Look(NamedTuple):
    """What an image looks like, at any size and compression."""
    hash: int            # difference hash, 64 bits
    thumbnail: bytes     # grey, THUMBNAIL x THUMBNAIL


def look(source: Source) -> Look:
    """Reduce an image to 9 x 8 pixels: bit n says if pixel n is brighter than the one before it."""
    image = open_image(source).convert("L")
    small = np.asarray(image.resize((9, 8), Image.Resampling.BOX))                    # (8, 9)
    bits = np.packbits(small[:, 1:] > small[:, :-1])                                  # (8,)
    thumbnail = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return Look(int.from_bytes(bits.tobytes(), "big"), thumbnail.tobytes())


def mark_excluded(rows: Iterable[Row], folder: Path, root: Path | None = None,
                  workers: int | None = None) -> list[Row]:
    """The rows, with those skipped whose image is also in `folder`, or whose patient is.

    By name: the file's stem, or what follows the last underscore of it: "MPX1007_synpic46719.png"
    of MedPix is "synpic46719.jpg" of VQA-RAD. By likeness: see Look and `alike`. By patient: a
    patient of an image that was found in one of these ways. Images outside `root` are not opened.
    UserError if none is found.
    """
    require(folder.is_dir(), f"{folder} is not a folder: correct --exclude")
    rows = list(rows)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    stems = {file.stem: file for file in files}
    reasons: dict[Source, str] = {}   # why an image is left out
    for row in rows:
        if isinstance(row.image, Path):
            stem = row.image.stem
            same = stems.get(stem) or stems.get(stem.rsplit("_", 1)[-1])
            if same:
                reasons[row.image] = f"excluded by name: {same.relative_to(folder)}"

    # Look at the images whose names say nothing.
    real_root = root and root.resolve()
    rest = dict.fromkeys(row.image for row in rows if row.image not in reasons and not row.skip)
    rest = [source for source in rest
            if isinstance(source, Path) and not unusable(source, real_root)]
    theirs, ours = _looks(files, workers), _looks(rest, workers)
    unseen = [file for file in files if file not in theirs]
    if unseen:
        print(f"prepare: {len(unseen):,} files in {folder} are no images that can be read, so they "
              f"are known by name only, the first is {unseen[0]}", file=sys.stderr)
    for source, file in alike(ours, theirs).items():
        reasons[source] = f"excluded by likeness: {file.relative_to(folder)}"
    require(reasons, f"none of the images is in {folder} or below it: give the folder that holds "
                     "the image files, or leave --exclude out")

    patients = {row.patient: row.image for row in rows if row.patient and row.image in reasons}
    marked = []
    for row in rows:
        reason = reasons.get(row.image)
        if not reason and row.patient in patients:
            reason = f"excluded by patient: {row.patient}"
        marked.append(row._replace(skip=row.skip or reason))
    return marked


def _looks(sources: list[Path], workers: int | None) -> dict[Path, Look]:
    """{image: its Look}. Files that are no images are left out: nothing can look like them."""
    with closing(map_images(look, sources, workers)) as results:
        shown = progress(results, "comparing", "images", len(sources))
        found = dict(zip(sources, shown, strict=True))
    return {source: seen for source, seen in found.items() if isinstance(seen, Look)}


def alike(ours: dict[Path, Look], theirs: dict[Path, Look]) -> dict[Path, Path]:
    """{our image: the first of theirs that it looks like}

    The hashes differ in at most MAX_DISTANCE bits, and the thumbnails correlate by at least
    MIN_CORRELATION. An image of one colour is like no other.
    """
    if not theirs:
        return {}
    names = list(theirs)
    hashes = np.array([seen.hash for seen in theirs.values()], dtype=np.uint64)       # (N,)
    found: dict[Path, Path] = {}
    for source, seen in ours.items():
        near = np.flatnonzero(np.bitwise_count(hashes ^ np.uint64(seen.hash)) <= MAX_DISTANCE)
        own = _standardised(seen.thumbnail)
        for n in near:
            if own @ _standardised(theirs[names[n]].thumbnail) >= MIN_CORRELATION:
                found[source] = names[n]
                break
    return found


def _standardised(thumbnail: bytes) -> np.ndarray:
    """A thumbnail with mean 0 and norm 1, flat; or zeros if it has one colour."""
    values = np.frombuffer(thumbnail, dtype=np.uint8).astype(np.float64)
    values -= values.mean()
    return values / max(np.linalg.norm(values), 1e-9)
