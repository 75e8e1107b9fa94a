"""What stands in several splits: patients, texts, images. And which of it is an error.

Where the line is drawn. In a table with a split column the user made the splits, and can mend
them: a training image that comes back in val or test with the same text (questions: with the
same question; classes: with any text) is refused unless --allow_leaks is given. Readers of
published sets keep the splits that the literature compares on, so their leaks are only counted:
VQA-RAD has 14 of its 451 test questions in its training file, with the same image (two of them
are held out for validation: 12 are counted). So are those of a reader of your own. Where a hash
decides the split, leaks are only counted, too: they are copies under another name or patient. A
shared patient, image or text alone is never an error, since published sets have all three (all
203 test images of VQA-RAD are training images).
"""
from typing import Callable, Hashable, Iterable, NamedTuple

from data import Row, Source
from m3ae_mini.config import require


class Crossing(NamedTuple):
    """How many things of a kind there are, and which of them stand in several splits."""
    total: int
    pairs: list[tuple[Row, Row]]   # for each: the first row, and the first of another split


def crossing(pairs: Iterable[tuple[Hashable, Row]]) -> Crossing:
    """pairs: (thing, a row that it stands in), in the order of the rows."""
    first: dict[Hashable, Row] = {}
    second: dict[Hashable, Row] = {}
    for thing, row in pairs:
        if first.setdefault(thing, row).split != row.split:
            second.setdefault(thing, row)
    return Crossing(len(first), [(first[thing], row) for thing, row in second.items()])


def leaks(rows: list[Row], task: str,
          content: Callable[[Source], Hashable]) -> list[tuple[Row, Row]]:
    """[(training row, row of val or test)] for each row of val or test that repeats a training row.

    content: what makes two images one. Upper and lower case do not make two texts.
    """
    def key(row: Row) -> tuple:
        image = content(row.image)
        return (image,) if task == "cls" else (image, row.text.casefold())

    trained: dict[tuple, Row] = {}
    for row in rows:
        if row.split == "train":
            trained.setdefault(key(row), row)
    return [(trained[key(row)], row) for row in rows
            if row.split != "train" and key(row) in trained]


def refuse_leaks(rows: list[Row], task: str, content: Callable[[Source], Hashable]) -> None:
    """UserError if a row of val or test repeats a training row."""
    found = leaks(rows, task, content)
    if found:
        trained, held_out = found[0]
        what = leaked(task)
        require(False, f"{len(found):,} samples of val or test have the {what} of a training "
                       f"sample, the first is {held_out.image} ({held_out.split}), also "
                       f"{trained.image} (train): keep each in one split, or pack them as they "
                       "are with --allow_leaks")


def leaked(task: str) -> str:
    """What two samples must share to be a leak, in words."""
    return {"cls": "image", "vqa": "image and question"}.get(task, "image and text")
