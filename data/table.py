"""Your own data: one table, CSV with a header or JSON lines, and the images it names.

    image,text,split                     {"image": "a/1.png", "text": "Normal chest.", "split": "train"}
    a/1.png,Normal chest.,train

Columns: image (or picture, path, file), relative to the table's folder; text (or caption, question); and
where you have them answer (in the spelling of data.answers; "#" stands between alternatives), closed (is it a
yes/no question or a choice?), label, group (images of one kind), patient and split. Without splits the
patient decides, or where there is none the image's name, the same way each time: one in ten goes to test,
one in ten to val, the others to train."""
import os
from pathlib import Path
from typing import Iterator

from data import Row, csv_records, draw, records
from data.answers import normalise_answer
from m3ae_mini.config import UserError

IMAGE = "image", "picture", "path", "file"
TEXT = "text", "caption", "question"
SPLITS = {"train": "train", "training": "train",
          "val": "val", "valid": "val", "validation": "val", "dev": "val",
          "test": "test", "testing": "test"}
COLUMNS = {*IMAGE, *TEXT, "answer", "closed", "label", "group", "patient", "split"}
CLOSED = {"closed": True, "true": True, "yes": True, "1": True,
          "open": False, "false": False, "no": False, "0": False}


def rows(root: Path, task: str) -> Iterator[Row]:
    """`root` is the table, or a folder that holds one. A malformed row is a UserError naming file and line.
    What a task needs of a row (an answer, a label) is looked for when it is packed."""
    path, splits = _table(root), set()
    for number, fields in _fields(path):
        where = f"{path}, line {number}"
        image, text = _first(fields, IMAGE, where), _first(fields, TEXT, where)
        if not image:
            raise UserError(f"{where}: the image's name is empty")
        splits.add(bool(fields.get("split")))
        if len(splits) > 1:
            raise UserError(f"{where}: some rows have a split and some none: give it in all, or in none")
        answer = fields.get("answer")
        if answer is not None:         # "A" may be a choice, and no article
            parts = [part.strip() for part in answer.split("#")]
            answer = "#".join(filter(None, (normalise_answer(part) or part.lower() for part in parts)))
        patient = fields.get("patient") or os.path.normpath(image)
        image = Path(os.path.normpath(path.parent / image))
        yield Row(_split(fields, patient, where), image, text,
                  answer=answer, closed=_closed(fields, where), label=fields.get("label"),
                  group=fields.get("group"))


def _table(root: Path) -> Path:
    """The one .csv or .jsonl file of a folder, or the file itself."""
    files = [root] if root.is_file() else sorted(root.iterdir())
    tables = [file for file in files if file.suffix.lower() in (".csv", ".jsonl")]
    if not tables:
        raise UserError(f"{root} holds no table: it needs a .csv with a header or a .jsonl")
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise UserError(f"{root} holds {len(tables)} tables ({names}): give one of them as --root")
    return tables[0]


def _fields(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, {column in small letters: what stands there})"""
    for number, record in csv_records(path) if path.suffix.lower() == ".csv" else records(path):
        fields = {}
        for key, value in record.items():
            column = key.strip().lower()
            if column in fields:
                raise UserError(f"{path}, line {number}: {key} stands there twice: rename or remove one")
            if isinstance(value, (list, dict)) and column in COLUMNS:
                raise UserError(f"{path}, line {number}: {key} is not plain text")
            fields[column] = "" if value is None else str(value).strip()
        yield number, fields


def _first(fields: dict[str, str], names: tuple[str, ...], where: str) -> str:
    """What stands in the one of the columns `names` that is there."""
    there = [name for name in names if name in fields]
    if not there:
        raise UserError(f"{where}: no {names[0]} (or {', '.join(names[1:])}) among {', '.join(fields)}")
    if len(there) > 1:
        raise UserError(f"{where}: which is meant, {' or '.join(there)}? rename or remove the other")
    return fields[there[0]]


def _split(fields: dict[str, str], patient: str, where: str) -> str:
    if name := fields.get("split"):
        if name.lower() not in SPLITS:
            raise UserError(f"{where}: the split is '{name}', it must be train, val or test")
        return SPLITS[name.lower()]
    chance = draw(patient)   # all rows of a patient, or of an image, stand in one split
    return "test" if chance < 0.1 else "val" if chance < 0.2 else "train"


def _closed(fields: dict[str, str], where: str) -> bool | None:
    word = fields.get("closed", "").lower()
    if word and word not in CLOSED:
        raise UserError(f"{where}: closed is '{word}', it must be true or false")
    return CLOSED.get(word)
