"""Pack a data set: every image is decoded, resized and stored once, so training need not.

    python -m data.prepare medpix --root MedPix-2-0 --out packs/medpix
    python -m data.prepare --show packs/medpix
    python -m data.prepare --verify packs/medpix

open_packs opens what --data of train.py and finetune.py names.
"""
import argparse
import importlib
import math
import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import find_root, phantoms
from data.exclude import mark_excluded
from data.images import FITS
from data.pack import Pack
from data.phantom_images import SHIFTS
from data.summary import TableReport
from data.write_pack import write_pack
from m3ae_mini.config import UserError, require

READERS = ("medicat medpix melinda mimic_cxr nih openi phantoms roco rocov2 slake table "
           "vqa_med_2019 vqa_rad").split()
TASKS = ("pretrain", "vqa", "cls", "irtr")
OWN_FLAGS = {"rephrased": "vqa_rad", "uncertain": "mimic_cxr", "shift": "phantoms"}   # of a reader


# ------------------------------------------------------------------------------------ opening packs

def open_packs(names: str, size: int, crop: float, task: str = "pretrain") -> list[Pack]:
    """Open the packs that --data names, separated by commas.

    Their images have `size` pixels, or more if crops are taken (crop < 1), else UserError. The
    name "phantoms" means the embedded data set, which is packed for `task` on first use.
    """
    packs = []
    for name in names.split(","):
        pack = Pack(phantom_pack(size, task) if name == "phantoms" else name)
        require(pack.size == size or (pack.size > size and crop < 1),
                f"{pack.folder} holds images of {pack.size} pixels, not {size}: use the --preset "
                f"or --image_size of {pack.size} pixels, or prepare it with --size {size}")
        packs.append(pack)
    return packs


def describe_packs(packs: list[Pack]) -> dict:
    """What config.json keeps of a run's packs; --predict treats images as the first pack does."""
    meta = packs[0].meta
    return {"packs": [pack.fingerprint() for pack in packs], "fit": meta.get("fit", "crop"),
            "window": meta.get("window")}


def phantom_pack(size: int, task: str, shift: int = 0) -> Path:
    """The folder of the phantoms' pack, in packs/. It is written if it does not exist.

    shift: see phantoms.rows."""
    folder = Path(f"packs/phantoms-{task}-{size}" + f"-shift{shift}" * bool(shift))
    if not folder.exists():
        try:
            write_pack(phantoms.rows(None, task, shift=shift), folder, "phantoms", task, size,
                       wait=True)
        except UserError:
            if not folder.exists():   # else another process has written the same pack
                raise
    return folder


# -------------------------------------------------------------------------------- looking at a pack

def contact_sheet(pack: Pack, count: int = 24, columns: int = 6, cell: int = 208) -> Image.Image:
    """Draw `count` samples, evenly spaced from the pack's first to its last, with their texts.

    cell: width of a column in pixels.
    """
    # What is written below each image: the facts, then the text.
    count = min(count, len(pack.samples))
    indices = np.linspace(0, len(pack.samples) - 1, count).astype(int)
    captions: list[list[str]] = []   # lines of text
    for index in indices:
        line = pack.line(index)
        facts = " · ".join(line[key] for key in ("split", "group", "answer", "label")
                           if key in line)
        captions.append(textwrap.wrap(facts, 32, max_lines=2, placeholder=" …")
                        + textwrap.wrap(line["text"], 32, max_lines=9, placeholder=" …"))

    # A row of the sheet is as high as its longest caption needs.
    font = ImageFont.load_default(12)
    line_height, margin = 15, 8      # pixels
    rows = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
    heights = [cell + margin + line_height * max(len(captions[i]) for i in row) for row in rows]
    sheet = Image.new("RGB", (columns * cell + margin, sum(heights) + margin), "white")

    # Paste the images row by row, each with its caption below.
    draw = ImageDraw.Draw(sheet)
    side, top = cell - margin, margin
    pixels = np.empty((3, pack.size, pack.size), dtype=np.uint8)
    for row, height in zip(rows, heights):
        for column, i in enumerate(row):
            left = margin + column * cell
            pack.read_image(pack.samples["image"][indices[i]], pixels)
            image = Image.fromarray(pixels.transpose(1, 2, 0))
            image = image.resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(image, (left, top))
            draw.text((left, top + side + 2), "\n".join(captions[i]), "black", font)
        top += height
    return sheet


def print_summary(meta: dict, out: Path, seconds: float) -> None:
    """Print the summary of a new pack, its size, and how long it took."""
    megabytes = sum(file["bytes"] for file in meta["files"].values()) / 1e6
    summary = (out / "summary.txt").read_text(encoding="utf-8")
    encoding = sys.stdout.encoding or "utf-8"   # a terminal may know fewer letters
    print(f"{out}: {megabytes:,.1f} MB, {seconds:.1f} s "
          f"({1000 * seconds / meta['images']:.1f} ms per image)")
    print(summary.encode(encoding, "replace").decode(encoding), end="")


# --------------------------------------------------------------------------------- the command line

def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    try:
        run(command_line().parse_args(join_window(arguments)))
    except UserError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    except OSError as error:   # a folder or a file that may not be read
        print(f"prepare: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare: interrupted, no pack was written", file=sys.stderr)
        return 130
    return 0


