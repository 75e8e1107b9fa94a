"""What the readers of question-answering data sets share: answers in one spelling, rows made of a question.

The spelling is the one of the VQA v2 evaluation (Goyal et al., CVPR 2017), which the paper follows."""
import re
from pathlib import Path

from data import Row
from m3ae_mini.config import UserError

NUMBERS = {word: str(number) for number, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
ARTICLES = "a", "an", "the"
# No colon, no apostrophe and no percent sign: they stay. The full stop has a rule of its own.
PUNCTUATION = ",;?!()[]{}<>\"`/\\_-+=@"
# Known by their letters without apostrophes. Left out are those whose letters make another word (its, were,
# well, ill) or a word of medicine ("im" is intramuscular).
CONTRACTIONS = {word.replace("'", ""): word for word in (
    "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't "
    "oughtn't shan't shouldn't wasn't weren't won't wouldn't could've might've must've should've would've "
    "couldn't've wouldn't've shouldn't've he'd he's how'd how's it'd it'll that'd that's there'd there's "
    "they'd they'll they're they've we've what'll what're what's where's who'd who'll who's why's "
    "you'd you'll you're you've o'clock ma'am y'all").split()}


def normalise_answer(text: str) -> str:
    """An answer in the spelling in which answers are compared: "The X-ray, two views." -> "x ray 2 views".

    Lower case. A punctuation mark is removed where it touches a blank anywhere in the answer, or the answer
    has a comma between two digits; else it turns into a blank. A full stop stays only before a digit. Number
    words turn into digits, articles go, lost apostrophes come back. Nothing but articles and marks: ""."""
    text = given = text.lower()
    comma_in_number = re.search(r"\d,\d", given)
    for mark in PUNCTUATION:   # blanks are looked for in the answer as given, not among those made here
        touches_blank = f" {mark}" in given or f"{mark} " in given
        text = text.replace(mark, "" if touches_blank or comma_in_number else " ")
    text = re.sub(r"\.(?!\d)", "", text)

    words = [NUMBERS.get(word, word) for word in text.split()]
    words = [word for word in words if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word.replace("'", ""), word) for word in words)


def question_row(split: str, image: Path, record: dict, where: str, group: str | None = None) -> Row:
    """The row of a record with "question", "answer" (text or a number; "#" in it turns into a blank, as that
    stands between alternatives in a pack) and "answer_type" (OPEN or CLOSED, in any case, blanks around it).
    UserError, which begins with `where`, on anything else."""
    kind = str(record["answer_type"]).strip().upper()
    if kind not in ("OPEN", "CLOSED"):
        raise UserError(f"{where}: the answer_type is '{record['answer_type']}', it must be OPEN or CLOSED")
    answer = None if record["answer"] is None else normalise_answer(str(record["answer"]).replace("#", " "))
    question = "" if record["question"] is None else str(record["question"])
    return Row(split, image, question, answer, closed=kind == "CLOSED", group=group)
