"""From a trained model to its use: answers for new images, search, features.

    run = load_run("runs/vqa")                        # model: a plain nn.Module; tokenizer, labels
    image = read_images(["chest.png"], run)           # (1, 3, S, S)
    probabilities = answer(run, image, ["Is there a pneumothorax?"])  # (1, A)
"""
import textwrap
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from data import clean_text, table
from data.decode import open_image
from data.images import square
from data.labels import saved_labels
from data.prepare import open_packs
from data.task_metrics import likely_labels, write_table
from m3ae_mini import M3AE, ModelConfig, plots, weights
from m3ae_mini.checkpoint import saved_settings
from m3ae_mini.config import TrainConfig, UserError, require
from m3ae_mini.loader import LoadedBatch, Samples, load, normalise, validation_micro_batches
from m3ae_mini.tokenizer import Tokenizer

BATCH = 32                             # images of one forward pass
FOUND = 10                             # results that a search shows
SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".webp", ".jp2")


class LoadedRun(NamedTuple):
    """A finished run."""
    folder: Path
    model: M3AE                        # in evaluation mode
    cfg: ModelConfig
    tokenizer: Tokenizer
    labels: list[str]                  # answers or classes; empty for other tasks
    several_labels: bool               # may a row have several of them?
    fit: str                           # as its pack's images were stored: see images.square
    window: list[float] | None         # see decode.decode
    device: torch.device


def load_run(folder: str | Path, device: str | torch.device = "cpu") -> LoadedRun:
    """Load the best checkpoint of a run's folder. UserError if it holds none."""
    folder = Path(folder)
    tokenizer = Tokenizer.load(folder)
    cfg, state = weights.load_m3ae(folder)
    model = M3AE(cfg).eval().requires_grad_(False)
    model.load_state_dict(state)
    labels = saved_labels(folder, cfg.task, with_blind=False) or []
    data = (saved_settings(folder) or {}).get("data", {})
    return LoadedRun(folder, model.to(device), cfg, tokenizer, labels,
                     data.get("several_labels", False), data.get("fit", "crop"),
                     data.get("window"), torch.device(device))


def read_images(paths: list[str | Path], run: LoadedRun) -> Tensor:
    """Image files -> (B, 3, S, S), normalised, on the run's device. UserError names a bad one.

    They are fitted into the square, and grey of more than 8 bits is windowed, as in the run's
    first pack."""
    pixels = []
    for path in paths:
        require(Path(path).is_file(), f"there is no image {path}")
        try:
            image = open_image(Path(path), run.window)
            image = square(image, run.cfg.image_size, run.fit).convert("RGB")
        except Exception as error:     # Pillow raises many types on a damaged file
            raise UserError(f"{path} can't be read as an image ({error})") from None
        pixels.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))     # (3, S, S)
    return normalise(torch.stack(pixels).to(run.device))


def read_texts(texts: list[str], tokenizer: Tokenizer,
               max_text_len: int) -> tuple[Tensor, Tensor, int]:
    """Texts -> ids, mask (B, T), and how many are truncated"""
    longest, pad_id = max_text_len - 2, tokenizer.pad_id
    token_ids = [ids for ids, _ in tokenizer.encode(map(clean_text, texts))]
    ids = torch.full((len(texts), max(map(len, token_ids)) + 2), pad_id)
    for row, tokens in zip(ids, token_ids):
        tokens = [tokenizer.cls_id, *tokens[:longest], tokenizer.sep_id]
        row[:len(tokens)] = torch.tensor(tokens)
    ids = ids[:, :max_text_len]                                       # (B, T)
    return ids, (ids != pad_id).long(), sum(len(tokens) > longest for tokens in token_ids)


def make_batch(run: LoadedRun, images: Tensor, texts: list[str]) -> dict[str, Tensor]:
    """Images (B, 3, S, S) and their texts -> a batch for the model"""
    ids, mask, _ = read_texts(texts, run.tokenizer, run.cfg.max_text_len)
    ids, mask = ids.to(run.device), mask.to(run.device)
    labels = torch.zeros(len(images), dtype=torch.long, device=run.device)
    return {"image": images, "text_ids": ids, "text_mask": mask, f"{run.cfg.task}_labels": labels}


@torch.no_grad()
def answer(run: LoadedRun, images: Tensor, texts: list[str]) -> Tensor:
    """Images (B, 3, S, S) and their questions or texts -> probabilities of all labels (B, A)"""
    logits = run.model(make_batch(run, images, texts))[f"{run.cfg.task}_logits"]
    logits = logits[:, :len(run.labels)]                                      # (B, A)
    one_by_one = run.cfg.task == "vqa" or run.several_labels
    return logits.sigmoid() if one_by_one else logits.softmax(-1)


