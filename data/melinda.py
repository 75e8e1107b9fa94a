"""MELINDA (Wu et al., AAAI 2021): figures of biomedical papers and the method of the experiment they show.

    {train,dev,test}.csv    figure_file,caption,…,i_meth_label,p_meth_label
    melinda_images/…        what figure_file names
"""
from pathlib import Path
from typing import Iterator

from data import Row, csv_records
from m3ae_mini.config import UserError


def rows(root: Path, task: str) -> Iterator[Row]:
    """The class is `p_meth_label`, the coarse kind of the method by which participants were detected: seven
    classes."""
    if task != "cls":
        raise UserError(f"melinda has nothing for the task {task}: choose --task cls")

    for split, name in ("train", "train"), ("val", "dev"), ("test", "test"):
        for _, record in csv_records(root / f"{name}.csv", "figure_file", "caption", "p_meth_label"):
            yield Row(split, root / "melinda_images" / record["figure_file"].strip(), record["caption"],
                      label=record["p_meth_label"])
