"""VQA-RAD (Lau et al., Scientific Data 2018): questions that clinicians asked about radiology pictures.

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
    """Answers are normalised (data.answers); pictures of one organ are of one kind.

    Without a valset.json, or with one that holds questions of the test set (the valset.json released with
    M³AE is a copy of testset.json), a tenth of the training questions is held out as validation.

    For pre-training, a question with its answer is a caption; those of the test set are left out."""
    if task not in ("vqa", "pretrain"):
        raise UserError(f"vqa_rad has nothing for the task {task}: choose --task vqa or pretrain")

    parts = {"train": _part(root / "trainset.json"), "test": _part(root / "testset.json")}
    valset = root / "valset.json"
    if valset.is_file():
        parts["val"] = _part(valset)
        test = {_identity(record) for _, record in parts["test"]}
        if shared := sum(_identity(record) in test for _, record in parts["val"]):
            print(f"vqa_rad: {valset} is not used, {shared:,} of its {len(parts['val']):,} questions are "
                  f"those of testset.json; a tenth of the training questions is held out", file=sys.stderr)
            del parts["val"]

    for part, questions in parts.items():
        for where, record in questions:
            split = "val" if part == "train" and "val" not in parts and _held_out(record) else part
            row = question_row(split, root / "images" / str(record["image_name"]), record, where,
                               group=str(record.get("image_organ") or ""))
            if task == "pretrain":
                held_back = "question of the test set" if split == "test" else None
                row = row._replace(text=f"{row.text} {row.answer or ''}.", skip=held_back)
            yield row


def _part(path: Path) -> list[tuple[str, dict]]:
    """[(file and number, question)] in the file's order."""
    return [(f"{path}, element {number}", record) for number, record in elements(path, *KEYS)]


def _identity(record: dict) -> str:
    """The qid alone would do in the released files; others may begin to count anew."""
    return f"{record['qid']} {record['image_name']}"


def _held_out(record: dict) -> bool:
    """By picture and question, not by qid: hundreds of questions stand twice in the training part, under two
    numbers, and both must go the same way."""
    question = " ".join(str(record["question"]).lower().split())
    return draw(f"{record['image_name']} {question}") < HELD_OUT
