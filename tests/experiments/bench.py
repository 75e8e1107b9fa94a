"""Measures what the project claims of its speed and memory, each way beside the plain one.

    python tests/bench.py step --preset base --batch_size 8         a training step, part by part
    python tests/bench.py loader                                    images a second and core
    python tests/bench.py retrieval --preset small --pairs 1024     seconds per (image, text) pair
    python tests/bench.py scaling                                   packs up to a million samples; processes

Four habits make such numbers worth something. Both ways are shown to compute the same before a clock starts.
They take turns where both fit in memory, so that a busy neighbour slows both. A first run is not counted: it
pays for what kernels do once. A training step runs in a fresh process for each way: the peak of a process
never falls again, and memory that a process once had it may keep."""
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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import m3ae_mini                       # before torch: it says how threads wait for each other
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from data import pack, phantoms, prepare
from m3ae_mini import M3AE, ModelConfig, loop, model as trunk
from m3ae_mini.config import TrainConfig, UserError
from m3ae_mini.loader import Samples, load, normalise, training_micro_batches

VOCAB = {"base": 50265, "small": 8192, "tiny": 1024}   # RoBERTa's; of tokenizers trained on the data
AGREE = 1e-4                           # losses and scores of both ways may differ by so much in float32
BARS = {torch.float32: (1.7, 0.6), torch.bfloat16: (1.8, 0.6)}     # base, batch 8: speed-up, share of memory


# ------------------------------------------------------------------------------------------- a training step

def plain_losses(model, batch):
    """The release's step with this model's weights: three full passes, both streams through all fusion layers
    in each, vocabulary logits at every position; attention, dropout and QuickGELU written down as they are
    defined. -> {name: loss}; one backward pass goes through all three from `loss`, their sum."""
    mlm, mim, itm = (model.objectives[name] for name in ("mlm", "mim", "itm"))
    whole, ids, mask = batch["image"], batch["text_ids"], batch["text_mask"]

    with mock.patch.multiple(trunk, attend=plain_attention, drop=F.dropout,
                             quick_gelu=lambda x: x * torch.sigmoid(1.702 * x)):
        # MLM: masked text, whole image.
        text = model.encode_text(batch["mlm_ids"], mask)                               # (B, T, D)
        text, _ = all_layers(model, text, model.encode_image(whole), mask)
        logits = mlm.decoder(mlm.norm(F.gelu(mlm.dense(text)))).float()                # (B, T, V)
        losses = {"mlm_loss": F.cross_entropy(logits.flatten(0, 1), batch["mlm_labels"].flatten())}

        # MIM: whole text, masked image.
        kept, restore = model.encode_image(whole, batch["mim_noise"])                  # (B, 1+K, D), (B, L)
        _, images = all_layers(model, model.encode_text(ids, mask), kept, mask)
        pred = mim.decode(images[mim.depth], restore).float()                          # (B, L, 3·P²)
        error = (pred - mim.target(whole, model.cfg)).square().mean(-1)                # (B, L)
        hidden = restore >= kept.shape[1] - 1                                          # (B, L)
        losses["mim_loss"] = (error * hidden).sum() / hidden.sum()

        # ITM: whole text, whole image; half of the images are wrong ones, and all are encoded again.
        index = batch["itm_index"]                                                     # (B,)
        image = model.encode_image(whole.index_select(0, index))                       # (B, 1+L, D)
        text, images = all_layers(model, model.encode_text(ids, mask), image, mask)
        pooled = model.text_pooler(text[:, 0]), model.image_pooler(images[-1][:, 0])   # (B, D) each
        logits = itm.fc(torch.cat(pooled, dim=-1).tanh()).float()                      # (B, 2)
        match = (index == torch.arange(len(index), device=index.device)).long()        # (B,)
        losses["itm_loss"] = F.cross_entropy(logits, match)
    return losses | {"loss": sum(losses.values())}


def all_layers(model, text, image, text_mask):
    """All fusion layers, both streams -> text (B, T, D) after the last, and the image stream (B, N, D) as it
    enters each layer, what leaves the last one at the end."""
    mask, images = text_mask.bool()[:, None, None], [image]                            # (B, 1, 1, T)
    for text_layer, image_layer in zip(model.fusion.text_layers, model.fusion.image_layers):
        text, image = text_layer(text, mask, image, None), image_layer(image, None, text, mask)
        images.append(image)
    return text, images


