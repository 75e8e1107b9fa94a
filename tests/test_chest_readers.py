"""The readers of chest radiographs with several labels, each on a miniature with its names and headers."""
import json

import pytest
from test_readers import draw_images, packed, prepared, write

from data import Row, hash_to_unit, nih
from data.pack import SPLITS
from m3ae_mini.config import UserError


# --------------------------------------------------------------------------------------------- ChestX-ray14

NIH_2017 = ("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
            "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],")       # twelve names, the last is empty
NIH_2020 = NIH_2017.replace("Gender", "Sex").removesuffix(",")
NIH_VIEWS = "PA", "AP", ""


def nih_name(patient, number=0):
    return f"{patient:08}_{number:03}.png"


def nih_row(name, patient, findings, view, header=NIH_2017):
    old = header.endswith(",")
    return f"{name},{findings},0,{patient},{'058Y' if old else 58},M,{view},2682,2749,0.143,0.143{',' * old}"


def nih_miniature(root, folders=("images_001/images", "images_012/images"), header=NIH_2017):
    """40 patients with two images each: 30 for training and validation, 10 to test. One is in neither list."""
    findings = "No Finding", "Effusion|Mass", "Pleural_Thickening", "Cardiomegaly"
    names = [(patient, nih_name(patient, number)) for patient in range(1, 41) for number in (0, 1)]
    lines = [nih_row(name, patient, findings[patient % 4], NIH_VIEWS[patient % 3], header)
             for patient, name in names] + [nih_row("00000099_000.png", 99, "Hernia", "PA", header)]
    table = "Data_Entry_2017.csv" if header.endswith(",") else "Data_Entry_2017_v2020.csv"
    write(root / table, "\r\n".join([header, *lines, ""]))
    write(root / "train_val_list.txt", "\n".join(name for _, name in names[:60]))
    write(root / "test_list.txt", "\r\n".join(name for _, name in names[60:]) + "\r\n")
    draw_images(root, *[f"{folders[i % len(folders)]}/{name}" for i, (_, name) in enumerate(names)],
                f"{folders[0]}/00000099_000.png")


@pytest.mark.parametrize("header", [NIH_2017, NIH_2020])
@pytest.mark.parametrize("folders", [("images_001/images", "images_012/images"), ("images",)])
def test_nih(tmp_path, capsys, folders, header):
    root = tmp_path / "ChestXray-NIHCC"
    nih_miniature(root, folders, header)
    rows = list(nih.rows(root, "cls"))
    assert capsys.readouterr().err == ""
    assert rows[0]._replace(split="") == Row("", root / folders[0] / "00000001_000.png", "Chest x-ray, AP view.",
                                             label="Effusion|Mass", group="AP", patient="1")
    assert rows[1].image == root / folders[-1] / "00000001_001.png" and rows[6].label == "No Finding"
    assert rows[2].text == "Chest x-ray." and rows[2].group is None and rows[4].text == "Chest x-ray, PA view."
    assert len(rows) == 81 and rows[-1].skip == "in neither list" and not any(row.skip for row in rows[:-1])
    for row in rows[:-1]:
        held_out = "val" if hash_to_unit(row.patient) < 0.1 else "train"
        assert row.split == ("test" if int(row.patient) > 30 else held_out)
    assert {row.split for row in rows} == set(SPLITS)

    assert prepared("nih", tmp_path, tmp_path / "pack", "--task", "cls") == 0           # a level too high
    assert f"prepare: reading {root}, not {tmp_path}:" in capsys.readouterr().err
    meta = json.loads((tmp_path / "pack" / "meta.json").read_text())
    assert meta["images"] == 80 and meta["samples"]["test"] == 20 and meta["skipped"] == {"in neither list": 1}
    assert meta["groups"] == ["AP", "PA"]


