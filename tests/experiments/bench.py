"""Measures speed and memory, each way beside a plain one.

    python tests/experiments/bench.py step --preset base        a training step, part by part
    python tests/experiments/bench.py loader                    images a second and core
    python tests/experiments/bench.py retrieval                 seconds per (image, text) pair
    python tests/experiments/bench.py scaling                   packs of a million; processes
    python tests/experiments/bench.py launches --preset base    kernels of a micro-batch on a GPU

Before a clock starts, both ways are shown to compute the same. Ways take turns, so that other
programs slow all of them; a first run is not counted. Each way of a training step runs in a fresh
process, since the peak memory of a process never falls.
"""
import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import m3ae_mini                       # before torch: it sets how threads wait
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from data import phantoms
from data.images import square
from data.pack import PACK_VERSION, SAMPLE_DTYPE, Pack
from data.prepare import positive
from data.write_pack import write_pack
from m3ae_mini import M3AE, ModelConfig, model as model_module, ops
from m3ae_mini.config import TrainConfig, UserError, require
from m3ae_mini.distributed import keep_freed_memory, run
from m3ae_mini.loader import Samples, load, normalise, training_micro_batches
from m3ae_mini.model import compile_layers, use_grad_checkpointing
from m3ae_mini.ops import split_heads

Args = argparse.Namespace
VOCAB_SIZE = {"base": 50265, "small": 8192, "tiny": 1024}   # RoBERTa's; of tokenizers of the data
TOLERANCE = 1e-4                       # of losses and scores of both ways, in float32


# -------------------------------------------------------------------------- the plain training step

