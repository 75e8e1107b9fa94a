"""Your own data: one table, CSV with a header or JSON lines, and the images it names.

    image,text,split                  {"image": "a/1.png", "text": "Normal chest.", "split": "val"}
    a/1.png,Normal chest.,val

Columns: image (or picture, path, file), relative to the table's folder; text (or caption,
question). Optional: answer (spelt as in data.answers; "#" separates alternatives), closed (is
it a yes/no question or a choice?), label, group (modality, body part), patient, split.

Without a split column, a hash of the patient (or of the image's path) decides: 10 % test, 10 %
val, 80 % train. The result is the same every time.
"""
import os
from pathlib import Path
from typing import Iterator

from data import Row, hash_to_unit, read_csv, read_jsonl
from data.answers import normalise_answer
from m3ae_mini.config import require

IMAGE = "image", "picture", "path", "file"
TEXT = "text", "caption", "question"
SPLITS = {"train": "train", "training": "train",
          "val": "val", "valid": "val", "validation": "val", "dev": "val",
          "test": "test", "testing": "test"}
COLUMNS = {*IMAGE, *TEXT, "answer", "closed", "label", "group", "patient", "split"}
CLOSED = {"closed": True, "true": True, "yes": True, "1": True,
          "open": False, "false": False, "no": False, "0": False}


def rows(root: Path, task: str) -> Iterator[Row]:
    """`root` is the table, or a folder that holds one. UserError names a malformed row by file
    and line. What the task needs of a row (an answer, a label) is checked when it is packed."""
    path = _table(root)
    with_split = set()   # holds True if a row has a split, False if a row has none
    for number, fields in _fields(path):
        location = f"{path}, line {number}"
        image = _first(fields, IMAGE, location)
        text = _first(fields, TEXT, location)
        require(image, f"{location}: the image's name is empty")
        with_split.add(bool(fields.get("split")))
        require(len(with_split) == 1, f"{location}: some rows have a split and some none: give it "
                                      "in all rows, or in none")
        patient = fields.get("patient") or os.path.normpath(image)
        yield Row(_split(fields, patient, location), Path(os.path.normpath(path.parent / image)),
                  text, answer=_answer(fields), closed=_closed(fields, location),
                  label=fields.get("label"), group=fields.get("group"))


def _table(root: Path) -> Path:
    """The one .csv or .jsonl file of a folder, or the file itself."""
    files = [root] if root.is_file() else sorted(root.iterdir())
    tables = [file for file in files if file.suffix.lower() in (".csv", ".jsonl")]
    require(tables, f"{root} holds no table: it needs a .csv with a header or a .jsonl")
    names = ", ".join(table.name for table in tables)
    require(len(tables) == 1,
            f"{root} holds {len(tables)} tables ({names}): give one of them as --root")
    return tables[0]


def _fields(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, {column in lower case: field})"""
    for number, record in read_csv(path) if path.suffix.lower() == ".csv" else read_jsonl(path):
        fields = {}
        for key, value in record.items():
            column = key.strip().lower()
            require(column not in fields, f"{path}, line {number}: there are two columns "
                                          f"'{column}': rename or remove one")
            require(column not in COLUMNS or not isinstance(value, (list, dict)),
                    f"{path}, line {number}: {key} is not plain text, but a list or an object")
            fields[column] = "" if value is None else str(value).strip()
        yield number, fields


def _first(fields: dict[str, str], names: tuple[str, ...], location: str) -> str:
    """The field of the one column among `names` that the table has."""
    found = [name for name in names if name in fields]
    require(found, f"{location}: no column {names[0]} (or {', '.join(names[1:])}) among "
                   f"{', '.join(fields)}")
    require(len(found) == 1, f"{location}: which is meant, {' or '.join(found)}? rename or remove "
                             "the other")
    return fields[found[0]]


def _split(fields: dict[str, str], patient: str, location: str) -> str:
    """The split given, else one by a hash of the patient."""
    name = fields.get("split")
    if name:
        require(name.lower() in SPLITS,
                f"{location}: the split is '{name}', it must be train, val or test")
        return SPLITS[name.lower()]
    chance = hash_to_unit(patient)   # all rows of a patient, or of an image, go to one split
    return "test" if chance < 0.1 else "val" if chance < 0.2 else "train"


def _answer(fields: dict[str, str]) -> str | None:
    """Each alternative normalised. "A" may be a choice, not an article: it stays."""
    if "answer" not in fields:
        return None
    parts = [part.strip() for part in fields["answer"].split("#")]
    return "#".join(filter(None, (normalise_answer(part) or part.lower() for part in parts)))


def _closed(fields: dict[str, str], location: str) -> bool | None:
    """Is the question closed? None if the table does not say."""
    word = fields.get("closed", "").lower()
    require(not word or word in CLOSED,
            f"{location}: closed is '{word}', it must be true or false")
    return CLOSED.get(word)
