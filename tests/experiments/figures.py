"""Draws the images of the READMEs from a run on phantoms.

    python tests/experiments/figures.py runs/pretrain              into tests/figures

front.png     reconstructions              ratios.png    the same at growing mask ratios
looks.png     where masked words attend    curves.png    learning curves
chest.png     an image to ask about

No image is chosen by hand: each is the first test sample that fits a rule, given in its function.
"""
import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import m3ae_mini                       # before torch: it sets how threads wait
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from data import phantoms
from data.prepare import open_packs
from m3ae_mini import M3AE, weights
from m3ae_mini.config import TrainConfig, reading, require
from m3ae_mini.distributed import run
from m3ae_mini.loader import VAL_SEED, Samples, load, validation_micro_batches
from m3ae_mini.model import patchify
from m3ae_mini.plots import (
    BACK, FONT, GREY, INK, caption, curves, reconstruct, to_pil, unpatchify, word_to_patch)
from m3ae_mini.tokenizer import Tokenizer

CELL, GAP, LINE = 144, 10, 18          # pixels: side of a panel, between panels, a line of text
RATIOS = 0.25, 0.5, 0.75, 0.9


# ------------------------------------------------------------------------------ run, samples, sheet

def open_run(folder: Path) -> tuple[M3AE, Samples]:
    """A run's folder -> its best model, and the test samples of the phantoms."""
    config_file = folder / "config.json"
    with reading(config_file):
        settings = json.loads(config_file.read_text())
    require(settings["run"]["data"] == "phantoms",
            f"{folder} was not trained on phantoms: give a run that was")
    cfg, state = weights.load_m3ae(folder)
    require(cfg.mlm and cfg.mim, f"{folder} was trained without MLM or MIM: give a run with both")
    model = M3AE(cfg).eval()
    model.load_state_dict(state)
    packs, tokenizer = open_packs("phantoms", cfg.image_size, crop=1), Tokenizer.load(folder)
    return model, Samples(packs, "test", tokenizer, cfg, TrainConfig())


def batch_of(samples: Samples, indices: Iterable[int]) -> dict[str, Tensor]:
    """The batch of these samples, with validation's masks."""
    return next(load(samples, [(0, 0, np.array(indices))], VAL_SEED, "cpu")).batch


def first(samples: Samples, fits: Callable[[dict], bool]) -> int:
    """The index of the first sample whose line fits."""
    return next(n for n in range(samples.n) if fits(samples.line(n)))


class Sheet:
    """An image to paste panels and write lines on."""

    def __init__(self, width: int, height: int):
        self.image = Image.new("RGB", (width, height), BACK)
        self.write = ImageDraw.Draw(self.image).text

    def panel(self, x: int, y: int, image: Tensor, heat: Tensor | None = None) -> None:
        """image (3, S, S), normalised; heat (L,) in 0 … 1: how red each patch is, or None."""
        panel = to_pil(image).resize((CELL, CELL), Image.Resampling.NEAREST)
        if heat is not None:
            grid = round(len(heat) ** 0.5)
            mask = Image.fromarray((heat.view(grid, grid) * 170).byte().numpy())
            panel.paste((255, 40, 0), mask=mask.resize((CELL, CELL), Image.Resampling.NEAREST))
        self.image.paste(panel, (x, y))

    def save(self, path: Path) -> None:
        self.image.save(path, optimize=True)


# ----------------------------------------------------------------------------------- the five files

def front(model: M3AE, samples: Samples, path: Path) -> None:
    """Of each group the first test sample whose caption says "with": original, masked,
    reconstructed, and the caption, green where a masked word was predicted, red where not."""
    groups = sorted(samples.packs[0].meta["groups"])
    indices = [first(samples, lambda line: line["group"] == group and " with " in line["text"])
               for group in groups]
    batch = batch_of(samples, indices)
    masked, restored = reconstruct(model, batch)
    text = model.encode_text(batch["mlm_ids"], batch["text_mask"])
    out = model.objectives["mlm"](model, batch, text, model.encode_image(batch["image"]))
    tokens = out["mlm_logits"].argmax(-1).tolist()
    guesses = dict(zip(batch["mlm_positions"].tolist(), tokens))

    width, height = 3 * CELL + 2 * GAP, CELL + 3 * LINE
    sheet = Sheet(2 * width + 5 * GAP, 2 * height + LINE + 2 * GAP)
    for i in range(len(groups)):
        left, top = GAP + i % 2 * (width + 3 * GAP), GAP + LINE + i // 2 * height
        panels = {"phantom": batch["image"], "75 % hidden": masked, "reconstructed": restored}
        for column, (head, images) in enumerate(panels.items()):
            x = left + column * (CELL + GAP)
            sheet.panel(x, top, images[i])
            if i < 2:
                sheet.write((x, top - LINE - 3), head, GREY, FONT)
        for x, y, text, colour in caption(samples.tokenizer, batch, i, guesses, width):
            sheet.write((left + x, top + CELL + 5 + y), text, colour, FONT)
    sheet.save(path)


