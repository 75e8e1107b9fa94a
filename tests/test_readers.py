"""The readers for the downstream tasks, each on a miniature of its layout, and the spelling of answers."""
import csv
import gzip
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import (Row, clean_text, find_root, hash_to_unit, medpix, melinda, openi, prepare, read_csv, roco, rocov2,
                  slake, vqa_med_2019, vqa_rad, without_placeholders)
from data.answers import normalise_answer, question_row
from data.pack import SPLITS
from data.write_pack import filter_rows, unusable, write_pack
from m3ae_mini.config import UserError

REAL = Path(__file__).parent.parent.parent / "shared" / "data"
needs = partial(pytest.mark.skipif, reason="the real data set is not here")


def draw_images(folder, *names):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24), dtype=np.uint8)).save(path)


def write(path, content):
    """Text as it is, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def packed(reader, root, out, task="vqa"):
    """(meta.json, samples, skipped rows) of the pack"""
    meta = write_pack(reader.rows(root, task), out, "miniature", task, 8, root=root)
    table, skipped = ([json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]
                      for name in ("samples.jsonl", "skipped.jsonl"))
    return meta, table, skipped


def prepared(name, root, out, *flags):
    """The exit status of the command."""
    arguments = [name, "--root", root, "--out", out, "--size", "8", "--workers", "1", *flags]
    return prepare.main([str(argument) for argument in arguments])


# ------------------------------------------------------------------------------------------------- the folder

def test_the_folder_is_root_or_its_only_child_that_fits_or_its_parent(tmp_path, capsys, monkeypatch):
    data = tmp_path / "a [b]" / "set"                            # brackets mean something in a pattern
    write(data / "list.json", [])
    (data / "images").mkdir()
    (tmp_path / "a [b]" / "other").mkdir()
    (tmp_path / "a [b]" / "__MACOSX" / "images").mkdir(parents=True)
    write(tmp_path / "a [b]" / "__MACOSX" / "list.json", [])
    marker = ("images", "*.json")
    assert find_root(data, marker) == data and capsys.readouterr().err == ""
    for given in data.parent, data / "images", data / "list.json":
        assert find_root(given, "nothing", marker) == data
        assert capsys.readouterr().err == f"prepare: reading {data}, not {given}: the data set's files are there\n"
    monkeypatch.chdir(data / "images")
    assert find_root(Path("."), marker) == data

    # Nothing is chosen among two, and what does not fit stays: its reader names what is missing.
    assert find_root(data.parent, "images", "list.txt") == data
    assert find_root(data, ("images", "list.txt")) == data
    assert find_root(data / "nowhere", marker) == data / "nowhere"
    write(tmp_path / "a [b]" / "other" / "list.json", [])
    with pytest.raises(UserError, match=r"holds 2 folders with the data set's files \(other, set\): give one"):
        find_root(data.parent, "list.json")


# --------------------------------------------------------------------------------------------------- answers

@pytest.mark.parametrize("given, normal", [
    ("Yes", "yes"),
    (" The  Right\tlung. ", "right lung"),
    ("none", "0"), ("Two", "2"), ("ten", "10"), ("eleven", "eleven"),
    ("an MRI of a brain", "mri of brain"), ("the", ""), ("", ""),
    ("x-ray", "x ray"), ("MRI/FLAIR", "mri flair"),            # no blank at the mark: it turns into one
    ("MR - ADC", "mr adc"), ("Air?", "air"),
    ("X-ray - plain film", "xray plain film"),                 # it touches a blank elsewhere: both go
    ("pain, jaundice,weight loss", "pain jaundiceweight loss"),
    ("well-defined, small", "well defined small"),             # each mark for itself
    ("x-ray/-film", "x ray film"),                             # blanks that were not given do not count
    ("1,000 x-ray", "1000 xray"), ("1,000/2", "10002"),        # a comma between digits: all marks go
    ("3.4 cm", "3.4 cm"), ("vs. T2.", "vs t2"), ("about .5", "about .5"),
    ("dont know", "don't know"), ("couldn'tve", "couldn't've"), ("isn't", "isn't"),
    ("its well", "its well"), ("im contrast", "im contrast"),  # words of their own
    ("patient's 5% : ok", "patient's 5% : ok"),                # marks that stay
])
def test_answers_in_one_spelling(given, normal):
    assert normalise_answer(given) == normal


# --------------------------------------------------------------------------------------------------- VQA-RAD

def rad_entry(qid, answer="Yes", kind="CLOSED", image=None, question=None):
    return {"qid": qid, "image_name": f"synpic{image or qid % 20}.jpg", "image_organ": "CHEST",
            "question": question or f"Is finding {qid} there?", "answer": answer, "answer_type": kind}


def rad_miniature(root):
    train = [rad_entry(qid) for qid in range(200)]
    train += [rad_entry(200 + qid, image=qid % 20, question=f"  is finding {qid}  THERE? ")
              for qid in range(1, 100) if qid % 20]                                  # asked again
    train[0] |= {"answer": 12, "answer_type": "OPEN"}                                # a JSON number
    train[1] |= {"answer": "The X-ray", "answer_type": "closed "}
    write(root / "trainset.json", train)
    write(root / "testset.json", [rad_entry(qid, 2.5, " Open") for qid in range(900, 910)])
    draw_images(root / "images", *[f"synpic{i}.jpg" for i in range(20)])


def test_vqa_rad(tmp_path):
    root = tmp_path / "rad"
    rad_miniature(root)
    rows = list(vqa_rad.rows(root, "vqa"))
    assert len(rows) == 305
    assert rows[0]._replace(split="") == Row("", root / "images" / "synpic0.jpg", "Is finding 0 there?", "12",
                                             closed=False, group="CHEST")
    assert (rows[1].answer, rows[1].closed) == ("x ray", True)
    assert {(row.answer, row.closed) for row in rows if row.split == "test"} == {("2.5", False)}

    held = {(row.image, clean_text(row.text).lower()) for row in rows if row.split == "val"}
    learned = {(row.image, clean_text(row.text).lower()) for row in rows if row.split == "train"}
    assert not held & learned and 10 <= len(held) <= 30
    write(root / "trainset.json", json.loads((root / "trainset.json").read_text())[::-1])
    again = list(vqa_rad.rows(root, "vqa"))   # nothing but the question itself decides
    assert sorted(map(str, again)) == sorted(map(str, rows))

    meta, samples, _ = packed(vqa_rad, root, tmp_path / "pack")
    assert meta["images"] == 20 and sum(meta["samples"].values()) == 305 and not meta["skipped"]
    assert [sample["answer"] for sample in samples if sample["split"] == "test"] == ["2.5"] * 10
    with pytest.raises(UserError, match="nothing for the task cls"):
        list(vqa_rad.rows(root, "cls"))

    captions = list(vqa_rad.rows(root, "pretrain"))          # nothing of the test set, no answer left out
    assert [row.text for row in captions] == [f"{row.text} {row.answer}." for row in again]
    assert all(bool(row.skip) == (row.split == "test") for row in captions)


def test_a_mark_between_alternatives_is_none_within_an_answer(tmp_path):
    record = {"question": "Where?", "answer": "L4#L5", "answer_type": "OPEN"}
    row = question_row("train", tmp_path, record, "")
    assert row.answer == "l4 l5"


def test_vqa_rad_uses_a_valset_unless_it_is_a_copy(tmp_path, capsys):
    rad_miniature(tmp_path)
    held_out = list(vqa_rad.rows(tmp_path, "vqa"))
    write(tmp_path / "valset.json", [rad_entry(qid) for qid in range(500, 505)])
    rows = list(vqa_rad.rows(tmp_path, "vqa"))
    assert [sum(row.split == split for row in rows) for split in SPLITS] == [295, 5, 10]
    assert capsys.readouterr().err == ""

    write(tmp_path / "valset.json", json.loads((tmp_path / "testset.json").read_text()))
    assert list(vqa_rad.rows(tmp_path, "vqa")) == held_out
    assert "not used, 10 of its 10 questions are those of testset.json" in capsys.readouterr().err
    write(tmp_path / "valset.json", json.loads((tmp_path / "trainset.json").read_text())[:7])
    assert list(vqa_rad.rows(tmp_path, "vqa")) == held_out
    assert "not used, 7 of its 7 questions are those of trainset.json" in capsys.readouterr().err


def test_vqa_rad_leaves_a_test_question_out_of_the_captions_wherever_it_stands(tmp_path):
    rad_miniature(tmp_path)
    train = json.loads((tmp_path / "trainset.json").read_text())
    twin = rad_entry(900, 2.5, " Open") | {"qid": 300}                                # as one of the test set
    write(tmp_path / "trainset.json", [*train, twin])
    captions = [row for row in vqa_rad.rows(tmp_path, "pretrain") if "finding 900 " in row.text]
    assert len(captions) == 2 and all(row.skip for row in captions)
    assert not any(row.skip for row in vqa_rad.rows(tmp_path, "vqa"))


@pytest.mark.parametrize("content, sentence", [
    ('[{"qid": 1},\n {"qid": ]', "trainset.json, line 2: not valid JSON"),
    ('{"qid": 1}', "trainset.json: not a JSON list"),
    ([rad_entry(1), 7], "trainset.json, element 2: not a JSON object"),
    ([rad_entry(1), {"qid": 2, "image_name": "a", "answer": "b", "answer_type": "OPEN"}],
     "element 2: has no question"),
    ([rad_entry(1, kind="OPNE")], "element 1: the answer_type is 'OPNE'"),
    ([rad_entry(1, answer=["yes"])], "element 1: the answer is not plain text"),
])
def test_a_malformed_list_is_named_by_file_and_element(tmp_path, content, sentence):
    rad_miniature(tmp_path)
    write(tmp_path / "trainset.json", content)
    with pytest.raises(UserError, match=sentence):
        list(vqa_rad.rows(tmp_path, "vqa"))


def test_odd_but_legal_values_are_counted(tmp_path):
    rad_miniature(tmp_path / "rad")
    train = json.loads((tmp_path / "rad" / "trainset.json").read_text())
    train[2]["answer"], train[3]["answer"], train[4]["question"], train[5]["image_organ"] = None, "A", None, 5
    (tmp_path / "rad" / "images" / "synpic7.jpg").unlink()
    write(tmp_path / "rad" / "trainset.json", train)
    meta, samples, skipped = packed(vqa_rad, tmp_path / "rad", tmp_path / "pack")   # 1 of 20 is not above 5 %
    assert meta["skipped"]["no answer"] == 2 and meta["skipped"]["no text"] == 1
    missing = [entry for entry in skipped if entry["reason"] == "missing image"]
    assert missing and all(entry["image"].endswith("synpic7.jpg") for entry in missing)
    assert len(skipped) == len(missing) + 3 and len(samples) + len(skipped) == 305 and "5" in meta["groups"]

    (tmp_path / "rad" / "images" / "synpic8.jpg").unlink()
    with pytest.raises(UserError, match=r"2 of 20 images .*synpic[78].jpg \(missing image\)"):
        packed(vqa_rad, tmp_path / "rad", tmp_path / "strict")


RAD_KEYS = ("qid", "phrase_type", "qid_linked_id", "image_case_url", "image_name", "image_organ", "evaluation",
            "question", "question_rephrase", "question_relation", "question_frame", "question_type", "answer",
            "answer_type")


def published_entry(qid, phrase_type="freeform", answer="Yes", kind="CLOSED", **more):
    """A record of the published file, with its 14 keys."""
    image = qid % 20
    known = dict.fromkeys(RAD_KEYS, "NULL") | rad_entry(qid, answer, kind) | {
        "phrase_type": phrase_type, "qid_linked_id": f"03f451ca-de62-4617-9679-{qid:012}", "evaluation": "evaluated",
        "image_case_url": f"https://medpix.nlm.nih.gov/case?id=b197277b-{image // 2}", "question_type": "PRES, ABN"}
    return known | more


def published_miniature(root):
    """200 training questions, 9 test questions, and what is odd in the real file."""
    records = [published_entry(qid, "para" if qid % 3 == 0 else "freeform") for qid in range(200)]
    records[0] |= {"answer": 12, "answer_type": "OPEN"}                              # a JSON number
    records[1] |= {"answer": "\tThe X-ray\t", "answer_type": "CLOSED "}
    for qid in range(0, 200, 2):
        records[qid]["question_rephrase"] = f"Can finding {qid} be seen?"
    del records[3]["question_rephrase"]
    records[4]["question_rephrase"] = None
    records[6]["question_rephrase"] = "is finding 26  there?"                        # another one's question
    records[8]["question_rephrase"] = "Is finding 908 there?"                        # of the test set
    records += [published_entry(qid, "test_para" if qid % 3 == 0 else "test_freeform", 2.5, "OPEN",
                                question_rephrase="Which one is it?") for qid in range(901, 910)]
    write(root / "VQA_RAD Dataset Public.json", records)
    draw_images(root / "VQA_RAD Image Folder", *[f"synpic{i}.jpg" for i in range(20)])


def test_vqa_rad_as_published(tmp_path, capsys):
    root = tmp_path / "osfstorage-archive"
    published_miniature(root)
    rows = list(vqa_rad.rows(root, "vqa"))
    image = root / "VQA_RAD Image Folder" / "synpic0.jpg"
    assert rows[0]._replace(split="") == Row("", image, "Is finding 0 there?", "12", closed=False, group="CHEST",
                                             patient="https://medpix.nlm.nih.gov/case?id=b197277b-0")
    assert (rows[1].answer, rows[1].closed) == ("x ray", True)
    assert [row.split == "test" for row in rows] == [False] * 200 + [True] * 9
    assert 10 <= sum(row.split == "val" for row in rows) <= 30 and not any(row.skip for row in rows)
    captions = [row for row in vqa_rad.rows(root, "pretrain") if not row.skip]
    assert [row.text for row in captions] == [f"{row.text} {row.answer}." for row in rows[:200]]

    # What is held out is what the same questions in split files hold out.
    records = json.loads((root / "VQA_RAD Dataset Public.json").read_text())
    write(tmp_path / "split" / "trainset.json", records[:200])
    write(tmp_path / "split" / "testset.json", records[200:])
    by_files = list(vqa_rad.rows(tmp_path / "split", "vqa"))
    assert [row.split for row in by_files] == [row.split for row in rows]

    assert prepared("vqa_rad", tmp_path, tmp_path / "pack", "--task", "vqa") == 2     # which of the two folders?
    assert "holds 2 folders" in capsys.readouterr().err
    (tmp_path / "split" / "trainset.json").rename(tmp_path / "moved.json")
    (tmp_path / "split" / "testset.json").unlink()
    assert prepared("vqa_rad", tmp_path, tmp_path / "pack", "--task", "vqa") == 0
    assert f"prepare: reading {root}, not {tmp_path}:" in capsys.readouterr().err
    assert prepared("vqa_rad", root / "VQA_RAD Image Folder", tmp_path / "two", "--task", "vqa") == 0
    lines = [(tmp_path / out / "samples.jsonl").read_text() for out in ("pack", "two")]
    assert lines[0] == lines[1].replace("..", "osfstorage-archive") and lines[0].count("\n") == 209

    records[7]["phrase_type"] = "test"
    write(root / "VQA_RAD Dataset Public.json", records)
    with pytest.raises(UserError, match="Public.json, element 8: the phrase_type is 'test', it must be freeform"):
        list(vqa_rad.rows(root, "vqa"))
    with pytest.raises(UserError, match="has no 'VQA_RAD Dataset Public.json' and no trainset.json: --root is"):
        list(vqa_rad.rows(tmp_path / "split", "vqa"))


def test_vqa_rad_in_both_layouts_says_which_it_reads(tmp_path, capsys):
    published_miniature(tmp_path)
    list(vqa_rad.rows(tmp_path, "vqa"))
    assert capsys.readouterr().err == ""
    write(tmp_path / "testset.json", [rad_entry(900)])
    write(tmp_path / "trainset.json", [rad_entry(1), rad_entry(2)])
    rows = list(vqa_rad.rows(tmp_path, "vqa"))                   # with the one folder of images that is there
    assert len(rows) == 3 and rows[0].image == tmp_path / "VQA_RAD Image Folder" / "synpic1.jpg"
    said = capsys.readouterr().err
    assert f"reading trainset.json and testset.json of {tmp_path}; 'VQA_RAD Dataset Public.json' is not" in said
    draw_images(tmp_path / "images", "synpic1.jpg")
    assert next(vqa_rad.rows(tmp_path, "vqa")).image == tmp_path / "images" / "synpic1.jpg"
    with pytest.raises(UserError, match="have no question_rephrase: leave --rephrased out"):
        list(vqa_rad.rows(tmp_path, "vqa", rephrased=True))


def test_rephrased_questions_train_and_leak_nothing(tmp_path, capsys):
    published_miniature(tmp_path)
    plain = list(vqa_rad.rows(tmp_path, "vqa"))
    rows = list(vqa_rad.rows(tmp_path, "vqa", rephrased=True))
    more = [row for row in rows if row not in plain]
    assert [row for row in rows if row in plain] == plain and len(more) == 99        # of every second, but for null
    assert {row.split for row in more} == {"train"} and more[0].answer == "12" and more[0].closed is False

    by_question = {row.text: row for row in plain}
    reasons = {row.text: row.skip for row in more}
    assert reasons.pop("is finding 26  there?") and reasons.pop("Is finding 908 there?")
    for text, skip in reasons.items():
        own = by_question[text.replace("Can", "Is").replace("be seen", "there")]
        assert skip == ("rephrased question of validation" if own.split == "val" else None)
    assert 3 <= sum(skip is not None for skip in reasons.values()) <= 20

    flags = "--task", "vqa", "--rephrased"
    assert prepared("vqa_rad", tmp_path, tmp_path / "pack", *flags) == 0
    meta = json.loads((tmp_path / "pack" / "meta.json").read_text())
    assert sum(meta["samples"].values()) + sum(meta["skipped"].values()) == 209 + 99
    assert prepared("slake", tmp_path, tmp_path / "none", *flags) == 2
    assert "--rephrased is for vqa_rad: leave it out for slake" in capsys.readouterr().err
    texts = [row.text for row in vqa_rad.rows(tmp_path, "pretrain", rephrased=True) if not row.skip]
    assert "Can finding 0 be seen? 12." in texts or by_question["Is finding 0 there?"].split == "val"


# ------------------------------------------------------------------------------------------------------ SLAKE

def slake_entry(name, question, answer="Yes", kind="CLOSED", language="en", **more):
    return {"img_name": name, "question": question, "answer": answer, "answer_type": kind,
            "q_lang": language, "qid": 1, "modality": "MRI", "location": "Brain", **more}


def test_slake(tmp_path):
    root = tmp_path / "slake"
    write(root / "train.json", [
        slake_entry("xmlab1/source.jpg", "Which organ is it?", "The Liver, Kidney", "OPEN "),
        slake_entry("xmlab1/source.jpg", "图中有什么器官?", "肝脏", "OPEN", "zh"),
        slake_entry("xmlab1/source.jpg", "How many kidneys?", 2, "open", location="")])
    write(root / "validate.json", [slake_entry("xmlab2/source.jpg", "Is it an MRI?", "No", " closed")])
    write(root / "test.json", [slake_entry("xmlab2/source.jpg", "器官?", "是", language="zh")])
    draw_images(root / "imgs", "xmlab1/source.jpg", "xmlab2/source.jpg")
    rows = list(slake.rows(root, "vqa"))
    image = root / "imgs" / "xmlab1" / "source.jpg"
    assert rows[0] == Row("train", image, "Which organ is it?", "liver kidney", False, group="MRI Brain")
    assert rows[1] == Row("train", image, "图中有什么器官?", skip="not English")
    assert (rows[2].answer, rows[2].closed, rows[2].group) == ("2", False, "MRI")
    assert (rows[3].split, rows[3].answer, rows[3].closed) == ("val", "no", True)

    meta, _, _ = packed(slake, root, tmp_path / "pack")
    assert meta["images"] == 2 and meta["samples"] == {"train": 2, "val": 1, "test": 0}
    assert meta["skipped"] == {"not English": 2}
    with pytest.raises(UserError, match="nothing for the task irtr"):
        list(slake.rows(root, "irtr"))

    entry = slake_entry("a", "b")
    del entry["q_lang"]
    write(root / "test.json", [entry])
    with pytest.raises(UserError, match="test.json, element 1: has no q_lang"):
        list(slake.rows(root, "vqa"))
    (root / "validate.json").unlink()
    with pytest.raises(UserError, match="validate.json cannot be read"):
        list(slake.rows(root, "vqa"))


@pytest.mark.parametrize("given", ["", "Slake1.0", "Slake1.0/Slake1.0", "Slake1.0/Slake1.0/imgs"])
def test_slake_as_it_unpacks(tmp_path, given, capsys):
    """A folder of the same name in a folder; --root one level too high or too low is found."""
    folder = tmp_path / "Slake1.0" / "Slake1.0"
    for name in "train", "validate", "test":
        entry = slake_entry("xmlab1/source.jpg", f"Is it {name}?", img_id=1, base_type="vqa", content_type="Plane",
                            triple=["vhead", "_", "_"])
        write(folder / f"{name}.json", [entry])
    draw_images(folder / "imgs", "xmlab1/source.jpg", "xmlab1/mask.png")
    write(folder / "KG" / "organ.csv", "organ#attribute#value\n")
    write(folder / "mask.txt", "1:liver\n")
    (tmp_path / "__MACOSX" / "Slake1.0" / "imgs").mkdir(parents=True)
    out = tmp_path / "pack"
    if given == "":                                              # two levels: a sentence
        assert prepared("slake", tmp_path, out, "--task", "vqa") == 2
        assert f"{tmp_path}/train.json cannot be read" in capsys.readouterr().err
        return
    assert prepared("slake", tmp_path / given, out, "--task", "vqa") == 0
    said = capsys.readouterr().err.count(f"prepare: reading {folder}, not {tmp_path / given}:")
    assert said == (given != "Slake1.0/Slake1.0")
    (line, *more) = (out / "samples.jsonl").read_text().splitlines()
    assert json.loads(line)["source"] == "imgs/xmlab1/source.jpg" and len(more) == 2


def test_lists_that_are_hostile(tmp_path):
    """Too deep, numbers too long, lists for texts: one sentence. Names that no system takes: a missing
    image. What is quoted on the terminal can't command it."""
    rad_miniature(tmp_path)
    for content, sentence in (("[" * 10 ** 5, "line 1: not valid JSON .too deep"),
                              ("[" + "1" * 5000 + "]", "not valid JSON .a number with too many"),
                              (json.dumps([rad_entry(1) | {"image_name": ["a"]}]), "image_name is not plain"),
                              (json.dumps([rad_entry(1, kind="\x1b[2J\n")]), r"answer_type is ' \[2J '")):
        write(tmp_path / "trainset.json", content)
        with pytest.raises(UserError, match=f"trainset.json, .*{sentence}") as error:
            list(vqa_rad.rows(tmp_path, "vqa"))
        assert str(error.value).isprintable()
    for name in "\ud800.jpg", "a\0b.jpg", "x" * 5000:
        assert unusable(tmp_path / name, tmp_path) == "missing image"


