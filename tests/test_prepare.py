"""Packing: images of every kind, the readers on miniatures of their data sets, and what goes wrong."""
import ast
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from data import Row, hash_to_unit, medicat, medpix, phantoms, prepare, roco, table
from data.images import open_image, square, store_image
from data.pack import PACK_VERSION, SAMPLE_DTYPE, SPLITS, Pack
from data.prepare import contact_sheet, mark_excluded, open_packs
from data.write_pack import filter_rows, write_pack
from m3ae_mini.config import UserError

REPO = Path(__file__).parent.parent
REAL = REPO.parent / "shared" / "data"
needs = partial(pytest.mark.skipif, reason="the real data set is not here")


def noise(width, height, channels=None, seed=0):
    """An image of random pixels, mode L or (with 3 or 4 channels) RGB or RGBA."""
    shape = (height, width, channels) if channels else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def drawn(size, seed=0):
    """An image that is drawn, not read: partial(drawn, seed=3) is a source."""
    return noise(size, size, 3 if seed % 2 else None, seed)


def rows_of(count, split="train"):
    return [Row(split, partial(drawn, seed=seed), f"caption {seed}") for seed in range(count)]


def listing(folder):
    return sorted(file.name for file in folder.iterdir())


def json_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def stored_image(folder, index):
    """Image `index` of the pack in `folder`: (S, S) or (3, S, S), as it lies on the disk."""
    size, offsets = Pack(folder).size, np.load(folder / "offsets.npy")
    pixels = np.fromfile(folder / "images.bin", dtype=np.uint8)[offsets[index]:offsets[index + 1]]
    return pixels.reshape(-1, size, size).squeeze()


# ---------------------------------------------------------------------------------------------- one image

def opened(tmp_path, image, kind="png", **options):
    path = tmp_path / f"image.{kind}"
    image.save(path, **options)
    return open_image(path)


def test_grey_and_colour_stay_as_they_are(tmp_path):
    for image in noise(7, 5), noise(7, 5, 3):
        read = opened(tmp_path, image)
        assert read.mode == image.mode and np.array_equal(read, image)


@pytest.mark.parametrize("kind, dtype", [("png", np.uint16), ("tiff", np.uint16), ("tiff", np.int32),
                                         ("tiff", np.float32)])
def test_deep_grey_is_stretched_by_its_own_range(tmp_path, kind, dtype):
    values = np.array([[1000, 1100, 1510], [2020, 1255, 1765]], dtype=dtype)   # 1000 … 2020: 4 values a step
    read = opened(tmp_path, Image.fromarray(values), kind)
    assert read.mode == "L" and np.asarray(read).tolist() == [[0, 25, 128], [255, 64, 191]]
    assert not np.any(opened(tmp_path, Image.fromarray(np.full((3, 3), 7, dtype=dtype)), kind))


def test_deep_grey_whose_zero_is_white(tmp_path):
    """MONOCHROME1, exported: the same ramp is seen in 8 and in 16 bits."""
    for dtype, top in (np.uint8, 255), (np.uint16, 4095):
        ramp = np.linspace(0, top, 40).astype(dtype).reshape(5, 8)
        opened(tmp_path, Image.fromarray(ramp), "tiff")
        file, entry = tmp_path / "image.tiff", struct.pack("<HHI", 262, 3, 1)    # PhotometricInterpretation
        assert entry + b"\1" in file.read_bytes()
        file.write_bytes(file.read_bytes().replace(entry + b"\1", entry + b"\0"))     # white is zero
        seen = np.asarray(open_image(file))
        assert (seen[0, 0], seen[-1, -1]) == (255, 0)


def test_what_pillow_would_cut_is_refused(tmp_path):
    frames = [noise(8, 8, seed=seed) for seed in range(3)]
    for kind in "tiff", "gif":
        with pytest.raises(ValueError, match="holds 3 images"):
            opened(tmp_path, frames[0], kind, save_all=True, append_images=frames[1:])
    raw = b"".join(bytes([0]) + row.tobytes() for row in np.full((4, 4, 2), 300, dtype=">u2"))  # filter 0

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
    head = (4).to_bytes(4, "big") * 2 + bytes([16, 4, 0, 0, 0])                # 16 bits, grey with alpha
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
                                        + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match="16 bits with transparency"):
        open_image(tmp_path / "deep.png")


def test_float_pixels_that_are_no_numbers_turn_black(tmp_path):
    values = np.array([[np.nan, -1, 0, np.inf, 1]], dtype=np.float32)
    assert np.asarray(opened(tmp_path, Image.fromarray(values), "tiff")).tolist() == [[0, 0, 128, 0, 255]]


