"""MedPix 2.0 (github.com/CHILab1/MedPix-2.0): 2,050 CT and MR images of teaching cases.

    MedPix-2-0/images/MPX1024_synpic40275.png
    MedPix-2-0/splitted_dataset/descriptions_{train,dev,test}.jsonl      split by case
"""
from pathlib import Path
from typing import Iterator

from data import Row, find_root, plain_value, read_jsonl
from m3ae_mini.config import require

MARKERS = ("splitted_dataset",)
PLACEHOLDER = "Replace this - DESCRIPTION OF THE IMAGE"   # left by whoever entered the case


def rows(root: Path, task: str) -> Iterator[Row]:
    """For "cls" the class is the part of the body (Location Category, five of them). For "irtr"
    all pairs of the published splits are used. The group is modality and part, the patient the
    case (U_id)."""
    require(task != "vqa",
            "medpix has nothing for the task vqa: choose --task pretrain, cls or irtr")
    root = find_root(root, *MARKERS)

    for split, name in ("train", "train"), ("val", "dev"), ("test", "test"):
        path = root / "splitted_dataset" / f"descriptions_{name}.jsonl"
        for number, record in read_jsonl(path, "Type", "image", "Location Category"):
            location = f"{path}, line {number}"
            description = record.get("Description")
            require(isinstance(description, dict) and "Caption" in description,
                    f"{location}: its Description has no Caption: is it the right file?")
            caption = str(plain_value(description["Caption"], "Caption", location) or "")
            case = str(plain_value(record.get("U_id"), "U_id", location) or "") or None
            part = record["Location Category"]
            yield Row(split, root / "images" / f"{record['image']}.png", caption, label=part,
                      group=f"{record['Type']} {part}",
                      patient=case,
                      skip="placeholder caption" if caption.startswith(PLACEHOLDER) else None)
