"""Nothing from outside is turned, stretched, merged or split without a line that says so."""
import json
import shutil
import struct
import tempfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import Row, medpix, prepare, table, vqa_rad
from data.answers import canonical_answer, collect_spellings
from data.decode import DEEP_COLOUR, DEEP_GREY, UNUSED_ALPHA, decode, open_image
from data.exclude import Look, alike, look, mark_excluded
from data.images import CONSTANT, NEARLY_BLACK, square, store_image
from data.leaks import leaks
from data.pack import Pack
from data.summary import TableReport
from data.write_pack import write_pack
from m3ae_mini.config import UserError

REAL = Path(__file__).parent.parent.parent / "shared" / "data"
needs = partial(pytest.mark.skipif, reason="the real data set is not here")


def noise(width, height, channels=None, seed=0):
    """An image of random pixels: L, or with 3 or 4 channels RGB or RGBA."""
    shape = (height, width, channels) if channels else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def blobs(seed, size=64):
    """Smooth random shapes, as an image has them."""
    return noise(6, 6, seed=seed).resize((size, size), Image.Resampling.BICUBIC)


def write_table(folder, header, *rows, name="t.csv"):
    """A CSV file; each image that it names becomes a file of its own noise, if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    at = next((i for i, column in enumerate(header.split(",")) if column == "image"), None)
    for i, row in enumerate(rows):
        path = folder / row.split(",")[at]
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            noise(12, 10, seed=1000 + i).save(path)
    return folder / name


def prepared(capsys, root, out, *flags, task="pretrain", name="table"):
    """(exit status, lines of the summary or the sentence on stderr)"""
    arguments = [name, "--root", root, "--out", out, "--task", task, "--size", "8", "--workers", "1", *flags]
    status = prepare.main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    if status:
        return status, told.err.strip().splitlines()[-1]
    lines = (Path(out) / "summary.txt").read_text(encoding="utf-8").splitlines()
    assert told.out.splitlines()[1:] == lines                        # what is kept was printed
    return status, lines


def starting(lines, start):
    (line,) = [line for line in lines if line.startswith(start)]
    return line


# ----------------------------------------------------------------------------------- images: orientation

TURNED = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
          5: lambda a: np.swapaxes(a, 0, 1), 6: lambda a: np.rot90(a, -1),
          7: lambda a: np.swapaxes(np.rot90(a, 2), 0, 1), 8: np.rot90}
LOSSLESS = None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma"
COMPRESSIONS = {mode: LOSSLESS for mode in ("L", "P", "RGB", "RGBX", "RGBA", "LA", "CMYK", "YCbCr", "LAB",
                                            "I;16", "I;16B", "I", "F")}
COMPRESSIONS |= {"1": (*LOSSLESS, "group3", "group4"), "L": (*LOSSLESS, "jpeg"), "RGB": (*LOSSLESS, "jpeg")}


def of_mode(mode):
    """A TIFF's image of a mode, and what open_image must make of it."""
    grey, colour = np.asarray(noise(24, 16)), np.asarray(noise(24, 16, 4, seed=1))
    if mode in ("I;16", "I;16B", "I", "F"):
        values = grey * np.uint16(99) + np.uint16(7)
        values = values.astype({"I": np.int32, "F": np.float32, "I;16B": ">u2"}.get(mode, np.uint16))
        low, high = values.min(), values.max()
        return Image.fromarray(values), np.rint((values - float(low)) / (high - float(low)) * 255)
    if mode in ("RGBX", "CMYK", "LAB"):
        data = np.ascontiguousarray(colour[..., :3] if mode == "LAB" else colour)
        image = Image.frombytes(mode, (24, 16), data.tobytes())
        return image, np.asarray(image.convert("RGB"))
    if mode == "P":
        image = noise(24, 16, 3).quantize(16)
        return image, np.asarray(image.convert("RGB"))
    image = Image.fromarray(colour).convert(mode) if mode in ("RGBA", "LA") else noise(24, 16, 3).convert(mode)
    if mode in ("RGBA", "LA"):
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return image, np.asarray(Image.alpha_composite(black, image.convert("RGBA")).convert("RGB"))
    return image, np.asarray(image.convert("L" if mode in ("1", "L") else "RGB"))


@pytest.mark.parametrize("mode", COMPRESSIONS)
def test_a_tiff_is_upright_in_all_modes_compressions_and_orientations(tmp_path, mode):
    image, expected = of_mode(mode)
    for compression in COMPRESSIONS[mode]:
        upright = None
        for orientation, turn in TURNED.items():
            path = tmp_path / "image.tif"
            image.save(path, compression=compression, tiffinfo={274: orientation})
            found = np.asarray(open_image(path))
            upright = found if orientation == 1 else upright
            assert np.array_equal(found, turn(upright)), (compression, orientation)
        apart = np.abs(upright.astype(int) - expected).max()
        assert apart <= (60 if compression == "jpeg" else mode == "YCbCr"), compression   # libtiff's rounding


# --------------------------------------------------------------------------------- images: what tags say

def with_tag(path, tag, value):
    """Set the value of a SHORT in a little-endian TIFF that Pillow wrote."""
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<HHI", tag, 3, 1)) + 8
    data[at:at + 2] = struct.pack("<H", value)
    path.write_bytes(data)
    return path


