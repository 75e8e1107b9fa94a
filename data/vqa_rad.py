"""VQA-RAD (Lau et al., Scientific Data 2018): clinicians' questions on radiology images.

    {trainset,testset}.json    a list of {"qid": 1, "image_name": "synpic54610.jpg", …}
    valset.json                the same, optional
    images/synpic54610.jpg
"""
import sys
from pathlib import Path
from typing import Iterator

from data import Row, hash_to_unit, read_json_list
from data.answers import question_row
from m3ae_mini.config import require

KEYS = "qid", "image_name", "question", "answer", "answer_type"
HELD_OUT = 0.1   # of the training questions, if there is no validation set


def rows(root: Path, task: str) -> Iterator[Row]:
    """Answers are normalised (data.answers). The group of an image is its organ.

    A tenth of the training questions is held out as validation, unless there is a valset.json
    with questions of its own. (The valset.json released with M³AE is a copy of testset.json.)

    Training questions and their answers become captions for pre-training. Questions of the test
    set do not. 14 of them are also in the released trainset.json: they are used for training as
    questions, but not as captions.
    """
    require(task in ("vqa", "pretrain"),
            f"vqa_rad has nothing for the task {task}: choose --task vqa or pretrain")

    parts = {"train": _read(root / "trainset.json"), "test": _read(root / "testset.json")}
    valset = root / "valset.json"
    if valset.is_file():
        validation = _read(valset)
        if not _is_copy(valset, validation, parts):
            parts["val"] = validation

    tested = {_question(record) for _, record in parts["test"]}
    for part, questions in parts.items():
        for location, record in questions:
            held_out = part == "train" and "val" not in parts and _held_out(record)
            row = question_row("val" if held_out else part,
                               root / "images" / str(record["image_name"]), record, location,
                               group=str(record.get("image_organ") or ""))
            if task == "pretrain":
                skip = "question of the test set" if _question(record) in tested else None
                row = row._replace(text=f"{row.text} {row.answer or ''}.", skip=skip)
            yield row


def _read(path: Path) -> list[tuple[str, dict]]:
    """[(location, question)] in the file's order."""
    return [(f"{path}, element {number}", record)
            for number, record in read_json_list(path, *KEYS)]


def _is_copy(valset: Path, validation: list[tuple[str, dict]],
             parts: dict[str, list[tuple[str, dict]]]) -> bool:
    """Does the validation set share questions with test or training? If so, it is reported."""
    for part in "test", "train":
        known = {_identity(record) for _, record in parts[part]}
        shared = sum(_identity(record) in known for _, record in validation)
        if shared:
            print(f"vqa_rad: {valset} is not used, {shared:,} of its {len(validation):,} questions "
                  f"are those of {part}set.json; a tenth of the training questions is held out",
                  file=sys.stderr)
            return True
    return False


def _identity(record: dict) -> str:
    """The qid alone would do in the released files; others may count from 1 again."""
    return f"{record['qid']} {record['image_name']}"


def _question(record: dict) -> str:
    """Image and question. Hundreds of training questions occur twice, under two qids."""
    return f"{record['image_name']} {' '.join(str(record['question']).lower().split())}"


def _held_out(record: dict) -> bool:
    """By image and question, not by qid: those that occur twice must go the same way."""
    return hash_to_unit(_question(record)) < HELD_OUT
