"""From an image file to the bytes of a pack: decoded, resized, cropped to a square.

open_image decodes a file (decode.py), square resizes it, store_image makes the bytes that
images.bin holds. store_images does this for many images, in several processes.
"""
import os
import signal
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Iterator

import numpy as np
from PIL import Image

from data import Source
from data.decode import open_image
from m3ae_mini.config import UserError

DECODE_BATCH = 16   # images that a process decodes per task


# ---------------------------------------------------------------------------------------- one image

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
