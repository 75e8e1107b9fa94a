"""Decode an image file as it is meant to be seen, and note what had to be decided.

open_image is the short way: a file becomes an image of mode L or RGB. What Pillow hands over is
not always what the file means: this module knows where they differ.
"""
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow's other formats are left out. For PostScript it starts a program, and none is medical.
FORMATS = "BMP GIF JPEG JPEG2000 PNG PPM TIFF WEBP".split()
Window = tuple[float, float]   # the values of a file that become black and white

# Notes of `decode`.
DEEP_GREY = "grey of more than 8 bits"
DEEP_COLOUR = "colour of more than 8 bits"
UNUSED_ALPHA = "alpha of 0 everywhere"

# TIFF tags.
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO = 0
UNSIGNED, SIGNED = 1, 2
JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}   # markers SOF0 to SOF15


def open_image(path: Path, window: Window | None = None) -> Image.Image:
    """Decode an image file as it is meant to be seen -> mode L (grey) or RGB. See `decode`."""
    return decode(path, window)[0]


def decode(path: Path, window: Window | None = None) -> tuple[Image.Image, list[str]]:
    """Decode an image file -> (image of mode L or RGB, notes)

    The EXIF rotation is applied. Transparency is drawn over black, but an alpha that is 0
    everywhere was never filled: it is ignored (note UNUSED_ALPHA). Grey of more than 8 bits
    (DEEP_GREY) is stretched linearly: `window`, two values of the file, or else the image's own
    minimum and maximum become 0 and 255. Colour of 16 bits keeps its upper 8 (DEEP_COLOUR). The
    rest is converted.

    Pillow's errors if the file is damaged, truncated or has more than 89 megapixels. ValueError
    if it is DICOM or a JPEG of more than 8 bits, if it holds several images, or 16-bit grey with
    transparency, of which Pillow reads only 8 bits.
    """
    with warnings.catch_warnings(), open(path, "rb") as stream:
        warnings.simplefilter("ignore")   # odd tags: no pixel depends on them
        warnings.simplefilter("error", Image.DecompressionBombWarning)   # the 89 megapixels
        _refuse_dicom(path, stream)

        # A file object, not a path: given a path, Pillow maps an uncompressed TIFF from the disk
        # with the width and height of the turned image, and scrambles it.
        with _open(stream) as file:
            _refuse_parts(file)
            notes = [DEEP_COLOUR] if _is_deep_colour(file) else []
            tags = getattr(file, "tag_v2", {})
            bits = _first(tags.get(BITS_PER_SAMPLE))
            sign = _first(tags.get(SAMPLE_FORMAT, UNSIGNED))
            inverted = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO   # Pillow heeds it up to 8 bits
            scale, offset = _scale_of_values(file, stream)
            image = ImageOps.exif_transpose(file)   # decodes all of it

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.array(image, dtype=np.float64)                    # (H, W)
        if (bits, sign, image.mode) == (32, UNSIGNED, "I"):
            values = values % 2 ** 32   # Pillow reads these bits as signed
        if "transparency" in image.info:   # the one grey that is transparent
            values[values == image.info["transparency"]] = np.nan
        if scale != 1:
            values = np.rint(values * scale)
        values -= offset
        return _to_8_bits(values, window, inverted), [DEEP_GREY]

    if image.mode == "L" and sign == SIGNED:
        return Image.fromarray(np.asarray(image) ^ 128), notes   # -128 … 127 become 0 … 255
    if image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        if rgba.getchannel("A").getextrema() != (0, 0):
            black = Image.new("RGBA", image.size, (0, 0, 0, 255))
            return Image.alpha_composite(black, rgba).convert("RGB"), notes
        notes.append(UNUSED_ALPHA)
        image = rgba   # its colours are those below the alpha
    return image.convert("L" if image.mode in ("1", "L") else "RGB"), notes


def _open(stream: BinaryIO) -> Image.Image:
    """Image.open, with a ValueError that names what Pillow does not."""
    try:
        return Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:
        bits = _jpeg_bits(stream)
        if bits is None or bits == 8:
            raise UnidentifiedImageError("cannot identify image file: it is damaged, or of a "
                                         "format that is not read") from None
        raise ValueError(f"a {bits}-bit JPEG, of {bits} bits a sample, and only 8 are read: "
                         "convert it to PNG") from None