def test_signed_bytes_are_read_as_signed(tmp_path):
    path = tmp_path / "signed.tif"
    values = np.array([[-128, -1, 0, 1, 127]], dtype=np.int8)
    Image.fromarray(values.view(np.uint8)).save(path, tiffinfo={339: 2})
    assert np.asarray(open_image(path)).tolist() == [[0, 127, 128, 129, 255]]


def test_signed_words_and_unsigned_long_words(tmp_path):
    path = tmp_path / "words.tif"
    Image.fromarray(np.array([[-1000, 0, 1000]], dtype=np.int32)).save(path)
    assert np.asarray(open_image(path)).tolist() == [[0, 128, 255]]
    values = np.array([[0, 2 ** 31, 2 ** 32 - 1]], dtype=np.uint32)
    Image.fromarray(values.view(np.int32)).save(path)
    assert np.asarray(open_image(with_tag(path, 339, 1))).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_white_is_zero_at_every_depth(tmp_path, dtype, compression):
    ramp = np.arange(0, 256, 5).astype(dtype).reshape(4, 13)
    path = tmp_path / "ramp.tif"
    Image.fromarray(ramp).save(path, compression=compression)
    with_tag(path, 262, 0)
    assert np.array_equal(open_image(path), 255 - ramp.astype(int))
    if dtype != np.uint8:                     # the window is in values of the file: 51 is white now
        seen = np.asarray(open_image(path, window=(51, 102)))
        assert (seen[ramp <= 51] == 255).all() and (seen[ramp >= 102] == 0).all()


# ------------------------------------------------------------------------------ images: depth and window

def pgm(path, values, largest):
    head = f"P5\n{values.shape[1]} {values.shape[0]}\n{largest}\n".encode()
    path.write_bytes(head + values.astype(">u2").tobytes())


VALUES = np.array([[0, 1000, 2000], [3000, 4000, 4095]])


@pytest.mark.parametrize("kind", ["png", "tif", "pgm", "float"])
def test_a_window_is_in_values_of_the_file(tmp_path, kind):
    path = tmp_path / f"deep.{kind if kind != 'float' else 'tif'}"
    if kind == "pgm":
        pgm(path, VALUES, largest=4095)       # Pillow spreads these over 16 bits
    else:
        Image.fromarray(VALUES.astype(np.float32 if kind == "float" else np.uint16)).save(path)
    image, notes = decode(path, window=(1000, 3000))
    assert np.asarray(image).tolist() == [[0, 0, 128], [255, 255, 255]] and notes == [DEEP_GREY]
    assert np.asarray(open_image(path)).tolist() == np.rint(VALUES / 4095 * 255).tolist()


def test_a_window_of_jpeg_2000_is_in_values_of_the_file(tmp_path):
    path, large = tmp_path / "deep.jp2", VALUES.repeat(8, 0).repeat(8, 1)
    for bits, signed in (16, False), (12, False), (13, True):
        # Pillow writes 16 bits. The codestream holds values minus half the range, whatever the
        # header says: with another depth in it, the same stream is a file of that depth.
        middle = 0 if signed else 2 ** (bits - 1)
        Image.fromarray((large + 2 ** 15 - middle).astype(np.uint16)).save(path)
        data = bytearray(path.read_bytes())
        for at in data.index(b"\xff\x4f\xff\x51") + 42, data.index(b"ihdr") + 14:
            assert data[at] == 15
            data[at] = bits - 1 + 128 * signed
        path.write_bytes(data)
        seen = np.asarray(open_image(path, (1000, 3000)))
        assert seen[::8, ::8].tolist() == [[0, 0, 128], [255, 255, 255]], bits


def test_the_transparent_grey_of_16_bits_turns_black(tmp_path):
    Image.fromarray(VALUES.astype(np.uint16)).save(tmp_path / "deep.png", transparency=4095)
    assert np.asarray(open_image(tmp_path / "deep.png")).tolist() == [[0, 64, 128], [191, 255, 0]]


def deep_png(path, values):
    """An RGB PNG of 16 bits, from (H, W, 3)."""
    def chunk(name, data):
        body = name + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines))
                     + chunk(b"IEND", b""))


def test_deep_colour_is_noted(tmp_path):
    deep_png(tmp_path / "deep.png", np.full((4, 5, 3), 0x1234))
    (tmp_path / "deep.ppm").write_bytes(b"P6\n1 1\n4095\n" + np.array([9, 99, 4095], ">u2").tobytes())
    noise(9, 9, 3).save(tmp_path / "plain.png")
    noise(9, 9, 3).save(tmp_path / "plain.ppm")
    noise(9, 9, 3).save(tmp_path / "plain.bmp")
    noise(9, 9, 3).save(tmp_path / "plain.jp2")
    head = struct.pack("<IiiHHIIiiII", 40, 1, 1, 1, 16, 0, 4, 0, 0, 0, 0)              # 5 bits a colour
    (tmp_path / "small.bmp").write_bytes(struct.pack("<2sIII", b"BM", 58, 0, 54) + head + b"\xff\x7f\0\0")
    assert decode(tmp_path / "deep.ppm")[1] == [DEEP_COLOUR]
    image, notes = decode(tmp_path / "deep.png")
    assert notes == [DEEP_COLOUR] and np.unique(image).tolist() == [0x12]
    for name in "plain.png", "plain.ppm", "plain.bmp", "plain.jp2", "small.bmp":
        assert decode(tmp_path / name)[1] == []