def plain_attention(q, k, v, heads, mask=None, dropout=0.0):
    """As model.attend: q (B, Q, W) over k, v (B, N, W) -> (B, Q, W), its weights (B, H, Q, N) in memory."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))      # (B, H, Q | N, W/H)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5                            # (B, H, Q, N)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (F.dropout(scores.softmax(-1), dropout) @ v).transpose(1, 2).flatten(2)   # (B, Q, W)


PARTS = "image encoder", "text encoder", "fusion"
WAYS = {"plain": plain_losses, "fast": lambda model, batch: model(batch)}


def agree(what, plain, fast):
    """UserError where two tensors differ by more than AGREE, or hold what is not a number."""
    gap = (plain - fast).abs().max().item()
    if not gap <= AGREE:
        raise UserError(f"{what} of the two ways differ by {gap:.2g}, more than rounding's {AGREE:g}: find "
                        "out why before anything is timed")


class Learner:
    """A model, a batch, and AdamW: the fused one for both ways, so that its gain is in no ratio. Hooks time
    the trunk's modules; on a GPU a mark is an event that the device stamps, so nobody waits for it."""

    def __init__(self, cfg, args, way=None):
        torch.manual_seed(0)
        self.spans = []
        self.args, self.model, self.batch = args, M3AE(cfg).to(args.device), noise(cfg, args.batch_size, args)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, betas=(0.9, 0.98), fused=True)
        fusion, self.net = self.model.fusion, self.model
        if args.compile and way == "fast":             # its parts can't be told apart then
            self.net = torch.compile(self.model)
            return
        for part, modules in zip(PARTS, ([self.model.vit], [self.model.text],
                                         [*fusion.text_layers, *fusion.image_layers])):
            for module in modules:
                module.register_forward_pre_hook(lambda *_, part=part: self.spans.append([part, self.mark()]))
                module.register_forward_hook(lambda *_: self.spans[-1].append(self.mark()))

    def mark(self):
        if self.args.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step(self, way):
        """One step -> {part: seconds}. What of the forward pass has no hook counts as heads: projections,
        poolers, pixel decoder, vocabulary, losses."""
        self.spans, marks = [], [self.mark()]
        for _ in range(self.args.chunks):
            with autocast(self.args):
                losses = WAYS[way](self.net, self.batch)
            marks.append(self.mark())
            (losses["loss"] / self.args.chunks).backward()
            marks.append(self.mark())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(self.mark())
        clock(self.args)                               # until all is stamped

        found = dict.fromkeys((*PARTS, "heads", "backward", "optimizer", "step"), 0.0)
        names = ["heads", "backward"] * self.args.chunks + ["optimizer"]
        for part, begun, ended in (*self.spans, *zip(names, marks, marks[1:]), ("step", marks[0], marks[-1])):
            found[part] += ended - begun if self.args.device == "cpu" else begun.elapsed_time(ended) / 1000
        found["heads"] -= sum(found[part] for part in PARTS)
        return found


def times(name, cfg, args):
    """For a fresh process -> [{part: seconds}, one for each timed step], and bytes at their height: on a CPU
    that is the peak of the process's life. All but "plain" keep freed memory, as train.py does."""
    if name != "plain":
        distributed.keep_freed_memory()
    way = name.split("-")[0]
    learner = Learner(cfg, args, way)
    if name.endswith("-recompute"):
        trunk.recompute(learner.model)
    for parameter in learner.model.parameters():       # AdamW's moments are there in all steps but the first
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    runs = [learner.step(way) for _ in range(1 + args.repeats)][1:]
    if args.device == "cuda":
        return runs, torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return runs, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compare(cfg, args):
    """UserError where the losses of the two ways differ, dropout off, in float32."""
    learner = Learner(cfg, args)
    with torch.no_grad():
        plain, fast = (losses(learner.model.eval(), learner.batch) for losses in WAYS.values())
    for name in ("mlm_loss", "mim_loss", "itm_loss"):
        agree(name, plain[name], fast[name])


