"""From an image file to the bytes of a pack: resized, made a square, stored.

decode.py reads a file, square resizes the image, store_image makes the bytes that images.bin
holds. map_images does this, or anything else, for many images in several processes.
"""
import hashlib
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import numpy as np
import PIL
from PIL import Image

from data import Source
from data import decode as decode_module
from data.decode import Window, decode, open_image
from m3ae_mini.config import UserError

__all__ = ["open_image", "square", "StoredImage", "store_image", "map_images"]

FITS = "crop", "pad"   # what becomes of an image that is no square
DECODE_BATCH = 16      # images that a process decodes per task
BLACK = 16             # of 255: a pixel below it is black
MIN_BRIGHT = 0.01      # of the pixels: with fewer above BLACK, an image is nearly black

# Notes of store_image, besides those of decode.
CONSTANT = "constant"
NEARLY_BLACK = "nearly black"


# ---------------------------------------------------------------------------------------- one image

class StoredImage(NamedTuple):
    """An image as images.bin holds it, and what the summary says of it."""
    pixels: bytes             # size² if it is grey (R = G = B), else 3 · size²
    notes: tuple[str, ...]    # of decode.py, and CONSTANT or NEARLY_BLACK
    cut: float                # share of the image's area that was cut off at the edges


def square(image: Image.Image, size: int, fit: str = "crop") -> Image.Image:
    """Resize an image and make it a square: (size, size).

    fit "crop": resize the shorter side to `size` pixels (bicubic), then crop the centre. These
    are torchvision's rules, with which the released models were trained: the longer side is
    rounded down, the crop begins at round((longer - size) / 2), halves to the even number.
    fit "pad": resize the longer side, the shorter one rounded down, and add black on both sides.
    ValueError if the resized image would have more than 89 megapixels, or a side of 0.
    """
    given = (min if fit == "crop" else max)(image.size)
    width, height = (size * side // given for side in image.size)
    if width * height > Image.MAX_IMAGE_PIXELS or min(width, height) == 0:
        raise ValueError(f"it is too elongated ({image.width} x {image.height} pixels)")
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))   # beyond the edge it is black


def store_image(source: Source, size: int, fit: str = "crop",
                window: Window | None = None) -> StoredImage:
    """Read or draw an image, and make the bytes that images.bin holds. Errors as in decode."""
    image, notes = (source(size), []) if callable(source) else decode(source, window)
    cut = 1 - min(image.size) / max(image.size) if fit == "crop" else 0.0
    pixels = np.asarray(square(image, size, fit))                     # (S, S) or (S, S, 3)
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]                                       # (S, S)

    # An image of one colour shows nothing. One that is nearly black may have been read wrongly.
    if (pixels == pixels[0, 0]).all():
        notes = [*notes, CONSTANT]
    elif (pixels >= BLACK).mean() < MIN_BRIGHT:
        notes = [*notes, NEARLY_BLACK]
    planes = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return StoredImage(planes.tobytes(), tuple(notes), cut)


def decoder_version() -> str:
    """A text that changes with the code, here and in Pillow, that makes a StoredImage of a file."""
    code = b"".join(Path(file).read_bytes() for file in (decode_module.__file__, __file__))
    return f"Pillow {PIL.__version__}, code {hashlib.sha256(code).hexdigest()[:8]}"


# -------------------------------------------------------------------------------------- many images

def map_images(function: Callable[[Source], Any], sources: list[Source],
               workers: int | None) -> Iterator[Any]:
    """For each source, in order: what the function makes of it, or why it cannot be read (str).

    function: picklable, its results too. workers: number of processes; None: one per core.
    UserError if one of them is killed.
    """
    starts = range(0, len(sources), DECODE_BATCH)
    batches = (sources[start:start + DECODE_BATCH] for start in starts)
    workers = min(workers or getattr(os, "process_cpu_count", os.cpu_count)(), len(starts))
    if workers <= 1:
        for batch in batches:
            yield from _map_batch(function, batch)
        return

    pool = ProcessPoolExecutor(workers, initializer=_start_worker)
    try:
        # Two tasks per worker are submitted: one to work on, one to go on with. So results do
        # not pile up in memory, however many images there are.
        pending = deque(pool.submit(_map_batch, function, batch)
                        for batch in islice(batches, 2 * workers))
        while pending:
            yield from pending.popleft().result()
            for batch in islice(batches, 1):
                pending.append(pool.submit(_map_batch, function, batch))
    except BrokenProcessPool:
        raise UserError("a decoding process was killed, perhaps for lack of memory: "
                        "use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _map_batch(function: Callable[[Source], Any], sources: list[Source]) -> list[Any]:
    """What map_images yields for one batch; runs in a process of its own."""
    results: list[Any] = []
    for source in sources:
        try:
            results.append(function(source))
        except Exception as error:   # Pillow raises many types on a damaged file
            if callable(source):
                raise
            results.append(f"{type(error).__name__}: {error}")
    return results


def _start_worker() -> None:
    """Ctrl-C reaches every process of a terminal: the parent alone ends the pool. A worker also
    ends when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