def use_run(task: str, args: Namespace, packs: str | None, device: torch.device) -> None:
    """What finetune.py does with a finished run: --predict, --search, or the task embed.

    packs: --data; None: those that the run was trained on."""
    require(args.init, "give the run with --init")
    if not packs and not args.predict and Path(args.init).is_dir():
        packs = trained_on(args.init)
        print(f"--data is not given: {packs}, on which {args.init} was trained")
    if args.predict:
        predict(task, Path(args.init), args.predict, args.out, device)
    elif args.search:
        require(task == "irtr", f"--search is for irtr, not {task}")
        search(Path(args.init), args.search, packs, args.out, device)
    else:
        embed(Path(args.init), packs, args.out, device)


def trained_on(init: str) -> str:
    """The --data of a run's training; "phantoms" where nothing says so."""
    saved = saved_settings(Path(init)) if Path(init).is_dir() else None
    return (saved or {}).get("run", {}).get("data", "phantoms")


# ------------------------------------------------------------------------------------- predictions

def predict(task: str, folder: Path, arguments: list[str], out: str | None,
            device: torch.device) -> None:
    """--predict IMAGE TEXT, --predict TABLE, or --predict FOLDER [TEXT]. UserError if it can't."""
    run = load_run(folder, device)
    require(run.labels and run.cfg.task == task, f"{folder} is not a run of finetune.py {task} "
            "without --blind: train one, and give it with --init")
    path, text = Path(arguments[0]), " ".join(arguments[1:])
    if path.is_dir() or path.suffix.lower() in (".csv", ".jsonl"):
        predict_many(run, path, text, Path(out or folder / "predictions.csv"))
    else:
        predict_one(run, path, text)


@torch.no_grad()
def predict_one(run: LoadedRun, path: Path, text: str) -> None:
    """Print the five most likely answers, and plot where the text attends."""
    images = read_images([path], run)                                         # (1, 3, S, S)
    (token_ids, _), = run.tokenizer.encode([clean_text(text)])
    longest = run.cfg.max_text_len - 2
    require(0 < len(token_ids) <= longest, f"the text has {len(token_ids)} tokens: give one of 1 "
            f"to {longest} after the image, as in training")
    probabilities = answer(run, images, [text])[0]                            # (A,)
    top = probabilities.topk(min(5, len(run.labels)))
    for probability, i in zip(top.values.tolist(), top.indices.tolist()):
        print(f"{probability:7.1%}  {run.labels[i]}")

    if not hasattr(run.model.fusion, "attention_map"):
        print("no attention is drawn: this fusion has no attention_map")
        return
    out = run.folder / "plots" / f"{path.stem[:60]}-attention.png"
    out.parent.mkdir(exist_ok=True)
    batch = make_batch(run, images, [text])
    plots.attention_map(run.model, batch, run.tokenizer.words(batch["text_ids"][0]), out)
    print(f"attention: {out}")


def predict_many(run: LoadedRun, source: Path, text: str, out: Path) -> None:
    """Write a row for each image of a table or a folder: its answer, or why it can't be read."""
    require(not out.exists(), f"{out} exists already: choose another --out")
    pairs, task = named_pairs(source, text, run.cfg.task), run.cfg.task
    probabilities = np.full((len(pairs), len(run.labels)), np.nan, np.float32)        # (n, A)
    errors, num_truncated = [""] * len(pairs), 0
    for start in tqdm(range(0, len(pairs), BATCH), desc="batches", leave=False, disable=None):
        images, texts, rows = [], [], []
        for row, (path, words) in enumerate(pairs[start:start + BATCH], start):
            try:
                require(task == "cls" or clean_text(words), "no question")
                images.append(read_images([path], run))
                texts.append(words)
                rows.append(row)
            except UserError as error:
                errors[row] = str(error)
        if rows:
            probabilities[rows] = answer(run, torch.cat(images), texts).cpu().numpy()
            num_truncated += read_texts(texts, run.tokenizer, run.cfg.max_text_len)[2]
    write_table(prediction_columns(run, pairs, probabilities, errors), out)

    bad = [str(path) for (path, _), error in zip(pairs, errors) if error]
    num_empty = sum(not clean_text(words) for _, words in pairs)
    print(f"{len(pairs) - len(bad):,} of {len(pairs):,} predictions: {out}")
    if num_empty and task == "cls":
        print(f"warning: {num_empty:,} images have no text, but the run was trained with texts")
    if num_truncated:
        print(f"{num_truncated:,} texts of more than {run.cfg.max_text_len} tokens were truncated")
    if bad:
        print(f"warning: no prediction for {len(bad):,} (see the column error): "
              f"{', '.join(bad[:5])}" + ", …" * (len(bad) > 5))