def operations(way, cfg, args):
    """Floating-point operations of a step's matrix products, forward and backward, counted on shapes without
    numbers; what --grad_checkpointing does twice counts once. Attention is not fused here, which multiplies as much:
    the counter knows no fused CPU kernel."""
    batch = {name: tensor.to("meta") for name, tensor in noise(cfg, args.batch_size, args).items()}
    with mock.patch.object(trunk, "attend", plain_attention), FlopCounterMode(display=False) as counter:
        WAYS[way](on_meta(cfg), batch)["loss"].backward()
    return counter.get_total_flops()


def step(args):
    """A training step both ways. The plain one has memory as torch and glibc give it; plain-kept has it as
    train.py keeps it on a CPU, and shows what of the gain is memory's. fast-recompute: with --grad_checkpointing."""
    table, notes = [], []
    in_fresh_process(compare, ModelConfig.preset(args.preset, vocab_size=VOCAB[args.preset]), args)
    for share in args.attn_dropout:
        cfg, figures = ModelConfig.preset(args.preset, vocab_size=VOCAB[args.preset], attn_dropout=share), {}
        for name in args.ways:
            runs, memory = in_fresh_process(times, name, cfg, args)
            found = {part: median(run[part] for run in runs) for part in runs[0]}
            fastest, slowest = (pick(run["step"] for run in runs) for pick in (min, max))
            figures[name] = found["step"], fastest, memory
            print(f"attn_dropout {share}, {name}: {found['step']:.4g} s", flush=True)
            table.append({"attn_dropout": share, "way": name, "memory GB": memory / 1e9,
                          "samples/s": args.chunks * args.batch_size / found["step"],
                          "TFLOP": args.chunks * operations(name.split("-")[0], cfg, args) / 1e12,
                          **{f"{part} s": seconds for part, seconds in found.items()},
                          "fastest, slowest": f"{fastest:.4g}, {slowest:.4g}"})
        for name, other in product(args.ways, args.ways):
            if not (name.startswith("fast") and other.startswith("plain")):
                continue
            speed, best, memory = (plain / fast for plain, fast in zip(figures[other], figures[name]))
            held = 1 / memory
            notes.append(f"attn_dropout {share}: {name} is {speed:.2f} times as fast as {other} "
                         f"(the fastest steps alone: {best:.2f}), {held:.2f} of its memory")
            if (args.preset, args.batch_size, args.chunks, other) == ("base", 8, 1, "plain"):
                bars = BARS[args.dtype]
                met = ["met" if good else "MISSED" for good in (speed >= bars[0], held <= bars[1])]
                notes[-1] += f" (bars {bars[0]}, {met[0]}, and {bars[1]}, {met[1]})"

    side = 8192 if args.device == "cuda" else 4096
    a, b = (torch.randn(side, side, device=args.device).to(args.dtype) for _ in range(2))
    peak = 2e-12 * side ** 3 / turns({"product": lambda: a @ b}, args)["product"]      # TFLOP/s
    for row in table:
        row["% of peak"] = 100 * row["TFLOP"] / row["step s"] / peak
    show(table)
    print(*notes, f"The peak is a product of {side} x {side}: {peak:.3g} TFLOP/s", sep="\n")


# ------------------------------------------------------------------------------------------- the loader

