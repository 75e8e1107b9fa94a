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


@torch.no_grad()
def attention(model, batch, words, path):
    """A sheet of where the text looks, for the first row of a batch: the picture, then it under the attention
    of each of the first tokens `words` (the first one's feature goes to the heads) in the last fusion layer,
    mean of its heads, as red over it."""
    seen, model = [], model.eval()
    cross = model.fusion.text_layers[-1].cross
    hook = cross.register_forward_pre_hook(lambda cross, args: seen.append(cross.weights(*args)))
    image = batch["image"][:1].float()                                          # (1, 3, S, S)
    model.fuse(model.encode_text(batch["text_ids"][:1], batch["text_mask"][:1]), model.encode_image(image),
               batch["text_mask"][:1])
    hook.remove()

    looks = seen[0][0].mean(0)[:len(words), 1:]                                 # (T, L) no class token
    looks = looks / looks.amax(1, keepdim=True)
    side, cell, columns = round(looks.shape[1] ** 0.5), 192, 6
    picture = visible(image[0]).resize((cell, cell), Image.Resampling.BICUBIC)
    sheet = Image.new("RGB", (columns * cell, -(-(1 + len(words)) // columns) * (cell + 20)), BACK)
    for place, word in enumerate(["", *words]):
        panel = picture.copy()
        if place:
            heat = Image.fromarray((looks[place - 1].view(side, side) * 180).byte().cpu().numpy())
            panel.paste((255, 40, 0), mask=heat.resize((cell, cell), Image.Resampling.BICUBIC))
        left, top = place % columns * cell, place // columns * (cell + 20)
        sheet.paste(panel, (left, top))
        ImageDraw.Draw(sheet).text((left + 4, top + cell + 1), word.strip(), INK, FONT)
    sheet.save(path)


def curves(lines, path):
    """lines: the dicts of metrics.jsonl -> a PNG with a panel for each figure that was followed: training's
    grey, validation's green."""
    names = ("mlm_loss", "mim_loss", "itm_loss", "mlm_acc", "mlm_gain_kin", "itm_acc_kin", "loss", "score")
    splits = {"train": GREY, "val": GREEN}
    series = {name: {split: [(line["step"], line[name]) for line in lines
                             if line["split"] == split and line.get(name) is not None] for split in splits}
              for name in names}
    series = {name: found for name, found in series.items() if any(found.values())}

    wide, high, columns = 280, 160, min(4, len(series))
    sheet = Image.new("RGB", (columns * (wide + 60), -(-len(series) // columns) * (high + 60)), BACK)
    draw = ImageDraw.Draw(sheet)
    for number, (name, found) in enumerate(series.items()):
        left, top = number % columns * (wide + 60) + 50, number // columns * (high + 60) + 30
        steps, values = zip(*(point for part in found.values() for point in part))
        low, up, end = min(0.0, *values), max(*values, 1e-9), max(steps)
        draw.rectangle((left, top, left + wide, top + high), outline=GREY)
        for x, y, text in ((0, -22, name), (-46, -8, f"{up:.3g}"), (-46, high - 8, f"{low:.3g}"),
                           (wide - 80, high + 4, f"step {end:,}")):
            draw.text((left + x, top + y), text, INK, FONT)
        for split, colour in splits.items():
            points = [(left + wide * step / end, top + high * (up - value) / (up - low))
                      for step, value in found[split]]
            draw.line(points, fill=colour, width=2)
            for x, y in points if split == "val" else ():
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
