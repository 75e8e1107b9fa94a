"""VQA-Med-2019 (Ben Abacha et al., ImageCLEF 2019): questions on modality, plane and organ.

The official archives, unpacked side by side in one folder (C2_Plane_… and C3_Organ_… too):

    …Training/QAPairsByCategory/C1_Modality_train.txt    image|question|answer
    …Training/Train_images/synpic41148.jpg
    …Validation/…                                        the same, with _val and Val_images
    VQAMed2019_Test_Questions_w_Ref_Answers.txt          image|category|question|answer
    VQAMed2019_Test_Images/synpic54082.jpg

or the layout of M³AE's release:

    {train,val,test}/QA/{Modality,Organ,Plane}.csv       image|question|answer
    {train,val,test}/images/synpic41148.jpg
"""
from pathlib import Path
from typing import Iterator

from data import Row, find_root, read_lines
from data.answers import canonical_answer
from m3ae_mini.config import require

CATEGORIES = "Modality", "Plane", "Organ"   # as in the paper, which leaves abnormalities out

# The release's layout, or the folder that holds both official archives, at any usual depth.
MARKERS = ("train/QA", ("C1_Modality_train.txt", "C1_Modality_val.txt"),
           ("*/C1_Modality_train.txt", "*/C1_Modality_val.txt"),
           ("*/*/C1_Modality_train.txt", "*/*/C1_Modality_val.txt"))


def rows(root: Path, task: str) -> Iterator[Row]:
    """Answers are normalised (data.answers). If several are right, they stay one answer,
    each normalised, joined by "#". No file says which questions are closed: `closed` is None."""
    require(task == "vqa", f"vqa_med_2019 has nothing for the task {task}: choose --task vqa")
    root = find_root(root, *MARKERS)

    # The release's layout.
    if (root / "train" / "QA").is_dir():
        for split in "train", "val", "test":
            for category in CATEGORIES:
                path = root / split / "QA" / f"{category}.csv"
                yield from _questions(split, path, root / split / "images")
        return

    # The official archives.
    for split, folder in ("train", "Train_images"), ("val", "Val_images"):
        for i, category in enumerate(CATEGORIES, start=1):
            path = _find(root, f"C{i}_{category}_{split}.txt")
            yield from _questions(split, path, _find(root, folder))
    yield from _questions("test", _find(root, "VQAMed2019_Test_Questions_w_Ref_Answers.txt"),
                          _find(root, "VQAMed2019_Test_Images"), parts=4)


def _find(root: Path, name: str) -> Path:
    """The file or folder `name` in root or up to three folders below, as archives unpack."""
    paths = (path for depth in range(4) for path in sorted(root.glob("*/" * depth + name))
             if "__MACOSX" not in path.parts)
    found = next(paths, None)
    require(found, f"{root} has no {name}, neither itself nor in its folders: --root is the "
                   "folder that holds the unpacked archives of training, validation and test "
                   "(the test images are a second archive in that of the test)")
    return found


def _questions(split: str, path: Path, folder: Path, parts: int = 3) -> Iterator[Row]:
    """The rows of a file whose lines are image|question|answer, or, with 4 parts,
    image|category|question|answer."""
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        values = [value.strip() for value in line.split("|")]
        require(len(values) == parts,
                f"{path}, line {number}: {len(values)} parts between |, not {parts}")

        image, *category, question, answer = values
        known = not category or category[0].capitalize() in CATEGORIES
        answers = map(canonical_answer, answer.split("#"))
        yield Row(split, folder / (image if "." in image else f"{image}.jpg"), question,
                  "#".join(filter(None, answers)),
                  skip=None if known else f"question on {category[0]}")