def write_pack(folder, count, cfg):
    """A pack of `count` samples of noise, made without decoding or tokenising anything: every second image
    is grey, each text has a length of its own, from a quarter of the longest that fits to all of it."""
    folder, draw, number = Path(folder), np.random.default_rng(0), np.arange(count)
    area, longest = cfg.image_size ** 2, cfg.max_text_len - 2                  # two tokens are special ones
    pixels = draw.bytes(3 * area)
    with open(folder / "images.bin", "wb") as file:
        file.writelines(pixels[:area if i % 2 else 3 * area] for i in range(count))
    np.save(folder / "offsets.npy", np.cumsum([0, *np.where(number % 2, area, 3 * area)]))
    line = json.dumps({"text": "noise"}) + "\n"
    (folder / "samples.jsonl").write_text(line * count)
    samples = np.zeros(count, dtype=pack.SAMPLE_DTYPE)
    samples["image"], samples["line"] = number, len(line) * number
    np.save(folder / "samples.npy", samples)
    files = {file.name: {"bytes": file.stat().st_size, "sha256": ""} for file in folder.iterdir()}
    (folder / "meta.json").write_text(json.dumps({
        "version": pack.PACK_VERSION, "size": cfg.image_size, "files": files, "groups": ["noise"],
        "name": "noise", "samples": {"train": count, "val": 0, "test": 0}}))

    lengths = draw.integers(longest // 4, longest, size=count, endpoint=True)
    lengths[0] = longest
    tokens = 2 * draw.integers(5, cfg.vocab_size, size=lengths.sum()) + (draw.random(lengths.sum()) < 0.7)
    table = np.concatenate([[0], lengths.cumsum(), tokens]).astype(np.uint32)
    tokens = pack.Pack(folder).token_file(SimpleNamespace(hash="noise"))       # see Pack.tokens
    np.save(tokens, np.append(table, np.uint32(zlib.crc32(table))))


def open_pack(folder, cfg, train_cfg):
    """The samples of such a pack; in the place of a tokenizer stands what the loader asks of one."""
    tokenizer = SimpleNamespace(hash="noise", cls_id=0, pad_id=1, sep_id=2, mask_id=4,
                                ordinary=np.arange(5, cfg.vocab_size))
    return Samples([pack.Pack(folder)], "train", tokenizer, cfg, train_cfg)


def noise(cfg, rows, args):
    """A batch by the loader itself: padded, cut and masked as it does."""
    with tempfile.TemporaryDirectory() as folder:
        write_pack(folder, rows, cfg)
        samples = open_pack(folder, cfg, TrainConfig())
        (_, _, _, batch), = load(samples, [(0, 0, np.arange(rows))], 0, args.device)
    return batch


def decode(files):
    """The usual way, all of it each time: paths -> float32 (B, 3, 288, 288), normalised."""
    pixels = [np.array(prepare.square(Image.open(file).convert("RGB"), 288)) for file in files]
    return normalise(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))


