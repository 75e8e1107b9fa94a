"""Draws the images of the README from a run on phantoms: the front image, reconstructions at growing mask
ratios, where words look, the curves, and one image to ask about.

    python tests/figures.py runs/pretrain              into tests/figures

No image is chosen by hand: each is the first test sample of which a rule, said in its function, is true.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import m3ae_mini                       # before torch: it says how threads wait for each other
import numpy as np
import torch
from PIL import Image, ImageDraw

from data import phantoms
from data.pack import open_packs
from m3ae_mini import M3AE, loop, weights
from m3ae_mini.config import TrainConfig, require
from m3ae_mini.loader import VAL_SEED, Samples, load, validation_micro_batches
from m3ae_mini.model import patchify
from m3ae_mini.plots import (BACK, FONT, GREY, INK, caption, curves, rebuild, to_pil, unpatchify,
                                word_to_patch)
from m3ae_mini.tokenizer import Tokenizer

CELL, GAP, LINE = 144, 10, 18          # pixels: side of a panel, between panels, a line of text
RATIOS = 0.25, 0.5, 0.75, 0.9


def open_run(run):
    """A run's folder -> its best model and the test samples of the phantoms."""
    settings = json.loads((Path(run) / "config.json").read_text())
    require(settings["run"]["data"] == "phantoms", f"{run} has not learned from phantoms: give one that has")
    cfg, state = weights.load_m3ae(run)
    require(cfg.mlm and cfg.mim, f"{run} has not learned both words and pixels: give one that has")
    model = M3AE(cfg).eval()
    model.load_state_dict(state)
    packs, tokenizer = open_packs("phantoms", cfg.image_size, crop=1), Tokenizer.load(run)
    return model, Samples(packs, "test", tokenizer, cfg, TrainConfig())


def chunk(samples, numbers):
    """The batch of these samples, with validation's masks."""
    return next(load(samples, iter([(0, 0, np.array(numbers))]), VAL_SEED, "cpu"))[3]


def first(samples, right):
    """The number of the first sample whose line is `right`."""
    return next(n for n in range(samples.n) if right(samples.line(n)))