def command_line() -> argparse.ArgumentParser:
    """The parser of all flags."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare",
                                     description="Pack a data set, show a pack, or check one.")
    add = parser.add_argument
    add("name", nargs="?", choices=READERS, metavar="NAME", help=", ".join(READERS))
    add("--root", type=Path, help="the data set's folder, or the table")
    add("--out", type=Path, help="the pack to write; with --show, the PNG")
    add("--size", type=positive, default=288,
        help="side of the stored images in pixels; a larger side than --image_size needs random "
             "crops (default: 288)")
    add("--task", choices=TASKS, default="pretrain",
        help="task to pack for: pre-training, questions, classes, retrieval")
    add("--rephrased", action="store_true",
        help="vqa_rad: the authors' second wording of a training question is one more question")
    add("--uncertain", choices=("absent", "present", "drop"),
        help="mimic_cxr: what an uncertain label counts as; drop: leave its images out (default: "
             "absent)")
    add("--shift", type=int, choices=(0, *SHIFTS), default=0,
        help="phantoms: the test images come from another scanner, with less contrast, more blur "
             "and noise: 1 little, 3 much (default: 0, the same)")
    add("--fit", choices=FITS, default="crop",
        help="crop: keep the centre square, cut the edges off; pad: keep all, add black (default: "
             "crop)")
    add("--window", type=window, metavar="LOW,HIGH",
        help="grey of more than 8 bits: the values of the file that become black and white in all "
             "images, such as -160,240 (default: each image's own minimum and maximum)")
    add("--exclude", type=Path, metavar="FOLDER",
        help="leave out the images that are also in FOLDER, by file name (the part after the last "
             "underscore is enough) or by likeness, and all other images of their patients")
    add("--allow_leaks", action="store_true",
        help="pack a table whose own splits have the same image and text in training and in val "
             "or test")
    add("--allow_missing", action="store_true",
        help="continue if more than 5 %% of the images are missing or unreadable")
    add("--overwrite", action="store_true", help="replace the pack, or begin anew a stopped "
                                                 "preparation with other flags")
    add("--workers", type=positive, help="processes that decode (default: one per core)")
    add("--show", type=Path, metavar="PACK", help="draw a contact sheet of a pack")
    add("--verify", type=Path, metavar="PACK",
        help="compare all files of a pack with their checksums")
    return parser


def positive(text: str) -> int:
    """A flag's whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def join_window(arguments: list[str] | None) -> list[str]:
    """`--window -160,240` as argparse takes it: a value that begins with a - needs a =."""
    joined = list(sys.argv[1:] if arguments is None else arguments)
    if "--window" in joined[:-1]:
        at = joined.index("--window")
        joined[at:at + 2] = [f"--window={joined[at + 1]}"]
    return joined


def window(text: str) -> tuple[float, float]:
    """A flag's LOW,HIGH with LOW below HIGH."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = 0.0
    if not -math.inf < low < high < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not LOW,HIGH, two numbers with LOW below "
                                         "HIGH, such as -160,240")
    return low, high


def run(args: argparse.Namespace) -> None:
    """Show, verify or write a pack. UserError if the flags are not valid."""
    if args.show:
        folder = os.path.abspath(args.show)   # gives "." a name
        out = args.out or Path(os.path.relpath(f"{folder}.png"))
        save_sheet(contact_sheet(Pack(args.show)), out)
        return
    if args.verify:
        Pack(args.verify).verify()
        print(f"{args.verify} is intact: all checksums match")
        return

    # Check the flags before any work is done.
    require(args.name is not None and args.out is not None,
            "give a data set's NAME and --out PACK, or --show PACK, or --verify PACK (--help)")
    require(args.size ** 2 <= Image.MAX_IMAGE_PIXELS,
            f"--size {args.size} is too large: use at most {int(Image.MAX_IMAGE_PIXELS ** 0.5)}")
    require(args.root is not None or args.name == "phantoms",
            f"{args.name} needs --root, the data set's folder")
    require(args.root is None or args.root.exists(), f"{args.root} does not exist: correct --root")
    options = {flag: getattr(args, flag) for flag in OWN_FLAGS if getattr(args, flag)}
    for flag in options:
        require(args.name == OWN_FLAGS[flag],
                f"--{flag} is for {OWN_FLAGS[flag]}: leave it out for {args.name}")

    # Read the annotations, then write the pack.
    began = time.perf_counter()
    reader = importlib.import_module(f"data.{args.name}")
    markers = getattr(reader, "MARKERS", ())
    root = find_root(args.root, *markers) if markers else args.root
    is_table = args.name == "table"
    report = TableReport() if is_table else None
    rows = reader.rows(root, args.task, *([report] if is_table else []), **options)
    if is_table and root.is_file():
        root = root.parent
    if args.exclude is not None:
        rows = mark_excluded(rows, args.exclude, root, args.workers)
    meta = write_pack(rows, args.out, args.name, args.task, args.size, root=root,
                      workers=args.workers, allow_missing=args.allow_missing,
                      overwrite=args.overwrite, fit=args.fit, window=args.window, table=report,
                      allow_leaks=args.allow_leaks,
                      several_labels=getattr(reader, "SEVERAL_LABELS", False))
    print_summary(meta, args.out, time.perf_counter() - began)


def save_sheet(sheet: Image.Image, out: Path) -> None:
    """Write a contact sheet. UserError if that fails."""
    try:
        sheet.save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"{out} cannot be written ({error}): give a .png with --out") from None
    print(f"wrote {out}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # ends as tidily as Ctrl-C
    sys.exit(main())
