"""PNG files, drawn by Pillow: reconstructions, attention maps, learning curves."""
import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .checkpoint import read_log
from .config import require
from .distributed import DistEnv, run
from .loader import MEAN, STD, VAL_SEED, Samples, load
from .model import patchify
from .objectives import M3AE

FONT = ImageFont.load_default(14)
BACK, INK, GREY = (250, 250, 248), (30, 30, 30), (150, 150, 150)
GREEN, RED = (0, 125, 60), (190, 30, 30)
COLOURS = (GREEN, RED, (30, 80, 180), (200, 120, 0), (120, 40, 140), (0, 140, 150), INK)


def to_pil(image: Tensor) -> Image.Image:
    """A normalised image (3, S, S) -> PIL"""
    pixels = image.permute(1, 2, 0).cpu().numpy() * STD + MEAN        # (S, S, 3) in 0 … 1
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def unpatchify(patches: Tensor, size: int) -> Tensor:
    """patches (B, L, 3·size²) -> image (B, 3, S, S): the inverse of model.patchify"""
    grid = round(patches.shape[1] ** 0.5)
    x = patches.unflatten(2, (size, size, 3)).unflatten(1, (grid, grid))  # (B, S/P, S/P, P, P, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)       # (B, 3, S, S)


# ---------------------------------------------------------------------------------- reconstructions

@torch.no_grad()
def reconstruct(model: M3AE, batch: dict) -> tuple[Tensor, Tensor]:
    """A batch -> its images with hidden patches grey, and restored, (B, 3, S, S) each

    Where the model predicts normalised patches, each gets its true mean and deviation back."""
    size = model.cfg.patch_size
    text = model.encode_text(batch["text_ids"], batch["text_mask"])   # (B, T, D)
    out = model.objectives["mim"](model, batch, text)
    pred, hidden = out["mim_pred"], out["mim_hidden"].bool()[..., None]  # (B, L, 3·P²), (B, L, 1)
    patches = patchify(batch["image"], size)                          # (B, L, 3·P²)
    if model.cfg.norm_pix_loss:
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    masked = patches.masked_fill(hidden, 0.0)
    restored = torch.where(hidden, pred, patches)
    return unpatchify(masked, size), unpatchify(restored, size)


@torch.no_grad()
def reconstructions(model: M3AE, samples: Samples, dist_env: DistEnv, path: Path,
                    count: int = 8) -> None:
    """Draw `count` samples: original, masked and restored image, and the caption.

    A word is green where the model restored it, red (with the true word behind) where it did
    not."""
    if not {"mim", "mlm"} & model.objectives.keys():
        return                                                        # nothing was reconstructed
    model.eval()
    spread = np.arange(count) * samples.n // count
    batch = next(load(samples, [(0, 0, spread)], VAL_SEED, dist_env.device)).batch
    masked = restored = batch["image"]
    guesses = None
    with dist_env.autocast():
        if "mim" in model.objectives:
            masked, restored = reconstruct(model, batch)
        if "mlm" in model.objectives:
            text = model.encode_text(batch["mlm_ids"], batch["text_mask"])  # (B, T, D)
            out = model.objectives["mlm"](model, batch, text, model.encode_image(batch["image"]))
            tokens = out["mlm_logits"].argmax(-1).tolist()            # (M,)
            guesses = dict(zip(batch["mlm_positions"].tolist(), tokens))
    model.train()

    # The sheet: two columns of samples, three images a sample, the caption below.
    cell, gap = max(144, samples.cfg.image_size), 12
    columns = 2
    width = 3 * cell + 2 * gap
    captions = [caption(samples.tokenizer, batch, row, guesses, width) for row in range(count)]
    height = cell + 42 + max((y for words in captions for _, y, _, _ in words), default=0)
    rows = 1 + (count - 1) // columns
    sheet = Image.new("RGB", (columns * (width + 2 * gap) + gap, rows * height + gap), BACK)
    for i, words in enumerate(captions):
        left, top = gap + i % columns * (width + 2 * gap), gap + i // columns * height
        for j, images in enumerate((batch["image"], masked, restored)):
            shown = to_pil(images[i].float()).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(shown, (left + j * (cell + gap), top))
        for x, y, text, colour in words:
            ImageDraw.Draw(sheet).text((left + x, top + cell + 6 + y), text, colour, FONT)
    sheet.save(path)


def caption(tokenizer, batch: dict, row: int, guesses: dict[int, int] | None,
            width: int) -> list[tuple]:
    """A row's caption as (x, y, text, colour) in pixels, in lines of at most `width` and 18 high

    guesses: {position of a masked token in the flattened batch: the token that the model puts
    there}."""
    ids, labels = batch["text_ids"][row].tolist(), batch["mlm_labels"][row].tolist()
    words = tokenizer.words(ids)
    placed = []
    x, y = 0, 0
    for t, (token, label) in enumerate(zip(ids, labels)):
        if token in (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id):
            continue
        text, colour = words[t], INK
        if label != -100 and guesses is not None:
            guess = guesses[row * len(ids) + t]
            text, colour = tokenizer.words([guess])[0], GREEN
            if guess != label:
                text, colour = f"{text} (true: {words[t].strip()})", RED
        text = text.replace("\n", " ")        # a model that has learned nothing yet writes anything
        if x and x + FONT.getlength(text) > width:
            x, y = 0, y + 18
        text = text if x else text.lstrip()
        placed.append((x, y, text, colour))
        x += FONT.getlength(text)
    return placed


