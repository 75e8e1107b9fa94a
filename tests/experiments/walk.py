"""Sends one batch of phantoms through the model: two tables of tests/README.md.

    python tests/experiments/walk.py                     the preset tiny
    python tests/experiments/walk.py --preset base       the paper's model, by shapes alone

Hooks record what the model does in a normal forward pass, in the order in which it does it.
"""
import argparse
import math
import sys
import tempfile
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import m3ae_mini                       # before torch: it sets how threads wait
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data import phantoms
from data.pack import Pack
from data.write_pack import write_pack
from m3ae_mini import M3AE, ModelConfig
from m3ae_mini.config import PRESETS, TrainConfig
from m3ae_mini.loader import Samples, load
from m3ae_mini.tokenizer import Tokenizer

ROWS = 32                              # of the batch: a micro-batch of train.py
MEANING = {
    "image": "normalised pixels",
    "text_ids": "the caption's tokens: start, words, end, padding",
    "text_mask": "1 for a real token, 0 for padding",
    "mlm_ids": "the same tokens, 15 % of them masked",
    "mlm_labels": "the true token where one is masked, else -100",
    "mlm_positions": "positions of the masked tokens in the flattened batch, padded to a multiple "
                     "of B",
    "mim_noise": "a random number for each patch: those with the highest are hidden",
    "itm_index": "image-text matching: the row whose image each text gets",
    "random_negative_index": "validation: a row with another image and another text",
    "hard_negative_index": "validation: such a row of the same group"}
LETTERS = ("B rows, S pixels a side, T tokens, L patches, K of them visible, M masked tokens with "
           "padding")


# ------------------------------------------------------------------------------------------ a batch

@cache
def default_tokenizer() -> Tokenizer:
    """The tokenizer of the default pre-training."""
    rows = phantoms.rows(None, "pretrain", {"train": phantoms.COUNTS["train"]})
    return Tokenizer.train((row.text for row in rows), PRESETS["tiny"]["tokenizer_vocab"])