def prediction_columns(run: LoadedRun, pairs: list[tuple[Path, str]], probabilities: np.ndarray,
                       errors: list[str]) -> dict[str, np.ndarray]:
    """The columns of predict_many's table. probabilities: (n, A); errors: n texts, or "".

    image, text, prediction, probability, error; of cls also "p: LABEL" for each class. With several
    labels a row, the prediction is those of probability 0.5 and more, and has no probability."""
    columns: dict[str, list] = {"image": [str(path) for path, _ in pairs],
                                "text": [text for _, text in pairs]}
    best = probabilities.argmax(1)                                            # (n,)
    if run.several_labels:
        columns["prediction"] = [likely_labels(row, run.labels) for row in probabilities]
    else:
        columns["prediction"] = [run.labels[i] for i in best]
        columns["probability"] = np.take_along_axis(probabilities, best[:, None], 1)[:, 0].tolist()
    if run.cfg.task == "cls":
        columns |= {f"p: {label}": probabilities[:, i].tolist()
                    for i, label in enumerate(run.labels)}

    # An image that can't be read has its error and nothing else.
    for name, column in columns.items():
        if name not in ("image", "text"):
            columns[name] = ["" if error else value for value, error in zip(column, errors)]
    return {name: np.array(column, dtype=object)
            for name, column in (columns | {"error": errors}).items()}


def named_pairs(source: Path, text: str, task: str) -> list[tuple[Path, str]]:
    """(image file, text) of each row of a table, or of each file of a folder with one text."""
    if not source.is_dir():
        require(not text, "a table brings its own texts: leave the text out")
        # As for pre-training: the answers are not known yet.
        return [(row.image, row.text) for row in table.rows(source, "pretrain")]
    require(text or task == "cls", "a folder of images needs the question, too")
    files = sorted(path for path in source.iterdir() if path.is_file())
    require(files, f"{source} holds no files: give a folder of images")
    return [(path, text) for path in files]


# ------------------------------------------------------------------------------- search, features

def all_batches(run: LoadedRun, packs: str) -> Iterator[tuple[Samples, LoadedBatch]]:
    """Every sample of the packs, split by split, in batches."""
    # Larger packs are fine: the whole images are resized (min_crop_area 0 allows for it).
    opened = open_packs(packs, run.cfg.image_size, 0.0, run.cfg.task)
    for split in SPLITS:
        if any(len(pack.split[split]) for pack in opened):
            samples = Samples(opened, split, run.tokenizer, run.cfg, TrainConfig())
            micro_batches = validation_micro_batches(samples, samples.n)
            for loaded in load(samples, micro_batches, 0, run.device):
                yield samples, loaded


@torch.no_grad()
def embed(folder: Path, packs: str, out: str | None, device: torch.device) -> None:
    """Write the features of all samples of packs to a .npz file

    image, text (n, D): class tokens of the encoders; pair (n, 2D): the pooled pair, which the heads
    read; source, caption, split (n,): texts."""
    path = Path(out or folder / "features.npz")
    require(not path.exists(), f"{path} exists already: choose another --out")
    run = load_run(folder, device)
    columns: dict[str, list] = {}
    for samples, loaded in all_batches(run, packs):
        batch, lines = loaded.batch, [samples.line(n) for n in loaded.indices]
        text = run.model.encode_text(batch["text_ids"], batch["text_mask"])   # (B, T, D)
        image = run.model.encode_image(batch["image"])                        # (B, 1+L, D)
        pair = run.model.pooled_pair(text, image, batch["text_mask"])         # (B, 2D)
        for name, tensor in (("image", image[:, 0]), ("text", text[:, 0]), ("pair", pair)):
            columns.setdefault(name, []).append(tensor.float().cpu().numpy())
        for name, key in (("source", "source"), ("caption", "text"), ("split", "split")):
            columns.setdefault(name, []).append(np.array([line[key] for line in lines]))
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    print(f"{len(arrays['source']):,} samples: {path}")