# ---------------------------------------------------------------------------------------------- VQA-Med-2019

MED_TEST = "VQAMed2019_Test_Questions_w_Ref_Answers.txt"


def med_miniature(root):
    for split, part in ("train", "Training"), ("val", "Validation"):
        folder = root / f"ImageClef-2019-VQA-Med-{part}"
        for i, category in enumerate(vqa_med_2019.CATEGORIES, start=1):
            write(folder / "QAPairsByCategory" / f"C{i}_{category}_{split}.txt",
                  f"synpic1|what is the {category}?|The {category}, one\nsynpic2|is it so?|yes\n")
        draw_images(folder / f"{split.capitalize()}_images", "synpic1.jpg", "synpic2.jpg")
    write(root / MED_TEST, "synpic9|modality|Which?|cta - ct angiography\r\n\r\n"
                           "synpic9|Organ|Which organ?|heart and vessels#Lung, mediastinum#The\n"
                           "synpic8|abnormality|What is wrong?|a#b\n")
    draw_images(root / "VQAMed2019Test" / "VQAMed2019_Test_Images", "synpic8.jpg", "synpic9.jpg")


def test_vqa_med_2019(tmp_path):
    root = tmp_path / "med"
    med_miniature(root)
    rows = list(vqa_med_2019.rows(root, "vqa"))
    assert [sum(row.split == split for row in rows) for split in SPLITS] == [6, 6, 3]
    images = root / "ImageClef-2019-VQA-Med-Training" / "Train_images"
    assert rows[0] == Row("train", images / "synpic1.jpg", "what is the Modality?", "modality 1")
    assert all(row.closed is None for row in rows)
    assert rows[-3].answer == "cta ct angiography" and rows[-2].answer == "heart and vessels#lung mediastinum"
    assert rows[-1].skip == "question on abnormality" and rows[-2].skip is None
    meta, _, _ = packed(vqa_med_2019, root, tmp_path / "pack")
    assert meta["samples"] == {"train": 6, "val": 6, "test": 2} and meta["images"] == 5
    assert meta["skipped"] == {"question on abnormality": 1}

    test = root / MED_TEST
    for lines, sentence in [("a|organ|b|c\na|b|c", "line 2: 3 parts between |, not 4"),
                            ("x", "line 1: 1 parts")]:
        write(test, lines)
        with pytest.raises(UserError) as error:
            list(vqa_med_2019.rows(root, "vqa"))
        assert f"{MED_TEST}, {sentence}" in str(error.value)
    test.unlink()
    with pytest.raises(UserError, match=f"has no {MED_TEST}.*--root is the folder"):
        list(vqa_med_2019.rows(root, "vqa"))


