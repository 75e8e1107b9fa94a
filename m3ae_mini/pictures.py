"""Pictures of what was learned: reconstructions and curves, as PNG files. Pillow draws them."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .data import MEAN, STD, VAL_SEED, load, validation_chunks
from .model import patchify

FONT = ImageFont.load_default(14)
BACK, INK, GREEN, RED, GREY = (250, 250, 248), (30, 30, 30), (0, 125, 60), (190, 30, 30), (150, 150, 150)


def unpatchify(patches, size):
    """patches (B, L, 3·size²) -> image (B, 3, S, S): the inverse of model.patchify."""
    side = round(patches.shape[1] ** 0.5)
    x = patches.unflatten(2, (size, size, 3)).unflatten(1, (side, side))        # (B, S/P, S/P, P, P, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)                 # (B, 3, S, S)


def visible(image):
    """A normalised image (3, S, S) -> PIL."""
    mean, std = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in (MEAN, STD))
    pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


@torch.no_grad()
def rebuild(model, batch):
    """A chunk -> (masked, rebuilt), each (B, 3, S, S): hidden patches grey; hidden patches as the model sees
    them. Where the model predicts normalised patches, each gets its true mean and deviation back."""
    size = model.cfg.patch_size
    text = model.encode_text(batch["text_ids"], batch["text_mask"])
    out = model.objectives["mim"](model, batch, text, None)
    patches, pred = patchify(batch["image"], size), out["mim_pred"]             # (B, L, 3·P²) each
    hidden = out["mim_hidden"].bool()[..., None]                                # (B, L, 1)
    if model.cfg.norm_pix_loss:
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    masked, rebuilt = patches.masked_fill(hidden, 0.0), torch.where(hidden, pred, patches)
    return unpatchify(masked, size), unpatchify(rebuilt, size)


@torch.no_grad()
def reconstructions(model, samples, place, path, count=8):
    """A sheet of `count` samples: original | masked | reconstructed, and the caption with its hidden words
    filled in, green where the model found the word, red (with the true word behind) where it did not."""
    model.eval()
    spread = np.arange(count) * samples.n // count
    _, _, _, batch = next(load(samples, iter([(0, 0, spread)]), VAL_SEED, place.device))
    with place.autocast():
        masked, rebuilt = rebuild(model, batch) if "mim" in model.objectives else (batch["image"],) * 2
        guesses = None
        if "mlm" in model.objectives:
            out = model.objectives["mlm"](model, batch, None, model.encode_image(batch["image"]))
            guesses = dict(zip(batch["mlm_positions"].tolist(), out["mlm_logits"].argmax(-1).tolist()))
    model.train()

    cell, gap, columns = max(144, samples.cfg.image_size), 12, 2
    width = 3 * cell + 2 * gap
    captions = [wrapped(caption_pieces(samples.tokenizer, batch, i, guesses), width) for i in range(count)]
    height = cell + 42 + max(y for caption in captions for _, y, _, _ in caption)      # room for the longest
    size = columns * (width + 2 * gap) + gap, -(-count // columns) * height + gap
    sheet = Image.new("RGB", size, BACK)
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        left, top = gap + i % columns * (width + 2 * gap), gap + i // columns * height
        for j, image in enumerate((batch["image"][i], masked[i], rebuilt[i])):
            shown = visible(image.float()).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(shown, (left + j * (cell + gap), top))
        for x, y, text, colour in caption:
            draw.text((left + x, top + cell + 6 + y), text, colour, FONT)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def caption_pieces(tokenizer, batch, row, guesses):
    """The caption of a row as (text, colour) pieces."""
    ids, labels = batch["text_ids"][row].tolist(), batch["mlm_labels"][row].tolist()
    words, pieces = tokenizer.words(ids), []
    for place, (token, label) in enumerate(zip(ids, labels)):
        if token in (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id):
            continue
        if label == -100 or guesses is None:
            pieces.append((words[place], INK))
        else:
            guess = guesses[row * len(ids) + place]
            right = guess == label
            text = tokenizer.words([guess])[0]
            truth = "" if right else f" (not {words[place].strip()})"
            pieces.append((text + truth, GREEN if right else RED))
    return pieces


def wrapped(pieces, width):
    """(text, colour) pieces -> (x, y, text, colour) in pixels, in lines of at most `width` and 18 high."""
    placed, x, y = [], 0, 0
    for text, colour in pieces:
        text = text.replace("\n", " ")            # a model that has learned nothing yet writes anything
        length = FONT.getlength(text)
        if x and x + length > width:
            x, y, text = 0, y + 18, text.lstrip()
        placed.append((x, y, text, colour))
        x += FONT.getlength(text)
    return placed


def curves(lines, path):
    """lines: the dicts of metrics.jsonl -> a PNG with a panel for every figure of training and validation."""
    names = ["mlm_loss", "mim_loss", "itm_loss", "mlm_acc", "mlm_gain_kin", "itm_acc_kin"]
    splits = {"train": GREY, "val": GREEN}
    series = {name: {split: [(line["step"], line[name]) for line in lines
                             if line["split"] == split and line.get(name) is not None] for split in splits}
              for name in names}
    series = {name: found for name, found in series.items() if any(found.values())}
    if not series:
        return

    wide, high, margin = 340, 220, 44
    columns = min(3, len(series))
    sheet = Image.new("RGB", (columns * wide, -(-len(series) // columns) * high), BACK)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (name, found) in enumerate(series.items()):
        left, top = number % columns * wide + margin, number // columns * high + 26
        right, bottom = left + wide - margin - 16, top + high - 60
        points = [point for part in found.values() for point in part]
        steps, values = [p[0] for p in points], [p[1] for p in points]
        low, up, end = min(values + [0.0]), max(values), max(steps)
        up = up if up > low else low + 1

        def place(step, value):
            return left + (right - left) * step / end, bottom - (bottom - top) * (value - low) / (up - low)

        draw.text((left, top - 20), name, INK, font)
        draw.text((right - 78, top - 20), "training", GREY, font)
        draw.text((right - 22, top - 20), "val", GREEN, font)
        draw.rectangle((left, top, right, bottom), outline=GREY)
        for value in (low, up):
            draw.text((left - 40, place(0, value)[1] - 7), f"{value:.3g}", INK, font)
        draw.text((right - 60, bottom + 4), f"step {end:,}", INK, font)
        for split, colour in splits.items():
            line = [place(*point) for point in found[split]]
            draw.line(line, fill=colour, width=2) if len(line) > 1 else None
            if split == "val":
                for x, y in line:
                    draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
