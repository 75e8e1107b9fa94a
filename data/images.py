"""From an image file to the bytes of a pack: decoded, resized, cropped to a square.

open_image decodes a file, square resizes it, store_image makes the bytes that images.bin holds.
store_images does this for many images, in several processes.
"""
import os
import signal
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Iterator

import numpy as np
from PIL import Image, ImageOps

from data import Source
from m3ae_mini.config import UserError

# Pillow's other formats are left out. For PostScript it starts a program, and none is medical.
FORMATS = "BMP GIF JPEG JPEG2000 PNG PPM TIFF WEBP".split()
DECODE_BATCH = 16   # images that a process decodes per task


# ---------------------------------------------------------------------------------------- one image

def open_image(path: Path) -> Image.Image:
    """Decode an image file as it is meant to be seen -> mode L (grey) or RGB.

    The EXIF rotation is applied. Grey of more than 8 bits is stretched: its minimum becomes 0,
    its maximum 255. Transparency is drawn over black. The rest is converted; colour of 16 bits
    keeps its upper 8.

    Pillow's errors if the file is damaged, truncated or has more than 89 megapixels. ValueError
    if it holds several images, or 16-bit grey with transparency, of which Pillow reads only 8
    bits.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")   # odd tags: no pixel depends on them
        warnings.simplefilter("error", Image.DecompressionBombWarning)   # the 89 megapixels
        with Image.open(path, formats=FORMATS) as file:
            # Refuse what Pillow would read only in part. MPO is a JPEG with its preview.
            if file.format != "MPO" and getattr(file, "n_frames", 1) > 1:
                raise ValueError(f"it holds {file.n_frames} images: export the one you mean")
            if any(str(tile[3]).startswith("LA;16") for tile in file.tile):
                raise ValueError("it has 16 bits with transparency: export it without "
                                 "transparency")

            # TIFF tag 262, PhotometricInterpretation. Pillow heeds it at 8 bits only.
            white_is_zero = getattr(file, "tag_v2", {}).get(262) == 0
            image = ImageOps.exif_transpose(file)   # decodes all of it

        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            values = np.asarray(image, dtype=np.float64)
            return _stretch_to_8_bits(-values if white_is_zero else values)
        if image.has_transparency_data:
            black = Image.new("RGBA", image.size, (0, 0, 0, 255))
            image = Image.alpha_composite(black, image.convert("RGBA"))
        return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _stretch_to_8_bits(values: np.ndarray) -> Image.Image:
    """Grey values (H, W) of any range -> mode L. NaN and infinite values turn black."""
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("no pixel is a number")
    low, high = values[finite].min(), values[finite].max()
    share = np.where(finite, values - low, 0) / max(high - low, np.finfo(float).tiny)
    return Image.fromarray(np.rint(share * 255).astype(np.uint8))


def square(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` pixels (bicubic), then crop the centre: (size, size).

    These are torchvision's rules, with which the released models were trained: the longer side
    is rounded down, the crop begins at round((longer - size) / 2), halves to the even number.
    ValueError if the resized image would have more than 89 megapixels.
    """
    shorter = min(image.size)
    width, height = (size * side // shorter for side in image.size)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"it is too elongated ({image.width} x {image.height} pixels)")
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


def store_image(source: Source, size: int) -> bytes:
    """An image as images.bin holds it: size² bytes if it is grey (R = G = B), else 3 · size²."""
    image = square(source(size) if callable(source) else open_image(source), size)
    pixels = np.asarray(image)                                        # (S, S) or (S, S, 3)
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]                                       # (S, S)
    return pixels.tobytes() if pixels.ndim == 2 else pixels.transpose(2, 0, 1).tobytes()


# -------------------------------------------------------------------------------------- many images

def store_images(sources: list[Source], size: int, workers: int | None) -> Iterator[bytes | str]:
    """For each source, in order: the bytes of store_image, or why it cannot be read (str).

    workers: number of processes; None: one per core. UserError if one of them is killed.
    """
    starts = range(0, len(sources), DECODE_BATCH)
    batches = (sources[start:start + DECODE_BATCH] for start in starts)
    workers = min(workers or getattr(os, "process_cpu_count", os.cpu_count)(), len(starts))
    if workers <= 1:
        for batch in batches:
            yield from _store_batch(batch, size)
        return

    pool = ProcessPoolExecutor(workers, initializer=_leave_signals_to_parent)
    try:
        # Two tasks per worker are submitted: one to work on, one to go on with. So results do
        # not pile up in memory, however many images there are.
        pending = deque(pool.submit(_store_batch, batch, size)
                        for batch in islice(batches, 2 * workers))
        while pending:
            yield from pending.popleft().result()
            for batch in islice(batches, 1):
                pending.append(pool.submit(_store_batch, batch, size))
    except BrokenProcessPool:
        raise UserError("a decoding process was killed, perhaps for lack of memory: "
                        "use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _store_batch(sources: list[Source], size: int) -> list[bytes | str]:
    """What store_images yields for one batch; runs in a process of its own."""
    results: list[bytes | str] = []
    for source in sources:
        try:
            results.append(store_image(source, size))
        except Exception as error:   # Pillow raises many types on a damaged file
            if callable(source):
                raise
            results.append(f"{type(error).__name__}: {error}")
    return results


def _leave_signals_to_parent() -> None:
    """Ctrl-C reaches every process of a terminal. The parent alone ends the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
