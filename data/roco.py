"""ROCO (github.com/razorx89/roco-dataset): radiology images of open-access papers with their captions.

    {train,validation|val,test}/radiology/captions.txt       ROCO_00001<TAB> caption
    {train,validation|val,test}/radiology/images/ROCO_00001.jpg

MedICaT adds sentences of the papers that mention an image of ROCO. They are further texts of that image
where the two files that join them are there: ROCO's list of links, and MedICaT's `roco_files`, in ROCO's
folder or in medicat/release beside it.

    {train,validation|val,test}/radiology/dlinks.txt         ROCO_00001 … …/PMC123.tar.gz figure.jpg
    roco_files/roco_{train,val,test}_references.jsonl        {"roco_image_id": "PMC123_figure.jpg", …}
"""
import os
from pathlib import Path
from typing import Iterator

from data import Row, draw, lines, records, texts, too_short
from m3ae_mini.config import UserError

FOLDERS = {"train": ["train"], "val": ["validation", "val"], "test": ["test"]}
RETRIEVAL_PAIRS = 2000   # of validation, and of test


def rows(root: Path, task: str) -> Iterator[Row]:
    """For "pretrain" all captions and references; for "irtr" captions: all of train, and of validation and
    test 2,000 each, the first usable ones in an order drawn by the images' names."""
    if task not in ("pretrain", "irtr"):
        raise UserError(f"roco has nothing for the task {task}: choose --task pretrain or irtr")

    folders = {split: root / name / "radiology" for split, names in FOLDERS.items() for name in names
               if (root / name / "radiology").is_dir()}
    if not folders:
        raise UserError(f"{root} has no train/radiology: --root is the folder of train, validation, test")

    for split, folder in folders.items():
        captions = _captions(folder / "captions.txt")
        if task == "pretrain":
            references = _references(root, folder, split)
            for name, caption in captions:
                for text in [caption] + references.get(name, []):
                    yield _row(split, folder, name, text)
        elif split == "train":
            for name, caption in captions:
                yield _row(split, folder, name, caption)
        else:
            yield from _retrieval_pairs(split, folder, captions)


def _row(split: str, folder: Path, name: str, text: str) -> Row:
    return Row(split, folder / "images" / f"{name}.jpg", text, skip=too_short(text))


def _captions(path: Path) -> list[tuple[str, str]]:
    """[(image's name, caption)] in the file's order."""
    pairs = []
    for number, line in enumerate(lines(path), start=1):
        name, tab, caption = line.partition("\t")
        if tab:
            pairs.append((name.strip(), caption))
        elif line.strip():
            raise UserError(f"{path}, line {number}: no tab between image and caption")
    return pairs


def _retrieval_pairs(split: str, folder: Path, captions: list[tuple[str, str]]) -> Iterator[Row]:
    """The first 2,000 usable pairs, in an order drawn by the images' names: the same ones everywhere."""
    taken = 0
    for name, caption in sorted(captions, key=lambda pair: draw(pair[0])):
        if taken == RETRIEVAL_PAIRS:
            return
        row = _row(split, folder, name, caption)
        taken += row.skip is None and os.path.isfile(row.image)
        yield row


def _references(root: Path, folder: Path, split: str) -> dict[str, list[str]]:
    """{image's name: sentences that mention it}, empty where one of the two files is not there."""
    links = folder / "dlinks.txt"
    places = root / "roco_files", root.parent / "medicat" / "release" / "roco_files"
    paths = [path for place in places if (path := place / f"roco_{split}_references.jsonl").is_file()]
    if not paths or not links.is_file():
        return {}

    names = {}   # "PMC123_figure.jpg": "ROCO_00001"
    for line in lines(links):
        link, archive, figure = line.partition(".tar.gz")
        if archive and link.strip():
            names[f"{link.rsplit('/', 1)[-1]}_{figure.strip()}"] = link.split()[0]

    references: dict[str, list[str]] = {}
    for number, record in records(paths[0], "roco_image_id"):
        if name := names.get(record["roco_image_id"]):
            found = texts(record, "gorc_references", f"{paths[0]}, line {number}")
            references.setdefault(name, []).extend(found)
    return references