def loader(args):
    """Images of 288 pixels from a pack, beside a DataLoader (0 workers) that decodes JPEGs of 824 x 829,
    one a sample: that the release opens two is not counted."""
    torch.set_num_threads(1)                           # normalising is all that torch does here
    distributed.keep_freed_memory()                                 # for both ways
    cfg, rows, draw, table = ModelConfig(image_size=288), args.batch_size, np.random.default_rng(0), []
    train_cfg = TrainConfig(steps=args.images // rows, batch_size=rows, micro_batch=rows)
    if not train_cfg.steps:
        raise UserError(f"--images {args.images} do not fill a batch: use at least --batch_size, {rows}")
    with tempfile.TemporaryDirectory() as folder:
        write_pack(folder, args.images, cfg)
        files = [f"{folder}/{i}.jpg" for i in range(args.images)]
        for i, file in enumerate(files):               # coarse noise, every second image grey
            coarse = draw.integers(256, size=(96, 96) if i % 2 else (96, 96, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((824, 829), Image.Resampling.BICUBIC).save(file, quality=90)
        samples = open_pack(folder, cfg, train_cfg)
        usual = torch.utils.data.DataLoader(files, rows, shuffle=True, drop_last=True, collate_fn=decode)

        def ours():
            return load(samples, training_micro_batches(samples, train_cfg, 0), 0, args.device)

        def as_bytes():                                # what is left for a CPU where a GPU normalises
            with mock.patch("m3ae_mini.data.normalise", lambda image: image):
                yield from ours()
        ways = {"DataLoader, Pillow": lambda: (images.to(args.device) for images in usual),
                "m3ae_mini.data.load": ours, "m3ae_mini.data.load, not normalised": as_bytes}
        for way, batches in ways.items():
            runs, before = [], resident()
            for _ in range(1 + args.repeats):
                start, core, first = clock(args), time.process_time(), None
                for _ in batches():
                    first = first or clock(args) - start
                runs.append((time.process_time() - core, clock(args) - start, first))
            core, wall, first = map(median, zip(*runs[1:]))
            count = train_cfg.steps * rows
            table.append({"way": way, "images/s and core": count / core, "images/s": count / wall,
                          "first batch s": first, "resident MB at the start": before[0],
                          f"after {1 + args.repeats} epochs": resident()[0]})
    show(table)
    print("A core's second is CPU time of all threads. All files are in the page cache. Texts and masks are "
          "made by load alone.")


# ------------------------------------------------------------------------------------------- retrieval

@torch.no_grad()
def retrieval(args):
    """Scores of all pairs of n images with n texts, an image with a block of texts at a time: each image
    and each text encoded once, or anew for every pair."""
    cfg = ModelConfig.preset(args.preset, vocab_size=VOCAB[args.preset], task="irtr")
    n = math.isqrt(args.pairs)
    torch.manual_seed(0)
    model, batch = M3AE(cfg).to(args.device).eval(), noise(cfg, n, args)
    ids, masks, images = (batch[name].split(args.batch_size) for name in ("text_ids", "text_mask", "image"))

    def scores(pairs):
        """pairs of text (B, T, D), its mask, image (1, 1+L, D) or (B, 1+L, D) -> (n²,)"""
        joint = [model.pooled_pair(text, image, mask) for text, mask, image in pairs]
        return model.objectives["irtr"].fc(torch.cat(joint)).float()[:, 0]

    def once():
        texts = [model.encode_text(*block) for block in zip(ids, masks)]
        images = [image[None] for block in images for image in model.encode_image(block)]
        return scores((text, mask, image) for image in images for text, mask in zip(texts, masks))

    def anew():
        return scores((model.encode_text(block, mask), mask,
                       model.encode_image(image.expand(len(block), -1, -1, -1)))
                      for image in batch["image"] for block, mask in zip(ids, masks))

    agree("scores", anew(), once())
    with autocast(args):
        found = turns({"anew": anew, "once": once}, args)
    show([{"encoded": way, "pairs": n * n, "s per pair": seconds / n ** 2,
           "times as fast": found["anew"] / seconds} for way, seconds in found.items()])


# ------------------------------------------------------------------------------------------- scaling

def scaling(args):
    """The loader's cost and memory by the pack's size; the speed of two processes; what they exchange."""
    cfg, table = ModelConfig.preset("tiny", image_size=24, vocab_size=1024), []
    for count in (1_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            write_pack(folder, count, cfg)
            table.append({"samples": count} | in_fresh_process(cost_of_pack, folder, cfg))
    show(table)

    with tempfile.TemporaryDirectory() as folder:
        rows = phantoms.rows(None, "pretrain", {"train": 512, "val": 32})
        prepare.pack(rows, f"{folder}/pack", "phantoms", "pretrain", ModelConfig.preset("tiny").image_size)
        show([{"processes": processes, "threads each": threads,
               "samples/s": speed_of_training(folder, processes, threads, args.steps)}
              for processes, threads in ((1, 1), (1, 2), (2, 1))])

    models = {preset: on_meta(ModelConfig.preset(preset, vocab_size=size)) for preset, size in VOCAB.items()}
    show([{"preset": preset, "MB of gradients all-reduced in a step":
           4e-6 * sum(parameter.numel() for parameter in model.parameters())}
          for preset, model in models.items()])
    print("Gradients are float32. Of n processes in a ring, each sends 2 (n - 1) / n of that.")


def cost_of_pack(folder, cfg):
    """What 300 chunks of 32 from a pack cost a fresh process -> {figure: value}."""
    torch.set_num_threads(1)
    train_cfg, marks = TrainConfig(steps=300, batch_size=32, micro_batch=32), [time.perf_counter()]
    before, samples = resident(), open_pack(folder, cfg, train_cfg)
    for _ in load(samples, training_micro_batches(samples, train_cfg, 0), 0, "cpu"):
        marks.append(time.perf_counter())
    after = resident()
    return {"opened, and a first chunk, s": marks[1] - marks[0],
            "µs a sample": 1e6 * (marks[-1] - marks[1]) / (32 * (len(marks) - 2)),
            "resident MB before": before[0], "after": after[0],
            "of it pages of mapped files": f"{before[1]:.0f}, {after[1]:.0f}"}


def speed_of_training(folder, processes, threads, steps):
    """Samples a second of train.py's tiny preset, by gloo where processes are several: the median of its log
    without the first line."""
    out, gpus = f"{folder}/{processes}x{threads}", processes if processes > 1 else 0
    flags = (f"--data {folder}/pack --out {out} --gpus {gpus} --device cpu --steps {steps} --eval_samples 32 "
             f"--log_every {max(1, steps // 5)} --test_samples 0")
    done = subprocess.run([sys.executable, "train.py", *flags.split()], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        raise UserError(f"train.py {flags} ended with: {done.stderr.strip().rpartition(chr(10))[2]}")
    lines = [json.loads(line) for line in open(f"{out}/metrics.jsonl")]
    rates = [line["samples_per_s"] for line in lines if line["split"] == "train"]
    return median(rates[1:] or rates)


# ------------------------------------------------------------------------------------------- what all share

def autocast(args):
    return torch.autocast(args.device, args.dtype, enabled=args.dtype != torch.float32)


def on_meta(cfg):
    """A model of shapes without numbers."""
    with torch.device("meta"):
        return M3AE(cfg).to("meta")


def in_fresh_process(function, *args):
    """function(*args) in a new process, called while this one is small: on Linux a child's peak starts at its
    parent's size."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    except BrokenProcessPool:
        raise UserError("a process was killed, perhaps for memory: use a smaller --batch_size") from None


def clock(args):
    """Seconds, when the GPU has done all that was asked of it."""
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def turns(ways, args):
    """{name: function} -> {name: median seconds of a call}. They take turns; a first round is not counted."""
    runs = {name: [] for name in ways}
    for _ in range(1 + args.repeats):
        for name, call in ways.items():
            start = clock(args)
            call()
            runs[name].append(clock(args) - start)
    return {name: median(times[1:]) for name, times in runs.items()}


def resident():
    """MB of memory that this process holds, by Linux's account, and how many of them are pages of mapped
    files, which the system takes back at will."""
    pages = Path("/proc/self/statm").read_text().split()[1:3]
    return [1e-6 * os.sysconf("SC_PAGE_SIZE") * int(count) for count in pages]


def show(rows):
    """A list of dicts with the same keys -> a Markdown table."""
    print()
    for line in rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows):
        print("|", *(f"{cell:.4g} |" if isinstance(cell, float) else f"{cell} |" for cell in line))
    print()


def main():
    benches = {bench.__name__: bench for bench in (step, loader, retrieval, scaling)}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, prepare.positive
    add("what", choices=benches)
    add("--preset", choices=VOCAB, default="small", help="the model of step and retrieval [small]")
    add("--batch_size", type=count, default=8, help="rows of a batch, or texts of a block in retrieval [8]")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of matrix products [float32]")
    add("--attn_dropout", type=float, nargs="+", default=(0.1, 0.0), help="step: each in turn [0.1 0]")
    ways = ("plain", "plain-kept", "fast", "fast-recompute")
    add("--ways", nargs="+", choices=ways, default=ways, help="step: which of them [all]")
    add("--chunks", type=count, default=1, help="step: batches whose gradients add up to one step [1]")
    add("--compile", action="store_true", help="step: the fast way by torch.compile")
    add("--repeats", type=count, default=5, help="timed runs, whose median is shown [5]")
    add("--images", type=count, default=2000, help="loader: how many are drawn [2000]")
    add("--pairs", type=count, default=1024, help="retrieval: rounded down to a square [1024]")
    add("--steps", type=count, default=30, help="scaling: steps of each training [30]")
    args, there = parser.parse_args(), torch.cuda.is_available()
    if args.device == "cuda" and not there:
        raise UserError("--device cuda: no GPU is there; use --device cpu")
    if args.device == "auto":
        args.device = "cuda" if there else "cpu"
    place = f"{torch.get_num_threads()} CPU threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{' '.join(sys.argv[1:])}: {place}, {args.dtype}, torch {torch.__version__}")
    args.dtype = getattr(torch, args.dtype)
    benches[args.what](args)


if __name__ == "__main__":
    distributed.run(main)
