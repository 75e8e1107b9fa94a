"""ChestX-ray14 of the NIH (Wang et al., CVPR 2017): chest X-rays with up to 14 findings.

    Data_Entry_2017_v2020.csv          Image Index,Finding Labels,…,Patient ID,…,View Position,…
    Data_Entry_2017.csv                the same, read if the newer one is missing
    train_val_list.txt, test_list.txt  lines: 00000001_000.png
    images_001/images/00000001_000.png up to images_012; or all images in images/
"""
import os
import sys
from pathlib import Path
from typing import Iterator

from data import Row, find_root, hash_to_unit, read_csv, read_lines
from data.labels import join_labels, split_labels
from m3ae_mini.config import require

TABLES = "Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv"
MARKERS = TABLES
SEVERAL_LABELS = True
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
HELD_OUT = 0.1   # of the patients of train_val_list.txt


def rows(root: Path, task: str) -> Iterator[Row]:
    """One row per image. Its label is the findings joined by "|", or "No Finding".

    The reports are not published. So the text is a sentence that only names the view: "Chest
    x-ray, PA view." The group is the view.

    The test set is test_list.txt. A hash of the patient holds out a tenth of train_val_list.txt
    as validation. Images that neither list names are skipped.
    """
    require(task == "cls", f"nih has no reports and no questions, so nothing for the task {task}: "
                           "choose --task cls")
    root = find_root(root, *MARKERS)
    table = _table(root)
    splits = _splits(root)
    folders = _image_folders(root)
    found = _find_images(folders)

    unseen = set(splits)   # names of the lists that the table has not had yet
    missing = 0
    for number, record in read_csv(table, "Image Index", "Finding Labels", "Patient ID",
                                   "View Position"):
        name = record["Image Index"].strip()
        patient = record["Patient ID"].strip()
        view = record["View Position"].strip()
        findings = record["Finding Labels"].strip("| ")
        location = f"{table}, line {number}: "
        label = join_labels(split_labels(findings, location)) if findings else None

        split = splits.get(name)
        unseen.discard(name)
        if split == "train" and hash_to_unit(patient) < HELD_OUT:
            split = "val"
        missing += split is not None and name not in found
        text = f"Chest x-ray, {view} view." if view else "Chest x-ray."
        yield Row(split or "train", found.get(name, folders[0]) / name, text,
                  label=label, group=view or None, patient=patient,
                  skip=None if split else "in neither list")

    if unseen:
        print(f"nih: {len(unseen):,} of {len(splits):,} listed images are not in {table}, the "
              f"first is {min(unseen)}", file=sys.stderr)
    if missing:
        names = ", ".join(str(folder.relative_to(root)) for folder in folders)
        print(f"nih: {missing:,} images are not in {names}", file=sys.stderr)


# ---------------------------------------------------------------------------------------- the files

def _table(root: Path) -> Path:
    """The newer of the two tables. If both are there, a line says so."""
    tables = [root / name for name in TABLES if (root / name).is_file()]
    require(tables, f"{root} has no {TABLES[0]} and no {TABLES[1]}: --root is the folder of one of "
                    "them")
    if len(tables) == 2:
        print(f"nih: reading {tables[0]}; {TABLES[1]} is not used", file=sys.stderr)
    return tables[0]


def _splits(root: Path) -> dict[str, str]:
    """{image's name: "train" or "test"} of both lists."""
    splits: dict[str, str] = {}
    for split, file in LISTS.items():
        for number, line in enumerate(read_lines(root / file), start=1):
            name = line.strip()
            if name:
                require(splits.setdefault(name, split) == split,
                        f"{root / file}, line {number}: {name} is also in {LISTS['train']}: remove "
                        "it from one of them")
    return splits


def _image_folders(root: Path) -> list[Path]:
    """The folders with images. UserError if there are none."""
    candidates = [*sorted(root.glob("images_[0-9][0-9][0-9]/images")), root / "images"]
    folders = [folder for folder in candidates if folder.is_dir()]
    require(folders, f"{root} has no images_001/images and no images: unpack the images there")
    return folders


def _find_images(folders: list[Path]) -> dict[str, Path]:
    """{image's name: its folder}. Lists each folder once: asking for 112,120 files is slow."""
    found: dict[str, Path] = {}
    twice: list[str] = []
    for folder in folders:
        for name in os.listdir(folder):
            if name.endswith(".png") and found.setdefault(name, folder) != folder:
                twice.append(name)
    if twice:
        first = min(twice)
        print(f"nih: {len(twice):,} images are in two folders, the first is {first}: "
              f"{found[first]} is read", file=sys.stderr)
    return found