def test_nih_of_one_archive_is_refused_or_left_out(tmp_path, capsys):
    nih_miniature(tmp_path / "nih")
    for path in (tmp_path / "nih" / "images_012" / "images").iterdir():
        path.unlink()
    (tmp_path / "nih" / "images_012" / "images").rmdir()
    (tmp_path / "nih" / "images_001" / "images" / "00000099_000.png").unlink()          # of neither list
    assert prepared("nih", tmp_path / "nih", tmp_path / "pack", "--task", "cls") == 2
    error = capsys.readouterr().err
    assert "nih: 40 images are not in images_001/images\n" in error
    assert "00000001_001.png (missing image): put them into the data set's folder" in error
    assert prepared("nih", tmp_path / "nih", tmp_path / "pack", "--task", "cls", "--allow_missing") == 0
    meta = json.loads((tmp_path / "pack" / "meta.json").read_text())
    assert meta["images"] == 40 and meta["skipped"] == {"in neither list": 1, "missing image": 40}


def test_nih_says_what_it_does_not_use(tmp_path, capsys):
    nih_miniature(tmp_path)
    nih_miniature(tmp_path, ("images",), NIH_2020)                          # the same again, the newer and flat
    table = tmp_path / "Data_Entry_2017_v2020.csv"
    lines = table.read_text().splitlines()
    lines[2] = nih_row(nih_name(1, 1), 1, " Mass | Nodule|", "PA", NIH_2020)
    lines[3] = nih_row(nih_name(2), 2, " | ", "PA", NIH_2020)
    write(table, "\n".join(lines[:-3] + lines[-1:]))                        # both of the last patient are gone
    rows = list(nih.rows(tmp_path, "cls"))
    assert rows[1].label == "Mass|Nodule" and rows[2].label is None
    assert rows[0].image.parent == tmp_path / "images_001" / "images"
    told = capsys.readouterr().err.splitlines()
    assert told == [f"nih: reading {table}; Data_Entry_2017.csv is not used",
                    "nih: 81 images are in two folders, the first is 00000001_000.png: "
                    f"{tmp_path / 'images_001' / 'images'} is read",
                    f"nih: 2 of 80 listed images are not in {table}, the first is 00000040_000.png"]
    meta, _, _ = packed(nih, tmp_path, tmp_path / "pack", "cls")
    assert meta["skipped"] == {"in neither list": 1, "no label": 1}


def test_nih_refuses_in_a_sentence(tmp_path, capsys):
    nih_miniature(tmp_path)
    for task in "pretrain", "irtr", "vqa":
        with pytest.raises(UserError, match=f"nih has no reports and no questions, so nothing for the task {task}"):
            list(nih.rows(tmp_path, task))
    with pytest.raises(UserError, match="has no Data_Entry_2017_v2020.csv and no Data_Entry_2017.csv"):
        list(nih.rows(tmp_path / "nowhere", "cls"))
    table = tmp_path / "Data_Entry_2017.csv"
    whole = table.read_text()
    write(table, whole.replace("0.143,0.143,", "0.143,0.143", 1))           # one row without the last comma
    with pytest.raises(UserError, match="line 2: 11 fields, not 12 as in the header"):
        list(nih.rows(tmp_path, "cls"))
    write(table, whole.replace("Finding Labels", "Findings"))
    with pytest.raises(UserError, match="line 1: has no Finding Labels"):
        list(nih.rows(tmp_path, "cls"))
    write(table, whole.replace("Effusion|Mass", "No Finding|Mass", 1))
    with pytest.raises(UserError, match=r"2017.csv, line 2: the label 'No Finding\|Mass' holds 'No Finding' and a"):
        list(nih.rows(tmp_path, "cls"))
    write(table, whole)

    test_list = (tmp_path / "test_list.txt").read_text()
    write(tmp_path / "test_list.txt", f"{test_list}{nih_name(1)}\n")
    with pytest.raises(UserError, match="test_list.txt, line 21: 00000001_000.png is also in train_val_list.txt"):
        list(nih.rows(tmp_path, "cls"))
    (tmp_path / "test_list.txt").unlink()
    with pytest.raises(UserError, match="test_list.txt cannot be read"):
        list(nih.rows(tmp_path, "cls"))
    write(tmp_path / "test_list.txt", test_list)
    for folder in "images_001", "images_012":
        (tmp_path / folder).rename(tmp_path / f"{folder}.tar")
    with pytest.raises(UserError, match="has no images_001/images and no images: unpack the images there"):
        list(nih.rows(tmp_path, "cls"))
