"""What the readers of question-answering data sets share: the spelling of answers.

The spelling is that of the VQA v2 evaluation (Goyal et al., CVPR 2017), as in the M³AE paper.
"""
import re
from pathlib import Path

from data import Row
from m3ae_mini.config import require

WORDS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {word: str(number) for number, word in enumerate(WORDS)} | {"none": "0"}
ARTICLES = "a", "an", "the"
# No colon, apostrophe or percent sign: they stay. The full stop has a rule of its own.
PUNCTUATION = ",;?!()[]{}<>\"`/\\_-+=@"
# Looked up without their apostrophes. Left out are those that would then be another word (its,
# were, well, ill) or a word of medicine ("im" is intramuscular).
CONTRACTIONS = {word.replace("'", ""): word for word in (
    "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't "
    "mustn't needn't oughtn't shan't shouldn't wasn't weren't won't wouldn't could've might've "
    "must've should've would've couldn't've wouldn't've shouldn't've he'd he's how'd how's it'd "
    "it'll that'd that's there'd there's they'd they'll they're they've we've what'll what're "
    "what's where's who'd who'll who's why's you'd you'll you're you've o'clock ma'am "
    "y'all").split()}


def normalise_answer(text: str) -> str:
    """The spelling in which answers are compared: "The X-ray, two views." -> "x ray 2 views".

    Lower case. A punctuation mark is removed if it touches a blank anywhere in the answer, or if
    the answer has a comma between two digits; else it becomes a blank. A full stop stays only
    before a digit. Number words become digits, articles go, lost apostrophes come back. An
    answer of nothing but articles and marks becomes "".
    """
    text = given = text.lower()
    comma_in_number = re.search(r"\d,\d", given)
    for mark in PUNCTUATION:   # looks for blanks in the answer as given, not for those made here
        touches_blank = f" {mark}" in given or f"{mark} " in given
        text = text.replace(mark, "" if touches_blank or comma_in_number else " ")
    text = re.sub(r"\.(?!\d)", "", text)

    words = [NUMBERS.get(word, word) for word in text.split()]
    words = [word for word in words if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word.replace("'", ""), word) for word in words)


def question_row(split: str, image: Path, record: dict, location: str,
                 group: str | None = None) -> Row:
    """The row of a record with "question", "answer" (text or a number) and "answer_type".

    A "#" in the answer becomes a blank: in a pack it separates alternatives. UserError if
    answer_type is not OPEN or CLOSED (in any case, with or without blanks around it).
    """
    answer_type = str(record["answer_type"]).strip().upper()
    require(answer_type in ("OPEN", "CLOSED"),
            f"{location}: the answer_type is '{record['answer_type']}', it must be OPEN or CLOSED")
    answer = record["answer"]
    if answer is not None:
        answer = normalise_answer(str(answer).replace("#", " "))
    question = "" if record["question"] is None else str(record["question"])
    return Row(split, image, question, answer, closed=answer_type == "CLOSED", group=group)
