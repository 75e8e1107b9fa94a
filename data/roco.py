"""ROCO (github.com/razorx89/roco-dataset): radiology images of open-access papers with captions.

    {train,validation|val,test}/radiology/captions.txt       ROCO_00001<TAB> caption
    {train,validation|val,test}/radiology/images/ROCO_00001.jpg

Its copy on Kaggle ("roco-dataset", folder all_data) has a table instead, read if there is no
captions.txt:

    {train,validation,test}/radiology/radiology{train,val,test}data.csv    id,name,caption
    {train,validation,test}/radiology/images/…                             what name says

MedICaT has sentences of the papers that mention an image of ROCO. They become further texts of
the image if the two files that join them exist: ROCO's list of links, and MedICaT's
`roco_files`, in ROCO's folder or in medicat/release next to it.

    {train,validation|val,test}/radiology/dlinks.txt         ROCO_00001 … …/PMC123.tar.gz fig.jpg
    roco_files/roco_{train,val,test}_references.jsonl        {"roco_image_id": "PMC123_fig.jpg", …}
"""
import os
import sys
from pathlib import Path
from typing import Iterator

from data import (Row, find_root, hash_to_unit, read_csv, read_jsonl, read_lines, text_list,
                  too_short)
from m3ae_mini.config import require

FOLDERS = {"train": ["train"], "val": ["validation", "val"], "test": ["test"]}
MARKERS = tuple(f"{name}/radiology" for names in FOLDERS.values() for name in names)
RETRIEVAL_PAIRS = 2000   # of validation, and of test


def rows(root: Path, task: str) -> Iterator[Row]:
    """For "pretrain" all captions and mentions. For "irtr" captions: all of train, and 2,000 of
    validation and of test, the first usable ones in the order of a hash of the image's name."""
    require(task in ("pretrain", "irtr"),
            f"roco has nothing for the task {task}: choose --task pretrain or irtr")
    root = find_root(root, *MARKERS)

    folders = {split: root / name / "radiology" for split, names in FOLDERS.items()
               for name in names if (root / name / "radiology").is_dir()}
    require(folders, f"{root} has no train/radiology: --root is the folder of train, validation "
                     "and test")

    for split, folder in folders.items():
        captions = _captions(folder, split)
        mentions = _mentions(root, folder, split) if task == "pretrain" else {}
        pairs = [Row(split, folder / "images" / file, text, skip=too_short(text))
                 for name, file, caption in captions
                 for text in [caption] + mentions.get(name, [])]
        yield from retrieval_pairs(pairs) if task == "irtr" and split != "train" else pairs


def retrieval_pairs(pairs: list[Row]) -> Iterator[Row]:
    """The first 2,000 usable pairs, ordered by a hash of the image's name: the same everywhere."""
    taken = 0
    for row in sorted(pairs, key=lambda row: hash_to_unit(row.image.stem)):
        if taken == RETRIEVAL_PAIRS:
            return
        taken += row.skip is None and os.path.isfile(row.image)
        yield row


def _captions(folder: Path, split: str) -> list[tuple[str, str, str]]:
    """[(ROCO's name of the image, its file, caption)] in the annotations' order."""
    path = folder / "captions.txt"
    table = folder / f"radiology{split}data.csv"
    if table.is_file() and not path.is_file():
        return [(record["id"], record["name"].strip(), record["caption"])
                for _, record in read_csv(table, "id", "name", "caption")]

    captions = []
    for number, line in enumerate(read_lines(path), start=1):
        name, tab, caption = line.partition("\t")
        if tab:
            captions.append((name.strip(), f"{name.strip()}.jpg", caption))
        else:
            require(not line.strip(), f"{path}, line {number}: no tab between image and caption")
    return captions


def _mentions(root: Path, folder: Path, split: str) -> dict[str, list[str]]:
    """{image's name: sentences that mention it}, empty if one of the two files is missing."""
    links = folder / "dlinks.txt"
    candidates = [parent / "roco_files" / f"roco_{split}_references.jsonl"
                  for parent in (root, root.parent / "medicat" / "release")]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None or not links.is_file():
        if path or links.is_file():
            print(f"warning: {links} or the references of MedICaT ({candidates[0]}) are missing: "
                  "none are joined", file=sys.stderr)
        return {}

    # ROCO's name of each figure: {"PMC123_fig.jpg": "ROCO_00001"}.
    names = {}
    for line in read_lines(links):
        link, archive, figure = line.partition(".tar.gz")
        if archive and link.strip():
            names[f"{link.rsplit('/', 1)[-1]}_{figure.strip()}"] = link.split()[0]

    mentions: dict[str, list[str]] = {}
    for number, record in read_jsonl(path, "roco_image_id"):
        if name := names.get(record["roco_image_id"]):
            sentences = text_list(record, "gorc_references", f"{path}, line {number}")
            mentions.setdefault(name, []).extend(sentences)
    print(f"{'prepare: ' if mentions else 'warning: '}sentences that mention the image, of {path}: "
          f"joined to {len(mentions):,} images", file=sys.stderr)
    return mentions
