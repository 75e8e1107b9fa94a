"""Data sets as published. One small file reads each; prepare.py packs what it yields.

A reader is a module with one function, `rows(root, task)`, that yields a Row for every (image,
text) pair. `root` is the user's --root; `task` is "pretrain", "vqa", "cls" or "irtr". MARKERS, if
it has them, are what find_root knows the data set's folder by. SEVERAL_LABELS says that a row may
have several labels, "A|B".
This file holds what the readers share. `location` is always a file and a line in it, for errors.
"""
import csv
import gzip
import hashlib
import json
import os
import re
import sys
import zlib
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

from PIL import Image

from m3ae_mini.config import UserError, require


# An image file, or a hashable, picklable function that draws an image of a given size in pixels.
Source = Path | Callable[[int], Image.Image]

MARKS = ".?!;:,"               # of those around an anonymised word the first of these stays
AROUND = MARKS + "/- \t\r\n"   # what goes with an anonymised word


class Row(NamedTuple):
    """One (image, text) pair as a reader finds it."""
    split: str                   # "train", "val" or "test"
    image: Source                # where its pixels come from
    text: str                    # caption, or question
    answer: str | None = None    # visual question answering; "#" separates alternatives
    closed: bool | None = None   # is it a closed question (yes/no or a choice)?
    label: str | None = None     # classification
    group: str | None = None     # modality, body part: hard negatives are of the same group
    patient: str | None = None   # who is shown: the summary counts patients in several splits
    skip: str | None = None      # why this row is not packed, "reason" or "reason: detail"; it is
                                 # counted and listed instead


# ------------------------------------------------------------------------------- finding the folder

def find_root(root: Path, *markers: str | tuple[str, ...]) -> Path:
    """The folder to read: `root`, else its only child with a marker, else its parent if it has one.

    A marker is a path below the folder, or a glob pattern; a tuple of them must be there together.
    If the folder is not `root`, a line on stderr names it. If no folder fits, `root` is returned:
    the reader then names the file that is missing. UserError if several children fit.
    """
    if _has_marker(root, markers) or not root.exists():
        return root
    folders = [path for path in sorted(root.iterdir()) if path.is_dir()] if root.is_dir() else []
    fitting = [path for path in folders if path.name != "__MACOSX" and _has_marker(path, markers)]
    require(len(fitting) <= 1, f"{root} holds {len(fitting)} folders with the data set's files "
                               f"({', '.join(path.name for path in fitting)}): give one as --root")

    # A path such as "." has no parent of its own: it is made absolute.
    folder = fitting[0] if fitting else Path(os.path.abspath(root)).parent
    if not fitting and not _has_marker(folder, markers):
        return root
    print(f"prepare: reading {folder}, not {root}: the data set's files are there",
          file=sys.stderr)
    return folder


def _has_marker(folder: Path, markers: tuple[str | tuple[str, ...], ...]) -> bool:
    """Is one of the markers in the folder?"""
    for marker in markers:
        patterns = (marker,) if isinstance(marker, str) else marker
        if all(any(folder.glob(pattern)) for pattern in patterns):
            return True
    return False


# ------------------------------------------------------------------------------------ reading files

def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, or of one in a .gz, with their ends.

    UserError if it is missing, not UTF-8, or not a whole gzip file.
    """
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        # utf-8-sig: spreadsheets like to write a byte order mark, which is not part of the text.
        with open_file(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}): download it again, or take "
                        ".gz off its name if it is unpacked") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): "
                        "is --root the right folder?") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8") from None


def read_jsonl(path: Path, *keys: str) -> Iterator[tuple[int, dict]]:
    """(line number, object) for every line of a JSON lines file.

    Each object must have `keys`; their values must be text, numbers, true, false or null.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            record = _parse_json(line, path, number)
            yield number, _with_keys(record, keys, f"{path}, line {number}")


def read_json_list(path: Path, *keys: str, within: str | None = None
                   ) -> Iterator[tuple[int, dict]]:
    """(number from 1, object) for every element of a JSON file that is one list.

    Each object must have `keys`, as in read_jsonl. within: the file is an object, and the list is
    found under this key of it.
    """
    records = _parse_json("".join(read_lines(path)), path, 1)
    location = str(path)
    if within is not None:
        require(isinstance(records, dict) and within in records,
                f"{path}: has no list '{within}': is it the right file?")
        records = records[within]
        location = f"{path}, {within}"
    require(isinstance(records, list), f"{location}: not a JSON list: is it the right file?")
    for number, record in enumerate(records, start=1):
        yield number, _with_keys(record, keys, f"{location}, element {number}")


