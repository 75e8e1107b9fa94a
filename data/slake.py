"""SLAKE (Liu et al., ISBI 2021): questions in English and Chinese about CT, MRI and X-ray images.

    {train,validate,test}.json    a list of {"img_name": "xmlab1/source.jpg", "q_lang": "en", …}
    imgs/xmlab1/source.jpg
"""
from pathlib import Path
from typing import Iterator

from data import Row, elements
from data.answers import question_row
from m3ae_mini.config import UserError

KEYS = "img_name", "question", "answer", "answer_type", "q_lang"


def rows(root: Path, task: str) -> Iterator[Row]:
    """Answers are normalised (data.answers). Only questions in English are packed, as in the paper. Images
    of one modality and location are of one kind."""
    if task != "vqa":
        raise UserError(f"slake has nothing for the task {task}: choose --task vqa")

    for split, name in ("train", "train"), ("val", "validate"), ("test", "test"):
        path = root / f"{name}.json"
        for number, record in elements(path, *KEYS):
            image = root / "imgs" / str(record["img_name"])
            if str(record["q_lang"]).strip().lower() != "en":
                yield Row(split, image, str(record["question"]), skip="not English")
            else:
                kind = [str(record[key]) for key in ("modality", "location") if record.get(key)]
                yield question_row(split, image, record, f"{path}, element {number}",
                                   group=" ".join(kind) or None)
