"""VQA-RAD (Lau et al., Scientific Data 2018): questions that clinicians asked about radiology images.

    {trainset,testset}.json    a list of {"qid": 1, "image_name": "synpic54610.jpg", "question": …, …}
    valset.json                the same, where there is one
    images/synpic54610.jpg
"""
import sys
from pathlib import Path
from typing import Iterator

from data import Row, draw, elements
from data.answers import question_row
from m3ae_mini.config import UserError

KEYS = "qid", "image_name", "question", "answer", "answer_type"
HELD_OUT = 0.1   # of the training questions, where there is no validation part


def rows(root: Path, task: str) -> Iterator[Row]:
    """Answers are normalised (data.answers); images of one organ are of one kind.

    Without a valset.json, or with one that holds questions of another part (the valset.json released with
    M³AE is a copy of testset.json), a tenth of the training questions is held out as validation.

    For pre-training, a question with its answer is a caption; those of the test set are left out. (14 of them
    stand in the released trainset.json, too: they are no captions, but stay training questions.)"""
    if task not in ("vqa", "pretrain"):
        raise UserError(f"vqa_rad has nothing for the task {task}: choose --task vqa or pretrain")

    parts = {"train": _part(root / "trainset.json"), "test": _part(root / "testset.json")}
    valset = root / "valset.json"
    if valset.is_file():
        parts["val"] = _part(valset)
        for part in "test", "train":
            known = {_identity(record) for _, record in parts[part]}
            if shared := sum(_identity(record) in known for _, record in parts["val"]):
                print(f"vqa_rad: {valset} is not used, {shared:,} of its {len(parts['val']):,} questions are "
                      f"those of {part}set.json; a tenth of the training questions is held out",
                      file=sys.stderr)
                del parts["val"]
                break

    tested = {_question(record) for _, record in parts["test"]}
    for part, questions in parts.items():
        for where, record in questions:
            split = "val" if part == "train" and "val" not in parts and _held_out(record) else part
            row = question_row(split, root / "images" / str(record["image_name"]), record, where,
                               group=str(record.get("image_organ") or ""))
            if task == "pretrain":
                held_back = "question of the test set" if _question(record) in tested else None
                row = row._replace(text=f"{row.text} {row.answer or ''}.", skip=held_back)
            yield row


def _part(path: Path) -> list[tuple[str, dict]]:
    """[(file and number, question)] in the file's order."""
    return [(f"{path}, element {number}", record) for number, record in elements(path, *KEYS)]


def _identity(record: dict) -> str:
    """The qid alone would do in the released files; others may begin to count anew."""
    return f"{record['qid']} {record['image_name']}"


def _question(record: dict) -> str:
    """Image and question. Hundreds of questions stand twice in the training part, under two qids."""
    return f"{record['image_name']} {' '.join(str(record['question']).lower().split())}"


def _held_out(record: dict) -> bool:
    """By image and question, not by qid: those that stand twice must go the same way."""
    return draw(_question(record)) < HELD_OUT
