"""SLAKE (Liu et al., ISBI 2021): questions in English and Chinese on CT, MRI and X-ray images.

    {train,validate,test}.json    a list of {"img_name": "xmlab1/source.jpg", "q_lang": "en", …}
    imgs/xmlab1/source.jpg
"""
from pathlib import Path
from typing import Iterator

from data import Row, find_root, read_json_list
from data.answers import question_row
from m3ae_mini.config import require

MARKERS = (("imgs", "train.json"),)
KEYS = "img_name", "question", "answer", "answer_type", "q_lang"


def rows(root: Path, task: str) -> Iterator[Row]:
    """Answers are normalised (data.answers). As in the paper, only questions in English are
    packed. The group of an image is its modality and location."""
    require(task == "vqa", f"slake has nothing for the task {task}: choose --task vqa")
    root = find_root(root, *MARKERS)

    for split, name in ("train", "train"), ("val", "validate"), ("test", "test"):
        path = root / f"{name}.json"
        for number, record in read_json_list(path, *KEYS):
            image = root / "imgs" / str(record["img_name"])
            if str(record["q_lang"]).strip().lower() != "en":
                yield Row(split, image, str(record["question"]), skip="not English")
            else:
                group = " ".join(str(record[key]) for key in ("modality", "location")
                                 if record.get(key))
                yield question_row(split, image, record, f"{path}, element {number}",
                                   group=group or None)
