"""Data sets in their layouts on disk: one small file reads each, prepare.py packs what it yields.

A reader is a module with one function, `rows(root, task)`, that yields a Row for every (picture, text) pair.
`root` is what the user gave as --root; `task` is "pretrain", "vqa", "cls" or "irtr".
What the readers share stands here."""
import hashlib
import json
from pathlib import Path
from typing import Any, Iterator, NamedTuple

from m3ae_mini.config import UserError


class Row(NamedTuple):
    """One (picture, text) pair as a reader finds it."""
    split: str                     # "train", "val" or "test"
    picture: Any                   # a Path, or a hashable, picklable callable: picture(size) -> PIL.Image
    text: str                      # caption, or question
    answer: str | None = None      # visual question answering
    closed: bool | None = None     # is the question a closed one (yes/no or a choice)?
    label: str | None = None       # classification
    group: str | None = None       # pictures of one kind (modality and body part): the harder wrong pictures
    skip: str | None = None        # why this row must not be packed; it is counted and listed instead


def lines(path: Path) -> Iterator[str]:
    """The lines of a text file, their ends included. UserError where it is missing or not UTF-8."""
    try:
        # A mark of byte order, which spreadsheets like to write, is no part of the first line.
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from file
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): is --root the right folder?") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8") from None


def records(path: Path, *keys: str) -> Iterator[tuple[int, dict]]:
    """(line number, object) for every line of a JSON lines file; each object must have `keys`."""
    for number, line in enumerate(lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        if missing := [key for key in keys if key not in record]:
            raise UserError(f"{path}, line {number}: has no {' and no '.join(missing)}")
        yield number, record


def draw(name: str) -> float:
    """A number in [0, 1) that depends on the name alone: splits made by it never change."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:6], "big") / 2 ** 48


def too_short(text: str) -> str | None:
    """Captions and references need three words (the rule of the paper): else why the row is skipped."""
    return None if len(text.split()) >= 3 else "under 3 words"
