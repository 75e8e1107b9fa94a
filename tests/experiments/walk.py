"""Walks one batch of phantoms through the model and prints what happens to it: the README's two tables.

    python tests/walk.py                     the preset tiny
    python tests/walk.py --preset base       the paper's model: shapes without numbers, so nothing is computed

Nothing is done over again to be shown: hooks write down what the model itself does, in its own order."""
import argparse
import math
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import m3ae_mini                       # before torch: it says how threads wait for each other
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data import phantoms, prepare
from data.pack import Pack
from m3ae_mini import M3AE, ModelConfig
from m3ae_mini.config import PRESETS, TrainConfig
from m3ae_mini.loader import Samples, load
from m3ae_mini.tokenizer import Tokenizer

ROWS = 32                              # of the batch: one chunk, as train.py makes it
MEANING = {
    "image": "normalised pixels",
    "text_ids": "the caption's tokens: start, words, end, padding",
    "text_mask": "1 where a token is real, 0 where it is padding",
    "mlm_ids": "the same tokens, 15 % of them hidden",
    "mlm_labels": "the true token where one is hidden, else -100",
    "mlm_positions": "places of the hidden tokens in the flattened batch, filled up to a multiple of B",
    "mim_noise": "a number for each patch: those with the highest are hidden",
    "itm_index": "which row's image each text goes with in matching",
    "random_negative_index": "validation: a row with another image and another text",
    "hard_negative_index": "validation: such a row of the same kind of image"}
LETTERS = "B rows, S pixels a side, T tokens, L patches, K of them kept, M hidden tokens and filler"


@cache
def usual_tokenizer():
    """That of the default pre-training."""
    rows = phantoms.rows(None, "pretrain", {"train": phantoms.COUNTS["train"]})
    return Tokenizer.train((row.text for row in rows), PRESETS["tiny"]["tokenizer_vocab"])


def batch_of_phantoms(preset):
    """-> (ModelConfig, the first chunk of phantoms in the size of this preset: a dict of tensors)"""
    cfg, settings, tokenizer = ModelConfig.preset(preset), TrainConfig(), usual_tokenizer()
    if preset != "base":                                   # which keeps the size of RoBERTa's vocabulary
        cfg.vocab_size = tokenizer.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        rows = phantoms.rows(None, "pretrain", {"train": ROWS})
        prepare.pack(rows, f"{folder}/pack", "phantoms", "pretrain", cfg.image_size, workers=1)
        samples = Samples([Pack(f"{folder}/pack")], "train", tokenizer, cfg, settings)
        (_, _, _, batch), = load(samples, [(0, 0, np.arange(ROWS))], settings.seed, "cpu")
    return cfg, batch


def stages(model):
    """[(name, module)] of what is shown as one stage: an encoder whole, the rest layer by layer."""
    names = "vit", "image_proj", "text", "text_proj", "text_pooler", "image_pooler"
    found = [(name, getattr(model, name)) for name in names]
    for owner, module in ("fusion", model.fusion), *model.objectives.items():
        for name, part in module.named_children():
            if isinstance(part, torch.nn.ModuleList):
                found += [(f"{owner}.{name}[{i}]", layer) for i, layer in enumerate(part)]
            elif not isinstance(part, torch.nn.LayerNorm):             # no operations that are counted
                found += [(f"{owner}.{name}", part)]
    return found


def walk(model, batch):
    """Run model(batch) -> (a dict for each stage in the order in which it ran, the model's outputs). A stage
    is "for" one objective, or for all; its parameters are 0 where it has run before; operations are those of
    the forward pass, multiplication and addition counted apart."""
    found, met, purpose, hooks = [], set(), ["all"], []
    counter = FlopCounterMode(display=False)

    def shapes(tensors):               # masks of bools left out
        return ", ".join(str(tuple(t.shape)) for t in tensors if torch.is_tensor(t) and t.dtype != torch.bool)

    def enter(start, module, args):
        start.append(counter.get_total_flops())

    def leave(name, start, module, args, output):
        parameters = 0 if module in met else sum(p.numel() for p in module.parameters())
        met.add(module)
        found.append({"for": purpose[-1], "stage": name, "reads": shapes(args), "makes": shapes([output]),
                      "parameters": parameters, "operations": counter.get_total_flops() - start.pop()})

    for name, module in stages(model):
        start = []
        hooks += [module.register_forward_pre_hook(partial(enter, start)),
                  module.register_forward_hook(partial(leave, name, start))]
    for name, module in model.objectives.items():
        hooks += [module.register_forward_pre_hook(lambda *_, name=name: purpose.append(name)),
                  module.register_forward_hook(lambda *_: purpose.pop() and None)]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:       # the fused kernel is not counted
        out = model(batch)
    for hook in hooks:
        hook.remove()
    return found, out


def tables(preset):
    """-> the batch and the walk, each as lines of a Markdown table; the model's config and its outputs."""
    cfg, batch = batch_of_phantoms(preset)
    torch.manual_seed(0)
    with torch.device("meta" if preset == "base" else "cpu"):
        model = M3AE(cfg)
    device = model.modality.device
    model.to(device).eval()            # also the decoder's positions, which numpy makes on the CPU
    found, out = walk(model, {name: batch[name].to(device) for name in MEANING})

    first = ["| tensor | shape | what it is |", "|---|---|---|"]
    first += [f"| `{name}` | {tuple(batch[name].shape)} | {meaning} |" for name, meaning in MEANING.items()]
    total = sum(p.numel() for p in model.parameters())
    operations = sum(row["operations"] for row in found)
    second = ["| for | stage | reads | makes | parameters | Mflop | share |", "|---|---|---|---|--:|--:|--:|"]
    for row in found:
        new = f"{row['parameters']:,}" if row["parameters"] else "as above"
        second.append(f"| {row['for']} | `{row['stage']}` | {row['reads']} | {row['makes']} | {new} | "
                      f"{row['operations'] / 1e6:,.1f} | {row['operations'] / operations:.1%} |")
    rest = total - sum(row["parameters"] for row in found)
    second += [f"| all | modality embedding, mask token, norms of heads | | | {rest:,} | | |",
               f"| | all | | | {total:,} | {operations / 1e6:,.1f} | 100.0% |"]
    return first, second, cfg, out


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("tiny", "base"), default="tiny")
    first, second, cfg, out = tables(parser.parse_args().preset)
    print("\n".join(["", f"{LETTERS}.", "", *first, "", *second, ""]))
    if not out["loss"].is_meta:
        print("Losses before any step: " + ", ".join(f"{name} {out[f'{name}_loss']:.3f}" for name in
                                                     ("mlm", "mim", "itm")))
        print(f"Guessing among {cfg.vocab_size} tokens: {math.log(cfg.vocab_size):.3f}; predicting zeros for "
              f"normalised patches: about 1; guessing between two: {math.log(2):.3f}")


if __name__ == "__main__":
    main()