def plain_losses(model: M3AE, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The release's step with this model's weights -> {name: loss}, `loss` their sum.

    Three full passes, both streams through all fusion layers in each, vocabulary logits at every
    position; attention, dropout and QuickGELU as they are defined."""
    mlm, mim, itm = (model.objectives[name] for name in ("mlm", "mim", "itm"))
    image, ids, mask = batch["image"], batch["text_ids"], batch["text_mask"]

    with mock.patch.multiple(model_module, attention=plain_attention, drop=F.dropout,
                             quick_gelu=lambda x: x * torch.sigmoid(1.702 * x)):
        # MLM: masked text, whole image.
        text = model.encode_text(batch["mlm_ids"], mask)                      # (B, T, D)
        text, _ = all_layers(model, text, model.encode_image(image), mask)
        logits = mlm.decoder(mlm.norm(F.gelu(mlm.dense(text)))).float()       # (B, T, V)
        labels = batch["mlm_labels"].flatten()                                # (B·T,)
        losses = {"mlm_loss": F.cross_entropy(logits.flatten(0, 1), labels)}

        # MIM: whole text, visible patches.
        noise = batch["mim_noise"]                                            # (B, L)
        visible, ids_restore = model.encode_visible(image, noise)             # (B, 1+K, D), (B, L)
        _, images = all_layers(model, model.encode_text(ids, mask), visible, mask)
        pred = mim.decode(images[mim.depth], ids_restore).float()             # (B, L, 3·P²)
        error = (pred - mim.target(image, model.cfg)).square().mean(-1)       # (B, L)
        hidden = ids_restore >= visible.shape[1] - 1                          # (B, L)
        losses["mim_loss"] = (error * hidden).sum() / hidden.sum()

        # ITM: whole text, whole image, all encoded again.
        index = batch["itm_index"]                                            # (B,)
        encoded = model.encode_image(image.index_select(0, index))            # (B, 1+L, D)
        text, images = all_layers(model, model.encode_text(ids, mask), encoded, mask)
        pooled = model.text_pooler(text[:, 0]), model.image_pooler(images[-1][:, 0])  # (B, D) each
        logits = itm.fc(torch.cat(pooled, dim=-1).tanh()).float()             # (B, 2)
        match = (index == torch.arange(len(index), device=index.device)).long()  # (B,)
        losses["itm_loss"] = F.cross_entropy(logits, match)
    return losses | {"loss": sum(losses.values())}


def all_layers(model: M3AE, text: Tensor, image: Tensor,
               text_mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    """All fusion layers -> the text (B, T, D) after the last, and the image stream (B, N, D) before
    the first layer and after each."""
    mask, images = text_mask.bool()[:, None, None], [image]                   # (B, 1, 1, T)
    layers = zip(model.fusion.text_layers, model.fusion.image_layers)
    for text_layer, image_layer in layers:
        text, image = text_layer(text, mask, image, None), image_layer(image, None, text, mask)
        images.append(image)
    return text, images


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None,
                    dropout: float = 0.0) -> Tensor:
    """As ops.attention, with the weights (B, H, Q, N) in memory: q (B, Q, W) over k, v (B, N, W)
    -> (B, Q, W)"""
    q, k, v = (split_heads(x, heads) for x in (q, k, v))                      # (B, H, Q | N, W/H)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5                     # (B, H, Q, N)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (F.dropout(scores.softmax(-1), dropout) @ v).transpose(1, 2).flatten(2)  # (B, Q, W)


WAYS: dict[str, Callable] = {"plain": plain_losses, "fast": lambda model, batch: model(batch)}


def require_equal(name: str, plain: Tensor, fast: Tensor) -> None:
    """UserError where two tensors differ by more than TOLERANCE, or hold NaN."""
    gap = (plain - fast).abs().max().item()
    require(gap <= TOLERANCE, f"{name} of the two ways differ by {gap:.2g}, more than rounding's "
            f"{TOLERANCE:g}: find out why before anything is timed")


# ---------------------------------------------------------------------------------- a training step

PARTS = "image encoder", "text encoder", "fusion"


class TimedStep:
    """A model, a batch, and fused AdamW for both ways. Hooks time the parts of the backbone; on a
    GPU a mark is an event on the device, so nothing waits."""

    def __init__(self, cfg: ModelConfig, args: Args, way: str | None = None):
        torch.manual_seed(0)
        self.args = args
        self.spans: list[list] = []                        # [part, start, end]
        self.model = M3AE(cfg).to(args.device)
        self.batch = noise_batch(cfg, args.batch_size, args)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, betas=(0.9, 0.98),
                                           fused=True)
        if args.compile and way == "fast":
            compile_layers(self.model)
        fusion = self.model.fusion
        modules = [self.model.vit], [self.model.text], [*fusion.text_layers, *fusion.image_layers]
        for part, group in zip(PARTS, modules):
            for module in group:
                module.register_forward_pre_hook(
                    lambda *_, part=part: self.spans.append([part, self.mark()]))
                module.register_forward_hook(lambda *_: self.spans[-1].append(self.mark()))

    def mark(self) -> Any:
        if self.args.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step(self, way: str) -> dict[str, float]:
        """One step -> {part: seconds}. The rest of the forward pass counts as heads."""
        self.spans, marks = [], [self.mark()]
        with autocast(self.args):
            loss = WAYS[way](self.model, self.batch)["loss"]
        marks.append(self.mark())
        loss.backward()
        marks.append(self.mark())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(self.mark())
        clock(self.args)                                   # until the device has reached all marks

        names = "heads", "backward", "optimizer"
        spans = [*self.spans, *zip(names, marks, marks[1:]), ("step", marks[0], marks[-1])]
        seconds = dict.fromkeys((*PARTS, *names, "step"), 0.0)
        for name, start, end in spans:
            on_cpu = self.args.device == "cpu"
            seconds[name] += end - start if on_cpu else start.elapsed_time(end) / 1000
        seconds["heads"] -= sum(seconds[part] for part in PARTS)
        return seconds


def time_steps(name: str, cfg: ModelConfig, args: Args) -> tuple[list[dict[str, float]], int]:
    """For a fresh process -> {part: seconds} of each timed step, and the peak memory in bytes. All
    but "plain" keep freed memory, as train.py does."""
    if name != "plain":
        keep_freed_memory()
    way = name.split("-")[0]
    timed = TimedStep(cfg, args, way)
    if name.endswith("-checkpointing"):
        use_grad_checkpointing(timed.model)

    # A first update: from then on AdamW's moments are in memory.
    for parameter in timed.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    timed.optimizer.step()
    timed.optimizer.zero_grad()
    runs = [timed.step(way) for _ in range(1 + args.repeats)][1:]
    if args.device == "cuda":
        return runs, torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return runs, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compare_losses(cfg: ModelConfig, args: Args) -> None:
    """UserError where the losses of the two ways differ, without dropout, in float32."""
    timed = TimedStep(cfg, args)
    timed.model.eval()
    with torch.no_grad():
        plain, fast = (losses(timed.model, timed.batch) for losses in WAYS.values())
    for name in ("mlm_loss", "mim_loss", "itm_loss"):
        require_equal(name, plain[name], fast[name])


def count_flops(way: str, cfg: ModelConfig, args: Args) -> int:
    """Operations of a step's matrix products, forward and backward, counted on the meta device.
    What --grad_checkpointing computes twice counts once. The counter knows no fused CPU kernel, so
    attention is the plain one, which multiplies as much."""
    batch = noise_batch(cfg, args.batch_size, args)
    batch = {name: tensor.to("meta") for name, tensor in batch.items()}
    counter = FlopCounterMode(display=False)
    with mock.patch.object(model_module, "attention", plain_attention), counter:
        WAYS[way](meta_model(cfg), batch)["loss"].backward()
    return counter.get_total_flops()


def step(args: Args) -> None:
    """A training step in each of the ways.

    plain: memory as torch and glibc give it. plain-kept: freed memory stays with the process, as in
    train.py. fast-checkpointing: with --grad_checkpointing."""
    table, notes = [], []
    cfg = ModelConfig.preset(args.preset, vocab_size=VOCAB_SIZE[args.preset])
    in_fresh_process(compare_losses, cfg, args)
    for dropout in args.attn_dropout:
        cfg.attn_dropout, measured = dropout, {}
        for name in args.ways:
            runs, memory = in_fresh_process(time_steps, name, cfg, args)
            seconds = {part: median(run[part] for run in runs) for part in runs[0]}
            fastest, slowest = (pick(run["step"] for run in runs) for pick in (min, max))
            measured[name] = seconds["step"], memory
            print(f"attn_dropout {dropout}, {name}: {seconds['step']:.4g} s", flush=True)
            table.append({
                "attn_dropout": dropout,
                "way": name,
                "memory GB": memory / 1e9,
                "samples/s": args.batch_size / seconds["step"],
                "TFLOP": count_flops(name.split("-")[0], cfg, args) / 1e12,
                **{f"{part} s": value for part, value in seconds.items()},
                "fastest, slowest": f"{fastest:.4g}, {slowest:.4g}"})
        for name, other in product(args.ways, args.ways):
            if name.startswith("fast") and other.startswith("plain"):
                (fast, fast_memory), (plain, plain_memory) = measured[name], measured[other]
                notes.append(f"attn_dropout {dropout}: {name} is {plain / fast:.2f} times as fast "
                             f"as {other}, with {fast_memory / plain_memory:.2f} of its memory")

    # The speed of a large matrix product: no step can be faster.
    side = 8192 if args.device == "cuda" else 4096
    a, b = (torch.randn(side, side, device=args.device).to(args.dtype) for _ in range(2))
    peak = 2e-12 * side ** 3 / take_turns({"product": lambda: a @ b}, args)["product"]  # TFLOP/s
    for row in table:
        row["% of peak"] = 100 * row["TFLOP"] / row["step s"] / peak
    show(table)
    print(*notes, f"The peak is a product of {side} x {side}: {peak:.3g} TFLOP/s", sep="\n")


# ---------------------------------------------------------------------------------- a pack of noise

def write_noise_pack(folder: Path | str, count: int, cfg: ModelConfig) -> None:
    """A pack of `count` samples of noise, written without decoding or tokenising anything. Every
    second image is grey; texts have a quarter of the longest length to all of it."""
    folder, rng, number = Path(folder), np.random.default_rng(0), np.arange(count)
    area, longest = cfg.image_size ** 2, cfg.max_text_len - 2          # two tokens are special ones

    pixels = rng.bytes(3 * area)
    with open(folder / "images.bin", "wb") as file:
        file.writelines(pixels[:area if i % 2 else 3 * area] for i in range(count))
    np.save(folder / "offsets.npy", np.cumsum([0, *np.where(number % 2, area, 3 * area)]))
    line = json.dumps({"text": "noise"}) + "\n"
    (folder / "samples.jsonl").write_text(line * count)
    samples = np.zeros(count, dtype=SAMPLE_DTYPE)
    samples["image"], samples["line"] = number, len(line) * number
    np.save(folder / "samples.npy", samples)

    files = {file.name: {"bytes": file.stat().st_size, "sha256": ""} for file in folder.iterdir()}
    (folder / "meta.json").write_text(json.dumps({
        "version": PACK_VERSION, "name": "noise", "size": cfg.image_size, "files": files,
        "groups": ["noise"], "samples": {"train": count, "val": 0, "test": 0}}))

    # The cache of tokens (Pack.tokens).
    lengths = rng.integers(longest // 4, longest, size=count, endpoint=True)
    lengths[0] = longest
    total = lengths.sum()
    tokens = 2 * rng.integers(5, cfg.vocab_size, size=total) + (rng.random(total) < 0.7)
    table = np.concatenate([[0], lengths.cumsum(), tokens]).astype(np.uint32)
    cache = Pack(folder).token_file(SimpleNamespace(hash="noise"))
    np.save(cache, np.append(table, np.uint32(zlib.crc32(table))))


def noise_samples(folder: Path | str, cfg: ModelConfig, train_cfg: TrainConfig) -> Samples:
    """The samples of such a pack. In place of a tokenizer: what the loader reads of one."""
    tokenizer = SimpleNamespace(hash="noise", cls_id=0, pad_id=1, sep_id=2, mask_id=4,
                                non_special_ids=np.arange(5, cfg.vocab_size))
    return Samples([Pack(folder)], "train", tokenizer, cfg, train_cfg)


def noise_batch(cfg: ModelConfig, rows: int, args: Args) -> dict[str, Tensor]:
    """A batch of noise made by the loader: padded, truncated and masked as usual."""
    with tempfile.TemporaryDirectory() as folder:
        write_noise_pack(folder, rows, cfg)
        samples = noise_samples(folder, cfg, TrainConfig())
        return next(load(samples, [(0, 0, np.arange(rows))], 0, args.device)).batch


# --------------------------------------------------------------------------------------- the loader

def decode(files: list[str]) -> Tensor:
    """The usual way, from the files each time: paths -> float32 (B, 3, 288, 288), normalised."""
    pixels = [np.array(square(Image.open(file).convert("RGB"), 288)) for file in files]
    return normalise(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))


def loader(args: Args) -> None:
    """Images of 288 pixels from a pack, beside a DataLoader (0 workers) that decodes JPEGs of
    824 x 829, one a sample. (The release opens two a sample.)"""
    torch.set_num_threads(1)                               # torch does nothing here but normalise
    keep_freed_memory()                                    # for all ways
    rows, num_steps = args.batch_size, args.images // args.batch_size
    require(num_steps, f"--images {args.images} do not fill a batch: use at least --batch_size, "
            f"{rows}")
    cfg, table = ModelConfig(image_size=288), []
    train_cfg = TrainConfig(steps=num_steps, batch_size=rows, micro_batch=rows)
    with tempfile.TemporaryDirectory() as folder:
        write_noise_pack(folder, args.images, cfg)
        samples = noise_samples(folder, cfg, train_cfg)
        files = write_jpegs(folder, args.images)
        data_loader = torch.utils.data.DataLoader(files, rows, shuffle=True, drop_last=True,
                                                  collate_fn=decode)

        def from_pack():
            return load(samples, training_micro_batches(samples, train_cfg, 0), 0, args.device)

        def not_normalised():                              # the CPU's part where a GPU normalises
            with mock.patch("m3ae_mini.loader.normalise", lambda image: image):
                yield from from_pack()

        ways = {"DataLoader, Pillow": lambda: (images.to(args.device) for images in data_loader),
                "m3ae_mini.loader.load": from_pack,
                "the same, not normalised": not_normalised}
        for way, batches in ways.items():
            before = resident()[0]
            runs = [time_epoch(batches(), args) for _ in range(1 + args.repeats)]
            core, wall, first_batch = map(median, zip(*runs[1:]))
            table.append({"way": way, "images/s and core": num_steps * rows / core,
                          "images/s": num_steps * rows / wall, "first batch s": first_batch,
                          "resident MB at the start": before,
                          f"after {len(runs)} epochs": resident()[0]})
    show(table)
    print("A core's second is CPU time of all threads. All files are in the page cache. Only "
          "load makes texts and masks.")


def write_jpegs(folder: str, count: int) -> list[str]:
    """JPEGs of 824 x 829 pixels, smooth noise, every second one grey -> their paths."""
    rng, files = np.random.default_rng(0), [f"{folder}/{i}.jpg" for i in range(count)]
    for i, file in enumerate(files):
        coarse = rng.integers(256, size=(96, 96) if i % 2 else (96, 96, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((824, 829), Image.Resampling.BICUBIC)
        image.save(file, quality=90)
    return files


def time_epoch(batches: Iterable, args: Args) -> tuple[float, float, float]:
    """Seconds of all cores, of the clock, and until the first batch."""
    start, core_start, first = clock(args), time.process_time(), 0.0
    for _ in batches:
        first = first or clock(args) - start
    return time.process_time() - core_start, clock(args) - start, first


# ---------------------------------------------------------------------------------------- retrieval

@torch.no_grad()
def retrieval(args: Args) -> None:
    """Scores of all pairs of n images and n texts, an image with a block of texts at a time: each
    image and text encoded once, or again for every pair."""
    cfg = ModelConfig.preset(args.preset, vocab_size=VOCAB_SIZE[args.preset], task="irtr")
    n = math.isqrt(args.pairs)
    torch.manual_seed(0)
    model, batch = M3AE(cfg).to(args.device).eval(), noise_batch(cfg, n, args)
    names = "text_ids", "text_mask", "image"
    ids, masks, images = (batch[name].split(args.batch_size) for name in names)

    def scores(pairs):
        """pairs: text (B, T, D), image (1 | B, 1+L, D), mask (B, T) each -> (n²,)"""
        features = [model.pooled_pair(text, image, mask) for text, image, mask in pairs]
        return model.objectives["irtr"].fc(torch.cat(features)).float()[:, 0]

    def once():
        texts = [model.encode_text(*block) for block in zip(ids, masks)]
        encoded = [image[None] for block in images for image in model.encode_image(block)]
        return scores((text, image, mask)
                      for image in encoded for text, mask in zip(texts, masks))

    def for_every_pair():
        return scores((model.encode_text(block, mask),
                       model.encode_image(image.expand(len(block), -1, -1, -1)), mask)
                      for image in batch["image"] for block, mask in zip(ids, masks))

    require_equal("scores", for_every_pair(), once())
    with autocast(args):
        found = take_turns({"for every pair": for_every_pair, "once": once}, args)
    show([{"encoded": way, "pairs": n * n, "s per pair": seconds / n ** 2,
           "times as fast": found["for every pair"] / seconds} for way, seconds in found.items()])


# ------------------------------------------------------------------------------------------ scaling

def scaling(args: Args) -> None:
    """Cost and memory of the loader by the pack's size; the speed of two processes."""
    cfg, table = ModelConfig.preset("tiny", image_size=24, vocab_size=1024), []
    for count in (1_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            write_noise_pack(folder, count, cfg)
            table.append({"samples": count} | in_fresh_process(cost_of_pack, folder, cfg))
    show(table)

    with tempfile.TemporaryDirectory() as folder:
        rows = phantoms.rows(None, "pretrain", {"train": 512, "val": 32})
        image_size = ModelConfig.preset("tiny").image_size
        write_pack(rows, f"{folder}/pack", "phantoms", "pretrain", image_size)
        show([{"processes": processes, "threads each": threads,
               "samples/s": training_speed(folder, processes, threads, args.steps)}
              for processes, threads in ((1, 1), (1, 2), (2, 1))])


def cost_of_pack(folder: str, cfg: ModelConfig) -> dict[str, Any]:
    """What 300 micro-batches of 32 from a pack cost a fresh process."""
    torch.set_num_threads(1)
    train_cfg = TrainConfig(steps=300, batch_size=32, micro_batch=32)
    marks, before = [time.perf_counter()], resident()
    samples = noise_samples(folder, cfg, train_cfg)
    for _ in load(samples, training_micro_batches(samples, train_cfg, 0), 0, "cpu"):
        marks.append(time.perf_counter())
    after = resident()
    return {"opening and first micro-batch, s": marks[1] - marks[0],
            "µs a sample": 1e6 * (marks[-1] - marks[1]) / (32 * (len(marks) - 2)),
            "resident MB before": before[0], "after": after[0],
            "of these mapped pages of files": f"{before[1]:.0f}, {after[1]:.0f}"}


def training_speed(folder: str, processes: int, threads: int, steps: int) -> float:
    """Samples a second of train.py with the preset tiny: the median of its log without the first
    line."""
    out, gpus = f"{folder}/{processes}x{threads}", processes if processes > 1 else 0
    flags = (f"--data {folder}/pack --out {out} --gpus {gpus} --device cpu --steps {steps} "
             f"--eval_samples 32 --log_every {max(1, steps // 5)} --test_samples 0")
    done = subprocess.run([sys.executable, "train.py", *flags.split()], cwd=ROOT,
                          capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    last_line = done.stderr.strip().rpartition("\n")[2]
    require(not done.returncode, f"train.py {flags} ended with: {last_line}")
    lines = [json.loads(line) for line in open(f"{out}/metrics.jsonl")]
    speeds = [line["samples_per_s"] for line in lines if line["split"] == "train"]
    return median(speeds[1:] or speeds)


# ------------------------------------------------------------------------------------ GPU launches

# Calls that launch no kernel: they make or rename memory, or ask for a property.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach",
             "device", "lift_fresh", "scalar_tensor", "_unsafe_view", "is_same_size"}


class KernelCounter(TorchDispatchMode):
    """Counts the calls below autograd that are no views: about one kernel each."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.count += not is_view and func._schema.name.split("::")[1] not in NO_KERNEL
        return func(*args, **(kwargs or {}))


def gpu_dropout(x: Tensor, share: float, training: bool = True) -> Tensor:
    """One kernel, as on a GPU."""
    return torch.native_dropout(x, share, True)[0] if share and training else x


def count_kernels(way: str, cfg: ModelConfig, batch: dict[str, Tensor]) -> tuple[int, int]:
    """The kernels of a forward and of a backward pass in bfloat16, on fake tensors.

    Fake tensors have shapes and no numbers. They are CPU tensors whose dropout and attention are
    one call each, as on a GPU. Left out: the optimizer, and what a library call launches besides
    its kernel."""
    fused = F.scaled_dot_product_attention
    with FakeTensorMode() as mode, mock.patch.multiple(model_module, drop=gpu_dropout), \
            mock.patch.multiple(ops, drop=gpu_dropout, fused_is_faster=lambda q, dropout: True), \
            mock.patch.multiple(F, dropout=gpu_dropout, scaled_dot_product_attention=lambda
                                q, k, v, mask=None, dropout=0.0: fused(q, k, v, mask)):
        model = M3AE(cfg)
        fake = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
        with KernelCounter() as forward, torch.autocast("cpu", torch.bfloat16):
            loss = WAYS[way](model, fake)["loss"]
        with KernelCounter() as backward:
            loss.backward()
    return forward.count, backward.count


def launches(args: Args) -> None:
    """How many kernels a GPU is asked for in one micro-batch of pre-training, plain and fast."""
    cfg = ModelConfig.preset(args.preset, vocab_size=VOCAB_SIZE[args.preset])
    batch = noise_batch(cfg, args.batch_size, args)
    rows = []
    for way in WAYS:
        forward, backward = count_kernels(way, cfg, batch)
        rows.append({"way": way, "forward": forward, "backward": backward,
                     "kernels": forward + backward})
    show(rows)


# ----------------------------------------------------------------------------------- what all share

def autocast(args: Args) -> torch.autocast:
    return torch.autocast(args.device, args.dtype, enabled=args.dtype != torch.float32)


def meta_model(cfg: ModelConfig) -> M3AE:
    """A model of shapes without numbers."""
    with torch.device("meta"):
        return M3AE(cfg).to("meta")


def in_fresh_process(function: Callable, *args) -> Any:
    """function(*args) in a new process. On Linux a child's peak memory starts at its parent's size:
    call this while this process is small."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    except BrokenProcessPool:
        raise UserError("a process was killed, perhaps for memory: use a smaller "
                        "--batch_size") from None


def clock(args: Args) -> float:
    """Seconds, once the GPU has done all its work."""
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(ways: dict[str, Callable], args: Args) -> dict[str, float]:
    """{name: function} -> {name: median seconds of a call}; a first round is not counted."""
    runs: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + args.repeats):
        for name, call in ways.items():
            start = clock(args)
            call()
            runs[name].append(clock(args) - start)
    return {name: median(seconds[1:]) for name, seconds in runs.items()}


def resident() -> list[float]:
    """MB that this process holds on Linux, and how many of them are mapped pages of files, which
    the system can take back."""
    pages = Path("/proc/self/statm").read_text().split()[1:3]
    return [1e-6 * os.sysconf("SC_PAGE_SIZE") * int(count) for count in pages]


def show(rows: list[dict]) -> None:
    """Print dicts with the same keys as a Markdown table."""
    print()
    for line in rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows):
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in line]
        print(f"| {' | '.join(cells)} |")
    print()


