"""MIMIC-CXR-JPG (Johnson et al., 2019): chest X-rays with reports and CheXpert's labels.

The tables may be unpacked, without .gz, and have another version in their names:

    mimic-cxr-2.0.0-split.csv.gz       dicom_id,study_id,subject_id,split
    mimic-cxr-2.0.0-metadata.csv.gz    dicom_id,…,ViewPosition,…
    mimic-cxr-2.0.0-chexpert.csv.gz    subject_id,study_id,Atelectasis,…; for "cls" only
    files/p10/p10000032/s50414267/02aa804e-bde0afdd-112c0b34-7bc16630-4e384014.jpg

The reports are MIMIC-CXR's (mimic-cxr-reports.zip). They may be next to the images, or in a folder
mimic-cxr-reports in --root or next to it:

    {.,mimic-cxr-reports,../mimic-cxr-reports}/files/p10/p10000032/s50414267.txt
"""
import os
import re
import sys
from pathlib import Path
from typing import Iterator

from data import Row, find_root, read_csv, too_short, without_placeholders
from data.labels import join_labels
from m3ae_mini.config import require

MARKERS = "mimic-cxr-*-split.csv", "mimic-cxr-*-split.csv.gz"
SEVERAL_LABELS = True
SPLITS = {"train": "train", "validate": "val", "test": "test"}
FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum",
            "Fracture", "Lung Lesion", "Lung Opacity", "Pleural Effusion", "Pleural Other",
            "Pneumonia", "Pneumothorax", "Support Devices")
UNCERTAIN = ("absent", "present", "drop")

ANONYMISED = "_{3,}"   # pattern of what stands for a word
TITLE = re.compile(r"^[ \t]*([A-Z][A-Z ,/()&-]*):", re.MULTILINE)   # of a report's section
WANTED = {"FINDING", "FINDINGS", "IMPRESSION", "IMPRESSIONS"}       # words of the titles to keep
NO_REPORT = "no report"


def rows(root: Path, task: str, uncertain: str | None = None) -> Iterator[Row]:
    """One row per image. Its text is findings and impression of its study's report, without the
    anonymised words. The group is the view (PA, AP, LATERAL, …).

    For "cls" the label is the study's findings joined by "|", or "No Finding" if there are none;
    the column "No Finding" itself is not read. CheXpert took the labels from these reports, so
    the text gives them away: `finetune.py cls --blind` shows how much. uncertain: what a label of
    -1 counts as, "absent" (if None) or "present"; "drop" skips the images of its study.

    For "pretrain" and "irtr" texts under 3 words are skipped.
    """
    require(task in ("pretrain", "irtr", "cls"),
            f"mimic_cxr has nothing for the task {task}: choose --task pretrain, irtr or cls")
    require(uncertain is None or task == "cls",
            f"--uncertain is for the labels of --task cls: leave it out for {task}")
    root = find_root(root, *MARKERS)
    table = _table(root, "split")
    metadata = _table(root, "metadata")
    views = {record["dicom_id"].strip(): sys.intern(record["ViewPosition"].strip())
             for _, record in read_csv(metadata, "dicom_id", "ViewPosition")}
    labels = _labels(_table(root, "chexpert"), uncertain or "absent") if task == "cls" else {}
    folders = _report_folders(root)

    last = None   # (subject, study) of the row before: images of a study follow each other
    text = ""
    why = None
    num_rows = num_reports = num_unknown = 0
    for number, record in read_csv(table, "dicom_id", "study_id", "subject_id", "split"):
        subject, study, split = _checked(record, f"{table}, line {number}")
        if (subject, study) != last:
            text, why = _read_report(folders, subject, study)
            last = (subject, study)

        image = record["dicom_id"].strip()
        num_rows += 1
        num_reports += why != NO_REPORT
        num_unknown += image not in views
        label = labels.get(study)
        skip = why
        if task != "cls":
            skip = why or too_short(text)
        elif label is None:
            skip = why or ("uncertain label" if study in labels else "not in the chexpert table")
        path = root / "files" / _study_path(subject, study) / f"{image}.jpg"
        yield Row(split, path, text, label=label, group=views.get(image) or None,
                  patient=subject, skip=skip)

    require(num_reports or not num_rows,
            f"none of the reports is in {' or '.join(map(str, folders))}: unpack "
            f"mimic-cxr-reports.zip in {root}")
    if num_unknown:
        print(f"mimic_cxr: {num_unknown:,} of {num_rows:,} images are not in {metadata}: they "
              "have no group", file=sys.stderr)


