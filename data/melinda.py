"""MELINDA (Wu et al., AAAI 2021): figures of biomedical papers, each with its experiment's method.

    {train,dev,test}.csv    figure_file,caption,…,i_meth_label,p_meth_label
    melinda_images/…        what figure_file names
"""
from pathlib import Path
from typing import Iterator

from data import Row, find_root, read_csv
from m3ae_mini.config import require

MARKERS = (("melinda_images", "train.csv"),)


def rows(root: Path, task: str) -> Iterator[Row]:
    """The class is `p_meth_label`, the coarse method of participant detection (seven classes)."""
    require(task == "cls", f"melinda has nothing for the task {task}: choose --task cls")
    root = find_root(root, *MARKERS)

    for split, name in ("train", "train"), ("val", "dev"), ("test", "test"):
        columns = ("figure_file", "caption", "p_meth_label")
        for _, record in read_csv(root / f"{name}.csv", *columns):
            image = root / "melinda_images" / record["figure_file"].strip()
            yield Row(split, image, record["caption"], label=record["p_meth_label"])
