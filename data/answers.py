"""What the readers of question-answering data sets share: the spelling of answers.

normalise_answer is the rule of the VQA v2 evaluation (Goyal et al., CVPR 2017), as in the M³AE
paper. It was made for photos: it drops signs. canonical_answer is the same rule, but signs,
comparisons and numbers survive it: "<5 mm" and ">5 mm", "HER2+" and "HER2-", "none" and "zero"
stay different. On VQA-RAD both give 498 answers, 461 of them in the training file.
"""
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

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

# Signs that canonical_answer keeps, in one spelling: (pattern, what stands there afterwards).
SIGNS = (
    (r"(?<![\d,])\d{1,3}(,\d{3})+(?![\d,])", lambda found: found[0].replace(",", "")),   # 1,000
    (r"\s*([<>]=?)\s*", r" \1"),                          # "< 5" is "<5"
    (r"(?<=\w)\s+([+-])(?=\s*([,;)]|$))", r"\1"),         # "ER +" at the end is "ER+"
    (r"(?<=\d)\s*([-/])\s*(?=\.?\d)", r"\1"),             # "2 - 3" is "2-3"
    (r"(^|\s)-\s+(?=\.?\d)", r"\1-"))                     # "- 2.5" is "-2.5"
KEEP = re.compile(
    r"[<>+]|(?<=[<>])=|\bnone\b"
    r"|(?<=[\w+%])-(?![\w-])"                             # HER2-
    r"|(?<![\w-])-(?=\.?\d)|(?<=\()-(?=\))|^-$"           # -2.5, (-)
    r"|(?<=\d)[-/](?=\.?\d)|(?<=\d),(?=\d)")              # 2-3, 1/2; 2,5
# While the rule of normalise_answer runs, each is a letter that no text uses.
LETTERS = {kept: chr(0xE000 + i) for i, kept in enumerate(("none", *"<>=+-/,"))}

_spellings: dict[str, set[str]] | None = None   # what collect_spellings collects


@contextmanager
def collect_spellings() -> Iterator[dict[str, set[str]]]:
    """Within the block: {answer: its spellings, as given}, of all answers that are normalised."""
    global _spellings
    _spellings = {}
    try:
        yield _spellings
    finally:
        _spellings = None


def canonical_answer(text: str) -> str:
    """normalise_answer that keeps signs, comparisons and numbers: "< 5 mm." -> "<5 mm".

    Kept are < > <= >=; every +; a - after a word, before a number or between two; a / between
    digits; a comma between digits unless it marks thousands; and none, which is no number.
    """
    kept = text.lower().strip()
    for pattern, instead in SIGNS:
        kept = re.sub(pattern, instead, kept)
    answer = _normalise(KEEP.sub(lambda found: LETTERS[found[0]], kept))
    for sign, letter in LETTERS.items():
        answer = answer.replace(letter, sign)
    return _collect(answer, text)


def normalise_answer(text: str) -> str:
    """The spelling in which answers are compared: "The X-ray, two views." -> "x ray 2 views".

    Lower case. A punctuation mark is removed if it touches a blank anywhere in the answer, or if
    the answer has a comma between two digits; else it becomes a blank. A full stop stays only
    before a digit. Number words become digits, articles go, lost apostrophes come back. An
    answer of nothing but articles and marks becomes "".
    """
    return _collect(_normalise(text), text)


def _collect(answer: str, given: str) -> str:
    """The answer, its spelling noted if somebody collects them."""
    if _spellings is not None:
        _spellings.setdefault(answer, set()).add(" ".join(given.split()))
    return answer


def _normalise(text: str) -> str:
    """The rule of normalise_answer."""
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
        answer = canonical_answer(str(answer).replace("#", " "))
    question = "" if record["question"] is None else str(record["question"])
    return Row(split, image, question, answer, closed=answer_type == "CLOSED", group=group)