@pytest.mark.parametrize("given, read", [
    (".", None), ("..", "."), ("VQAMed2019Test", "."), ("ImageClef-2019-VQA-Med-Training", ".")])
def test_vqa_med_2019_as_it_unpacks(tmp_path, given, read, capsys):
    """The archives beside each other; --root may be a level off."""
    root = tmp_path / "above" / "med"
    med_miniature(root)
    (root / MED_TEST).rename(root / "VQAMed2019Test" / MED_TEST)
    folder = (root / given).resolve()
    rows = list(vqa_med_2019.rows(folder, "vqa"))
    assert len(rows) == 15 and all(row.image.is_file() for row in rows)
    assert (f"prepare: reading {root}, not {folder}:" in capsys.readouterr().err) == (read is not None)


def test_vqa_med_2019_in_folders_of_the_same_name(tmp_path, capsys):
    """As some programs unpack: training/training/…, with what a Mac adds; and all in one folder."""
    med_miniature(tmp_path / "med")
    draw_images(tmp_path / "med" / "__MACOSX" / "Train_images", "._synpic1.jpg")
    for name in "ImageClef-2019-VQA-Med-Training", "ImageClef-2019-VQA-Med-Validation":
        (tmp_path / "med" / name).rename(tmp_path / "moved")
        (tmp_path / "med" / name).mkdir()
        (tmp_path / "moved").rename(tmp_path / "med" / name / name)
    rows = list(vqa_med_2019.rows(tmp_path / "med", "vqa"))
    assert len(rows) == 15 and all(row.image.is_file() for row in rows)

    for path in [*(tmp_path / "med").glob("*/*/QAPairsByCategory/*.txt"), *(tmp_path / "med").glob("*/*/*_images")]:
        path.rename(tmp_path / "med" / path.name)
    assert len(list(vqa_med_2019.rows(tmp_path / "med", "vqa"))) == 15
    assert capsys.readouterr().err == ""