def main():
    benches = {bench.__name__: bench for bench in (step, loader, retrieval, scaling, launches)}
    ways = ("plain", "plain-kept", "fast", "fast-checkpointing")
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=benches)
    add("--preset", choices=VOCAB_SIZE, default="small",
        help="step, retrieval, launches: which model [small]")
    add("--batch_size", type=positive, default=8,
        help="rows of a batch; retrieval: texts of a block [8]")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="float32", choices=("float32", "bfloat16"),
        help="of matrix products [float32]")
    add("--attn_dropout", type=float, nargs="+", default=(0.1, 0.0),
        help="step: each in turn [0.1 0]")
    add("--ways", nargs="+", choices=ways, default=ways, help="step: which of them [all]")
    add("--compile", action="store_true", help="step: compile the fast way")
    add("--repeats", type=positive, default=5, help="timed runs; the median is shown [5]")
    add("--images", type=positive, default=2000, help="loader: how many are drawn [2000]")
    add("--pairs", type=positive, default=1024, help="retrieval: rounded down to a square [1024]")
    add("--steps", type=positive, default=30, help="scaling: steps of each training [30]")
    args = parser.parse_args()

    has_gpu = torch.cuda.is_available()
    require(has_gpu or args.device != "cuda", "--device cuda: there is no GPU; use --device cpu")
    if args.device == "auto":
        args.device = "cuda" if has_gpu else "cpu"
    if args.device == "cuda":
        device_name = torch.cuda.get_device_name()
    else:
        device_name = f"{torch.get_num_threads()} CPU threads"
    print(f"{' '.join(sys.argv[1:])}: {device_name}, {args.dtype}, torch {torch.__version__}")
    args.dtype = getattr(torch, args.dtype)
    benches[args.what](args)


if __name__ == "__main__":
    run(main)