@torch.no_grad()
def search(folder: Path, query: str, packs: str, out: str | None, device: torch.device) -> None:
    """Draw the best images for words, or the best texts for an image file, with their scores.

    ITC ranks all samples; the matching head ranks the best again."""
    run, path = load_run(folder, device), Path(out or folder / "plots" / "search.png")
    require("itc" in run.model.objectives,
            f"{folder} has no ITC head, which a search needs: pre-train with --itc 1")
    require(path.suffix == ".png", f"--out {path}: name a file that ends in .png")
    by_image, itc = query.lower().endswith(IMAGE_SUFFIXES), run.model.objectives["itc"]
    require(not by_image or Path(query).is_file(),
            f"there is no file {query}: give an image file, or words")
    if by_image:
        asked = run.model.encode_image(read_images([query], run))             # (1, 1+L, D)
        feature = itc.image_features(asked)                                   # (1, D)
    else:
        ids, mask, num_truncated = read_texts([query], run.tokenizer, run.cfg.max_text_len)
        ids, mask = ids.to(run.device), mask.to(run.device)
        if num_truncated:
            print(f"the query has more than {run.cfg.max_text_len} tokens: the rest is not read")
        asked = run.model.encode_text(ids, mask)                              # (1, T, D)
        query_batch = {"text_ids": ids, "text_mask": mask}
        feature = itc.text_features(asked, query_batch)                       # (1, D)

    # The best by ITC, each image or each text once; of those the encodings are kept.
    best: dict = {}
    for samples, loaded in all_batches(run, packs):
        batch = loaded.batch
        if by_image:
            encoded = run.model.encode_text(batch["text_ids"], batch["text_mask"])  # (B, T, D)
            scores = itc.scores(itc.text_features(encoded, batch), feature)[:, 0]    # (B,)
        else:
            encoded = run.model.encode_image(batch["image"])                  # (B, 1+L, D)
            scores = itc.scores(feature, itc.image_features(encoded))[0]      # (B,)
        for i, n in enumerate(loaded.indices):
            line = samples.line(n)
            key = line["text"] if by_image else (samples.location[n][0], line["image"])
            best.setdefault(key, (scores[i].item(), line, batch["image"][i].cpu(), encoded[i],
                                  batch["text_mask"][i]))
        best = dict(sorted(best.items(), key=lambda item: -item[1][0])[:FOUND])

    found = []
    for score, line, image, encoded, text_mask in best.values():
        text, picture, mask = (encoded[None], asked, text_mask[None]) if by_image else (
            asked, encoded[None], mask)
        found.append((match_score(run.model, text, picture, mask), score, line, image))
    found.sort(key=lambda item: -item[0])         # ties stay in the order of ITC
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_found(query, found, path)
    has_head = {"irtr", "itm"} & set(run.model.objectives.keys())
    order = "in the order of matching (higher is better)" if has_head else "without matching"
    print(f"the {len(found)} best {'texts' if by_image else 'images'} by ITC, {order}:")
    for matching, score, line, _ in found:
        print(f"matching {matching:6.2f}  ITC {score:6.2f}  {line['split']}  {line['source']}  "
              f"{line['text'][:80]}")
    print(f"drawn: {path}")


def match_score(model: M3AE, text: Tensor, image: Tensor, mask: Tensor) -> float:
    """How well a text (1, T, D) and an image (1, 1+L, D) match; 0 without a head that tells."""
    pair = model.pooled_pair(text, image, mask)                               # (1, 2D)
    if "irtr" in model.objectives:
        return model.objectives["irtr"].fc(pair).item()
    if "itm" in model.objectives:
        no, yes = model.objectives["itm"].fc(pair)[0].tolist()
        return yes - no
    return 0.0


def draw_found(query: str, found: list[tuple], path: Path) -> None:
    """A sheet of the results: image, scores, caption; two rows of five."""
    cell, high = 200, 300              # pixels
    font = ImageFont.load_default(12)
    sheet = Image.new("RGB", (5 * cell, 30 + high * -(-len(found) // 5)), plots.BACK)
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 8), textwrap.shorten(query, 120), plots.INK, plots.FONT)
    for i, (matching, score, line, image) in enumerate(found):
        left, top = i % 5 * cell + 8, i // 5 * high + 34
        shown = plots.to_pil(image).resize((cell - 16, cell - 16), Image.Resampling.BICUBIC)
        sheet.paste(shown, (left, top))
        words = textwrap.wrap(line["text"], 32, max_lines=5, placeholder=" …")
        head = f"{i + 1}. matching {matching:.2f}, ITC {score:.2f}"
        draw.text((left, top + cell - 12), "\n".join([head, *words]), plots.INK, font)
    sheet.save(path)
