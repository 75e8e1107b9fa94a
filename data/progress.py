"""Progress of a long loop on stderr: a bar on a terminal, else a line every half a minute."""
import sys
import time
from typing import Iterable, Iterator, TypeVar

from tqdm import tqdm

FIRST_SECONDS = 4      # a loop that takes less shows nothing
LINE_SECONDS = 30      # between two lines

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, unit: str, total: int | None = None,
             done: int = 0) -> Iterator[Item]:
    """Yield the items, and show how many are done, how fast, and the time that remains.

    unit: a plural, such as "images". total: items in all, if known. done: of these, those that
    an earlier preparation has done.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, what, total, initial=done, unit=f" {unit}", delay=FIRST_SECONDS,
                        dynamic_ncols=True)
        return

    began = time.monotonic()
    due = began + FIRST_SECONDS
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now >= due:
            line = progress_line(what, unit, done, count, now - began, total)
            print(line, file=sys.stderr, flush=True)
            due = now + LINE_SECONDS


def progress_line(what: str, unit: str, done: int, count: int, seconds: float,
                  total: int | None) -> str:
    """Such as "packing: 12,000 of 200,000 images, 410 a second, 8 min left".

    count: items of this call, done: those before it, seconds: since its start.
    """
    rate = count / seconds
    speed = f"{rate:,.0f} a second" if rate >= 10 else f"{60 * rate:,.0f} a minute"
    if total is None:
        return f"{what}: {done + count:,} {unit}, {speed}"
    left = (total - done - count) / rate
    return f"{what}: {done + count:,} of {total:,} {unit}, {speed}, {in_words(left)} left"


def in_words(seconds: float) -> str:
    """A time, rounded up: "40 s", "8 min", "2 h 10 min"."""
    whole = int(-(-seconds // 1))
    minutes = -(-whole // 60)
    if whole < 60:
        return f"{whole} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