# ------------------------------------------------------------------------------------- images: transparency

def bmp(image, path):
    """A BMP whose header names bits of alpha; Pillow writes none."""
    head = struct.pack("<IiiHHIIiiII", 108, *image.size, 1, 32, 3, 0, 0, 0, 0, 0)
    head += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"sRGB" + bytes(48)
    pixels = np.asarray(image)[::-1, :, [2, 1, 0, 3]].tobytes()
    path.write_bytes(struct.pack("<2sIII", b"BM", 14 + len(head) + len(pixels), 0, 14 + len(head)) + head + pixels)


@pytest.mark.parametrize("kind, mode", [("png", "RGBA"), ("png", "LA"), ("tif", "RGBA"), ("tif", "LA"),
                                        ("bmp", "RGBA"), ("webp", "RGBA")])
def test_an_alpha_of_0_everywhere_is_ignored(tmp_path, kind, mode):
    image = noise(12, 9, 3).convert(mode)
    image.putalpha(0)
    options = {"webp": {"lossless": True, "exact": True}}.get(kind, {})
    save = partial(bmp, image) if kind == "bmp" else partial(image.save, **options)
    save(tmp_path / f"image.{kind}")
    read, notes = decode(tmp_path / f"image.{kind}")
    assert notes == [UNUSED_ALPHA]
    assert np.array_equal(read.convert("RGB"), noise(12, 9, 3).convert(mode[:-1]).convert("RGB"))
    image.putpixel((3, 4), (*image.getpixel((3, 4))[:-1], 1))         # a single pixel makes it an alpha
    save(tmp_path / f"image.{kind}")
    read, notes = decode(tmp_path / f"image.{kind}")
    assert notes == [] and np.asarray(read).max() <= 1


def test_a_palette_that_is_all_transparent(tmp_path):
    image = noise(12, 9, 3).quantize(8)
    image.save(tmp_path / "image.png", transparency=bytes(8))
    read, notes = decode(tmp_path / "image.png")
    assert notes == [UNUSED_ALPHA] and np.array_equal(read, image.convert("RGB"))


def test_a_tiff_whose_grey_is_multiplied_by_its_alpha(tmp_path):
    path = tmp_path / "image.tif"
    pixels = np.array([[[100, 200], [30, 255]]], dtype=np.uint8)
    Image.frombytes("LA", (2, 1), pixels.tobytes()).save(path)
    with_tag(path, 338, 1)                    # the grey is multiplied already
    assert np.abs(np.asarray(open_image(path).convert("L")).astype(int) - [[100, 30]]).max() <= 1


# ------------------------------------------------------------------------------ images: what is refused

def jpeg_header(bits):
    """A JPEG's beginning: a comment, a frame header with a precision, and no more."""
    frame = bytes([bits]) + struct.pack(">HHB", 8, 8, 1) + b"\1\x11\0"
    return (b"\xff\xd8\xff\xfe\0\4ab\xff" + b"\xff\xc1" + struct.pack(">H", 2 + len(frame)) + frame
            + b"\xff\xd9")


@pytest.mark.parametrize("name, data, sentence", [
    ("deep.jpg", jpeg_header(12), "a 12-bit JPEG.*convert it to PNG"),
    ("deeper.png", jpeg_header(16), "a 16-bit JPEG"),
    ("film.jpg", bytes(128) + b"DICM" + bytes(99), "DICOM: export it as PNG with its window, MONOCHROME1"),
    ("film.dcm", b"no mark at all", "DICOM: export it as PNG")])
def test_the_sentence_names_the_real_trouble(tmp_path, capsys, name, data, sentence):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=sentence):
        open_image(tmp_path / name)
    root = write_table(tmp_path, "image,text", f"{name},A film.")
    status, said = prepared(capsys, root, tmp_path / "pack")
    assert status == 2 and name in said and "replace or convert" in said and "put them" not in said
    assert not (tmp_path / "pack").exists()


# -------------------------------------------------------------------------------- images: summary, --fit

def test_constant_and_nearly_black_images_are_counted(tmp_path, capsys):
    black = np.zeros((20, 20), np.uint8)
    dark = black + np.arange(20, dtype=np.uint8) % 16
    for name, pixels in ("white", black + 255), ("dark", dark), ("black", black):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    root = write_table(tmp_path, "image,text", *[f"{name}.png,Text {name}" for name in ("a", "dark", "white")],
                       "black.png,More")
    _, lines = prepared(capsys, root, tmp_path / "pack")
    assert "2 constant, 1 nearly black" in starting(lines, "images:")
    assert "warning: constant images: 2, the first: 'white.png'" in lines
    assert "warning: nearly black images: 1, the first: 'dark.png'" in lines
    bright = dark.copy()
    bright[:1] = 200                          # one row in twenty
    Image.fromarray(bright).save(tmp_path / "dark.png")
    assert store_image(tmp_path / "dark.png", 20).notes == ()
    assert store_image(tmp_path / "white.png", 20).notes == (CONSTANT,) != (NEARLY_BLACK,)