def read_csv(path: Path, *columns: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of its last line, {column: field}) for every row of a CSV file with a header.

    The header must have `columns`. UserError if it is separated by semicolons or tabs.
    """
    table = csv.reader(read_lines(path), strict=True)
    try:
        names = next(table, [])
        mark = next((mark for mark in ";\t" if len(names) == 1 and mark in names[0]), None)
        require(mark is None, f"{path}, line 1: the fields are separated by "
                              f"{'semicolons' if mark == ';' else 'tabs'}: save it with commas")
        twice = next((name for name in names if names.count(name) > 1), None)
        require(twice is None, f"{path}, line 1: there are two columns '{twice}': rename or "
                               "remove one")
        header = _with_keys(dict.fromkeys(names), columns, f"{path}, line 1")
        for values in filter(any, table):   # skips empty lines, and those of separators alone
            require(len(values) == len(header),
                    f"{path}, line {table.line_num}: {len(values)} fields, not {len(header)} as in "
                    "the header: put quotes around a field with a comma in it")
            yield table.line_num, dict(zip(header, values))
    except csv.Error as error:
        raise UserError(f"{path}, line {table.line_num}: not valid CSV ({error}): "
                        "correct the file") from None


def _parse_json(text: str, path: Path, line: int) -> Any:
    """The value of a JSON text that begins at a line of a file. NaN becomes None."""
    try:
        return json.loads(text, parse_constant=lambda name: None)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            line += error.lineno - 1
            why = error.msg
        else:
            deep = isinstance(error, RecursionError)
            why = "too deep" if deep else "a number with too many digits"
        raise UserError(f"{path}, line {line}: not valid JSON ({why}): correct the file") from None


# ---------------------------------------------------------------------------------- checking values

def _with_keys(record: Any, keys: tuple[str, ...], location: str) -> dict:
    """The record, with the values under `keys` checked by plain_value."""
    require(isinstance(record, dict), f"{location}: not a JSON object: is it the right file?")
    missing = [key for key in keys if key not in record]
    require(not missing, f"{location}: has no {' and no '.join(missing)}: is it the right file?")
    return record | {key: plain_value(record[key], key, location) for key in keys}


def plain_value(value: Any, key: str, location: str) -> str | bool | None:
    """Text, true, false and null as they are, numbers as text. UserError on lists and objects."""
    require(not isinstance(value, (list, dict)),
            f"{location}: the {key} is not plain text, but a list or an object")
    return value if value is None or isinstance(value, bool) else str(value)


def text_list(record: dict, key: str, location: str) -> list[str]:
    """The list of texts under a key; empty if it is null or missing."""
    values = record.get(key) or []
    require(isinstance(values, list), f"{location}: the {key} are not a list of texts")
    return [str(plain_value(value, key, location) or "") for value in values]


# -------------------------------------------------------------------------------------------- texts

def clean_text(text: str | None) -> str:
    """Each run of white space, line breaks included, becomes one blank; the ends are stripped."""
    return " ".join((text or "").split())


def without_placeholders(text: str, placeholder: str) -> str:
    """The text without placeholders, which stand for anonymised words. placeholder: a pattern.

    "No XXXX, XXXX. Clear." -> "No. Clear.": blanks and marks around it become one blank and the
    strongest of the marks. Brackets with nothing else in them go. Other marks stay.
    """
    clean, *parts = re.split(f"(?:{placeholder})(?:'s)?", text)
    for part in parts:
        clean = _close_gap(clean, part)
    if parts and not parts[-1].strip(AROUND):
        clean = clean.rstrip(" ,;:")   # the text ended in XXXX: only the end of a sentence stays
    return " ".join(clean.split())


def _close_gap(left: str, right: str) -> str:
    """What was before and after a placeholder as one text."""
    before = left.rstrip(AROUND)
    after = right.lstrip(AROUND)
    while before.endswith("(") and after.startswith(")"):   # nothing else was in the brackets
        left = before[:-1]
        right = after[1:]
        before = left.rstrip(AROUND)
        after = right.lstrip(AROUND)
    if not before:
        return after

    marks = left[len(before):] + right[:len(right) - len(after)]
    mark = next((mark for mark in MARKS if mark in marks), "")
    if before.endswith("("):
        return before + after
    return before + mark + after if after.startswith(")") else f"{before}{mark} {after}"


def too_short(text: str) -> str | None:
    """Why a caption is skipped: under three words, the paper's rule. None if it is not."""
    return None if len(text.split()) >= 3 else "under 3 words"


def hash_to_unit(name: str) -> float:
    """A number in [0, 1) that depends only on the name: splits made with it never change."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:6],
                          "big") / 2 ** 48
