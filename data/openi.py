"""Open-i, the chest X-rays of Indiana University (Demner-Fushman et al., JAMIA 2016).

As Kaggle has them ("chest-xrays-indiana-university"), the level images/ may be missing:

    indiana_reports.csv        uid,MeSH,Problems,image,indication,comparison,findings,impression
    indiana_projections.csv    uid,filename,projection
    images/images_normalized/1_IM-0001-4001.dcm.png

or as R2Gen (github.com/zhjohnchan/R2Gen) has them:

    annotation.json            {"train": [{"id": …, "report": …, "image_path": [2 names]}, …], …}
    images/CXR2384_IM-0942/0.png
"""
import sys
from pathlib import Path
from typing import Iterator

from data import (Row, find_root, hash_to_unit, read_csv, read_json_list, text_list, too_short,
                  without_placeholders)
from m3ae_mini.config import require

REPORTS = "indiana_reports.csv"
MARKERS = REPORTS, "annotation.json"
NO_TEXT = "no findings and no impression"
ANONYMISED = "X{4,}"   # pattern of what stands for a word


def rows(root: Path, task: str) -> Iterator[Row]:
    """One row per image. Its text is findings and impression, without the anonymised words.

    Of Kaggle's files: The patient is the uid, the group the projection (Frontal or Lateral). A
    hash of the uid decides the split: 10 % test, 10 % val, 80 % train. For "cls" an image is
    normal or abnormal. The report tells which: `finetune.py cls --blind` shows what it gives away.

    Of R2Gen's: The split is its own, the patient the id. There is no group and no class. If both
    are there, Kaggle's files are read, and a line says so.

    For "pretrain" and "irtr" texts under 3 words are skipped.
    """
    require(task in ("pretrain", "irtr", "cls"),
            f"openi has nothing for the task {task}: choose --task pretrain, irtr or cls")
    root = find_root(root, *MARKERS)
    kaggle = (root / REPORTS).is_file()
    annotation = root / "annotation.json"
    require(kaggle or annotation.is_file(),
            f"{root} has no {REPORTS} and no annotation.json: --root is the folder of one of them")
    require(kaggle or task != "cls",
            f"{annotation} has no classes: choose --task pretrain or irtr, or get {REPORTS}")

    if kaggle and annotation.is_file():
        print(f"openi: reading {root / REPORTS}; annotation.json is not used", file=sys.stderr)
    for row in _kaggle_rows(root) if kaggle else _r2gen_rows(annotation):
        short = None if task == "cls" else too_short(row.text)
        yield row._replace(skip=row.skip or short)


# ------------------------------------------------------------------------------------- both layouts

def _kaggle_rows(root: Path) -> Iterator[Row]:
    """A row per image of indiana_projections.csv."""
    reports: dict[str, tuple[str, str | None]] = {}   # uid: (text, class)
    columns = "uid", "MeSH", "Problems", "findings", "impression"
    for number, record in read_csv(root / REPORTS, *columns):
        uid = record["uid"].strip()
        require(uid not in reports, f"{root / REPORTS}, line {number}: the uid '{uid}' is there "
                                    "twice: remove one of the reports")
        text = without_placeholders(f"{record['findings']} {record['impression']}", ANONYMISED)
        reports[uid] = (text, _label(record))

    folders = root / "images" / "images_normalized", root / "images_normalized"
    folder = folders[1] if folders[1].is_dir() and not folders[0].is_dir() else folders[0]
    shown = set()
    table = root / "indiana_projections.csv"
    for _, record in read_csv(table, "uid", "filename", "projection"):
        uid = record["uid"].strip()
        shown.add(uid)
        text, label = reports.get(uid, ("", None))
        skip = None if text else NO_TEXT if uid in reports else "no report"
        yield Row(_split(uid), folder / record["filename"].strip(), text, label=label,
                  group=record["projection"], patient=uid, skip=skip)

    without = len(reports.keys() - shown)
    if without:
        print(f"openi: {without:,} of {len(reports):,} reports are not used: {table} has no image "
              "of them", file=sys.stderr)


def _r2gen_rows(path: Path) -> Iterator[Row]:
    """A row per image of annotation.json."""
    for split in "train", "val", "test":
        for number, record in read_json_list(path, "id", "report", within=split):
            location = f"{path}, {split}, element {number}"
            text = without_placeholders(str(record["report"] or ""), ANONYMISED)
            images = text_list(record, "image_path", location)
            require(images, f"{location}: has no image_path: is it the right file?")
            for name in images:
                yield Row(split, path.parent / "images" / name, text, patient=str(record["id"]),
                          skip=None if text else NO_TEXT)


# ------------------------------------------------------------------------------------------ details

def _split(uid: str) -> str:
    """All images of a uid go to one split."""
    chance = hash_to_unit(uid)
    return "test" if chance < 0.1 else "val" if chance < 0.2 else "train"


def _label(record: dict[str, str]) -> str | None:
    """ "normal" if Problems, or where they are empty MeSH, is just that, else "abnormal". None if
    both are empty, or say that the report is not indexed."""
    for column in "Problems", "MeSH":
        value = record[column].strip().lower()
        if value not in ("", "no indexing"):
            return "normal" if value == "normal" else "abnormal"
    return None
