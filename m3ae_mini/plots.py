"""Images of what was learned, drawn by Pillow as PNG files: reconstructions, attention, curves."""
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .data import MEAN, STD, VAL_SEED, load
from .model import patchify

FONT = ImageFont.load_default(14)
BACK, INK, GREEN, RED, GREY = (250, 250, 248), (30, 30, 30), (0, 125, 60), (190, 30, 30), (150, 150, 150)


def unpatchify(patches, size):
    """patches (B, L, 3·size²) -> image (B, 3, S, S): the inverse of model.patchify."""
    side = round(patches.shape[1] ** 0.5)
    x = patches.unflatten(2, (size, size, 3)).unflatten(1, (side, side))        # (B, S/P, S/P, P, P, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)                 # (B, 3, S, S)


def to_pil(image):
    """A normalised image (3, S, S) -> PIL."""
    pixels = image.permute(1, 2, 0).cpu().numpy() * STD + MEAN                  # (S, S, 3) in 0 … 1
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


@torch.no_grad()
def rebuild(model, batch):
    """A chunk -> (masked, rebuilt), each (B, 3, S, S): hidden patches grey; hidden patches as the model
    restores them. Where the model predicts normalised patches, each gets its true mean and deviation back."""
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
def reconstructions(model, samples, dist_env, path, count=8):
    """A sheet of `count` samples: original | masked | reconstructed, and the caption with its hidden words
    filled in, green where the model found the word, red (with the true word behind) where it did not."""
    model.eval()
    spread = np.arange(count) * samples.n // count
    _, _, _, batch = next(load(samples, [(0, 0, spread)], VAL_SEED, dist_env.device))
    guesses = None
    with dist_env.autocast():
        masked, rebuilt = rebuild(model, batch) if "mim" in model.objectives else (batch["image"],) * 2
        if "mlm" in model.objectives:
            out = model.objectives["mlm"](model, batch, None, model.encode_image(batch["image"]))
            guesses = dict(zip(batch["mlm_positions"].tolist(), out["mlm_logits"].argmax(-1).tolist()))
    model.train()

    cell, gap, columns, lines = max(144, samples.cfg.image_size), 12, 2, 1 + (count - 1) // 2
    width = 3 * cell + 2 * gap
    captions = [caption(samples.tokenizer, batch, i, guesses, width) for i in range(count)]
    height = cell + 42 + max((word[1] for words in captions for word in words), default=0)
    sheet = Image.new("RGB", (columns * (width + 2 * gap) + gap, lines * height + gap), BACK)
    draw = ImageDraw.Draw(sheet)
    for i, words in enumerate(captions):
        left, top = gap + i % columns * (width + 2 * gap), gap + i // columns * height
        for j, image in enumerate((batch["image"][i], masked[i], rebuilt[i])):
            shown = to_pil(image.float()).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(shown, (left + j * (cell + gap), top))
        for x, y, text, colour in words:
            draw.text((left + x, top + cell + 6 + y), text, colour, FONT)
    sheet.save(path)


def caption(tokenizer, batch, row, guesses, width):
    """A row's caption as (x, y, text, colour) in pixels, in lines of at most `width` and 18 high."""
    ids, labels = batch["text_ids"][row].tolist(), batch["mlm_labels"][row].tolist()
    words, placed, x, y = tokenizer.words(ids), [], 0, 0
    for place, (token, label) in enumerate(zip(ids, labels)):
        if token in (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id):
            continue
        text, colour = words[place], INK
        if label != -100 and guesses is not None:
            guess = guesses[row * len(ids) + place]
            text, colour = tokenizer.words([guess])[0], GREEN
            if guess != label:
                text, colour = f"{text} (truth: {words[place].strip()})", RED
        text = text.replace("\n", " ")            # a model that has learned nothing yet writes anything
        if x and x + FONT.getlength(text) > width:
            x, y = 0, y + 18
        text = text if x else text.lstrip()
        placed.append((x, y, text, colour))
        x += FONT.getlength(text)
    return placed


def word_to_patch(model, ids, mask, image):
    """ids, mask (B, T), image (B, 3, S, S) -> (B, T, L): how much each token looks at each patch in the last
    fusion layer, the mean of its heads; what goes to the class token is left out."""
    seen, cross = [], model.fusion.text_layers[-1].cross
    hook = cross.register_forward_pre_hook(lambda cross, args: seen.append(cross.weights(*args)))
    model.fuse(model.encode_text(ids, mask), model.encode_image(image), mask)
    hook.remove()
    return seen[0].mean(1)[:, :, 1:]


@torch.no_grad()
def attention(model, batch, words, path):
    """The image of a batch's first row; then, in red, where each of the tokens `words` looks."""
    image = batch["image"][:1].float()                                          # (1, 3, S, S)
    looks = word_to_patch(model.eval(), batch["text_ids"][:1], batch["text_mask"][:1], image)[0, :len(words)]
    low, high = looks.aminmax(dim=1, keepdim=True)
    looks = (looks - low) / (high - low).clamp(min=1e-9)                        # (T, L)
    side, cell, columns = round(looks.shape[1] ** 0.5), 192, 6
    shown = to_pil(image[0]).resize((cell, cell), Image.Resampling.BICUBIC)
    sheet = Image.new("RGB", (columns * cell, (1 + len(words) // columns) * (cell + 20)), BACK)
    for place, word in enumerate(["image", *words]):
        panel = shown.copy()
        if place:
            heat = Image.fromarray((looks[place - 1].view(side, side) * 180).byte().cpu().numpy())
            panel.paste((255, 40, 0), mask=heat.resize((cell, cell), Image.Resampling.BICUBIC))
        left, top = place % columns * cell, place // columns * (cell + 20)
        sheet.paste(panel, (left, top))
        ImageDraw.Draw(sheet).text((left + 4, top + cell + 1), word.strip() or "_", INK, FONT)
    sheet.save(path)


def curves(lines, path):
    """The lines of metrics.jsonl, dicts -> a panel for each figure: training grey, validation green."""
    names = ("mlm_loss", "mim_loss", "itm_loss", "mlm_acc", "mlm_gain_hard", "itm_acc_hard", "loss", "score")
    splits = {"train": GREY, "val": GREEN}
    lines = [line for line in lines if line["split"] in splits]
    names = [name for name in names if any(line.get(name) is not None for line in lines)]
    wide, high, columns = 280, 160, min(4, len(names))
    sheet = Image.new("RGB", (columns * (wide + 60), (1 + (len(names) - 1) // columns) * (high + 60)), BACK)
    draw = ImageDraw.Draw(sheet)
    for number, name in enumerate(names):
        left, top = number % columns * (wide + 60) + 50, number // columns * (high + 60) + 30
        found = [line for line in lines if line.get(name) is not None]
        values, end = [line[name] for line in found], max(line["step"] for line in found)
        low, up = min(0.0, *values), max(*values, 1e-9)
        draw.rectangle((left, top, left + wide, top + high), outline=GREY)
        for x, y, text, anchor in ((0, -12, name, "lm"), (wide, high + 12, f"step {end:,}", "rm"),
                                   (-5, 6, f"{up:.2g}", "rm"), (-5, high - 6, f"{low:.1g}", "rm")):
            draw.text((left + x, top + y), text, INK, FONT, anchor)
        for split, colour in splits.items():
            points = [(left + wide * line["step"] / end, top + high * (up - line[name]) / (up - low))
                      for line in found if line["split"] == split]
            draw.line(points, fill=colour, width=2)
            for x, y in points if split == "val" else ():
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    sheet.save(path)