# --------------------------------------------------------------------------------------- the tables

def _table(root: Path, kind: str) -> Path:
    """mimic-cxr-VERSION-{kind}.csv, or the same in a .gz. UserError if there are two versions."""
    found = [path for pattern in ("csv", "csv.gz")
             for path in sorted(root.glob(f"mimic-cxr-*-{kind}.{pattern}"))]
    name = f"mimic-cxr-2.0.0-{kind}.csv"
    require(found, f"{root} has no {name}.gz and no {name}: --root is the folder that holds it")
    versions = {path.name.removesuffix(".gz") for path in found}
    require(len(versions) == 1, f"{root} holds {' and '.join(sorted(versions))}: keep one of them")
    if len(found) == 2:
        print(f"mimic_cxr: reading {found[0]}; {found[1].name} is not used", file=sys.stderr)
    return found[0]


def _checked(record: dict[str, str], location: str) -> tuple[str, str, str]:
    """(subject_id, study_id, split) of a row of the split table. UserError if one is not valid."""
    ids = [record[column].strip() for column in ("subject_id", "study_id")]
    for column, value in zip(("subject_id", "study_id"), ids):
        require(value.isdecimal(), f"{location}: the {column} is '{value}', not a whole number")
    split = record["split"].strip()
    require(split in SPLITS, f"{location}: the split is '{split}', it must be {', '.join(SPLITS)}")
    return ids[0], ids[1], SPLITS[split]


def _labels(path: Path, uncertain: str) -> dict[str, str | None]:
    """{study_id: label}, None if it is dropped. A line says how many labels are uncertain."""
    labels: dict[str, str | None] = {}
    num_uncertain = 0
    for number, record in read_csv(path, "study_id", *FINDINGS):
        location = f"{path}, line {number}"
        study = record["study_id"].strip()
        require(study not in labels, f"{location}: the study '{study}' is there twice: remove one")

        values = {name: record[name].strip().removesuffix(".0") for name in FINDINGS}
        wrong = next((name for name in FINDINGS if values[name] not in ("1", "0", "-1", "")), None)
        require(wrong is None, f"{location}: {wrong} is '{record.get(wrong)}', it must be 1.0, "
                               "0.0, -1.0 or blank")
        doubts = list(values.values()).count("-1")
        num_uncertain += doubts
        present = ("1", "-1") if uncertain == "present" else ("1",)
        names = [name for name in FINDINGS if values[name] in present]
        dropped = doubts and uncertain == "drop"
        labels[study] = None if dropped else sys.intern(join_labels(names))

    if num_uncertain:
        others = "|".join(choice for choice in UNCERTAIN if choice != uncertain)
        effect = f"count as {uncertain}"
        if uncertain == "drop":
            effect = "leave out the images of their studies"
        print(f"mimic_cxr: {num_uncertain:,} uncertain labels {effect} (--uncertain {others})",
              file=sys.stderr)
    return labels


# -------------------------------------------------------------------------------------- the reports

def _study_path(subject: str, study: str) -> str:
    """Where a study is below files/: p10/p10000032/s50414267."""
    return f"p{subject[:2]}/p{subject}/s{study}"


def _report_folders(root: Path) -> list[Path]:
    """The folders that may hold reports, whether they exist or not."""
    parent = Path(os.path.abspath(root)).parent
    return [root / "files", root / "mimic-cxr-reports" / "files",
            parent / "mimic-cxr-reports" / "files"]


def _read_report(folders: list[Path], subject: str, study: str) -> tuple[str, str | None]:
    """(text of a study's report, why it cannot be used or None)."""
    for folder in folders:
        path = folder / f"{_study_path(subject, study)}.txt"
        try:
            report = path.read_bytes().decode()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, UnicodeDecodeError) as error:
            return "", f"unreadable report: {error}"
        text = findings_and_impression(report)
        return text, None if text else "no findings and no impression"
    return "", NO_REPORT


def findings_and_impression(report: str) -> str:
    """The text of both sections, in their order, without anonymised words.

    A section begins with a title: capitals up to a colon, at the start of a line. It ends at the
    next title. "FINDINGS AND IMPRESSION:" is a title of both.
    """
    _, *parts = TITLE.split(report)   # [title, section, title, section, …]
    wanted = []
    for title, section in zip(parts[::2], parts[1::2]):
        words = set(re.findall("[A-Z]+", title)) - {"AND"}
        if words and words <= WANTED:
            wanted.append(section)
    return without_placeholders(" ".join(wanted), ANONYMISED)