def test_deep_images_are_counted_and_a_window_treats_them_alike(tmp_path, capsys):
    for name, top in ("low", 1000), ("high", 4000):
        Image.fromarray(np.linspace(0, top, 64).astype(np.uint16).reshape(8, 8)).save(tmp_path / f"{name}.png")
    root = write_table(tmp_path, "image,text", "low.png,Low", "high.png,High", "a.png,Plain")
    _, lines = prepared(capsys, root, tmp_path / "own")
    assert "2 of more than 8 bits" in starting(lines, "images:")
    told = starting(lines, "warning: images of more than 8 bits")
    assert "its own minimum to its own maximum" in told and "2, the first: 'low.png'" in told

    def brightest(pack):
        return {line["source"]: int(image(pack, line["image"]).max()) for line in pack.lines()}

    def image(pack, index):
        pixels = np.empty((3, 8, 8), np.uint8)
        pack.read_image(index, pixels)
        return pixels
    own = brightest(Pack(tmp_path / "own"))
    assert own["low.png"] == own["high.png"] == 255
    _, lines = prepared(capsys, root, tmp_path / "alike", "--window", "-0.5,4000")
    assert "-0.5 is black and 4000 is white" in starting(lines, "window:")
    assert not any("own minimum" in line for line in lines)
    one_scale = brightest(Pack(tmp_path / "alike"))
    assert (one_scale["low.png"], one_scale["high.png"]) == (64, 255) and one_scale["a.png"] == own["a.png"]
    assert Pack(tmp_path / "alike").meta["window"] == [-0.5, 4000]