def phantom_batch(preset: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The preset's settings, and a batch of the first 32 phantoms in its size."""
    cfg, train_cfg, tokenizer = ModelConfig.preset(preset), TrainConfig(), default_tokenizer()
    if preset != "base":                                   # base keeps RoBERTa's vocabulary
        cfg.vocab_size = tokenizer.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        rows = phantoms.rows(None, "pretrain", {"train": ROWS})
        write_pack(rows, f"{folder}/pack", "phantoms", "pretrain", cfg.image_size, workers=1)
        samples = Samples([Pack(f"{folder}/pack")], "train", tokenizer, cfg, train_cfg)
        loaded = next(load(samples, [(0, 0, np.arange(ROWS))], train_cfg.seed, "cpu"))
    return cfg, loaded.batch


# ----------------------------------------------------------------------------------------- the walk

def stages(model: M3AE) -> list[tuple[str, nn.Module]]:
    """What is shown as one stage: an encoder as a whole, the rest layer by layer."""
    names = ("vit", "image_proj", "text", "text_proj", "text_pooler", "image_pooler")
    found = [(name, getattr(model, name)) for name in names]
    for owner, module in ("fusion", model.fusion), *model.objectives.items():
        for name, part in module.named_children():
            if isinstance(part, nn.ModuleList):
                found += [(f"{owner}.{name}[{i}]", layer) for i, layer in enumerate(part)]
            elif not isinstance(part, nn.LayerNorm):       # it has no operations that are counted
                found.append((f"{owner}.{name}", part))
    return found


def shapes(tensors: Iterable) -> str:
    """The shapes of the tensors; boolean masks are left out."""
    shown = [x for x in tensors if torch.is_tensor(x) and x.dtype != torch.bool]
    return ", ".join(str(tuple(x.shape)) for x in shown)


@torch.no_grad()
def walk(model: M3AE, batch: dict[str, Tensor]) -> tuple[list[dict], dict[str, Tensor]]:
    """Run model(batch) -> a dict for each stage, in the order in which they ran; the outputs.

    A stage runs "for" one objective, or for all. Its parameters are 0 where it has run before. Its
    operations are those of the forward pass; multiplication and addition count separately."""
    found, seen, objective, hooks = [], set(), ["all"], []
    counter = FlopCounterMode(display=False)

    def enter(starts, module, args):
        starts.append(counter.get_total_flops())

    def leave(name, starts, module, args, output):
        parameters = 0 if module in seen else sum(p.numel() for p in module.parameters())
        seen.add(module)
        found.append({
            "for": objective[-1],
            "stage": name,
            "inputs": shapes(args),
            "outputs": shapes([output]),
            "parameters": parameters,
            "operations": counter.get_total_flops() - starts.pop()})

    # Hooks of the stages, and hooks that tell which objective they run for.
    for name, module in stages(model):
        starts = []
        hooks += [module.register_forward_pre_hook(partial(enter, starts)),
                  module.register_forward_hook(partial(leave, name, starts))]
    for name, module in model.objectives.items():
        hooks += [module.register_forward_pre_hook(lambda *_, name=name: objective.append(name)),
                  module.register_forward_hook(lambda *_: objective.pop() and None)]

    with sdpa_kernel(SDPBackend.MATH), counter:            # the counter knows no fused CPU kernel
        out = model(batch)
    for hook in hooks:
        hook.remove()
    return found, out


def tables(preset: str) -> tuple[list[str], list[str], ModelConfig, dict[str, Tensor]]:
    """The batch and the walk, each as the lines of a Markdown table; the settings; the outputs."""
    cfg, batch = phantom_batch(preset)
    torch.manual_seed(0)
    with torch.device("meta" if preset == "base" else "cpu"):
        model = M3AE(cfg)
    device = model.modality.device
    model.to(device).eval()            # also the decoder's positions, which numpy makes on the CPU
    found, out = walk(model, {name: batch[name].to(device) for name in MEANING})

    batch_table = ["| tensor | shape | what it is |", "|---|---|---|"]
    batch_table += [f"| `{name}` | {tuple(batch[name].shape)} | {meaning} |"
                    for name, meaning in MEANING.items()]

    parameters = sum(p.numel() for p in model.parameters())
    operations = sum(row["operations"] for row in found)
    stage_table = ["| for | stage | inputs | outputs | parameters | Mflop | share |",
                   "|---|---|---|---|--:|--:|--:|"]
    for row in found:
        new = f"{row['parameters']:,}" if row["parameters"] else "as above"
        stage_table.append(
            f"| {row['for']} | `{row['stage']}` | {row['inputs']} | {row['outputs']} | {new} | "
            f"{row['operations'] / 1e6:,.1f} | {row['operations'] / operations:.1%} |")
    rest = parameters - sum(row["parameters"] for row in found)
    stage_table += [f"| all | modality embedding, mask token, norms of heads | | | {rest:,} | | |",
                    f"| | all | | | {parameters:,} | {operations / 1e6:,.1f} | 100.0% |"]
    return batch_table, stage_table, cfg, out


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("tiny", "base"), default="tiny")
    batch_table, stage_table, cfg, out = tables(parser.parse_args().preset)
    print("\n".join(["", f"{LETTERS}.", "", *batch_table, "", *stage_table, ""]))
    if not out["loss"].is_meta:
        losses = [f"{name} {out[f'{name}_loss']:.3f}" for name in ("mlm", "mim", "itm")]
        print(f"Losses before the first step: {', '.join(losses)}")
        print(f"Trivial baselines: one of {cfg.vocab_size} tokens at random "
              f"{math.log(cfg.vocab_size):.3f}; zeros for normalised patches about 1; a match or "
              f"not at random {math.log(2):.3f}")


if __name__ == "__main__":
    main()