def _jpeg_bits(stream: BinaryIO) -> int | None:
    """Bits per sample, from a JPEG's frame header; None if there is none."""
    stream.seek(0)
    data = stream.read()
    place = 2
    while data.startswith(b"\xff\xd8") and data[place:place + 1] == b"\xff":
        marker = data[place + 1:place + 2]
        if marker == b"\xff":   # a fill byte
            place += 1
        elif len(data) > place + 4 and marker[0] in JPEG_FRAMES:
            return data[place + 4]
        else:
            place += 2 + max(2, int.from_bytes(data[place + 2:place + 4], "big"))
    return None


def _refuse_dicom(path: Path, stream: BinaryIO) -> None:
    """ValueError if the file is DICOM by its mark or its name. The stream is at 0 after it."""
    if stream.read(132)[128:] == b"DICM" or Path(path).suffix.lower() in (".dcm", ".dicom"):
        raise ValueError("DICOM: export it as PNG with its window, MONOCHROME1 inverted")
    stream.seek(0)


def _refuse_parts(file: Image.Image) -> None:
    """ValueError if Pillow would read only a part of what the file holds."""
    if file.format != "MPO" and getattr(file, "n_frames", 1) > 1:   # MPO: a JPEG with its preview
        raise ValueError(f"it holds {file.n_frames} images: export the one you mean")
    if any(str(tile[3]).startswith("LA;16") for tile in file.tile):
        raise ValueError("it has 16 bits with transparency: export it without transparency")


def _is_deep_colour(file: Image.Image) -> bool:
    """Does the file hold colours of more than 8 bits? Of those, Pillow keeps the upper 8."""
    if file.mode.startswith(("I", "F")):
        return False
    arguments = [tile[3] for tile in file.tile]
    if file.format == "PPM":   # (mode, largest value)
        return any(not isinstance(found, str) and found[-1] > 255 for found in arguments)
    if file.format == "JPEG2000":
        return _jpeg2000_bits(file.fp)[0] > 8
    return file.format in ("PNG", "TIFF") and ";16" in str(arguments)


def _scale_of_values(file: Image.Image, stream: BinaryIO) -> tuple[float, float]:
    """(scale, offset): a value of the file is Pillow's times scale, minus offset.

    Pillow spreads the values of two formats over 16 bits: those of PGM and of JPEG 2000.
    """
    if file.format == "PPM" and file.mode == "I" and not isinstance(file.tile[0][3], str):
        largest = file.tile[0][3][-1]
        return (largest / 65535 if largest > 255 else 1.0), 0.0
    if file.format == "JPEG2000" and file.mode == "I;16":
        bits, signed = _jpeg2000_bits(stream)
        return 2.0 ** (bits - 16), 2.0 ** (bits - 1) if signed else 0.0
    return 1.0, 0.0


def _jpeg2000_bits(stream: BinaryIO) -> tuple[int, bool]:
    """(bits, signed) of the first component, from the SIZ marker. The stream's place stays."""
    place = stream.tell()
    stream.seek(0)
    data = stream.read()
    stream.seek(place)
    siz = data.find(b"\xff\x4f\xff\x51")
    depth = data[siz + 42] if 0 <= siz < len(data) - 42 else 7
    return (depth & 127) + 1, depth >= 128


def _first(value):
    """The value of a TIFF tag, or the first of several."""
    return value[0] if isinstance(value, tuple) and value else value


def _to_8_bits(values: np.ndarray, window: Window | None, inverted: bool) -> Image.Image:
    """Grey values (H, W) of any range -> mode L. NaN and infinite values turn black."""
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("no pixel is a number")
    low, high = window or (values[finite].min(), values[finite].max())
    if inverted:   # the greatest value is black
        values = -values
        low, high = -high, -low
    share = np.where(finite, values - low, 0) / max(high - low, np.finfo(float).tiny)
    return Image.fromarray(np.rint(share.clip(0, 1) * 255).astype(np.uint8))
