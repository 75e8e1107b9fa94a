"""ROCOv2 (Rückert et al., Scientific Data 2024; Zenodo 8333645, later 10821435): radiology images
of open-access papers with captions.

    {train,valid,test}_captions.csv                          ID,Caption
    {train,valid,test}_concepts.csv                          ID,CUIs; optional
    train_images/train/ROCOv2_2023_train_000001.jpg          valid and test likewise
"""
from pathlib import Path
from typing import Iterator

from data import Row, find_root, read_csv, too_short
from data.roco import retrieval_pairs
from m3ae_mini.config import require

MARKERS = ("train_captions.csv",)


def rows(root: Path, task: str) -> Iterator[Row]:
    """As in ROCO, captions under 3 words are skipped, and for "irtr" 2,000 pairs of validation and
    of test are taken.

    The group of an image is its first concept, a CUI of UMLS, if there is a table of concepts.
    The images of a split may be in train_images/train, train_images, train (or with valid or test
    for train), or next to the captions: the first of these that holds an image of the captions.
    """
    require(task in ("pretrain", "irtr"),
            f"rocov2 has nothing for the task {task}: choose --task pretrain or irtr")
    root = find_root(root, *MARKERS)

    for split, name in ("train", "train"), ("val", "valid"), ("test", "test"):
        table = read_csv(root / f"{name}_captions.csv", "ID", "Caption")
        captions = [(record["ID"].strip(), record["Caption"]) for _, record in table]
        folder = _image_folder(root, name, [image for image, _ in captions])
        groups = _first_concepts(root / f"{name}_concepts.csv")
        pairs = [Row(split, folder / f"{image}.jpg", caption, group=groups.get(image),
                     skip=too_short(caption))
                 for image, caption in captions]
        yield from retrieval_pairs(pairs) if task == "irtr" and split != "train" else pairs


def _image_folder(root: Path, name: str, images: list[str]) -> Path:
    """The first usual folder that holds one of the images; the archive's own if none does."""
    folders = [root / f"{name}_images" / name, root / f"{name}_images", root / name, root]
    return next((folder for folder in folders if folder.is_dir()
                 and any((folder / f"{image}.jpg").is_file() for image in images)), folders[0])


def _first_concepts(path: Path) -> dict[str, str]:
    """{image: the first of its CUIs}. Empty if there is no such file."""
    if not path.is_file():
        return {}
    return {record["ID"].strip(): record["CUIs"].split(";")[0].strip()
            for _, record in read_csv(path, "ID", "CUIs")}
