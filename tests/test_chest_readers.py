"""The readers of chest radiographs with several labels, each on a miniature with its names and headers."""
import gzip
import json

import pytest
from test_readers import draw_images, packed, prepared, write, write_csv

from data import Row, hash_to_unit, mimic_cxr, nih
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


def test_a_subset_with_one_label_a_row_has_several_all_the_same(tmp_path, capsys):
    """The set decides, not its rows: "No Finding" never becomes a class."""
    nih_miniature(tmp_path)
    table = tmp_path / "Data_Entry_2017.csv"
    table.write_text(table.read_text().replace("Effusion|Mass", "Mass"))
    assert prepared("nih", tmp_path, tmp_path / "pack", "--task", "cls") == 0
    meta = json.loads((tmp_path / "pack" / "meta.json").read_text())
    assert meta["several_labels"] and meta["labels"] == ["Cardiomegaly", "Mass", "Pleural_Thickening"]


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


# ------------------------------------------------------------------------------------------- MIMIC-CXR-JPG

METADATA = ("dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows",
            "Columns", "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning",
            "ViewCodeSequence_CodeMeaning", "PatientOrientationCodeSequence_CodeMeaning")
CHEXPERT = ("subject_id", "study_id", "Atelectasis", "Cardiomegaly", "Consolidation", "Edema",
            "Enlarged Cardiomediastinum", "Fracture", "Lung Lesion", "Lung Opacity", "No Finding",
            "Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices")
REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)
 
 INDICATION:  ___F with cough  // pneumonia?
 
 FINDINGS: 
 
 Study {study} is compared with ___, ___.
 The heart is normal: no edema at
 T12: none.
 
 IMPRESSION: 
 
 1.  No acute disease (___).
 
 RECOMMENDATION(S):  Call Dr. ___.
