"""Your own data: one table, CSV with a header or JSON lines, and the images it names.

    image,text,split                  {"image": "a/1.png", "text": "Normal chest.", "split": "val"}
    a/1.png,Normal chest.,val

Columns: image, relative to the table's folder; text. Optional: answer (spelt as in
data.answers; "#" separates alternatives), closed (is it a yes/no question or a choice?), label
(one class, or several, "A|B"; if any row has several, "No Finding" means none), group (modality,
body part), patient, split. NAMES has the other names by which they are known, in any case, with
blanks, underscores or none. Two names of one thing are refused.

Without a split column, a hash of the patient (or of the image's path) decides: 10 % test, 10 %
val, 80 % train. The result is the same every time. A TableReport says what was read as what.
"""
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Iterator

from data import Row, hash_to_unit, read_csv, read_jsonl
from data.answers import canonical_answer
from data.labels import join_labels, split_labels
from data.summary import TableReport
from m3ae_mini.config import require

NAMES = {
    "image": ("image", "picture", "path", "file"),
    "text": ("text", "caption", "question"),
    "answer": ("answer",),
    "closed": ("closed",),
    "label": ("label",),
    "group": ("group",),
    "patient": ("patient", "patientid", "patientname", "patientnumber", "pid", "subject",
                "subjectid"),
    # A patient may have several of these: they count as the patient if no column above is there.
    "case": ("case", "caseid", "study", "studyid", "studyuid", "studyinstanceuid", "exam", "examid",
             "accession", "accessionnumber"),
    "split": ("split", "set", "subset", "fold", "phase", "partition")}
ROLES = {name: role for role, names in NAMES.items() for name in names}
SPLITS = {"train": "train", "training": "train",
          "val": "val", "valid": "val", "validation": "val", "validate": "val", "dev": "val",
          "test": "test", "testing": "test"}
CLOSED = {"closed": True, "true": True, "yes": True, "1": True,
          "open": False, "false": False, "no": False, "0": False}


def rows(root: Path, task: str, report: TableReport | None = None) -> Iterator[Row]:
    """`root` is the table, or a folder that holds one. UserError names a malformed row by file
    and line. What the task needs of a row (an answer, a label) is checked when it is packed.
    The report, if given, is filled in."""
    path = _table(root)
    report = report or TableReport()
    filled: dict[str, set[bool]] = {"split": set(), "patient": set()}   # has a row a value?
    for number, record in read_csv(path) if path.suffix.lower() == ".csv" else read_jsonl(path):
        location = f"{path}, line {number}"
        fields = _fields(record, location, report)
        require(fields["image"], f"{location}: the image's name is empty")
        needed = {"vqa": "answer", "cls": "label"}.get(task)
        require(needed is None or needed in fields or path.suffix.lower() != ".csv",
                f"{location}: no column {needed} among {', '.join(record)}: --task {task} needs it")
        for role, known in filled.items():
            known.add(bool(fields.get(role)))
            require(len(known) == 1,
                    f"{location}: some rows have a {role} and some none: give it in all rows, or "
                    "in none")
        report.split_given = bool(fields.get("split"))
        label = fields.get("label")
        require(not label or ";" not in label,
                f"{location}: does the label '{label}' hold several labels? separate them by |, or "
                "rename the column")
        if label and "|" in label:
            label = join_labels(split_labels(label, f"{location}: "))

        patient = fields.get("patient")
        image = os.path.normpath(fields["image"])
        split = _split(fields.get("split"), patient or image, report, location)
        yield Row(split, Path(os.path.normpath(path.parent / image)), fields["text"],
                  answer=_answer(fields), closed=_closed(fields, location), label=label,
                  group=fields.get("group"), patient=patient or None)


def _table(root: Path) -> Path:
    """The one .csv or .jsonl file of a folder, or of the folders in it; or the file itself."""
    def tables(files) -> list[Path]:
        return [file for file in files if file.suffix.lower() in (".csv", ".jsonl")]

    found = [root] if root.is_file() else tables(sorted(root.iterdir()))
    found = tables(found) or tables(sorted(root.glob("*/*")))
    require(found, f"{root} holds no table: it needs a .csv with a header or a .jsonl")
    names = ", ".join(str(table.relative_to(root)) for table in found[:9] if table != root)
    require(len(found) == 1,
            f"{root} holds {len(found)} tables ({names}): give one of them as --root")
    return found[0]


def _fields(record: dict, location: str, report: TableReport) -> dict[str, str]:
    """{role: field} of a row. Columns of no role join report.unused."""
    seen: set[str] = set()
    fields: dict[str, str] = {}
    names: dict[str, str] = {}   # {role: the column's name}
    for key, value in record.items():
        name = key.strip()
        require(name.lower() not in seen, f"{location}: there are two columns '{name.lower()}': "
                                          "rename or remove one")
        seen.add(name.lower())
        role = ROLES.get(_plain(name))
        if role is None:
            report.unused[name] = None
            continue
        require(not isinstance(value, (list, dict)),
                f"{location}: {name} is not plain text, but a list or an object")
        require(role not in names,
                f"{location}: which is meant, {names.get(role)} or {name}? rename or remove the "
                "other")
        names[role] = name
        fields[role] = "" if value is None else str(value).strip()

    for role in "image", "text":
        others = ", ".join(NAMES[role][1:])
        require(role in fields, f"{location}: no column {role} (or {others}) among "
                                f"{', '.join(map(str.strip, record))}: rename one of them")
    if "case" in names and "patient" in names:
        report.unused[names.pop("case")] = None
    elif "case" in names:
        names["patient"] = names.pop("case")
        fields["patient"] = fields["case"]
    for role, name in names.items():   # the lines of a JSON lines file may differ
        before = report.columns.setdefault(role, name)
        require(_plain(before) == _plain(name),
                f"{location}: which is meant, {before} or {name}? rename or remove the other")
    return fields


@lru_cache(1024)
def _plain(name: str) -> str:
    """A column's name without case, blanks and underscores: "Patient ID" is "patientid"."""
    return re.sub(r"[\W_]+", "", name.lower())


def _split(name: str | None, patient: str, report: TableReport, location: str) -> str:
    """The split given, else one by a hash of the patient."""
    if name:
        column = report.columns["split"]
        require(name.lower() in SPLITS,
                f"{location}: the {column} is '{name}', it must be train, val or test: correct it, "
                "or rename the column")
        return SPLITS[name.lower()]
    chance = hash_to_unit(patient)   # all rows of a patient, or of an image, go to one split
    return "test" if chance < 0.1 else "val" if chance < 0.2 else "train"


def _answer(fields: dict[str, str]) -> str | None:
    """Each alternative normalised. "A" may be a choice, not an article: it stays."""
    if "answer" not in fields:
        return None
    parts = [part.strip() for part in fields["answer"].split("#")]
    return "#".join(filter(None, (canonical_answer(part) or part.lower() for part in parts)))


def _closed(fields: dict[str, str], location: str) -> bool | None:
    """Is the question closed? None if the table does not say."""
    word = fields.get("closed", "").lower()
    require(not word or word in CLOSED,
            f"{location}: closed is '{word}', it must be true or false")
    return CLOSED.get(word)