@pytest.mark.parametrize("given", ["5", "a,b", "5,5", "9,1", "1,2,3", "nan,1", "-inf,1", ""])
def test_a_window_that_is_none_is_refused(given, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        prepare.main(["table", "--root", str(tmp_path), "--out", str(tmp_path / "p"), "--window", given])
    assert end.value.code == 2 and "is not LOW,HIGH" in capsys.readouterr().err


@pytest.mark.parametrize("width, height", [(40, 20), (20, 40), (30, 30), (41, 17)])
def test_pad_keeps_the_whole_image(width, height):
    """The image as PIL resizes it, in the middle of black."""
    image = noise(width, height, 3)
    found = np.asarray(square(image, 24, fit="pad"))
    wide, high = 24 * width // max(width, height), 24 * height // max(width, height)
    left, top = round((wide - 24) / 2), round((high - 24) / 2)
    expected = np.zeros((24, 24, 3), np.uint8)
    expected[-top:-top + high, -left:-left + wide] = np.asarray(
        image.resize((wide, high), Image.Resampling.BICUBIC))
    assert np.array_equal(found, expected)
    with pytest.raises(ValueError, match="too elongated"):
        square(Image.new("L", (1000, 1)), 24, fit="pad")


def test_the_area_cut_off_is_told(tmp_path, capsys):
    noise(40, 20).save(tmp_path / "wide.png")
    noise(20, 25).save(tmp_path / "tall.png")
    root = write_table(tmp_path, "image,text", "wide.png,Wide", "tall.png,Tall")
    _, lines = prepared(capsys, root, tmp_path / "crop")
    assert "35.0 % of the area cut off on average, 50 % at most" in starting(lines, "images:")
    assert store_image(tmp_path / "wide.png", 10).cut == 0.5
    assert store_image(tmp_path / "wide.png", 10, fit="pad").cut == 0
    _, lines = prepared(capsys, root, tmp_path / "pad", "--fit", "pad")
    assert "nothing cut off" in starting(lines, "images:")
    assert (Pack(tmp_path / "crop").meta["fit"], Pack(tmp_path / "pad").meta["fit"]) == ("crop", "pad")


# -------------------------------------------------------------------------------------------- columns

@pytest.mark.parametrize("name", ["split", "Set", "SUBSET", "fold", "phase", "Partition"])
def test_other_names_of_split(tmp_path, capsys, name):
    root = write_table(tmp_path, f"image,text,{name}", "a.png,A,train", "b.png,B,Validation", "c.png,C,TEST")
    _, lines = prepared(capsys, root, tmp_path / "pack")
    assert starting(lines, "samples:") == f"samples: 1 train, 1 val, 1 test; split by the column '{name}'"
    assert f"split from '{name}'" in starting(lines, "columns:")


@pytest.mark.parametrize("name", ["patient", "Patient ID", "patient_id", "PatientID", "PATIENT-ID", "subject_id",
                                  "Subject", "case", "case_id", "CaseID", "study", "study_id"])
def test_other_names_of_patient(tmp_path, capsys, name):
    root = write_table(tmp_path, f"image,text,{name},age",
                       *[f"{i}.png,Text {i},p{i // 8},7" for i in range(200)])
    _, lines = prepared(capsys, root, tmp_path / "pack")
    assert starting(lines, "samples:").endswith(f"split by a hash of '{name}'")
    columns = starting(lines, "columns:")
    assert f"patient from '{name}'" in columns and columns.endswith("not used: 'age'")
    assert starting(lines, "in several splits:").startswith("in several splits: 0 of 25 patients, 0 of 200 texts")
    assert not [line for line in lines if "no column names the patient" in line]
    splits = {}
    for line in Pack(tmp_path / "pack").lines():
        splits.setdefault(line["patient"], set()).add(line["split"])
    assert len(splits) == 25 and all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == {"train", "val", "test"}


def test_a_patient_has_cases_and_studies(tmp_path, capsys):
    root = write_table(tmp_path, "image,text,study_id,subject_id", "a.png,A,s1,p1", "b.png,B,s2,p1")
    report = TableReport()
    rows = list(table.rows(root, "pretrain", report))
    assert [row.patient for row in rows] == ["p1", "p1"] and rows[0].split == rows[1].split
    assert report.columns["patient"] == "subject_id" and list(report.unused) == ["study_id"]


def test_without_patients_the_summary_warns(tmp_path, capsys):
    root = write_table(tmp_path, "image,text,sex", "a.png,A,f")
    _, lines = prepared(capsys, root, tmp_path / "pack")
    assert starting(lines, "samples:").endswith("split by a hash of the image's path")
    assert starting(lines, "warning: no column names the patient")
    assert starting(lines, "in several splits:").endswith("patients are not known")


@pytest.mark.parametrize("name, lines, sentence", [
    ("t.csv", ["image,text,set,fold", "a,b,train,train"], "line 2: which is meant, set or fold"),
    ("t.csv", ["image,text,patient,Patient ID", "a,b,1,1"], "line 2: which is meant, patient or Patient ID"),
    ("t.csv", ["image,text,case,study", "a,b,1,1"], "line 2: which is meant, case or study"),
    ("t.csv", ["image,text,Patient ID", "a,b,1", "c,d, "], "line 3: some rows have a patient and some none"),
    ("t.csv", ["image,text,fold", "a,b,3"], "line 2: the fold is '3'.* or rename the column"),
    ("t.csv", ["image;text;split", "a;b;train"], "line 1: the fields are separated by semicolons: save it"),
    ("t.csv", ["image\ttext", "a\tb"], "line 1: the fields are separated by tabs"),
    ("t.jsonl", ['{"image": "a", "text": "b", "case": 1}', '{"image": "a", "text": "b", "study": 1}'],
     "line 2: which is meant, case or study"),
    ("t.jsonl", ['{"image": "a", "text": "b", "patient": 1}', '{"image": "a", "text": "b"}'],
     "line 2: some rows have a patient and some none"),
    ("t.csv", ["image,text,label", "a,b,Mass|No Finding"], "line 2: the label 'Mass.No Finding' holds 'No Finding'"),
    ("t.csv", ["image,text,label", "a,b,Mass; Nodule"], "line 2: does the label 'Mass; Nodule' hold several labels"),
    ("t.jsonl", ['{"image": "a", "text": "b", "label": ["A"]}'], "line 1: label is not plain text"),
])
def test_what_a_table_leaves_open_is_refused(tmp_path, name, lines, sentence):
    (tmp_path / name).write_text("\n".join(lines))
    with pytest.raises(UserError, match=sentence):
        list(table.rows(tmp_path, "pretrain"))


@pytest.mark.parametrize("column, kind", [("group", "groups"), ("label", "classes")])
def test_names_that_differ_only_in_case(tmp_path, capsys, column, kind):
    root = write_table(tmp_path, f"image,text,{column}", "a.png,A,CT", "b.png,B,ct", "c.png,C,MR", "d.png,D,CT")
    _, lines = prepared(capsys, root, tmp_path / "pack", task="cls" if column == "label" else "pretrain")
    assert starting(lines, f"{kind} (samples)") == f"{kind} (samples): CT 2, ct 1, MR 1"
    assert starting(lines, f"warning: 1 {kind} differ from another only in case").endswith("'CT' and 'ct'")


def test_images_beside_the_tables_folder(tmp_path, capsys):
    noise(9, 9).save(tmp_path / "x.png")
    root = write_table(tmp_path / "set" / "tables", "image,text", "../images/x.png,A")
    status, said = prepared(capsys, root, tmp_path / "pack")
    assert status == 2 and "outside the data set's folder" in said
    assert "move the table into a folder that holds the images, or give" in said
    status, lines = prepared(capsys, tmp_path / "set", tmp_path / "pack")     # that mends it
    assert status == 0
    assert [line["source"] for line in Pack(tmp_path / "pack").lines()] == ["images/x.png"]


# ---------------------------------------------------------------------------------------------- leaks

def test_patients_texts_and_images_in_several_splits_are_counted(tmp_path, capsys):
    noise(12, 10, seed=5).save(tmp_path / "0.png")
    noise(12, 10, seed=5).save(tmp_path / "copy.png")
    root = write_table(tmp_path, "image,text,patient,split",
                       "0.png,First,p0,train", "1.png,Normal chest.,p1,train", "2.png,Normal chest.,p2,val",
                       "3.png,Other,p1,test", "copy.png,Last,p3,test")
    _, lines = prepared(capsys, root, tmp_path / "pack")
    assert starting(lines, "in several splits:") == (
        "in several splits: 1 of 4 patients, 1 of 4 texts, 1 of 4 images; the first text: 'Normal chest.'")
    assert "warning: patients in several splits: 1, the first: 'p1': '1.png' (train), '3.png' (test)" in lines
    assert "warning: images in several splits: 1, the first: '0.png' (train), 'copy.png' (test)" in lines
    samples = {line["source"]: line["split"] for line in Pack(tmp_path / "pack").lines()}
    assert samples == {"0.png": "train", "1.png": "train", "2.png": "val", "3.png": "test", "copy.png": "test"}


@pytest.mark.parametrize("task, trained, held_out, leak", [
    ("pretrain", "A mass.", "A mass.", True), ("pretrain", "A mass.", "Mass here.", False),
    ("irtr", "A mass.", "A mass.", True),
    ("vqa", "Is it so?", "IS IT  SO?", True), ("vqa", "Is it so?", "Is it large?", False),
    ("cls", "A mass.", "Another text", True)])
@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_leak_of_the_users_own_splits_is_refused(tmp_path, capsys, task, trained, held_out, leak, split,
                                                   copied):
    other = "copy.png" if copied else "a.png"
    noise(12, 10, seed=5).save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "copy.png")
    root = write_table(tmp_path, "image,text,answer,label,split", f"a.png,{trained},yes,x,train",
                       f"{other},{held_out},no,x,{split}", "b.png,Else,no,x,train")
    status, told = prepared(capsys, root, tmp_path / "pack", task=task)
    assert status == (2 if leak else 0)
    if leak:
        assert f"1 samples of val or test" in told and other in told and "--allow_leaks" in told
        assert not (tmp_path / "pack").exists()
        status, lines = prepared(capsys, root, tmp_path / "pack", "--allow_leaks", task=task)
        assert status == 0 and "(--allow_leaks)" in starting(lines, "warning: 1 samples of val or test")