def test_vqa_med_2019_in_the_layout_of_the_release(tmp_path):
    root = tmp_path / "med"
    for split in SPLITS:
        for category in vqa_med_2019.CATEGORIES:
            write(root / split / "QA" / f"{category}.csv",
                  "synpic3|what is it?|CT\nsynpic3.jpg|or?|A#Three\n")
        draw_images(root / split / "images", "synpic3.jpg")
    rows = list(vqa_med_2019.rows(root, "vqa"))
    assert len(rows) == 18 and {row.answer for row in rows} == {"ct", "3"}
    assert {row.image for row in rows} == {root / split / "images" / "synpic3.jpg" for split in SPLITS}
    (root / "val" / "QA" / "Plane.csv").unlink()
    with pytest.raises(UserError, match="Plane.csv cannot be read"):
        list(vqa_med_2019.rows(root, "vqa"))
    with pytest.raises(UserError, match="nothing for the task cls"):
        list(vqa_med_2019.rows(root, "cls"))


# ---------------------------------------------------------------------------------------------------- MELINDA

MELINDA = "figure_file", "caption", "i_meth", "p_meth", "i_meth_label", "p_meth_label"


def write_csv(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def test_melinda(tmp_path):
    root = tmp_path / "melinda"
    write_csv(root / "train.csv", MELINDA,
              ("1_A.png", "Western blot,\n\nof \"X\".", "a", "b", "c", "blot"),
              ("1_A.png", "Second caption", "a", "b", "c", "gel"), ("1_B.png", "None", "a", "b", "c", " "))
    write_csv(root / "dev.csv", MELINDA, ("2.png", "Dev", "a", "b", "c", "blot"))
    write_csv(root / "test.csv", MELINDA, ("3.png", "Test", "a", "b", "c", "gel"))
    draw_images(root / "melinda_images", "1_A.png", "1_B.png", "2.png", "3.png")
    rows = list(melinda.rows(root, "cls"))
    assert rows[0] == Row("train", root / "melinda_images" / "1_A.png", "Western blot,\n\nof \"X\".",
                          label="blot")
    assert [row.split for row in rows] == ["train"] * 3 + ["val", "test"]
    meta, samples, _ = packed(melinda, root, tmp_path / "pack", "cls")
    assert meta["labels"] == ["blot", "gel"] and meta["skipped"] == {"no label": 1}
    assert samples[0]["text"] == 'Western blot, of "X".' and meta["samples"]["train"] == 2

    (root / "melinda_images" / "2.png").unlink()
    with pytest.raises(UserError, match=r"1 of 3 images .*2.png \(missing image\)"):
        packed(melinda, root, tmp_path / "gone", "cls")
    with pytest.raises(UserError, match="nothing for the task vqa"):
        list(melinda.rows(root, "vqa"))


@pytest.mark.parametrize("content, sentence", [
    ("figure_file,caption\na,b\n", "train.csv, line 1: has no p_meth_label"),
    ("", "line 1: has no figure_file and no caption and no p_meth_label"),
    ("figure_file,caption,p_meth_label\na,b,c\na,b\n", "train.csv, line 3: 2 fields, not 3"),
    ('figure_file,caption,p_meth_label\na,"b,c\n', "train.csv, line 2: not valid CSV"),
])
def test_a_malformed_csv_is_named_by_file_and_line(tmp_path, content, sentence):
    write(tmp_path / "train.csv", content)
    with pytest.raises(UserError, match=sentence):
        list(melinda.rows(tmp_path, "cls"))


def test_a_gz_is_read_as_it_is_unpacked_and_a_torn_one_is_named(tmp_path):
    path = tmp_path / "table.csv.gz"
    content = "".join(f"{i},{hash_to_unit(str(i))}\r\n" for i in range(3000)).encode()
    whole = gzip.compress(b"\xef\xbb\xbfname,value\r\n" + content)                 # with a byte order mark
    path.write_bytes(whole)
    rows = list(read_csv(path, "name", "value"))
    assert len(rows) == 3000 and rows[1] == (3, {"name": "1", "value": str(hash_to_unit("1"))})
    for damaged, why in ((whole[:-900], "ended before"), (whole[:-8] + b"12345678", "CRC check failed"),
                         (whole[:10] + b"\xff" + whole[11:], "Error -3"), (b"name,value\r\n1,2", "Not a gzipped file")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"table.csv.gz is not a whole gzip file \(.*({why}).*download it again"):
            list(read_csv(path, "name"))
    path.unlink()
    with pytest.raises(UserError, match=r"table.csv.gz cannot be read \(No such file"):
        list(read_csv(path, "name"))


# -------------------------------------------------------------------------------------------------- retrieval

def test_retrieval_takes_an_image_with_two_captions_and_no_pair_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(roco, "RETRIEVAL_PAIRS", 3)
    lines = ["ROCO_1\tA first caption.", "ROCO_1\tA second caption.", "ROCO_2\tToo short",
             "ROCO_3\tAnother long caption.", "ROCO_4\tOne more caption."]
    for name in "train", "validation", "test":
        write(tmp_path / "roco" / name / "radiology" / "captions.txt", "\n".join(lines))
        draw_images(tmp_path / "roco" / name / "radiology" / "images",
                      *[f"ROCO_{i}.jpg" for i in range(1, 5)])
    meta, samples, _ = packed(roco, tmp_path / "roco", tmp_path / "pack", "irtr")
    assert meta["samples"] == {"train": 4, "val": 3, "test": 3}
    _, again, _ = packed(roco, tmp_path / "roco", tmp_path / "again", "irtr")
    assert samples == again


# ------------------------------------------------------------------------------------- ROCO as Kaggle has it

def test_roco_of_kaggle(tmp_path, capsys):
    """Tables for captions.txt, images under their names of PubMed Central; one cannot be opened."""
    root = tmp_path / "all_data"
    for name, split, numbers in (("train", "train", range(25)), ("validation", "val", range(30, 32)),
                                 ("test", "test", range(40, 42))):
        folder = root / name / "radiology"
        files = {i: f"PMC40837{i:02}_AMHSR-4-14-g002.jpg" for i in numbers}
        write_csv(folder / f"radiology{split}data.csv", ("id", "name", "caption"),
                  *[(f"ROCO_{i:05}", file, f' Axial CT, "number" {i}.\n') for i, file in files.items()])
        draw_images(folder / "images", *files.values())
        write(root / name / "non-radiology" / f"{split}data.csv", "id,name,caption\n")
        write(root / name / "non-radiology" / "captions.txt", "ROCO_00001\tA photograph of it.\n")
    with open(root / "train" / "radiology" / "radiologytraindata.csv", "a") as file:
        file.write("ROCO_00090,PMC4083700_AMHSR-4-14-g002.jpg,Two words\r\n"
                   "ROCO_00091,PMC4240561_MA-68-291-g002.jpg,An image that is broken\r\n")
    (root / "train" / "radiology" / "images" / "PMC4240561_MA-68-291-g002.jpg").write_bytes(b"\xff\xd8\xff no more")

    rows = list(roco.rows(root, "pretrain"))
    assert rows[1] == Row("train", root / "train/radiology/images/PMC4083701_AMHSR-4-14-g002.jpg",
                          ' Axial CT, "number" 1.\n')
    assert prepared("roco", tmp_path, tmp_path / "pack") == 0
    assert f"prepare: reading {root}, not {tmp_path}" in capsys.readouterr().err
    meta = json.loads((tmp_path / "pack" / "meta.json").read_text())
    assert meta["samples"] == {"train": 25, "val": 2, "test": 2} and meta["images"] == 29
    assert meta["skipped"] == {"under 3 words": 1, "unreadable image": 1}
    assert "PMC4240561_MA-68-291-g002.jpg" in (tmp_path / "pack" / "skipped.jsonl").read_text()
    assert prepared("roco", root / "test", tmp_path / "irtr", "--task", "irtr") == 0

    write(root / "test" / "radiology" / "captions.txt", "PMC4083740_AMHSR-4-14-g002\tThe text file is read.\n")
    assert [row.text for row in roco.rows(root, "pretrain") if row.split == "test"] == ["The text file is read.\n"]


# ----------------------------------------------------------------------------------------------------- ROCOv2

def rocov2_miniature(root, folders):
    """Tables as on Zenodo; folders: where each split has its images, below root."""
    for (name, count), folder in zip({"train": 4, "valid": 3, "test": 3}.items(), folders, strict=True):
        ids = [f"ROCOv2_2023_{name}_{i:06}" for i in range(1, count + 1)]
        captions = [(image, f'Axial CT, "{i}"\nof the chest') for i, image in enumerate(ids)]
        write_csv(root / f"{name}_captions.csv", ("ID", "Caption"), *captions, (f"ROCOv2_2023_{name}_000099", "A CT"))
        write_csv(root / f"{name}_concepts.csv", ("ID", "CUIs"), (ids[0], "C0040405;C0817096"), (ids[1], "C1306645"))
        write_csv(root / f"{name}_concepts_manual.csv", ("ID", "CUIs"), (ids[0], "C0000000"))
        (root / f"{name}_images" / name).mkdir(parents=True)                         # made, and left empty
        draw_images(root / folder, *[f"{image}.jpg" for image in ids])
    write(root / "cui_mapping.csv", "CUI,Canonical name\n")


@pytest.mark.parametrize("folders", [
    ("train_images/train", "valid_images/valid", "test_images/test"), ("train_images", "valid_images", "test_images"),
    ("train", "valid", "test"), (".", ".", ".")])
def test_rocov2(tmp_path, folders, capsys):
    root = tmp_path / "rocov2"
    rocov2_miniature(root, folders)
    rows = list(rocov2.rows(root, "pretrain"))
    assert rows[0] == Row("train", root / folders[0] / "ROCOv2_2023_train_000001.jpg",
                          'Axial CT, "0"\nof the chest', group="C0040405")
    assert [row.group for row in rows[:4]] == ["C0040405", "C1306645", None, None]
    assert prepared("rocov2", root / folders[0], tmp_path / "pack") == (2 if "/" in folders[0] else 0)
    assert prepared("rocov2", tmp_path, tmp_path / "high") == 0
    assert f"prepare: reading {root}, not {tmp_path}" in capsys.readouterr().err
    meta = json.loads((tmp_path / "high" / "meta.json").read_text())
    assert meta["samples"] == {"train": 4, "val": 3, "test": 3} and meta["skipped"] == {"under 3 words": 3}


def test_rocov2_retrieval_and_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(roco, "RETRIEVAL_PAIRS", 2)
    rocov2_miniature(tmp_path, ("train", "valid", "test"))
    kept, _ = filter_rows(rocov2.rows(tmp_path, "irtr"), "irtr")
    assert [sum(row.split == split for row in kept) for split in SPLITS] == [4, 2, 2]
    (tmp_path / "test_concepts.csv").unlink()
    assert {row.group for row in rocov2.rows(tmp_path, "pretrain") if row.split == "test"} == {None}
    with pytest.raises(UserError, match="nothing for the task cls"):
        list(rocov2.rows(tmp_path, "cls"))
    write_csv(tmp_path / "test_captions.csv", ("ID", "Text"), ("a", "b"))
    with pytest.raises(UserError, match="test_captions.csv, line 1: has no Caption"):
        list(rocov2.rows(tmp_path, "pretrain"))
    (tmp_path / "valid_captions.csv").unlink()
    with pytest.raises(UserError, match="valid_captions.csv cannot be read"):
        list(rocov2.rows(tmp_path, "pretrain"))


# ----------------------------------------------------------------------------------------------------- Open-i

OPENI = "uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression"


def openi_miniature(root, images="images/images_normalized"):
    """40 reports with two images each, and what is odd in the real files."""
    reports = [(uid, "normal", "normal", "Chest PA and Lateral", "", "", f"Heart {uid} is normal.", "No disease.")
               for uid in range(1, 41)]
    reports[0] = (1, "Cardiomegaly/borderline;Lung/hyperdistention", "Cardiomegaly;Lung", "", "", "XXXX.",
                  "Borderline cardiomegaly. Midline sternotomy XXXX.", "Inferior XXXX XXXX, XXXX. No acute disease.")
    reports[1] = (2, "normal", "", "PA and lateral chest XXXX, XXXX", "", "", "", "")
    reports[2] = (3, "No Indexing", "No Indexing", "", "", "", "", "Clear lungs, no effusion.")
    reports[3] = (4, "", "", "", "", "", "XXXX XXXX.", "XXXX.")
    reports[4] = (5, "", "", "", "", "", "Normal chest.", "")
    reports[7] = (8, "", "Opacity", "", "", "", "Opacity on the left.", "")
    projections = [(uid, f"{uid}_IM-{uid:04}-{number}.dcm.png", view) for uid in range(1, 40)      # not of the last
                   for number, view in ((1001, "Frontal"), (2001, "Lateral"))]
    projections.append((99, "99_IM-0099-1001.dcm.png", "Frontal"))
    write_csv(root / "indiana_reports.csv", OPENI, *reports)
    write_csv(root / "indiana_projections.csv", ("uid", "filename", "projection"), *projections)
    draw_images(root / images, *[name for _, name, _ in projections[2:]])                          # some are absent


@pytest.mark.parametrize("images", ["images/images_normalized", "images_normalized"])
def test_openi(tmp_path, images, capsys):
    root = tmp_path / "chest-xrays-indiana-university"
    openi_miniature(root, images)
    rows = list(openi.rows(root, "cls"))
    assert "openi: 1 of 40 reports are not used: " in capsys.readouterr().err
    assert rows[0]._replace(split="") == Row(
        "", root / images / "1_IM-0001-1001.dcm.png",
        "Borderline cardiomegaly. Midline sternotomy. Inferior. No acute disease.",
        label="abnormal", group="Frontal", patient="1")
    by_uid = {row.patient: row for row in rows}
    assert [by_uid[uid].label for uid in ("2", "3", "4", "5", "6")] == ["normal", None, None, None, "normal"]
    assert {uid: row.skip for uid, row in by_uid.items() if row.skip} == {
        "2": "no findings and no impression", "4": "no findings and no impression", "99": "no report"}
    assert [row.group for row in rows[:2]] == ["Frontal", "Lateral"] and len(rows) == 79
    for row in rows:
        chance = hash_to_unit(row.patient)
        assert row.split == ("test" if chance < 0.1 else "val" if chance < 0.2 else "train")
    assert {row.split for row in rows} == set(SPLITS)

    assert prepared("openi", tmp_path, tmp_path / "pack") == 0                # a level too high
    assert f"prepare: reading {root}, not {tmp_path}:" in capsys.readouterr().err
    meta = json.loads((tmp_path / "pack" / "meta.json").read_text())
    assert meta["skipped"] == {"missing image": 2, "no findings and no impression": 4, "no report": 1,
                               "under 3 words": 2}
    assert sum(meta["samples"].values()) == 70 and meta["groups"] == ["Frontal", "Lateral"]
    assert prepared("openi", root / Path(images).parts[0], tmp_path / "cls", "--task", "cls") == 0
    meta = json.loads((tmp_path / "cls" / "meta.json").read_text())
    assert meta["labels"] == ["abnormal", "normal"] and meta["skipped"]["no label"] == 4

    with pytest.raises(UserError, match="openi has nothing for the task vqa"):
        list(openi.rows(root, "vqa"))
    with open(root / "indiana_reports.csv", "a") as file:
        file.write("7,,,,,,Again.,\n")
    with pytest.raises(UserError, match="indiana_reports.csv, line 42: the uid '7' is there twice"):
        list(openi.rows(root, "cls"))
    with pytest.raises(UserError, match="has no indiana_reports.csv and no annotation.json"):
        list(openi.rows(tmp_path / "nowhere", "cls"))


@pytest.mark.parametrize("given, left", [
    ("The XXXX is clear.", "The is clear."), ("XXXX XXXX opacity", "opacity"), ("chest x-XXXX.", "chest x."),
    ("No XXXX, XXXX. Clear.", "No. Clear."), ("XXXX-year-old", "year-old"), ("Dr. XXXX's note", "Dr. note"),
    ("Seen. (XXXX, XXXX) Then", "Seen. Then"), ("nodule (XXXX mm).", "nodule (mm)."), ("(see XXXX).", "(see)."),
    ("a cyst, XXXX", "a cyst"), ("Clear. XXXX", "Clear."), ("XXXX. XXXX", ""), ("the XXXX/XXXX, lung", "the, lung"),
    ("No  change ... , fine,", "No change ... , fine,"), ("XXX and XXXXXX", "XXX and"),
    ("(" * 3000 + "XXXX" + ")" * 3000, "")])
def test_anonymised_words_leave_no_trace(given, left):
    assert without_placeholders(given, openi.ANONYMISED) == left


def test_openi_of_r2gen(tmp_path, capsys):
    root = tmp_path / "iu_xray"
    study = {"id": "CXR2384_IM-0942", "report": "The heart is normal in size. XXXX lungs.",
             "image_path": ["CXR2384_IM-0942/0.png", "CXR2384_IM-0942/1.png"], "split": "train"}
    short = {"id": "CXR1_IM-0001", "report": "Normal chest.", "image_path": ["CXR1_IM-0001/0.png"], "split": "train"}
    parts = {"train": [study, short], "val": [study | {"id": "CXR2_IM-0002", "report": None}], "test": [study]}
    write(root / "annotation.json", parts)
    draw_images(root / "images", *study["image_path"], *short["image_path"])
    rows = list(openi.rows(root, "irtr"))
    assert rows[1] == Row("train", root / "images" / "CXR2384_IM-0942" / "1.png",
                          "The heart is normal in size. lungs.", patient="CXR2384_IM-0942")
    assert [row.split for row in rows] == ["train"] * 3 + ["val"] * 2 + ["test"] * 2
    assert [row.skip for row in rows[2:4]] == ["under 3 words", "no findings and no impression"]
    assert prepared("openi", root / "images", tmp_path / "pack") == 0
    with pytest.raises(UserError, match="annotation.json has no classes: choose --task pretrain or irtr"):
        list(openi.rows(root, "cls"))

    for content, sentence in (({"train": []}, "annotation.json: has no list 'val'"),
                              ({"train": 3}, "annotation.json, train: not a JSON list"),
                              ([study], "annotation.json: has no list 'train'"),
                              ({"train": [study, {"id": 1}]}, "train, element 2: has no report"),
                              ({"train": [study | {"image_path": []}]}, "train, element 1: has no image_path")):
        write(root / "annotation.json", content)
        with pytest.raises(UserError, match=sentence):
            list(openi.rows(root, "pretrain"))

    openi_miniature(root)
    capsys.readouterr()
    assert len(list(openi.rows(root, "cls"))) == 79
    assert "indiana_reports.csv; annotation.json is not used" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- real data

@needs(not (REAL / "vqa_rad").is_dir())
def test_real_vqa_rad():
    rows = list(vqa_rad.rows(REAL / "vqa_rad", "vqa"))
    train = [row for row in rows if row.split != "test"]
    assert len(train) == 3064 and len(rows) == 3515
    assert len({row.answer for row in rows}) == 498        # the paper's list
    assert len({row.answer for row in train}) == 461
    assert all(row.answer and row.group for row in rows) and {row.closed for row in rows} == {True, False}
    assert len({row.image for row in rows}) == 314 and all(row.image.is_file() for row in rows)
    assert 0.08 < sum(row.split == "val" for row in rows) / 3064 < 0.12
    left_out = [row.split for row in vqa_rad.rows(REAL / "vqa_rad", "pretrain") if row.skip]
    assert len(left_out) == 451 + 22                       # 14 stand in the training file, too, some twice


@needs(not (REAL / "vqa_med_2019").is_dir())
def test_real_vqa_med_2019(tmp_path, capsys):
    rows = list(vqa_med_2019._questions("test", REAL / "vqa_med_2019" / MED_TEST, tmp_path, parts=4))
    assert len(rows) == 500 and sum(row.skip == "question on abnormality" for row in rows) == 125
    assert sum("#" in row.answer for row in rows if not row.skip) == 9 and all(row.answer for row in rows)

    arguments = ["vqa_med_2019", "--root", REAL / "vqa_med_2019", "--task", "vqa", "--out", tmp_path / "pack"]
    assert prepare.main([str(argument) for argument in arguments]) == 2
    assert "has no C1_Modality_train.txt" in capsys.readouterr().err


@needs(not (REAL / "MedPix-2-0").is_dir())
def test_real_medpix_for_classes_and_retrieval():
    for task in "cls", "irtr":
        kept, _ = filter_rows(medpix.rows(REAL / "MedPix-2-0", task), task)
        assert [sum(row.split == split for row in kept) for split in SPLITS] == [1638, 191, 200]
        assert len({row.label for row in kept}) == 5