def test_one_bit(tmp_path):
    bits = noise(9, 6).convert("1")
    read = opened(tmp_path, bits)
    assert read.mode == "L" and np.array_equal(np.asarray(read), 255 * np.asarray(bits, dtype=np.uint8))


def test_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    assert np.asarray(opened(tmp_path, image)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    clear = opened(tmp_path, image, transparency=1)   # the second colour is transparent: black shows through
    assert np.asarray(clear).tolist() == [[[10, 20, 30], [0, 0, 0]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_over_black(tmp_path, mode):
    image = noise(16, 16, 4).convert(mode)
    colour, alpha = np.split(np.asarray(image.convert("RGBA"), dtype=float), [3], axis=2)
    read = opened(tmp_path, image)
    assert read.mode == "RGB" and np.abs(np.asarray(read) - colour * alpha / 255).max() <= 1


def test_transparent_grey(tmp_path):
    image = Image.fromarray(np.array([[9, 10, 11]], dtype=np.uint8))
    assert np.asarray(opened(tmp_path, image, transparency=10).convert("L")).tolist() == [[9, 0, 11]]


def test_cmyk_and_ycbcr(tmp_path):
    image = noise(8, 8, 4)
    cmyk = Image.frombytes("CMYK", image.size, image.tobytes())
    ink = np.asarray(image, dtype=float)
    expected = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    assert np.abs(np.asarray(opened(tmp_path, cmyk, "tiff")) - expected).max() <= 1

    grey = noise(8, 8).convert("YCbCr")   # luma is the grey, chroma 128
    assert np.array_equal(opened(tmp_path, grey, "tiff"), grey.convert("RGB"))


@pytest.mark.parametrize("orientation, turned", [
    (1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (4, np.flipud), (5, np.transpose),
    (6, lambda a: np.rot90(a, -1)), (7, lambda a: np.rot90(a, 2).T), (8, np.rot90)])
def test_exif_rotation(tmp_path, orientation, turned):
    image, exif = noise(6, 4), Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(opened(tmp_path, image, exif=exif), turned(np.asarray(image)))
    deep = Image.fromarray(257 * np.asarray(image, dtype=np.uint16))
    assert np.asarray(opened(tmp_path, deep, exif=exif)).shape == turned(np.asarray(image)).shape


@pytest.mark.parametrize("size", [16, 31])
@pytest.mark.parametrize("width, height", [(40, 40), (61, 40), (40, 61), (401, 203), (17, 64), (1, 3)])
def test_square_is_pils_resize_and_crop(width, height, size):
    """As torchvision does it: the longer side is int(size * longer / shorter), the crop from int(round())."""
    image, short = noise(width, height, 3), min(width, height)
    wide, high = int(size * width / short), int(size * height / short)
    whole = np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC))
    left, top = int(round((wide - size) / 2)), int(round((high - size) / 2))
    assert min(wide, high) == size
    assert np.array_equal(square(image, size), whole[top:top + size, left:left + size])


def test_grey_takes_one_plane(tmp_path):
    grey = noise(20, 20)
    grey.convert("RGB").save(tmp_path / "grey.png")
    assert store_image(tmp_path / "grey.png", 20).pixels == grey.tobytes()

    pixels = np.stack([np.asarray(grey)] * 3, axis=2)
    pixels[3, 4, 2] ^= 1   # one pixel is not grey
    Image.fromarray(pixels).save(tmp_path / "colour.png")
    assert store_image(tmp_path / "colour.png", 20).pixels == pixels.transpose(2, 0, 1).tobytes()


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "tiff", "gif", "webp", "ppm"])
def test_a_truncated_image_is_refused(tmp_path, kind):
    path = tmp_path / f"image.{kind}"
    noise(60, 60, 3).save(path)
    open_image(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(OSError):
        open_image(path)


def test_an_image_bomb_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (10_000, 9_000)).save(tmp_path / "bomb.png")
    with pytest.raises(Image.DecompressionBombWarning):
        open_image(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="elongated"):   # it would be one only after resizing
        square(Image.new("L", (40_000, 1)), 288)


def test_an_image_that_would_start_a_program_is_refused(tmp_path):
    """PostScript is drawn by a program beside Pillow, whatever the file's name says."""
    noise(20, 20, 3).save(tmp_path / "0.eps")
    os.rename(tmp_path / "0.eps", tmp_path / "0.png")
    with Image.open(tmp_path / "0.png") as image:          # Pillow would
        assert image.format == "EPS"
    with pytest.raises(UnidentifiedImageError):
        open_image(tmp_path / "0.png")


# ------------------------------------------------------------------------------------------------- the pack

TEXT_WITH_BREAKS = "Chest radiograph.\n\n  •\tNo effusion. "


