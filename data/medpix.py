"""MedPix 2.0 (github.com/CHILab1/MedPix-2.0): 2,050 CT and MR images of teaching cases, split by case.

    MedPix-2-0/images/MPX1024_synpic40275.png
    MedPix-2-0/splitted_dataset/descriptions_{train,dev,test}.jsonl
"""
from pathlib import Path
from typing import Iterator

from data import Row, plain, records
from m3ae_mini.config import UserError

PLACEHOLDER = "Replace this - DESCRIPTION OF THE IMAGE"   # left as it was by whoever entered the case


def rows(root: Path, task: str) -> Iterator[Row]:
    """`root` is the folder MedPix-2-0 or the clone that holds it. For "cls" the class is the part of the body
    (Location Category, five of them); for "irtr" the pairs are all those of its own splits."""
    if task == "vqa":
        raise UserError("medpix has nothing for the task vqa: choose --task pretrain, cls or irtr")
    if not (root / "splitted_dataset").is_dir():
        root = root / "MedPix-2-0"

    for split, name in ("train", "train"), ("val", "dev"), ("test", "test"):
        path = root / "splitted_dataset" / f"descriptions_{name}.jsonl"
        for number, record in records(path, "Type", "image", "Location Category"):
            description = record.get("Description")
            if not isinstance(description, dict) or "Caption" not in description:
                raise UserError(f"{path}, line {number}: its Description has no Caption")
            caption = str(plain(description["Caption"], "Caption", f"{path}, line {number}") or "")
            part = record["Location Category"]
            yield Row(split, root / "images" / f"{record['image']}.png", caption, label=part,
                      group=f"{record['Type']} {part}",
                      skip="placeholder caption" if caption.startswith(PLACEHOLDER) else None)