def test_val_and_test_may_share(tmp_path, capsys):
    root = write_table(tmp_path, "image,text,split", "b.png,Else,train", "a.png,A mass.,val", "a.png,A mass.,test")
    assert prepared(capsys, root, tmp_path / "pack")[0] == 0


def test_copies_that_a_hash_splits_are_counted(tmp_path, capsys):
    names = [f"{i}.png" for i in range(30)]
    for name in names:
        blobs(0).save(tmp_path / name)
    root = write_table(tmp_path, "image,text", *[f"{name},One text" for name in names])
    status, lines = prepared(capsys, root, tmp_path / "pack")
    held_out = sum(len(Pack(tmp_path / "pack").split[split]) for split in ("val", "test"))
    assert status == 0 and held_out
    assert "(a hash made the split)" in starting(lines, f"warning: {held_out} samples of val or test")


def test_leaks_are_rows_of_val_and_test():
    rows = [Row("train", "a", "x"), Row("train", "a", "y"), Row("val", "a", "X"), Row("test", "b", "x"),
            Row("test", "a", "y")]
    found = leaks(rows, "pretrain", content=str)
    assert found == [(rows[0], rows[2]), (rows[1], rows[4])]
    assert [held_out for _, held_out in leaks(rows, "cls", content=str)] == [rows[2], rows[4]]


@needs(not (REAL / "vqa_rad").is_dir())
def test_vqa_rad_is_packed_as_published(tmp_path, capsys):
    status, lines = prepared(capsys, REAL / "vqa_rad", tmp_path / "pack", task="vqa", name="vqa_rad")
    assert status == 0
    assert "as the set is published" in starting(lines, "warning: 12 samples of val or test")
    assert "of 314 images" in starting(lines, "in several splits:")
    merged = starting(lines, "answers:")
    assert "'MR - Flair' and 'MR FLAIR' and 'MR-FLAIR' -> 'mr flair'" in merged and merged.count("->") == 3


# -------------------------------------------------------------------------------------------- exclude