@pytest.fixture
def records(tmp_path):
    """A JSON lines table of 22 images, one of them used three times, in a folder of its own."""
    root = tmp_path / "records"
    (root / "images").mkdir(parents=True)
    entries = []
    for i in range(22):
        noise(30, 20, 3 if i == 1 else None, seed=i).save(root / "images" / f"{i}.png")
        entries.append({"image": f"images/{i}.png", "caption": f"Finding {i}", "label": "ab"[i % 2],
                        "split": ["train", "dev", "test"][i % 3]})
    entries[0] |= {"caption": TEXT_WITH_BREAKS, "group": "CT", "answer": 2, "closed": True}
    entries.append(entries[0] | {"caption": "Finding 3"})       # the image again, the text of another
    entries.append(entries[0])                                  # the pair again
    entries.append(entries[1] | {"caption": " \n"})             # no text
    (root / "table.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return root


def packed(root, out, size=16, task="pretrain", reader=table, **options):
    return write_pack(reader.rows(root, task), out, reader.__name__.split(".")[-1], task, size, root=root,
                        **options)


def test_what_a_pack_holds(records, tmp_path):
    out = tmp_path / "packs" / "mine"
    meta = packed(records, out)
    assert meta == json.loads((out / "meta.json").read_text()) == Pack(out).meta
    Pack(out).verify()
    assert listing(out.parent) == ["mine"]
    assert listing(out) == sorted([*meta["files"], "meta.json"])
    assert meta["samples"] == {"train": 9, "val": 7, "test": 7} and meta["images"] == 22
    assert meta["labels"] == ["a", "b"] and meta["groups"] == ["CT"]
    assert meta["skipped"] == {"duplicate": 1, "no text": 1}
    assert [entry["reason"] for entry in json_lines(out / "skipped.jsonl")] == ["duplicate", "no text"]

    samples, numbers = json_lines(out / "samples.jsonl"), np.load(out / "samples.npy")
    assert numbers.dtype == SAMPLE_DTYPE and len(numbers) == len(samples) == 23
    assert [sample["split"] for sample in samples] == ["train"] * 9 + ["val"] * 7 + ["test"] * 7
    assert samples[0] == {"image": 0, "text": "Chest radiograph. • No effusion.", "split": "train",
                          "answer": "2", "closed": True, "label": "a", "group": "CT",
                          "source": "images/0.png"}
    raw = (out / "samples.jsonl").read_bytes()
    for sample, row in zip(samples, numbers):
        assert json.loads(raw[row["line"]:].split(b"\n")[0]) == sample
        assert row["image"] == sample["image"] and meta["labels"][row["label"]] == sample["label"]
        assert row["group"] == (0 if "group" in sample else -1)
        assert row["closed"] == (1 if "closed" in sample else -1)

    again = [i for i, sample in enumerate(samples) if sample["source"] == "images/0.png"]
    assert [samples[i]["text"] for i in again] == ["Chest radiograph. • No effusion.", "Finding 3"]
    same_text = [i for i, sample in enumerate(samples) if sample["text"] == "Finding 3"]
    assert len(same_text) == 2 and len(set(numbers["text"][same_text])) == 1
    assert len(set(numbers["text"])) == len({sample["text"] for sample in samples})

    for sample in samples:
        image = Image.open(records / sample["source"])
        expected = np.asarray(square(image, 16))
        assert np.array_equal(stored_image(out, sample["image"]),
                              expected if image.mode == "L" else expected.transpose(2, 0, 1))


def test_a_pack_of_another_version_is_refused(records, tmp_path):
    meta = packed(records, tmp_path / "pack")
    assert meta["version"] == PACK_VERSION
    for version in PACK_VERSION - 1, PACK_VERSION + 1:
        (tmp_path / "pack" / "meta.json").write_text(json.dumps({"version": version}))   # other keys
        with pytest.raises(UserError, match=f"version {version}, .* reads version {PACK_VERSION}: delete"):
            Pack(tmp_path / "pack")


def test_questions_may_repeat(records, tmp_path):
    meta = packed(records, tmp_path / "vqa", task="vqa")
    assert meta["samples"] == {"train": 3, "val": 0, "test": 0}
    assert meta["skipped"] == {"no answer": 21, "no text": 1}


def test_any_number_of_workers_gives_the_same_pack(tmp_path):
    for workers in 1, 2:
        write_pack(rows_of(100), tmp_path / str(workers), "drawn", "pretrain", 24, workers=workers)
    for name in listing(tmp_path / "1"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert np.array_equal(stored_image(tmp_path / "2", 98), drawn(24, 98))


def test_five_percent_of_the_images_may_be_missing(records, tmp_path):
    (records / "images" / "4.png").unlink()
    (records / "images" / "5.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="2 of 22 images cannot be packed, the first is .*4.png"):
        packed(records, tmp_path / "pack")
    assert listing(tmp_path) == ["pack.part", "records"]       # four images were decoded

    meta = packed(records, tmp_path / "allowed", allow_missing=True)
    assert meta["images"] == 20
    assert meta["skipped"] == {"duplicate": 1, "missing image": 1, "no text": 1, "unreadable image": 1}
    summary = (tmp_path / "allowed" / "summary.txt").read_text()
    assert "warning: 2 of the skipped rows have an image that cannot be packed" in summary
    unreadable = json_lines(tmp_path / "allowed" / "skipped.jsonl")[-1]
    assert unreadable["reason"] == "unreadable image" and "cannot identify" in unreadable["detail"]
    assert unreadable["text"] == "Finding 5"

    noise(30, 20).save(records / "images" / "4.png")   # 1 of 22 is under 5 %
    assert packed(records, tmp_path / "pack")["skipped"]["unreadable image"] == 1


def test_names_that_leave_the_folder_are_refused(records, tmp_path):
    noise(9, 9).save(tmp_path / "secret.png")
    (records / "link.png").symlink_to(tmp_path / "secret.png")
    (records / "inner.png").symlink_to(records / "images" / "7.png")
    names = ["../secret.png", "images/../../secret.png", str(tmp_path / "secret.png"), "link.png",
             "inner.png", "a\0b.png"]
    with open(records / "table.jsonl", "a") as file:
        for name in names:
            file.write(json.dumps({"image": name, "caption": f"leave {name!r}", "split": "train"}) + "\n")
    meta = packed(records, tmp_path / "pack", allow_missing=True)
    assert meta["skipped"]["outside the data set's folder"] == 4 and meta["skipped"]["missing image"] == 1
    texts = [s["source"] for s in json_lines(tmp_path / "pack" / "samples.jsonl") if "leave" in s["text"]]
    assert texts == ["inner.png"]


def test_an_existing_pack_is_replaced_only_on_demand(records, tmp_path):
    out = tmp_path / "pack"
    packed(records, out)
    before = (out / "images.bin").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        packed(records, out, size=8)
    (records / "images" / "1.png").write_bytes(b"")
    (records / "images" / "2.png").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be packed"):
        packed(records, out, size=8, overwrite=True)
    assert (out / "images.bin").read_bytes() == before

    assert packed(records, out, size=8, overwrite=True, allow_missing=True)["size"] == 8
    assert Pack(out).size == 8 and listing(tmp_path) == ["pack", "records"]
    with pytest.raises(UserError, match="is not a pack"):
        packed(records, records, overwrite=True)


def test_a_pack_that_appears_meanwhile_stays(records, tmp_path):
    out = tmp_path / "pack"

    def rows():
        yield from table.rows(records, "pretrain")
        packed(records, out)                                   # somebody else is faster
    with pytest.raises(UserError, match="was created meanwhile"):
        write_pack(rows(), out, "table", "pretrain", 8, root=records)
    assert Pack(out).size == 16 and listing(tmp_path) == ["pack", "records"]


def test_an_interrupt_between_the_renames(records, tmp_path, monkeypatch):
    out, rename = tmp_path / "pack", Path.rename
    packed(records, out)

    def first_alone(source, target):
        if source.parent.name == "pack.part" and source.name == "pack":
            raise KeyboardInterrupt
        return rename(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", first_alone)
        with pytest.raises(KeyboardInterrupt):
            packed(records, out, size=8, overwrite=True)
    assert Pack(out).size == 16 and listing(tmp_path) == ["pack", "pack.part", "records"]

    os.rename(out, tmp_path / "pack.part" / "old")             # what a kill there leaves
    with pytest.raises(UserError, match="was created meanwhile"):
        packed(records, out, size=8)
    assert Pack(out).size == 16
    packed(records, out, size=8, overwrite=True)
    assert Pack(out).size == 8 and listing(tmp_path) == ["pack", "records"]


def test_phantoms_drawn_twice_at_once_are_one_pack(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(phantoms, "COUNTS", {"train": 4, "val": 2, "test": 2})
    rows = phantoms.rows

    def slow(root, task, shift):
        monkeypatch.setattr(phantoms, "rows", rows)
        open_packs("phantoms", 16, crop=1)                     # another process, at the same time
        return rows(root, task, shift=shift)
    monkeypatch.setattr(phantoms, "rows", slow)
    assert open_packs("phantoms", 16, crop=1)[0].split["train"] == range(4)


def test_nothing_to_train_on(tmp_path):
    for rows in [], rows_of(3, "val"), [row._replace(skip="excluded") for row in rows_of(3)]:
        with pytest.raises(UserError, match="no training rows"):
            write_pack(rows, tmp_path / "pack", "drawn", "pretrain", 8)
    assert listing(tmp_path) == []


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        write_pack(rows_of(40), tmp_path / "pack", "drawn", "pretrain", 8, workers=2)
    assert listing(tmp_path) == []


def test_a_sheet_of_a_damaged_pack(records, tmp_path):
    """A line that names another image: its length is right, so the pack opens."""
    out = tmp_path / "pack"
    packed(records, out)
    sheet = contact_sheet(Pack(out))
    lines = (out / "samples.jsonl").read_bytes()
    (out / "samples.jsonl").write_bytes(lines.replace(b'"image": 12,', b'"image": 92,'))
    assert contact_sheet(Pack(out)) == sheet           # what samples.npy says counts
    with pytest.raises(UserError, match="samples.jsonl does not match its checksum"):
        Pack(out).verify()


def test_imports_point_one_way():
    """The modules of data/ have an order, and what reads packs needs nothing of what writes them."""
    imports = {}
    for path in (REPO / "data").glob("*.py"):
        found = imports[path.stem] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "data":
                found |= {*node.module.split(".")[1:], *(alias.name for alias in node.names)}
        found &= {path.stem for path in (REPO / "data").glob("*.py")}
    list(TopologicalSorter(imports).static_order())            # CycleError where there is a circle
    assert imports["pack"] == {"progress"} and {"write_pack", "pack", "phantoms"} <= imports["prepare"]


# -------------------------------------------------------------------------------------- the command line

def refused(capsys, *arguments):
    """The sentence on stderr with which `prepare arguments` ends."""
    assert prepare.main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert said.startswith("prepare: ")
    return said


def test_command_line(records, tmp_path, capsys):
    out = tmp_path / "pack"
    assert prepare.main(["table", "--root", str(records), "--out", str(out), "--size", "16"]) == 0
    said = capsys.readouterr().out
    assert "22 images of 16 x 16" in said and "9 train, 7 val, 7 test" in said and "1 duplicate" in said
    assert prepare.main(["--verify", str(out)]) == 0
    assert prepare.main(["--show", str(out)]) == 0
    with Image.open(tmp_path / "pack.png") as sheet:
        assert sheet.width > 1000 and len(np.unique(sheet)) > 20

    assert "exists already" in refused(capsys, "table", "--root", records, "--out", out)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        (tmp_path / "pack.png").unlink()
        assert prepare.main(["--show", "."]) == 0 and (tmp_path / "pack.png").is_file()
    new = tmp_path / "new"
    assert "use at most 9459" in refused(capsys, "table", "--root", records, "--out", new, "--size", "9460")
    assert "correct --root" in refused(capsys, "table", "--root", tmp_path / "nowhere", "--out", new)
    assert "--root" in refused(capsys, "table", "--out", new)
    assert "--out" in refused(capsys, "table", "--root", records)
    assert "no pack" in refused(capsys, "--show", tmp_path)
    in_a_file = out / "meta.json" / "pack"
    assert "cannot be written" in refused(capsys, "table", "--root", records, "--out", in_a_file)
    assert "train/radiology" in refused(capsys, "roco", "--root", records, "--out", new)

    def forbidden(folder):
        raise PermissionError(13, "Permission denied", str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "iterdir", forbidden)
        assert "records: Permission denied" in refused(capsys, "table", "--root", records, "--out", new)
    for wrong in ["nonsense"], ["table", "--size", "0"], ["table", "--task", "x"]:
        with pytest.raises(SystemExit) as end:
            prepare.main(wrong)
        assert end.value.code == 2
    assert listing(tmp_path) == ["pack", "pack.png", "records"]


def test_exclude_knows_images_by_their_names(tmp_path):
    for name in "synpic1.jpg", "synpic22.png":
        (tmp_path / name).touch()
    names = ["MPX7_synpic1.png", "MPX7_synpic2.png", "synpic22.jpg", "a_synpic222.png"]
    rows = mark_excluded([Row("train", Path(name), "text") for name in names], tmp_path)
    found = ["excluded by name: synpic1.jpg", None, "excluded by name: synpic22.png", None]
    assert [row.skip for row in rows] == found
    (tmp_path / "below").mkdir()
    (tmp_path / "synpic22.png").rename(tmp_path / "below" / "synpic22.png")
    rows = mark_excluded([Row("train", Path(name), "text") for name in names], tmp_path)
    found[2] = "excluded by name: below/synpic22.png"
    assert [row.skip for row in rows] == found
    with pytest.raises(UserError, match="is not a folder"):
        list(mark_excluded([], tmp_path / "nowhere"))
    with pytest.raises(UserError, match="none of the images is in"):       # that of the data set, say
        list(mark_excluded([Row("train", Path("synpic3.jpg"), "text")], tmp_path))


# --------------------------------------------------------------------------------------------- the readers

def test_csv(tmp_path):
    (tmp_path / "mine.csv").write_bytes(
        '\ufeffPath,Question,answer,closed,split\r\n'
        'a.png,"Is it ""large"",\r\nor not?",yes,yes,train\r\n\r\n'
        'b/c.png,Where is it?,,open,Validation\r\n'.encode("utf-8"))
    rows = list(table.rows(tmp_path / "mine.csv", "vqa"))
    assert rows == list(table.rows(tmp_path, "vqa"))
    assert rows[0] == Row("train", tmp_path / "a.png", 'Is it "large",\r\nor not?', "yes", True)
    assert rows[1] == Row("val", tmp_path / "b/c.png", "Where is it?", "", False)


def test_a_table_without_splits_is_split_by_image(tmp_path):
    lines = [f"{i // 2}.png,text {i}" for i in range(4000)]
    (tmp_path / "t.csv").write_text("\n".join(["file,text"] + lines))
    rows = list(table.rows(tmp_path, "pretrain"))
    splits = {row.image: row.split for row in rows}
    assert all(row.split == splits[row.image] for row in rows)
    share = {split: list(splits.values()).count(split) / 2000 for split in SPLITS}
    assert abs(share["val"] - 0.1) < 0.02 and abs(share["test"] - 0.1) < 0.02
    (tmp_path / "t.csv").write_text("\n".join(["file,text"] + [f"./{line}" for line in lines]))
    again = list(table.rows(tmp_path, "pretrain"))             # the same images, spelled otherwise
    assert [row.split for row in again] == [row.split for row in rows]
    assert [round(hash_to_unit(f"{i}.png"), 6) for i in range(3)] == [0.059171, 0.579619, 0.201021]   # for ever


def test_all_images_of_a_patient_are_in_one_split_and_answers_in_one_spelling(tmp_path):
    lines = [f"{i}.png,text {i},p{i // 7},The Left#on  the LEFT!#," for i in range(700)]
    (tmp_path / "t.csv").write_text("\n".join(["file,text,patient,answer,split"] + lines))
    rows = list(table.rows(tmp_path, "vqa"))
    assert {row.answer for row in rows} == {"left#on left"}
    patients = [{row.split for row in rows[i:i + 7]} for i in range(0, 700, 7)]
    assert all(len(splits) == 1 for splits in patients) and set.union(*patients) == set(SPLITS)


@pytest.mark.parametrize("name, lines, sentence", [
    ("t.jsonl", ['{"image": "a", "text": "b"}', '{"image": "a", '], "t.jsonl, line 2: not valid JSON"),
    ("t.jsonl", ['["a"]'], "line 1: not a JSON object"),
    ("t.jsonl", ['{"text": "b"}'], "line 1: no column image .* among text"),
    ("t.jsonl", ['{"image": "a", "text": ["b"]}'], "line 1: text is not plain text"),
    ("t.jsonl", ['{"image": "a", "text": "b", "split": "tain"}'], "line 1: the split is 'tain'"),
    ("t.jsonl", ['{"image": "a", "text": "b", "closed": 3}'], "line 1: closed is '3'"),
    ("t.csv", ["image,text", "a,b", "a,b,c"], "t.csv, line 3: 3 fields, not 2"),
    ("t.csv", ["image,text", 'a,"b'], "line 2: not valid CSV"),
    ("t.csv", ["image,text", ",b"], "line 2: the image's name is empty"),
    ("t.csv", ["image,words", "a,b"], "line 2: no column text .* among image, words"),
    ("t.csv", ["image,caption,question", "a,b,c"], "line 2: which is meant, caption or question"),
    ("t.csv", ["image,text,text", "a,b,c"], "line 1: there are two columns 'text'"),
    ("t.csv", ["image,Text,text", "a,b,c"], "line 2: there are two columns 'text'"),
    ("t.csv", ["image,text,split", "a,b,train", "c,d,"], "line 3: some rows have a split and some none"),
    ("t.txt", ["image,text"], "holds no table"),
])
def test_a_malformed_table_is_named_by_file_and_line(tmp_path, name, lines, sentence):
    (tmp_path / name).write_text("\n".join(lines))
    with pytest.raises(UserError, match=sentence):
        list(table.rows(tmp_path, "pretrain"))


def test_what_tables_hold_besides(tmp_path):
    """An ending in capitals, a line of commas, a choice called A, a path in two spellings; NaN as an empty
    cell, as pandas writes it; a column of lists that nothing reads."""
    (tmp_path / "T.CSV").write_text("image,text,answer\na.png,Which?,A\n,,\nb/../a.png,Which?,The B#a\n")
    first, second = table.rows(tmp_path, "vqa")
    assert (first.answer, second.answer) == ("a", "b#a") and first.image == second.image
    (tmp_path / "T.CSV").unlink()
    (tmp_path / "t.jsonl").write_text(
        '{"image": "a.png", "text": "Which?", "answer": NaN, "patient": NaN, "box": [1, 2]}')
    assert [(row.answer, row.text) for row in table.rows(tmp_path, "vqa")] == [("", "Which?")]


def test_a_table_must_be_one_and_utf8(tmp_path):
    (tmp_path / "a.csv").write_bytes("image,text\na.png,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        list(table.rows(tmp_path, "pretrain"))
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(UserError, match="2 tables"):
        list(table.rows(tmp_path, "pretrain"))


def write_lines(path, *entries):
    """Lines of text, or of JSON where an entry is a dict."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_text("".join(f"{line}\n" for line in lines))


def medpix_entry(name, caption, kind="CT", part="Head"):
    return {"Type": kind, "U_id": "MPX1", "image": name, "Description": {"Caption": caption, "Plane": None},
            "Location": "Brain", "Location Category": part}


def test_medpix(tmp_path):
    root = tmp_path / "MedPix-2-0"
    folder = root / "splitted_dataset"
    write_lines(folder / "descriptions_train.jsonl", medpix_entry("MPX1_synpic1", "Mass.\n\n• large"),
                medpix_entry("MPX1_synpic2", medpix.PLACEHOLDER + " OR FINDINGS."))
    write_lines(folder / "descriptions_dev.jsonl", medpix_entry("MPX2_synpic3", "Cyst", "MR", "Abdomen"))
    write_lines(folder / "descriptions_test.jsonl", medpix_entry("MPX3_synpic4", None))
    rows = list(medpix.rows(tmp_path, "cls"))   # the clone, or the folder in it
    assert rows == list(medpix.rows(root, "cls"))
    assert [row.split for row in rows] == ["train", "train", "val", "test"]
    assert rows[0] == Row("train", root / "images" / "MPX1_synpic1.png", "Mass.\n\n• large", label="Head",
                          group="CT Head", patient="MPX1")
    assert [row.skip for row in rows] == [None, "placeholder caption", None, None]
    assert (rows[2].label, rows[2].group) == ("Abdomen", "MR Abdomen")

    entry = medpix_entry("a", "b")
    write_lines(folder / "descriptions_test.jsonl", entry, entry | {"Description": 3})
    with pytest.raises(UserError, match="descriptions_test.jsonl, line 2: its Description has no Caption"):
        list(medpix.rows(root, "cls"))
    with pytest.raises(UserError, match="vqa"):
        list(medpix.rows(root, "vqa"))


def roco_miniature(root, validation="validation"):
    for name, numbers in ("train", range(1, 4)), (validation, range(4, 20)), ("test", range(20, 30)):
        folder = root / name / "radiology"
        write_lines(folder / "captions.txt", *[f"ROCO_{i:05}\t Axial CT  number {i}." for i in numbers])
        links = [f"ROCO_{i:05}\twget -r ftp://host/pub/{i % 7}/PMC{i}.tar.gz\tfig {i}.jpg" for i in numbers]
        write_lines(folder / "dlinks.txt", *links)
        (folder / "images").mkdir()
        for i in numbers:
            noise(20, 20, seed=i).save(folder / "images" / f"ROCO_{i:05}.jpg")
    with open(root / "train" / "radiology" / "captions.txt", "a") as file:
        file.write("ROCO_00090\t Two words.\n")


@pytest.mark.parametrize("validation", ["validation", "val"])
def test_roco(tmp_path, validation):
    root = tmp_path / "roco"
    roco_miniature(root, validation)
    rows = list(roco.rows(root, "pretrain"))
    assert len(rows) == 30 and {row.split for row in rows} == {"train", "val", "test"}
    assert rows[0] == Row("train", root / "train/radiology/images/ROCO_00001.jpg", " Axial CT  number 1.\n")
    assert [row.skip for row in rows].count("under 3 words") == 1 and rows[3].skip

    references = tmp_path / "medicat" / "release" / "roco_files"
    write_lines(references / "roco_train_references.jsonl",
                {"roco_image_id": "PMC2_fig 2.jpg", "gorc_references": ["Figure 2 shows this.", "See Fig."]},
                {"roco_image_id": "PMC3_fig 3.jpg", "gorc_references": None},
                {"roco_image_id": "PMC99_fig 3.jpg", "gorc_references": ["Of no image here."]})
    more = list(roco.rows(root, "pretrain"))
    added = [row for row in more if row not in rows]
    assert [(row.image.stem, row.text, row.skip) for row in added] == [
        ("ROCO_00002", "Figure 2 shows this.", None), ("ROCO_00002", "See Fig.", "under 3 words")]
    meta = packed(root, tmp_path / "pack", reader=roco)
    assert meta["images"] == 29 and meta["samples"] == {"train": 4, "val": 16, "test": 10}


def test_roco_retrieval_takes_pairs_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(roco, "RETRIEVAL_PAIRS", 8)
    roco_miniature(tmp_path)
    first = [row.image for row in roco.rows(tmp_path, "irtr") if row.split == "val"]
    assert len(first) == 8 and first == sorted(first, key=lambda image: hash_to_unit(image.stem))
    first[0].unlink()
    rows = list(roco.rows(tmp_path, "irtr"))
    second = [row.image for row in rows if row.split == "val"]
    assert second[:8] == first and len(second) == 9   # the missing one is listed, another takes its place
    assert len([row for row in rows if row.split == "train"]) == 4
    with pytest.raises(UserError, match="task vqa"):
        list(roco.rows(tmp_path, "vqa"))


def test_roco_without_images(tmp_path, capsys):
    roco_miniature(tmp_path / "roco")
    for path in (tmp_path / "roco").rglob("*.jpg"):
        path.unlink()
    said = refused(capsys, "roco", "--root", tmp_path / "roco", "--out", tmp_path / "pack")
    assert "29 of 29 images" in said and "train/radiology/images/ROCO_00001.jpg (missing image)" in said
    assert listing(tmp_path) == ["roco"]

    captions = tmp_path / "roco" / "test" / "radiology" / "captions.txt"
    write_lines(captions, "ROCO_00001\tA b c.", "ROCO_00002 A b c.")
    with pytest.raises(UserError, match="captions.txt, line 2: no tab"):
        list(roco.rows(tmp_path / "roco", "pretrain"))


def test_medicat(tmp_path, monkeypatch):
    monkeypatch.setattr(medicat, "HELD_OUT", 4)
    entries = [{"radiology": i != 5, "pdf_hash": f"paper{i // 2}", "fig_uri": f"{i}-Figure1-1.png",
                "s2_caption": f"Axial CT number {i}." if i != 6 else None,
                "s2orc_references": [f"Figure {i} shows a mass.", "See Figure"] if i % 2 else None}
               for i in range(30)]
    write_lines(tmp_path / "release" / medicat.ANNOTATIONS, *entries)
    rows = list(medicat.rows(tmp_path, "pretrain"))
    usable = {row.image.name: row.split for row in rows if row.skip is None}
    assert len(usable) == 28   # not the figure that is no radiology, nor the one without a text
    assert "paper2_5-Figure1-1.png" not in usable and "paper3_6-Figure1-1.png" not in usable
    assert list(usable.values()) == ["val"] * 4 + ["test"] * 4 + ["train"] * 20
    of_one = [row for row in rows if row.image == tmp_path / "release/figures/paper0_1-Figure1-1.png"]
    assert [row.text for row in of_one] == ["Axial CT number 1.", "Figure 1 shows a mass.", "See Figure"]
    assert [row.skip for row in of_one] == [None, None, "under 3 words"]

    del entries[3]["s2_caption"]
    write_lines(tmp_path / "release" / medicat.ANNOTATIONS, *entries)
    with pytest.raises(UserError, match="line 4: has no s2_caption"):
        list(medicat.rows(tmp_path, "pretrain"))
    with pytest.raises(UserError, match="cannot be read .No such file"):
        list(medicat.rows(tmp_path / "nowhere", "pretrain"))


# ------------------------------------------------------------------------------------------------- real data

@needs(not (REAL / "MedPix-2-0").is_dir())
def test_real_medpix():
    rows = list(medpix.rows(REAL / "MedPix-2-0", "pretrain"))
    count = {split: sum(row.split == split for row in rows) for split in SPLITS}
    placeholders = {split: sum(row.split == split and row.skip is not None for row in rows)
                    for split in SPLITS}
    assert count == {"train": 1653, "val": 197, "test": 200}
    assert placeholders == {"train": 15, "val": 6, "test": 0}
    assert len({row.label for row in rows}) == 5 and len({row.group for row in rows}) == 10
    assert all(row.image.is_file() for row in rows)
    kept, skipped = filter_rows(rows, "pretrain")
    assert len(kept) == 2029 and len(skipped) == 21 and not any("\n" in row.text for row in kept)


@needs(not (REAL / "roco").is_dir())
def test_real_roco_has_no_images(tmp_path, capsys):
    rows = list(roco.rows(REAL / "roco", "pretrain"))
    assert sum(row.skip is not None for row in rows) == 116 + 131 and len(rows) == 8179 + 8180
    said = refused(capsys, "roco", "--root", REAL / "roco", "--out", tmp_path / "pack")
    assert "16,112 of 16,112 images" in said and "validation/radiology/images/ROCO_00020.jpg" in said
    assert listing(tmp_path) == []