def ratios(model: M3AE, samples: Samples, path: Path, count: int = 3) -> None:
    """The first `count` test samples at growing mask ratios, and the mean error of 512 samples."""
    batch, trained_ratio = batch_of(samples, range(count)), model.mask_ratio
    num_patches, row_height = batch["mim_noise"].shape[1], 2 * (CELL + GAP)
    sheet = Sheet((CELL + GAP) * (1 + len(RATIOS)) + GAP, count * row_height + 3 * LINE)
    first_top = 2 * LINE + GAP
    for row in range(count):
        sheet.panel(GAP, first_top + row * row_height, batch["image"][row])

    for column, ratio in enumerate(RATIOS, 1):
        # The error of many samples, then the images of a few.
        model.mask_ratio, errors = ratio, []
        for loaded in load(samples, validation_micro_batches(samples, 512), VAL_SEED, "cpu"):
            text = model.encode_text(loaded.batch["text_ids"], loaded.batch["text_mask"])
            out = model.objectives["mim"](model, loaded.batch, text)
            errors.append(out["mim_loss"].item())
        masked, restored = reconstruct(model, batch)

        left, visible = GAP + column * (CELL + GAP), int(num_patches * (1 - ratio))
        sheet.write((left, GAP), f"{ratio:.0%}: {visible} of {num_patches} visible", INK, FONT)
        sheet.write((left, GAP + LINE - 2), f"error {np.mean(errors):.3f}", GREY, FONT)
        for row in range(count):
            top = first_top + row * row_height
            sheet.panel(left, top, masked[row])
            sheet.panel(left, top + CELL + GAP // 2, restored[row])
    model.mask_ratio = trained_ratio
    sheet.save(path)


def looks(model: M3AE, samples: Samples, path: Path) -> None:
    """The first test sample of two groups with one finding and these words, each masked alone.

    Above: where its position attends in the last fusion layer. Below: how much of the word's
    log-probability is lost when a patch is painted over with the mean colour."""
    wanted = (("chest x-ray", ("left", "large", "effusion")),
              ("brain mri", ("left", "frontal", "mass")))
    notes = ("above: attention of", "the masked word", "", "below: cost of each",
             "patch painted over")
    height = 2 * (CELL + LINE + GAP) + 3 * LINE
    sheet = Sheet(4 * (CELL + GAP) + GAP, len(wanted) * height + GAP)
    for i, (group, words) in enumerate(wanted):
        def fits(line):
            in_text = line["text"].lower().strip(".").split()
            return line["group"] == group and "and" not in in_text and set(words) <= set(in_text)

        # The sample, its caption above it and the notes below.
        n, top = first(samples, fits), GAP + i * height
        batch = batch_of(samples, [n])
        tokens = [word.strip() for word in samples.tokenizer.words(batch["text_ids"][0])]
        sheet.write((GAP, top), samples.line(n)["text"], INK, FONT)
        sheet.panel(GAP, top + 5 * LINE // 2, batch["image"][0])
        for y, text in enumerate(notes, 3):
            sheet.write((GAP, top + CELL + y * LINE), text, GREY, FONT)

        # A column for each word.
        for column, word in enumerate(words, 1):
            position, left = tokens.index(word), GAP + column * (CELL + GAP)
            ids = batch["text_ids"].clone()
            ids[0, position] = samples.tokenizer.mask_id
            attended = word_to_patch(model, ids, batch["text_mask"], batch["image"])[0, position]
            whole, without = probabilities(model, batch, ids, position)       # (), (L,)
            cost = (whole / without).log().clamp(min=0)                       # (L,)
            rows = ((attended / attended.max(), f"{word}: {whole:.1%}"),
                    (cost / cost.max().clamp(min=0.1), f"down to {without.min():.1%}"))
            for row, (heat, text) in enumerate(rows):
                y = top + 3 * LINE // 2 + row * (CELL + LINE + GAP)
                sheet.write((left, y - 3), text, INK, FONT)
                sheet.panel(left, y + LINE, batch["image"][0], heat)
    sheet.save(path)


def probabilities(model: M3AE, batch: dict, ids: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """The true word's probability at a masked position of a batch of one: with the whole image (),
    and without each of its patches (L,)."""
    patches = patchify(batch["image"], model.cfg.patch_size)                  # (1, L, 3·P²)
    count = patches.shape[1]
    without = patches.repeat(count, 1, 1) * (1 - torch.eye(count))[..., None]  # (L, L, 3·P²)
    without = unpatchify(without, model.cfg.patch_size)                       # (L, 3, S, S)
    images = torch.cat([batch["image"], without])                             # (1+L, 3, S, S)

    labels = torch.full_like(ids, -100)
    labels[0, position] = batch["text_ids"][0, position]
    many = {"mlm_ids": ids, "text_mask": batch["text_mask"], "mlm_labels": labels}
    many = {name: tensor.repeat(1 + count, 1) for name, tensor in many.items()}
    text = model.encode_text(many["mlm_ids"], many["text_mask"])
    out = model.objectives["mlm"](model, many, text, model.encode_image(images))
    found = out["mlm_logits"].softmax(-1).gather(1, out["mlm_targets"][:, None])[:, 0]  # (1+L,)
    return found[0], found[1:]


def chest(path: Path) -> None:
    """An image to ask about: the first effusion among the test images of question answering."""
    rows = phantoms.rows(None, "vqa", {"test": 100})
    row = next(row for row in rows if row.group == "chest x-ray" and "effusion" in row.answer)
    row.image(192).save(path)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a pre-training on phantoms")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "figures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, samples = open_run(args.run)
    front(model, samples, args.out / "front.png")
    ratios(model, samples, args.out / "ratios.png")
    looks(model, samples, args.out / "looks.png")
    chest(args.out / "chest.png")
    lines = (args.run / "metrics.jsonl").read_text().splitlines()
    curves({"run": [json.loads(line) for line in lines]}, args.out / "curves.png")


if __name__ == "__main__":
    run(main)
