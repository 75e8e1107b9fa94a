"""The use of a finished run: many predictions, search, features, and the same from Python."""
import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from data.pack import Pack
from data.predict import answer, load_run, make_batch, read_images, read_texts
from m3ae_mini.checkpoint import saved_settings
from m3ae_mini.config import UserError
from m3ae_mini.loader import normalise
from test_finetune import contrasted, packs, pretrained, started                       # fixtures, too


@pytest.fixture(scope="module")
def classes(packs, pretrained, tmp_path_factory):
    """The folder of a short run of cls."""
    out = tmp_path_factory.mktemp("runs") / "cls"
    with pytest.MonkeyPatch.context() as patch:
        started(patch, "cls", "--data", packs["cls"], "--init", pretrained, "--steps", 2, "--out", out)
    return out


@pytest.fixture
def images(tmp_path):
    """A folder of 40 images, three of them broken."""
    folder, random = tmp_path / "images", np.random.default_rng(2)
    folder.mkdir()
    for i in range(40):
        pixels = random.integers(0, 256, (20 + i % 3, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    for i in 0, 17, 39:
        path = folder / f"{i:02}.png"
        path.write_bytes(path.read_bytes()[:99])
    return folder


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_of_images(classes, images, tmp_path, monkeypatch, capsys):
    """In batches, as one by one; what can't be read is named, and nothing else is lost."""
    out = tmp_path / "found.csv"
    started(monkeypatch, "cls", "--init", classes, "--predict", images, "A nodule.", "--out", out)
    printed, rows = capsys.readouterr().out, read_rows(out)
    assert f"37 of 40 predictions: {out}" in printed
    assert "warning: no prediction for 3 (see the column error): " in printed and "17.png" in printed
    assert [row["image"] for row in rows] == [str(path) for path in sorted(images.iterdir())]
    bad = [row for row in rows if row["error"]]
    assert [row["image"][-6:] for row in bad] == ["00.png", "17.png", "39.png"]
    assert not any(row["prediction"] or row["probability"] for row in bad)

    run = load_run(classes)
    assert isinstance(run.model, torch.nn.Module) and not run.model.training
    for row in rows[1:4] + rows[20:22]:
        probabilities = answer(run, read_images([row["image"]], run), ["A nodule."])[0]
        assert row["prediction"] == run.labels[probabilities.argmax()]
        assert float(row["probability"]) == pytest.approx(probabilities.max().item(), abs=1e-5)

    with pytest.raises(UserError, match="found.csv exists already"):
        started(monkeypatch, "cls", "--init", classes, "--predict", images, "--out", out)
    started(monkeypatch, "cls", "--init", classes, "--predict", images)
    assert len(read_rows(classes / "predictions.csv")) == 40
    assert "warning: 40 images have no text, but the run was trained with" in capsys.readouterr().out


def test_a_table_of_images(packs, pretrained, images, tmp_path, monkeypatch, capsys):
    run = tmp_path / "vqa"
    started(monkeypatch, "vqa", "--data", packs["vqa"], "--init", pretrained, "--steps", 1, "--out", run,
            "--test_samples", 0)
    table = tmp_path / "mine.csv"
    table.write_text("image,text\nimages/01.png,What is seen?\nimages/17.png,What is seen?\n"
                     f"images/02.png,{'left ' * 50}\nimages/nowhere.png,Where?\nimages/03.png,\n")
    started(monkeypatch, "vqa", "--init", run, "--predict", table, "--out", tmp_path / "out.csv")
    printed, rows = capsys.readouterr().out, read_rows(tmp_path / "out.csv")
    assert [bool(row["error"]) for row in rows] == [False, True, False, True, True]
    assert [row["text"][:5] for row in rows] == ["What ", "What ", "left ", "Where", ""]
    assert rows[-1]["error"] == "no question"
    assert "2 of 5 predictions" in printed and "1 texts of more than 32 tokens were truncated" in printed
    for arguments, sentence in (((table, "What?"), "a table brings its own texts"),
                                ((images,), "a folder of images needs the question, too"),
                                ((tmp_path / "empty",), "a folder of images needs the question")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=sentence):
            started(monkeypatch, "vqa", "--init", run, "--predict", *arguments, "--out", tmp_path / "x.csv")


def test_search_by_words_and_by_image(packs, contrasted, images, tmp_path, monkeypatch, capsys):
    """The ten best by ITC, in the order of the matching head, each image or text once."""
    flags = ["--init", contrasted, "--data", packs["irtr"]]
    started(monkeypatch, "irtr", *flags, "--search", "large nodule on the left", "--out", tmp_path / "a.png")
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == "the 10 best images by ITC, in the order of matching (higher is better):"
    assert len(lines) == 10 and last == f"drawn: {tmp_path / 'a.png'}"
    assert Image.open(tmp_path / "a.png").size == (1000, 630)
    scores = [float(line.split()[1]) for line in lines]
    sources = [line.split()[5] for line in lines]
    assert scores == sorted(scores, reverse=True) and len(set(sources)) == 10

    # By hand: the ITC scores of all images of the pack.
    run, pack = load_run(contrasted), Pack(packs["irtr"])
    itc = run.model.objectives["itc"]
    ids, mask, _ = read_texts(["large nodule on the left"], run.tokenizer, run.cfg.max_text_len)
    pixels = np.empty((3, 16, 16), dtype=np.uint8)
    found = {}
    with torch.no_grad():
        text = itc.text_features(run.model.encode_text(ids, mask), {"text_ids": ids, "text_mask": mask})
        for line in pack.lines():
            pack.read_image(line["image"], pixels)
            image = run.model.encode_image(normalise(torch.from_numpy(pixels)[None]))
            found[line["source"]] = itc.scores(text, itc.image_features(image)).item()
    assert set(sources) == set(sorted(found, key=lambda source: -found[source])[:10])

    image = images / "01.png"
    started(monkeypatch, "irtr", *flags, "--search", image, "--out", tmp_path / "b.png")
    _, *lines, _ = capsys.readouterr().out.splitlines()
    texts = [line.split(".png  ")[1] for line in lines]
    assert len(texts) == len(set(texts)) == 10


def test_without_data_a_run_is_used_on_its_own(contrasted, tmp_path, monkeypatch, capsys):
    """It is not phantoms that are searched when the run has never seen them."""
    own = saved_settings(contrasted)["run"]["data"]
    assert own != "phantoms"
    for task, *flags in (("irtr", "--search", "nodule", "--out", tmp_path / "c.png"),
                         ("embed", "--out", tmp_path / "c.npz")):
        started(monkeypatch, task, "--init", contrasted, *flags)
        assert f"--data is not given: {own}, on which {contrasted} was trained" in capsys.readouterr().out


def test_features(packs, contrasted, tmp_path, monkeypatch, capsys):
    started(monkeypatch, "embed", "--init", contrasted, "--data", packs["pretrain"], "--out",
            tmp_path / "f.npz")
    features, lines = np.load(tmp_path / "f.npz"), list(Pack(packs["pretrain"]).lines())
    assert features["source"].tolist() == [line["source"] for line in lines]
    assert features["caption"].tolist() == [line["text"] for line in lines]
    run = load_run(contrasted)
    width = run.cfg.fusion_width
    assert features["image"].shape == features["text"].shape == (len(lines), width)
    assert features["pair"].shape == (len(lines), 2 * width)

    # The last sample by hand.
    pixels = np.empty((3, 16, 16), dtype=np.uint8)
    Pack(packs["pretrain"]).read_image(lines[-1]["image"], pixels)
    image = normalise(torch.from_numpy(pixels)[None])
    batch = make_batch(run, image, [lines[-1]["text"]])
    with torch.no_grad():
        text = run.model.encode_text(batch["text_ids"], batch["text_mask"])
        image = run.model.encode_image(image)
        pair = run.model.pooled_pair(text, image, batch["text_mask"])
    for name, value in ("image", image[0, 0]), ("text", text[0, 0]), ("pair", pair[0]):
        assert np.abs(features[name][-1] - value.numpy()).max() < 1e-5
    with pytest.raises(UserError, match="f.npz exists already"):
        started(monkeypatch, "embed", "--init", contrasted, "--data", packs["pretrain"], "--out",
                tmp_path / "f.npz")


def test_what_the_use_of_a_run_refuses(packs, pretrained, contrasted, monkeypatch):
    for task, flags, sentence in (
            ("irtr", ["--init", pretrained, "--search", "nodule"], "has no ITC head, which a search needs"),
            ("vqa", ["--init", contrasted, "--search", "nodule"], "--search is for irtr, not vqa"),
            ("irtr", ["--init", contrasted, "--search", "nodule.png"], "there is no file nodule.png"),
            ("irtr", ["--init", contrasted, "--search", "a", "--out", "runs/x"], "file that ends in .png"),
            ("embed", [], "give the run with --init"),
            ("embed", ["--init", "nowhere"], "no tokenizer at nowhere")):
        with pytest.raises(UserError, match=sentence):
            started(monkeypatch, task, *flags, "--data", packs["irtr"])


def test_a_blind_run_answers_no_image(packs, pretrained, images, tmp_path, monkeypatch):
    run = tmp_path / "blind"
    started(monkeypatch, "cls", "--data", packs["cls"], "--init", pretrained, "--steps", 1, "--blind",
            "--out", run, "--test_samples", 0)
    assert json.loads((run / "config.json").read_text())["task"]["blind"]
    with pytest.raises(UserError, match="is not a run of finetune.py cls without --blind"):
        started(monkeypatch, "cls", "--init", run, "--predict", images)


def test_images_are_prepared_as_in_the_pack(pretrained, images, tmp_path, monkeypatch):
    """--fit pad and --window of the pack hold for what is predicted."""
    from data import prepare
    rows = [f"images/{i:02}.png,A nodule.,{split},{label}"
            for i, (split, label) in enumerate(zip(["train"] * 8 + ["val", "test"] * 2, "ab" * 6), 1)]
    (tmp_path / "t.csv").write_text("\n".join(["image,text,split,label", *rows]))
    arguments = ["table", "--root", str(tmp_path / "t.csv"), "--task", "cls", "--size", "16", "--fit", "pad",
                 "--window=-10,500", "--out", str(tmp_path / "pack")]
    prepare.run(prepare.command_line().parse_args(arguments))
    started(monkeypatch, "cls", "--data", tmp_path / "pack", "--init", pretrained, "--steps", 1, "--out",
            tmp_path / "run", "--test_samples", 0)
    run, pack = load_run(tmp_path / "run"), Pack(tmp_path / "pack")
    assert (run.fit, run.window) == ("pad", [-10, 500])
    pixels = np.empty((3, 16, 16), dtype=np.uint8)
    line = next(pack.lines())
    pack.read_image(line["image"], pixels)
    expected = normalise(torch.from_numpy(pixels.copy())[None])
    assert torch.equal(read_images([images / line["source"].split("/")[-1]], run), expected)
    # Grey of 16 bits: 245 lies in the middle of the window.
    Image.fromarray(np.full((16, 16), 245, dtype=np.uint16)).save(tmp_path / "deep.png")
    deep = read_images([tmp_path / "deep.png"], run)
    assert torch.allclose(deep, normalise(torch.full((1, 3, 16, 16), 127.5)), atol=0.02)