class Sheet:
    """An image to paste panels and write lines on."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (width, height), BACK)
        self.write = ImageDraw.Draw(self.image).text

    def panel(self, x, y, image, heat=None):
        """image (3, S, S), normalised; heat (L,) from 0 to 1: how red each patch is, or None."""
        panel = to_pil(image).resize((CELL, CELL), Image.Resampling.NEAREST)
        if heat is not None:
            side = round(len(heat) ** 0.5)
            mask = Image.fromarray((heat.view(side, side) * 170).byte().numpy())
            panel.paste((255, 40, 0), mask=mask.resize((CELL, CELL), Image.Resampling.NEAREST))
        self.image.paste(panel, (x, y))

    def save(self, path):
        self.image.save(path, optimize=True)


def front(model, samples, path):
    """Of each kind the first test sample whose caption tells a finding by "with": original, masked,
    reconstructed; its caption, green where a hidden word was found, red where not."""
    kinds = sorted(samples.packs[0].meta["groups"])
    batch = chunk(samples, [first(samples, lambda line: line["group"] == kind and " with " in line["text"])
                            for kind in kinds])
    masked, rebuilt = rebuild(model, batch)
    out = model.objectives["mlm"](model, batch, None, model.encode_image(batch["image"]))
    guesses = dict(zip(batch["mlm_positions"].tolist(), out["mlm_logits"].argmax(-1).tolist()))

    width, height = 3 * CELL + 2 * GAP, CELL + 3 * LINE
    sheet = Sheet(2 * width + 5 * GAP, 2 * height + LINE + 2 * GAP)
    for i in range(len(kinds)):
        left, top = GAP + i % 2 * (width + 3 * GAP), GAP + LINE + i // 2 * height
        for j, (image, head) in enumerate(((batch["image"][i], "phantom"), (masked[i], "75 % hidden"),
                                           (rebuilt[i], "reconstructed"))):
            sheet.panel(left + j * (CELL + GAP), top, image)
            if i < 2:
                sheet.write((left + j * (CELL + GAP), top - LINE - 3), head, GREY, FONT)
        for x, y, text, colour in caption(samples.tokenizer, batch, i, guesses, width):
            sheet.write((left + x, top + CELL + 5 + y), text, colour, FONT)
    sheet.save(path)


def ratios(model, samples, path, count=3):
    """The first `count` test samples at growing mask ratios, and the mean error of 512 samples at each."""
    batch, trained = chunk(samples, range(count)), model.cfg
    sheet = Sheet((CELL + GAP) * (1 + len(RATIOS)) + GAP, 2 * count * (CELL + GAP) + 3 * LINE)
    for row in range(count):
        sheet.panel(GAP, 2 * row * (CELL + GAP) + 2 * LINE + GAP, batch["image"][row])
    for column, ratio in enumerate(RATIOS, 1):
        model.cfg, errors = replace(trained, mask_ratio=ratio), []
        for _, _, _, some in load(samples, validation_micro_batches(samples, 512), VAL_SEED, "cpu"):
            text = model.encode_text(some["text_ids"], some["text_mask"])
            errors.append(model.objectives["mim"](model, some, text, None)["mim_loss"].item())
        masked, rebuilt = rebuild(model, batch)
        kept, left = int(batch["mim_noise"].shape[1] * (1 - ratio)), GAP + column * (CELL + GAP)
        sheet.write((left, GAP), f"{ratio:.0%}: {kept} of {batch['mim_noise'].shape[1]} kept", INK, FONT)
        sheet.write((left, GAP + LINE - 2), f"error {np.mean(errors):.3f}", GREY, FONT)
        for row in range(count):
            top = 2 * row * (CELL + GAP) + 2 * LINE + GAP
            sheet.panel(left, top, masked[row])
            sheet.panel(left, top + CELL + GAP // 2, rebuilt[row])
    model.cfg = trained
    sheet.save(path)


def looks(model, samples, path):
    """The first test sample of each kind in `wanted` with one finding and these words. Each word is hidden
    alone. Above: where its place looks in the last fusion layer. Below: what the word's log-probability loses
    when a patch is painted over with the mean colour."""
    wanted = ("chest x-ray", ("left", "large", "effusion")), ("brain mri", ("left", "frontal", "mass"))
    height = 2 * (CELL + LINE + GAP) + 3 * LINE
    sheet = Sheet(4 * (CELL + GAP) + GAP, len(wanted) * height + GAP)
    for i, (kind, words) in enumerate(wanted):
        number = first(samples, lambda line: line["group"] == kind and " and " not in line["text"]
                       and set(words) <= set(line["text"].lower().strip(".").split()))
        batch, top = chunk(samples, [number]), GAP + i * height
        tokens = [word.strip() for word in samples.tokenizer.words(batch["text_ids"][0])]
        sheet.write((GAP, top), samples.line(number)["text"], INK, FONT)
        sheet.panel(GAP, top + 5 * LINE // 2, batch["image"][0])
        for y, text in enumerate(("above: attention of", "the hidden word", "", "below: cost of each",
                                  "patch painted over"), 3):
            sheet.write((GAP, top + CELL + y * LINE), text, GREY, FONT)
        for column, word in enumerate(words, 1):
            place, left = tokens.index(word), GAP + column * (CELL + GAP)
            ids = batch["text_ids"].clone()
            ids[0, place] = samples.tokenizer.mask_id
            look = word_to_patch(model, ids, batch["text_mask"], batch["image"])[0, place]         # (L,)
            seen, unseen = probabilities(model, batch, ids, place)
            loss = (seen / unseen).log().clamp(min=0)                                              # (L,)
            for line, (heat, text) in enumerate((
                    (look / look.max(), f"{word}: {seen:.1%}"),
                    (loss / loss.max().clamp(min=0.1), f"down to {unseen.min():.1%}"))):
                y = top + 3 * LINE // 2 + line * (CELL + LINE + GAP)
                sheet.write((left, y - 3), text, INK, FONT)
                sheet.panel(left, y + LINE, batch["image"][0], heat)
    sheet.save(path)


def probabilities(model, batch, ids, place):
    """The true word's probability at a hidden place of a batch of one: with the whole image, and without
    each of its patches, (L,)."""
    size = model.cfg.patch_size
    patches = patchify(batch["image"], size)                                           # (1, L, 3·P²)
    count = patches.shape[1]
    without = patches.repeat(count, 1, 1) * (1 - torch.eye(count))[..., None]          # (L, L, 3·P²)
    images = torch.cat([batch["image"], unpatchify(without, size)])                    # (1+L, 3, S, S)
    many = {"mlm_ids": ids, "text_mask": batch["text_mask"], "mlm_labels": torch.full_like(ids, -100)}
    many["mlm_labels"][0, place] = batch["text_ids"][0, place]
    many = {name: tensor.repeat(1 + count, 1) for name, tensor in many.items()}
    out = model.objectives["mlm"](model, many, None, model.encode_image(images))
    found = out["mlm_logits"].softmax(-1).gather(1, out["mlm_targets"][:, None])[:, 0]  # (1+L,)
    return found[0], found[1:]


def chest(path):
    """An image to ask about: the first effusion among the test images of question answering."""
    rows = phantoms.rows(None, "vqa", {"test": 100})
    row = next(row for row in rows if row.group == "chest x-ray" and "effusion" in row.answer)
    row.image(192).save(path)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a pre-training on phantoms")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "figures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, samples = open_run(args.run)
    front(model, samples, args.out / "front.png")
    ratios(model, samples, args.out / "ratios.png")
    looks(model, samples, args.out / "looks.png")
    chest(args.out / "chest.png")
    lines = (Path(args.run) / "metrics.jsonl").read_text().splitlines()
    curves([json.loads(line) for line in lines], args.out / "curves.png")


if __name__ == "__main__":
    distributed.run(main)