"""
REPORT_TEXT = "Study {study} is compared with. The heart is normal: no edema at T12: none. 1. No acute disease."
FIRST = 50000001      # study_id of the first study; 20 studies, of the patients 10000001 to 10000020


def study_folder(root, i, below="files"):
    subject = 10000001 + i
    return root / below / f"p{subject // 10 ** 6}" / f"p{subject}" / f"s{FIRST + i}"


def chexpert_row(i, **values):
    """A row of the table; names with a _ for a blank."""
    known = {name.replace("_", " "): value for name, value in values.items()}
    return 10000001 + i, FIRST + i, *(known.get(name, "") for name in CHEXPERT[2:])


def mimic_tables(root, write_table, version="2.0.0"):
    """Two images per study. Studies 0 to 13 are to train, 14 to 16 to validate, the others to test."""
    images = [(f"{i:08x}-{number}", 10000001 + i, FIRST + i, ("PA", "LATERAL")[number] if i else "")
              for i in range(20) for number in (0, 1)]
    splits = ["train"] * 28 + ["validate"] * 6 + ["test"] * 6
    write_table(root / f"mimic-cxr-{version}-split.csv", ("dicom_id", "study_id", "subject_id", "split"),
                *[(image, study, subject, split) for (image, subject, study, _), split in zip(images, splits)])
    write_table(root / f"mimic-cxr-{version}-metadata.csv", METADATA,
                *[(image, subject, study, "CHEST (PA AND LAT)", view, 3056, 2544, 21800506, "213014.531",
                   "CHEST (PA, LAT)", "postero-anterior", "Erect") for image, subject, study, view in images[::-1]])
    labels = [chexpert_row(i, Edema="0.0", No_Finding="1.0") for i in range(20)]
    labels[0] = chexpert_row(0, Atelectasis="1.0", Edema="-1.0", Pleural_Effusion="1.0", Pneumonia="0.0")
    labels[1] = chexpert_row(1, Pneumonia="-1.0", Fracture="-1.0")
    labels[2] = chexpert_row(2, No_Finding="1.0", Support_Devices="1.0")
    labels[3] = chexpert_row(3)
    write_table(root / f"mimic-cxr-{version}-chexpert.csv", CHEXPERT, *labels[:4], *labels[5:9],
                *labels[10:])                                                    # not of 4 and 9
    return images


def write_gz(path, *rows):
    """A CSV in a .gz."""
    write_csv(path, *rows)
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


def mimic_miniature(root, write_table=write_gz, reports="files", version="2.0.0"):
    """20 studies; what is odd: 0 has no view, 4 and 9 no labels, the reports of 5 to 9 are unlike the others."""
    images = mimic_tables(root, write_table, version)
    for i in range(20):
        write(study_folder(root, i, reports).with_suffix(".txt"), REPORT.format(study=i))
    draw_images(root, *[study_folder(root, study - FIRST).relative_to(root) / f"{image}.jpg"
                        for image, _, study, _ in images])
    odd = {5: " FINAL REPORT\n FINDINGS AND IMPRESSION:  Clear   lungs,\r\n no effusion.\n",
           6: "IMPRESSION:Clear lungs only.\n FINDINGS WERE TOLD TO:  Dr. ___\n\tCOMPARISON: None.",
           7: " FINAL REPORT\n CHEST, PA:\n The lungs are clear. IMPRESSION: not at the start\n",
           8: " FINDINGS: ___\n\n IMPRESSION:  ___.\n"}
    for i, report in odd.items():
        write(study_folder(root, i, reports).with_suffix(".txt"), report)
    study_folder(root, 9, reports).with_suffix(".txt").unlink()


def by_study(rows):
    """{number of the study: its two rows}"""
    studies = {}
    for row in rows:
        studies.setdefault(int(row.image.parent.name[1:]) - FIRST, []).append(row)
    return studies


@pytest.mark.parametrize("reports", ["files", "mimic-cxr-reports/files", "../mimic-cxr-reports/files"])
def test_mimic_cxr(tmp_path, capsys, reports):
    root = tmp_path / "mimic-cxr-jpg"
    root.mkdir()
    mimic_miniature(root, reports=reports)
    rows = list(mimic_cxr.rows(root, "pretrain"))
    assert capsys.readouterr().err == ""
    assert rows[0] == Row("train", study_folder(root, 0) / "00000000-0.jpg", REPORT_TEXT.format(study=0),
                          patient="10000001")
    assert [row.group for row in rows[:4]] == [None, None, "PA", "LATERAL"]
    studies = by_study(rows)
    assert all(len(pair) == 2 and pair[0].text == pair[1].text for pair in studies.values()) and len(studies) == 20
    assert [studies[i][0].split for i in (13, 14, 16, 17)] == ["train", "val", "val", "test"]
    assert studies[5][0].text == "Clear lungs, no effusion." and studies[6][0].text == "Clear lungs only."
    assert {i: pair[0].skip for i, pair in studies.items() if pair[0].skip} == {
        7: "no findings and no impression", 8: "no findings and no impression", 9: "no report"}
    assert not any(row.label for row in rows)

    assert prepared("mimic_cxr", root / "files", tmp_path / "pack") == 0              # a level too low
    assert f"prepare: reading {root}, not {root / 'files'}:" in capsys.readouterr().err
    meta = json.loads((tmp_path / "pack" / "meta.json").read_text())
    assert meta["samples"] == {"train": 22, "val": 6, "test": 6} and meta["groups"] == ["LATERAL", "PA"]
    assert meta["skipped"] == {"no findings and no impression": 4, "no report": 2}


def test_mimic_cxr_for_classes(tmp_path, capsys):
    root = tmp_path / "mimic-cxr-jpg"
    mimic_miniature(root)
    expected = {"absent": ["Atelectasis|Pleural Effusion", "No Finding", "Support Devices", "No Finding"],
                "present": ["Atelectasis|Edema|Pleural Effusion", "Fracture|Pneumonia", "Support Devices",
                            "No Finding"],
                "drop": [None, None, "Support Devices", "No Finding"]}
    told = {"absent": "count as absent (--uncertain present|drop)",
            "present": "count as present (--uncertain absent|drop)",
            "drop": "leave out the images of their studies (--uncertain absent|present)"}
    for uncertain, labels in expected.items():
        studies = by_study(mimic_cxr.rows(root, "cls", uncertain=uncertain))
        assert capsys.readouterr().err == f"mimic_cxr: 3 uncertain labels {told[uncertain]}\n"
        assert [studies[i][1].label for i in range(4)] == labels
        skipped = {i: pair[1].skip for i, pair in studies.items() if pair[1].skip}
        assert {i: skip for i, skip in skipped.items() if i < 5} == (
            {0: "uncertain label", 1: "uncertain label"} if uncertain == "drop" else {}
        ) | {4: "not in the chexpert table"}
    rows = list(mimic_cxr.rows(root, "cls"))
    assert by_study(rows)[1][0].label == "No Finding" and rows[0].text == REPORT_TEXT.format(study=0)

    flags = "--task", "cls", "--uncertain", "drop"
    assert prepared("mimic_cxr", root, tmp_path / "pack", *flags) == 0
    meta = json.loads((tmp_path / "pack" / "meta.json").read_text())
    assert meta["skipped"] == {"no findings and no impression": 4, "no report": 2, "not in the chexpert table": 2,
                               "uncertain label": 4}
    capsys.readouterr()
    assert prepared("mimic_cxr", root, tmp_path / "two", "--uncertain", "drop") == 2
    assert "--uncertain is for the labels of --task cls: leave it out for pretrain" in capsys.readouterr().err
    assert prepared("nih", root, tmp_path / "two", *flags) == 2
    assert "--uncertain is for mimic_cxr: leave it out for nih" in capsys.readouterr().err

    for row, sentence in ((chexpert_row(4, Edema="2.0"), "line 20: Edema is '2.0', it must be 1.0, 0.0, -1.0 or"),
                          (chexpert_row(3), "line 20: the study '50000004' is there twice")):
        with gzip.open(root / "mimic-cxr-2.0.0-chexpert.csv.gz", "at") as file:
            file.write(",".join(map(str, row)) + "\r\n")
        with pytest.raises(UserError, match=f"chexpert.csv.gz, {sentence}"):
            list(mimic_cxr.rows(root, "cls"))
        mimic_tables(root, write_gz)


def test_mimic_cxr_finds_its_tables(tmp_path, capsys):
    mimic_miniature(tmp_path / "new", write_csv, version="2.1.0")
    mimic_miniature(tmp_path / "old")
    rows = [[row._replace(image=row.image.name) for row in mimic_cxr.rows(tmp_path / name, "cls")]
            for name in ("new", "old")]
    assert rows[0] == rows[1] and len(rows[0]) == 40
    capsys.readouterr()

    # Both are there: the unpacked ones are read.
    root = tmp_path / "old"
    mimic_tables(root, write_csv)
    (root / "mimic-cxr-2.0.0-metadata.csv").unlink()
    write(root / "mimic-cxr-2.0.0-split.csv.gz", "torn")
    assert len(list(mimic_cxr.rows(root, "irtr"))) == 40
    assert capsys.readouterr().err == (f"mimic_cxr: reading {root / 'mimic-cxr-2.0.0-split.csv'}; "
                                       "mimic-cxr-2.0.0-split.csv.gz is not used\n")
    (root / "mimic-cxr-2.0.0-split.csv").unlink()
    with pytest.raises(UserError, match=r"mimic-cxr-2.0.0-split.csv.gz is not a whole gzip file \(Not a gzipped"):
        list(mimic_cxr.rows(root, "irtr"))

    mimic_tables(root, write_csv, version="2.1.0")
    with pytest.raises(UserError, match="holds mimic-cxr-2.0.0-split.csv and mimic-cxr-2.1.0-split.csv: keep one"):
        list(mimic_cxr.rows(root, "irtr"))
    for path in root.glob("*-chexpert.csv*"):
        path.unlink()
    for path in root.glob("mimic-cxr-2.1.0-*"):
        path.unlink()
    mimic_tables(root, write_gz)
    for path in root.glob("*-chexpert.csv*"):
        path.unlink()
    assert len(list(mimic_cxr.rows(root, "irtr"))) == 40               # chexpert is for classes alone
    with pytest.raises(UserError, match="has no mimic-cxr-2.0.0-chexpert.csv.gz and no mimic-cxr-2.0.0-chexpert.csv"):
        list(mimic_cxr.rows(root, "cls"))
    with pytest.raises(UserError, match="has no mimic-cxr-2.0.0-split.csv.gz"):
        list(mimic_cxr.rows(tmp_path / "nowhere", "irtr"))
    with pytest.raises(UserError, match="nothing for the task vqa: choose --task pretrain, irtr or cls"):
        list(mimic_cxr.rows(root, "vqa"))


def test_mimic_cxr_refuses_or_counts_what_is_wrong(tmp_path, capsys):
    mimic_miniature(tmp_path, write_csv)
    table = tmp_path / "mimic-cxr-2.0.0-split.csv"
    whole = table.read_text()
    for old, new, sentence in (("50000001", "../s1", "the study_id is '../s1', not a whole number"),
                               ("10000001", "", "the subject_id is '', not a whole number"),
                               ("train", "dev", "the split is 'dev', it must be train, validate, test")):
        write(table, whole.replace(old, new, 1))
        with pytest.raises(UserError, match=f"split.csv, line 2: {sentence}"):
            list(mimic_cxr.rows(tmp_path, "irtr"))

    # Rows in another order, and columns, too: the same pairs.
    lines = [line.split(",") for line in whole.split()]
    write(table, "\n".join(",".join(line[::-1]) for line in lines[:1] + lines[1::2] + lines[2::2]))
    rows = list(mimic_cxr.rows(tmp_path, "irtr"))
    write(table, whole)
    assert set(rows) == set(mimic_cxr.rows(tmp_path, "irtr")) and len(rows) == 40

    study_folder(tmp_path, 0).with_suffix(".txt").write_bytes(b"FINDINGS: \xff")
    write(study_folder(tmp_path, 1).with_suffix(".txt"), "FINDINGS: Normal.")
    metadata = tmp_path / "mimic-cxr-2.0.0-metadata.csv"
    write(metadata, "".join(metadata.read_text().splitlines(keepends=True)[:-3]))
    rows = list(mimic_cxr.rows(tmp_path, "irtr"))
    assert rows[0].skip.startswith("unreadable report: 'utf-8' codec") and rows[2].skip == "under 3 words"
    assert f"mimic_cxr: 3 of 40 images are not in {metadata}: they have no group" in capsys.readouterr().err
    assert [row.group for row in rows[:5]] == [None, None, None, "LATERAL", "PA"]

    (tmp_path / "moved").mkdir()
    for i in range(20):
        report = study_folder(tmp_path, i).with_suffix(".txt")
        if report.is_file():
            report.rename(tmp_path / "moved" / report.name)
    with pytest.raises(UserError, match="none of the reports is in .*files or .*: unpack mimic-cxr-reports.zip in"):
        list(mimic_cxr.rows(tmp_path, "irtr"))
