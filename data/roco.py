"""ROCO (github.com/razorx89/roco-dataset): radiology images of open-access papers with captions.

    {train,validation|val,test}/radiology/captions.txt       ROCO_00001<TAB> caption
    {train,validation|val,test}/radiology/images/ROCO_00001.jpg

MedICaT has sentences of the papers that mention an image of ROCO. They become further texts of
the image if the two files that join them exist: ROCO's list of links, and MedICaT's
`roco_files`, in ROCO's folder or in medicat/release next to it.

    {train,validation|val,test}/radiology/dlinks.txt         ROCO_00001 … …/PMC123.tar.gz fig.jpg
    roco_files/roco_{train,val,test}_references.jsonl        {"roco_image_id": "PMC123_fig.jpg", …}
"""
import os
from pathlib import Path
from typing import Iterator

from data import Row, hash_to_unit, read_jsonl, read_lines, text_list, too_short
from m3ae_mini.config import require

FOLDERS = {"train": ["train"], "val": ["validation", "val"], "test": ["test"]}
RETRIEVAL_PAIRS = 2000   # of validation, and of test


def rows(root: Path, task: str) -> Iterator[Row]:
    """For "pretrain" all captions and mentions. For "irtr" captions: all of train, and 2,000 of
    validation and of test, the first usable ones in the order of a hash of the image's name."""
    require(task in ("pretrain", "irtr"),
            f"roco has nothing for the task {task}: choose --task pretrain or irtr")

    folders = {split: root / name / "radiology" for split, names in FOLDERS.items()
               for name in names if (root / name / "radiology").is_dir()}
    require(folders, f"{root} has no train/radiology: --root is the folder of train, validation "
                     "and test")

    for split, folder in folders.items():
        captions = _captions(folder / "captions.txt")
        if task == "pretrain":
            mentions = _mentions(root, folder, split)
            for name, caption in captions:
                for text in [caption] + mentions.get(name, []):
                    yield _row(split, folder, name, text)
        elif split == "train":
            for name, caption in captions:
                yield _row(split, folder, name, caption)
        else:
            yield from _retrieval_pairs(split, folder, captions)


def _row(split: str, folder: Path, name: str, text: str) -> Row:
    """The row of an image and one of its texts."""
    return Row(split, folder / "images" / f"{name}.jpg", text, skip=too_short(text))


def _captions(path: Path) -> list[tuple[str, str]]:
    """[(image's name, caption)] in the file's order."""
    pairs = []
    for number, line in enumerate(read_lines(path), start=1):
        name, tab, caption = line.partition("\t")
        if tab:
            pairs.append((name.strip(), caption))
        else:
            require(not line.strip(), f"{path}, line {number}: no tab between image and caption")
    return pairs


def _retrieval_pairs(split: str, folder: Path, captions: list[tuple[str, str]]) -> Iterator[Row]:
    """The first 2,000 usable pairs, ordered by a hash of the name: the same ones everywhere."""
    taken = 0
    for name, caption in sorted(captions, key=lambda pair: hash_to_unit(pair[0])):
        if taken == RETRIEVAL_PAIRS:
            return
        row = _row(split, folder, name, caption)
        taken += row.skip is None and os.path.isfile(row.image)
        yield row


def _mentions(root: Path, folder: Path, split: str) -> dict[str, list[str]]:
    """{image's name: sentences that mention it}, empty if one of the two files is missing."""
    links = folder / "dlinks.txt"
    candidates = [parent / "roco_files" / f"roco_{split}_references.jsonl"
                  for parent in (root, root.parent / "medicat" / "release")]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None or not links.is_file():
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
    return mentions
