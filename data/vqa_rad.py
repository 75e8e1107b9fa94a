"""VQA-RAD (Lau et al., Scientific Data 2018): clinicians' questions on radiology images.

As its authors publish it (osf.io/89kps):

    VQA_RAD Dataset Public.json          a list of {"qid": 1, "phrase_type": "freeform", …}
    VQA_RAD Image Folder/synpic54610.jpg

or in the split files that M³AE and others use (github.com/Awenbocc/med-vqa):

    {trainset,testset}.json    a list of {"qid": 1, "image_name": "synpic54610.jpg", …}
    valset.json                the same, optional
    images/synpic54610.jpg
"""
import sys
from pathlib import Path
from typing import Iterator

from data import Row, find_root, hash_to_unit, plain_value, read_json_list
from data.answers import question_row
from m3ae_mini.config import require

PUBLISHED = "VQA_RAD Dataset Public.json"
IMAGES = {"published": "VQA_RAD Image Folder", "split files": "images"}
MARKERS = PUBLISHED, "trainset.json", "testset.json"
KEYS = "qid", "image_name", "question", "answer", "answer_type"
PARTS = {"freeform": "train", "para": "train", "test_freeform": "test", "test_para": "test"}
HELD_OUT = 0.1   # of the training questions, if there is no validation set

Questions = list[tuple[str, dict]]   # (location, question) in the file's order


def rows(root: Path, task: str, rephrased: bool = False) -> Iterator[Row]:
    """Answers are normalised (data.answers). The group of an image is its organ, the patient its
    case (`image_case_url`, which only the published file has).

    The published file names its test questions by `phrase_type`. If trainset.json or testset.json
    is there too, they are read instead, and a line says so. The images may be in the folder of
    either layout.

    A tenth of the training questions is held out as validation, unless the split files have a
    valset.json with questions of its own. (The valset.json released with M³AE is a copy of
    testset.json.)

    Training questions and their answers become captions for pre-training. Questions of the test
    set do not. 14 of them are also in the released trainset.json: they are used for training as
    questions, but not as captions.

    rephrased: `question_rephrase` of a training question is one more training question. It is
    skipped if the question is held out, or if the same is already asked about the image.
    """
    require(task in ("vqa", "pretrain"),
            f"vqa_rad has nothing for the task {task}: choose --task vqa or pretrain")
    root = find_root(root, *MARKERS)
    layout = _layout(root)
    parts = _published(root / PUBLISHED) if layout == "published" else _split_files(root)
    images = _image_folder(root, layout)
    require(not rephrased or _has_rephrased(parts["train"]),
            f"the training questions in {root} have no question_rephrase: leave --rephrased out, "
            f"or keep '{PUBLISHED}' in a folder without trainset.json")

    tested = {_question(record) for _, record in parts["test"]}
    asked = {_question(record) for questions in parts.values() for _, record in questions}
    for part, questions in parts.items():
        for location, record in questions:
            held_out = part == "train" and "val" not in parts and _held_out(record)
            row = _row("val" if held_out else part, images, record, location, task)
            if task == "pretrain" and _question(record) in tested:
                row = row._replace(skip="question of the test set")
            yield row

            # The same answer to another question. Held-out questions must not come back by it.
            text = _optional(record, "question_rephrase", location)
            if rephrased and part == "train" and text:
                again = record | {"question": text}
                row = _row("train", images, again, location, task)
                if held_out:
                    row = row._replace(skip="rephrased question of validation")
                elif _question(again) in asked:
                    row = row._replace(skip="rephrased question that is asked already")
                asked.add(_question(again))
                yield row


# ----------------------------------------------------------------------------- reading both layouts

def _layout(root: Path) -> str:
    """"published" or "split files". If both are there, the split files, and a line says so."""
    published = (root / PUBLISHED).is_file()
    split_files = any((root / f"{part}set.json").is_file() for part in ("train", "test"))
    require(published or split_files, f"{root} has no '{PUBLISHED}' and no trainset.json: --root "
                                      "is the folder that holds one of them")
    if published and split_files:
        print(f"vqa_rad: reading trainset.json and testset.json of {root}; '{PUBLISHED}' is not "
              "used", file=sys.stderr)
    return "split files" if split_files else "published"


def _image_folder(root: Path, layout: str) -> Path:
    """The layout's own folder of images, or, if only that exists, the other layout's."""
    own = root / IMAGES[layout]
    others = [root / name for name in IMAGES.values() if (root / name).is_dir()]
    return own if own.is_dir() or not others else others[0]


def _published(path: Path) -> dict[str, Questions]:
    """{"train": …, "test": …} by the phrase_type of each question."""
    parts: dict[str, Questions] = {"train": [], "test": []}
    for location, record in _read(path, "phrase_type"):
        phrase_type = str(record["phrase_type"]).strip().lower()
        require(phrase_type in PARTS, f"{location}: the phrase_type is '{record['phrase_type']}', "
                                      f"it must be {', '.join(PARTS)}")
        parts[PARTS[phrase_type]].append((location, record))
    return parts


def _split_files(root: Path) -> dict[str, Questions]:
    """{"train": …, "test": …}, and "val" if valset.json has questions of its own."""
    parts = {"train": _read(root / "trainset.json"), "test": _read(root / "testset.json")}
    valset = root / "valset.json"
    if valset.is_file():
        validation = _read(valset)
        if not _is_copy(valset, validation, parts):
            parts["val"] = validation
    return parts


def _read(path: Path, *keys: str) -> Questions:
    """[(location, question)] in the file's order. `keys` are needed besides KEYS."""
    return [(f"{path}, element {number}", record)
            for number, record in read_json_list(path, *KEYS, *keys)]


def _is_copy(valset: Path, validation: Questions, parts: dict[str, Questions]) -> bool:
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


# ----------------------------------------------------------------------------------- rows of a part

def _row(split: str, images: Path, record: dict, location: str, task: str) -> Row:
    """The row of a question. For "pretrain" its text is question and answer."""
    row = question_row(split, images / str(record["image_name"]).strip(), record, location,
                       group=_optional(record, "image_organ", location))
    if task == "pretrain":
        row = row._replace(text=f"{row.text} {row.answer or ''}.")
    return row._replace(patient=_optional(record, "image_case_url", location))


def _has_rephrased(questions: Questions) -> bool:
    """Does any question have a question_rephrase?"""
    return any(_optional(record, "question_rephrase", location) for location, record in questions)


def _optional(record: dict, key: str, location: str) -> str | None:
    """The text under a key. None if it is missing, empty or "NULL", as the published file says."""
    value = plain_value(record.get(key), key, location)
    text = "" if value is None else str(value).strip()
    return None if text in ("", "NULL") else text


def _identity(record: dict) -> str:
    """The qid alone would do in the released files; others may count from 1 again."""
    return f"{record['qid']} {record['image_name']}"


def _question(record: dict) -> str:
    """Image and question. Hundreds of training questions occur twice, under two qids."""
    return f"{record['image_name']} {' '.join(str(record['question']).lower().split())}"


def _held_out(record: dict) -> bool:
    """By image and question, not by qid: those that occur twice must go the same way."""
    return hash_to_unit(_question(record)) < HELD_OUT