@pytest.fixture
def shared_images(tmp_path):
    """Our images, and a folder that holds 0 (smaller, as JPEG) under another name, and 1 under its own."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    (theirs / "below").mkdir(parents=True)
    for i in range(6):
        blobs(i, 200).save(ours / f"{i}.png")
    blobs(0, 200).resize((90, 90)).save(theirs / "below" / "other.jpg", quality=80)
    blobs(9, 200).save(theirs / "1.png")       # the same name, another image
    (theirs / "notes.txt").write_text("not an image")
    return ours, theirs


def test_exclude_finds_names_likeness_and_patients(shared_images, capsys):
    ours, theirs = shared_images
    patients = ["p0", "p1", "p0", "p3", "p1", None]
    rows = mark_excluded([Row("train", ours / f"{i}.png", "text", patient=patients[i]) for i in range(6)], theirs)
    assert [row.skip for row in rows] == [
        "excluded by likeness: below/other.jpg", "excluded by name: 1.png", "excluded by patient: p0", None,
        "excluded by patient: p1", None]
    assert "1 files in" in (told := capsys.readouterr().err) and "notes.txt" in told


def test_exclude_tells_its_reasons(shared_images, tmp_path, capsys):
    ours, theirs = shared_images
    header, rows = "image,text,patient", [f"{i}.png,Text {i},p{i % 3}" for i in range(6)]
    _, lines = prepared(capsys, write_table(ours, header, *rows), tmp_path / "pack", "--exclude", theirs)
    assert starting(lines, "skipped rows:").startswith(
        "skipped rows: 1 excluded by likeness, 1 excluded by name, 2 excluded by patient ")
    entries = [json.loads(line) for line in (tmp_path / "pack" / "skipped.jsonl").read_text().splitlines()]
    assert entries[0]["detail"] == "below/other.jpg" and entries[2]["detail"] == "p0"

    root = write_table(ours, "image,text", *[row.rpartition(",")[0] for row in rows])
    _, lines = prepared(capsys, root, tmp_path / "unknown", "--exclude", theirs)
    assert starting(lines, "warning: --exclude left out images, but patients are not known")


def test_what_lies_outside_is_not_looked_at(shared_images, tmp_path):
    ours, theirs = shared_images
    rows = [Row("train", ours / "0.png", "text"), Row("train", ours / "in" / "1.png", "text")]
    assert [bool(row.skip) for row in mark_excluded(rows, theirs, root=ours / "in")] == [False, True]


def test_images_of_one_colour_are_alike_to_none(tmp_path):
    for name in "a", "b":
        Image.new("L", (20, 20), 7).save(tmp_path / f"{name}.png")
    looks = [{name: look(tmp_path / f"{name}.png")} for name in ("a", "b")]
    assert looks[0]["a"].hash == looks[1]["b"].hash == 0 and alike(*looks) == {}


def test_both_measures_must_agree():
    pixels = bytes(range(256)) * 4
    ours = {"a": Look(0b1111, pixels)}
    assert alike(ours, {"b": Look(0, pixels)}) == {"a": "b"}           # 4 bits apart
    assert alike(ours, {"b": Look(0b1111_0000_1, pixels)}) == {}       # 8 bits
    assert alike(ours, {"b": Look(0b10000, pixels)}) == {}             # 5 bits
    assert alike(ours, {"b": Look(0b1111, pixels[::-1])}) == {}        # opposite thumbnails


def test_other_images_are_not_alike():
    looks = {}
    for i in range(40):
        looks[i] = look_of(blobs(i))
    for i in range(20):
        assert alike({i: looks[i]}, {n: looks[n] for n in looks if n != i}) == {}
        assert alike({i: looks[i]}, looks) == {i: i}


def look_of(image):
    with tempfile.TemporaryDirectory() as folder:
        image.save(Path(folder) / "image.png")
        return look(Path(folder) / "image.png")


@needs(not (REAL / "vqa_rad").is_dir() or not (REAL / "MedPix-2-0").is_dir())
def test_real_medpix_without_vqa_rad():
    """19 by name; MPX2028_synpic34053 is synpic34054; no other case is touched by likeness but 1792."""
    rows = [row._replace(patient=row.image.stem.split("_")[0])
            for row in medpix.rows(REAL / "MedPix-2-0", "pretrain")]
    marked = mark_excluded(rows, REAL / "vqa_rad" / "images")
    why = {kind: [row for row in marked if (row.skip or "").startswith(f"excluded by {kind}")]
           for kind in ("name", "likeness", "patient")}
    assert len(why["name"]) == 19
    alike_to = {row.image.stem: row.skip.split(": ")[1] for row in why["likeness"]}
    assert alike_to["MPX2028_synpic34053"] == "synpic34054.jpg"
    cases = {row.patient for row in why["name"]}
    assert {name.split("_")[0] for name in alike_to} - cases == {"MPX1792"} and len(alike_to) == 6
    cases.add("MPX1792")
    assert all(row.skip for row in marked if row.patient in cases)
    assert {row.patient for row in why["patient"]} <= cases


# -------------------------------------------------------------------------------------------- answers

@pytest.mark.parametrize("one, other", [
    ("<5 mm", ">5 mm"), ("< 5 mm", "5 mm"), ("<=5", "<5"), (">= 5", "> 5"), ("<50%", "50%"), ("HER2+", "HER2-"),
    ("HER2+", "HER2"), ("HER2-", "HER2"), ("HER2 +", "HER2 -"), ("ER+, PR-", "ER-, PR+"), ("3+", "3"),
    ("++", "+"), ("+", "-"), ("(+)", "(-)"), ("-2.5", "2.5"), ("- 2.5", "2.5"), ("T-score -2.5", "T-score 2.5"),
    ("CT + contrast", "CT - contrast"), ("none", "zero"), ("None", "0"), ("none.", "Zero."), ("L1-2", "L1/2"),
    ("L1-2", "L12"), ("1/2", "12"), ("2-3 mm - left", "23 mm left"), ("2,5 cm", "25 cm"), ("0,5", "5"),
    ("120/80", "12080"), ("1,000/2", "10002"), ("left > right", "left < right")])
def test_answers_that_stay_different(one, other):
    assert canonical_answer(one) != canonical_answer(other)
    assert canonical_answer(one) and canonical_answer(other)


@pytest.mark.parametrize("answer, spellings", [
    ("<5 mm", ["< 5 mm", "<5 mm.", " <5  MM"]), (">=5", [">= 5", ">=5"]), ("her2+", ["HER2+", "Her2 +"]),
    ("her2-", ["HER2-", "HER2 -", "HER2-."]), ("-2.5", ["-2.5", "- 2.5"]), ("none", ["None", "none."]),
    ("0", ["zero", "Zero", "0"]), ("2", ["two", "2."]), ("2-3 cm", ["2-3 cm", "2 - 3 cm"]),
    ("1000", ["1,000", "1000"]), ("1234567", ["1,234,567"]), ("x ray", ["X-ray", "the x ray"]),
    ("mr adc", ["MR - ADC", "MR-ADC"]), ("left", ["The Left", "left?"]), ("mri flair", ["MRI/FLAIR"])])
def test_spellings_that_are_one(answer, spellings):
    assert {canonical_answer(spelling) for spelling in spellings} == {answer}


def test_merged_spellings_are_told(tmp_path, capsys):
    answers = ["The Left", "left", "LEFT", "X-ray", "x ray", "<5", "< 5", "No", "no", "none"]
    root = write_table(tmp_path, "image,text,answer,split",
                       *[f"{i}.png,Where?,{answer},train" for i, answer in enumerate(answers)])
    _, lines = prepared(capsys, root, tmp_path / "pack", task="vqa")
    told = starting(lines, "answers:")
    assert "9 spellings were merged into 4, such as " in told and told.count("->") == 3
    assert "'LEFT' and 'The Left' and 'left' -> 'left'" in told and "'No'" not in told   # case alone comes last
    with collect_spellings() as found:
        canonical_answer("The Left")
    canonical_answer("left")
    assert found == {"left": {"The Left"}}


@needs(not (REAL / "vqa_rad").is_dir())
def test_the_released_list_sizes_stay_reachable():
    rows = list(vqa_rad.rows(REAL / "vqa_rad", "vqa"))
    assert len({row.answer for row in rows}) == 498
    assert len({row.answer for row in rows if row.split != "test"}) == 461
    assert "none" in {row.answer for row in rows} and "l2-3" in {row.answer for row in rows}


# -------------------------------------------------------------------------------------------- summary

def test_the_summary_is_among_the_checked_files(tmp_path, capsys):
    root = write_table(tmp_path, "image,text", "a.png,A", "b.png,B", "a.png,A")
    _, lines = prepared(capsys, root, tmp_path / "pack")
    assert lines[0] == "table for pretrain: 2 images of 8 x 8"
    assert "skipped rows: 1 duplicate (listed in skipped.jsonl)" in lines
    assert [line.startswith("warning:") for line in lines] == sorted(line.startswith("warning:") for line in lines)
    pack = Pack(tmp_path / "pack")
    pack.verify()
    (tmp_path / "pack" / "summary.txt").write_text("x" * pack.files["summary.txt"][0])
    with pytest.raises(UserError, match="summary.txt does not match its checksum"):
        pack.verify()


def test_a_pack_without_a_summary_is_still_read(tmp_path, capsys):
    root = write_table(tmp_path, "image,text", "a.png,A")
    prepared(capsys, root, tmp_path / "pack")
    meta = json.loads((tmp_path / "pack" / "meta.json").read_text())
    for name in "fit", "window":
        del meta[name]
    del meta["files"]["summary.txt"]
    (tmp_path / "pack" / "summary.txt").unlink()
    (tmp_path / "pack" / "meta.json").write_text(json.dumps(meta))
    assert [line["text"] for line in Pack(tmp_path / "pack").lines()] == ["A"]
    assert prepare.main(["--verify", str(tmp_path / "pack")]) == 0


def test_what_is_quoted_cannot_command_the_terminal(tmp_path, capsys):
    group = "x\x1b[2J\nwarning: all is well" + "y" * 99
    image = tmp_path / "a.png"
    noise(9, 9).save(image)
    rows = [Row(split, image, "text\x1b" * 40, group=group, patient="p\x07") for split in ("train", "test")]
    write_pack(rows, tmp_path / "pack", "mine", "pretrain", 8, root=tmp_path, workers=1)
    text = (tmp_path / "pack" / "summary.txt").read_text()
    lines = text.splitlines()
    assert text.replace("\n", "").isprintable() and not any("all is well" in line[:30] for line in lines)
    assert max(map(len, lines)) < 300


def test_splits_without_samples_and_a_window_without_use(tmp_path, capsys):
    """Training would refuse the first only after hours of preparation; the second does nothing."""
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("image,text,split\na.png,Left nodule.,train\n")
    arguments = ["table", "--root", str(tmp_path / "t.csv"), "--size", "16", "--window", "0,9", "--out",
                 str(tmp_path / "pack")]
    prepare.run(prepare.command_line().parse_args(arguments))
    summary = (tmp_path / "pack" / "summary.txt").read_text()
    for words in ("warning: no val samples: training needs some", "warning: no test samples: there will be",
                  "warning: --window changed nothing: no image has more than 8 bits"):
        assert words in summary and words in capsys.readouterr().out + summary
    # A table without the column that the task needs.
    with pytest.raises(UserError, match="t.csv, line 2: no column answer among image, text, split: "
                       "--task vqa needs it"):
        prepare.run(prepare.command_line().parse_args([*arguments[:-1], str(tmp_path / "q"), "--task", "vqa"]))