# ---------------------------------------------------------------------------------------- attention

def word_to_patch(model: M3AE, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
    """ids, mask (B, T), image (B, 3, S, S) -> attention of each token to each patch (B, T, L)

    As the fusion's attention_map has it; the class token is left out."""
    text, image = model.encode_text(ids, mask), model.encode_image(image)
    return model.fusion.attention_map(text, image, mask)[:, :, 1:]    # (B, T, L)


@torch.no_grad()
def attention_map(model: M3AE, batch: dict, words: list[str], path: Path) -> None:
    """Draw the batch's first image; then, in red, where each of the tokens `words` attends."""
    image = batch["image"][:1].float()                                # (1, 3, S, S)
    ids, mask = batch["text_ids"][:1], batch["text_mask"][:1]         # (1, T) each
    maps = word_to_patch(model.eval(), ids, mask, image)[0, :len(words)]  # (T, L)
    low, high = maps.aminmax(dim=1, keepdim=True)
    maps = (maps - low) / (high - low).clamp(min=1e-9)                # (T, L) in 0 … 1

    grid = round(maps.shape[1] ** 0.5)
    cell, columns = 192, 6
    shown = to_pil(image[0]).resize((cell, cell), Image.Resampling.BICUBIC)
    sheet = Image.new("RGB", (columns * cell, (1 + len(words) // columns) * (cell + 20)), BACK)
    for i, word in enumerate(["image", *words]):
        left, top = i % columns * cell, i // columns * (cell + 20)
        sheet.paste(shown, (left, top))
        if i:
            heat = Image.fromarray((maps[i - 1].view(grid, grid) * 180).byte().cpu().numpy())
            heat = heat.resize((cell, cell), Image.Resampling.BICUBIC)
            sheet.paste((255, 40, 0), (left, top, left + cell, top + cell), heat)
        ImageDraw.Draw(sheet).text((left + 4, top + cell + 1), word.strip() or "_", INK, FONT)
    sheet.save(path)


# ------------------------------------------------------------------------------------------- curves

def curves(runs: dict[str, list[dict]], path: Path) -> None:
    """The lines of each run's metrics.jsonl -> a panel for each metric that any of them has

    A thin line is training, a thick one with dots validation. A single run is green; several have
    a colour each, named at the top."""
    kept = {folder: [line for line in lines if line["split"] in ("train", "val")]
            for folder, lines in runs.items()}
    every = [line for lines in kept.values() for line in lines]
    losses = dict.fromkeys(name for line in every for name in line if name.endswith("_loss"))
    wanted = [*losses, "mlm_acc", "mlm_gain_hard", "itm_acc_hard", "itc_acc", "loss", "score"]
    names = [name for name in wanted if any(line.get(name) is not None for line in every)]
    wide, high = 280, 160              # pixels
    columns = min(4, len(names)) or 1
    rows = 1 + max(0, len(names) - 1) // columns
    head = 24 * len(runs) if len(runs) > 1 else 0
    sheet = Image.new("RGB", (columns * (wide + 60), head + rows * (high + 60)), BACK)
    draw = ImageDraw.Draw(sheet)
    for i, folder in enumerate(runs if head else ()):
        draw.text((50, 24 * i + 16), folder, COLOURS[i % len(COLOURS)], FONT, "lm")
    for i, name in enumerate(names):
        corner = i % columns * (wide + 60) + 50, head + i // columns * (high + 60) + 30
        series = [[line for line in lines if line.get(name) is not None] for lines in kept.values()]
        panel(draw, name, series, *corner, wide, high)
    sheet.save(path)


def panel(draw, name: str, series: list[list[dict]], left: int, top: int, wide: int,
          high: int) -> None:
    """One panel of `curves`, its frame's corner at (left, top). series: the lines of each run."""
    every = [line for lines in series for line in lines]
    values, end = [line[name] for line in every], max(line["step"] for line in every)
    low, up = min(0.0, *values), max(*values, 1e-9)
    draw.rectangle((left, top, left + wide, top + high), outline=GREY)
    for x, y, text, anchor in ((0, -12, name, "lm"), (wide, high + 12, f"step {end:,}", "rm"),
                               (-5, 6, f"{up:.2g}", "rm"), (-5, high - 6, f"{low:.1g}", "rm")):
        draw.text((left + x, top + y), text, INK, FONT, anchor)
    for i, lines in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        for split in ("train", "val"):
            points = [(left + wide * line["step"] / end,
                       top + high * (up - line[name]) / (up - low))
                      for line in lines if line["split"] == split]
            thin = split == "train"
            draw.line(points, GREY if thin and len(series) == 1 else colour, 1 if thin else 2)
            for x, y in () if thin else points:
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)


def main() -> None:
    """python -m m3ae_mini.plots RUN RUN …: the curves of several runs in one image."""
    parser = argparse.ArgumentParser(description="Draw the curves of several runs in one image.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", default="curves.png", help="the PNG to write [curves.png]")
    args = parser.parse_args()
    runs = {name: read_log(name) for name in args.runs}
    empty = [name for name, lines in runs.items() if not lines]
    require(not empty, f"{', '.join(empty)} holds no metrics.jsonl with lines: give a run's folder")
    require(args.out.endswith(".png"), f"--out {args.out}: name a file that ends in .png")
    curves(runs, Path(args.out))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
