"""Data sets in their layouts on disk: one small file reads each, prepare.py packs what it yields.

A reader is a module with one function, `rows(root, task)`, that yields a Row for every (image, text) pair.
`root` is what the user gave as --root; `task` is "pretrain", "vqa", "cls" or "irtr".
What the readers share stands here."""
import csv
import hashlib
import json
from pathlib import Path
from typing import Any, Iterator, NamedTuple

from m3ae_mini.config import UserError


class Row(NamedTuple):
    """One (image, text) pair as a reader finds it."""
    split: str                     # "train", "val" or "test"
    image: Any                   # a Path, or a hashable, picklable callable: image(size) -> PIL.Image
    text: str                      # caption, or question
    answer: str | None = None      # visual question answering
    closed: bool | None = None     # is the question a closed one (yes/no or a choice)?
    label: str | None = None       # classification
    group: str | None = None       # images of one kind (modality and body part): the harder wrong images
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
    """(line number, object) for every line of a JSON lines file; each object must have `keys`, and under them
    plain text, numbers, true, false or null."""
    for number, line in enumerate(lines(path), start=1):
        if line.strip():
            record = _json(line, path, number)
            yield number, _with_keys(record, keys, f"{path}, line {number}")


def elements(path: Path, *keys: str) -> Iterator[tuple[int, dict]]:
    """(number, counted from 1, and object) for every element of a JSON file that is one list; each object
    must have `keys`, as in `records`."""
    entries = _json("".join(lines(path)), path, 1)
    if not isinstance(entries, list):
        raise UserError(f"{path}: not a JSON list")
    for number, record in enumerate(entries, start=1):
        yield number, _with_keys(record, keys, f"{path}, element {number}")


def csv_records(path: Path, *columns: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of its last line, {column: field}) for every row of a CSV file whose header has `columns`."""
    table = csv.reader(lines(path), strict=True)
    try:
        names = next(table, [])
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{path}, line 1: the column '{twice[0]}' stands there twice: rename or remove "
                            "one")
        header = _with_keys(dict.fromkeys(names), columns, f"{path}, line 1")
        for values in filter(any, table):   # empty lines are left out, and those of separators alone
            if len(values) != len(header):
                raise UserError(f"{path}, line {table.line_num}: {len(values)} fields, not {len(header)}")
            yield table.line_num, dict(zip(header, values))
    except csv.Error as error:
        raise UserError(f"{path}, line {table.line_num}: not valid CSV ({error})") from None


def _json(text: str, path: Path, line: int) -> Any:
    """What the text, which begins at a line of the file, says in JSON."""
    try:
        return json.loads(text, parse_constant=lambda name: None)      # NaN, as some write an empty cell
    except json.JSONDecodeError as error:
        line, why = line + error.lineno - 1, error.msg
    except RecursionError:
        why = "too deep"
    except ValueError:
        why = "a number of thousands of digits"
    raise UserError(f"{path}, line {line}: not valid JSON ({why})")


def _with_keys(record: Any, keys: tuple[str, ...], where: str) -> dict:
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object")
    if missing := [key for key in keys if key not in record]:
        raise UserError(f"{where}: has no {' and no '.join(missing)}")
    return record | {key: plain(record[key], key, where) for key in keys}


def plain(value: Any, key: str, where: str) -> str | bool | None:
    """The value of a key: text, true, false or null as they are, numbers as text. UserError on lists and
    objects."""
    if isinstance(value, (list, dict)):
        raise UserError(f"{where}: the {key} is not plain text")
    return value if value is None or isinstance(value, bool) else str(value)


def texts(record: dict, key: str, where: str) -> list[str]:
    """The list of texts under a key; nothing where it is null."""
    found = record.get(key) or []
    if not isinstance(found, list):
        raise UserError(f"{where}: the {key} are not a list")
    return [str(plain(text, key, where) or "") for text in found]


def draw(name: str) -> float:
    """A number in [0, 1) that depends on the name alone: splits made by it never change."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:6], "big") / 2 ** 48


def too_short(text: str) -> str | None:
    """Captions and references need three words (the rule of the paper): else why the row is skipped."""
    return None if len(text.split()) >= 3 else "under 3 words"


def clean_text(text: str | None) -> str:
    """Each run of white space, line breaks included, becomes one blank; the ends are stripped."""
    return " ".join((text or "").split())
