"""What a GPU computes, how fast and in how much memory: five minutes and the time of compiling.

    python tests/experiments/gpu.py                               all parts, on GPU 0
    python tests/experiments/gpu.py attention steps               some of them
    python tests/experiments/gpu.py --device cpu --preset tiny    a rehearsal without a GPU

tests      the tests that are marked `gpu`
attention  one query, or a batch of 1 against many, at odd lengths: equal to plain softmax
types      the first losses in bfloat16 and float16 against float32
overlap    a step with the loader against a step on one batch that stays on the device
steps      memory and samples per second of each task
processes  `train.py --gpus N` over NCCL against one process
compile    compiled again after the warm-up? (texts and masks of new lengths)
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench
from bench import Args, autocast, clock, noise_batch, noise_samples, show, write_noise_pack

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_mini import M3AE, ModelConfig
from m3ae_mini.config import TrainConfig, preset_values, require
from m3ae_mini.distributed import run
from m3ae_mini.loader import load, training_micro_batches
from m3ae_mini.model import compile_layers, use_grad_checkpointing
from m3ae_mini.ops import attention, split_heads

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"cuda": (torch.float32, torch.bfloat16, torch.float16),
          "cpu": (torch.float32, torch.bfloat16)}
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}

# A training step in bfloat16: (task, rows, --grad_checkpointing).
STEPS = [("pretrain", 128, False), ("pretrain", 64, False), ("pretrain", 32, False),
         ("pretrain", 16, False), ("pretrain", 32, True), ("vqa", 32, False), ("cls", 16, False),
         ("irtr", 16, False), ("irtr", 16, True)]


def tests(args: Args) -> None:
    """The tests that are marked `gpu`, in a process of their own."""
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", ROOT / "tests"], cwd=ROOT)


# ---------------------------------------------------------------------------------------- one model

def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of q (B, Q, W) over k, v (B, N, W) in float64, four heads -> (B, Q, W)"""
    q, k, v = (split_heads(x.double(), 4) for x in (q, k, v))                 # (B, 4, Q | N, W/4)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5                     # (B, 4, Q, N)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)                # (B, Q, W)


def attention_error(dtype: torch.dtype, queries: int, keys: int, masked: bool, many: str,
                    device: str) -> float:
    """The largest error of output and gradients, relative to the largest value. many: which side
    has a batch of 5, where the other has 1; "both"."""
    draw = torch.Generator().manual_seed(0)

    def tensor(batch, length):
        x = torch.randn(batch, length, 256, generator=draw).to(device, dtype)
        return x.requires_grad_()

    rows = {"queries": (5, 1), "keys": (1, 5), "both": (5, 5)}[many]
    q, k, v = tensor(rows[0], queries), tensor(rows[1], keys), tensor(rows[1], keys)
    mask = None
    if masked:
        mask = torch.ones(rows[1], 1, 1, keys, dtype=torch.bool, device=device)
        mask[..., -keys // 3:] = False
    weight = torch.randn(5, queries, 256, generator=draw).to(device)

    results = []
    for compute in (lambda: attention(q, k, v, 4, mask), lambda: plain_attention(q, k, v, mask)):
        out = compute()
        gradients = torch.autograd.grad((out.double() * weight).sum(), (q, k, v))
        results.append([out, *gradients])
    errors = [((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
              for a, b in zip(*results)]
    return max(errors)


def attention_part(args: Args) -> None:
    """Fused attention and its gradients differ from plain softmax by no more than rounding."""
    rows = []
    for dtype in DTYPES[args.device]:
        worst = 0.0
        for queries, keys in ((1, 65), (1, 577), (65, 577), (40, 325), (577, 40)):
            for many in "queries", "keys", "both":
                for masked in False, True:
                    error = attention_error(dtype, queries, keys, masked, many, args.device)
                    worst = max(worst, error)
                    require(error < ROUNDING[dtype],
                            f"attention of {queries} over {keys} tokens ({many} many, mask "
                            f"{masked}) in {dtype} is off by {error:.2g}")
        rows.append({"attention in": str(dtype)[6:], "largest error": worst,
                     "allowed": ROUNDING[dtype]})
    show(rows)


def task_config(task: str, args: Args) -> ModelConfig:
    """The preset's architecture for a task, with its image size and text length."""
    values = preset_values(ModelConfig, args.preset, task)
    sizes = dict(vocab_size=bench.VOCAB_SIZE[args.preset], num_answers=498, num_classes=7)
    return ModelConfig(**values | sizes | {"task": task})


def task_batch(cfg: ModelConfig, rows: int, args: Args) -> dict[str, Tensor]:
    """A batch of noise for a task, with labels."""
    labels = torch.zeros(rows, dtype=torch.long, device=args.device)
    return noise_batch(cfg, rows, args) | {f"{cfg.task}_labels": labels}


def train_step(model, optimizer, batch: dict[str, Tensor], args: Args) -> Tensor:
    with autocast(args):
        loss = model(batch)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def new_model(cfg: ModelConfig, args: Args) -> tuple[M3AE, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = M3AE(cfg).to(args.device).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def types(args: Args) -> None:
    """Three steps without dropout in each type: the losses stay close to those in float32."""
    cfg = task_config("pretrain", args)
    cfg.dropout = cfg.attn_dropout = 0.0
    batch, losses = task_batch(cfg, 8, args), {}
    for args.dtype in DTYPES[args.device]:
        model, optimizer = new_model(cfg, args)
        losses[args.dtype] = [train_step(model, optimizer, batch, args).item() for _ in range(3)]
    rows = [{"type": str(dtype)[6:], **{f"loss of step {i + 1}": x for i, x in enumerate(values)}}
            for dtype, values in losses.items()]
    show(rows)
    for dtype, values in losses.items():
        gap = max(abs(a - b) for a, b in zip(values, losses[torch.float32]))
        require(gap < 0.1, f"the losses in {dtype} are {gap:.2g} away from those in float32")


def compile_part(args: Args) -> None:
    """Texts and masks of new lengths do not compile the model again."""
    if args.device != "cuda":
        print("not rehearsed: on a CPU dropout breaks the graph")
        return
    cfg = task_config("pretrain", args)
    model, optimizer = new_model(cfg, args)
    compile_layers(model)
    batch, counts = task_batch(cfg, 8, args), []
    lengths = [cfg.max_text_len - 4 * i for i in range(4)]
    start = time.perf_counter()
    for i, length in enumerate(2 * lengths):
        short = {name: x[:, :length] if x.ndim == 2 and x.shape[1] == cfg.max_text_len else x
                 for name, x in batch.items()}
        masked = torch.arange(8 * (3 + i), device=args.device)                # (M,), another M
        train_step(model, optimizer, short | {"mlm_positions": masked}, args)
        print(f"{length} tokens: {time.perf_counter() - start:.0f} s", flush=True)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    show([{"graphs after step 1": counts[0], "after 4 lengths": counts[3], "after 8": counts[7],
           "seconds": time.perf_counter() - start}])
    require(counts[7] == counts[3], "the model was compiled again after the warm-up")


# ------------------------------------------------------------------------------------ memory, speed

def overlap(args: Args) -> None:
    """Samples per second with the loader, and on one batch that is on the device already."""
    cfg = task_config("pretrain", args)
    model, optimizer = new_model(cfg, args)
    rows, steps = args.rows or 32, 3 + args.repeats
    with tempfile.TemporaryDirectory() as folder:
        write_noise_pack(folder, 4 * rows, cfg)
        train_cfg = TrainConfig(batch_size=rows, micro_batch=rows, steps=steps)
        samples = noise_samples(folder, cfg, train_cfg)

        def timed(batches):
            for i, batch in enumerate(batches):
                if i == 3:
                    start = clock(args)
                train_step(model, optimizer, batch, args)
            return rows * args.repeats / (clock(args) - start)

        order = training_micro_batches(samples, train_cfg, 0)
        with_loader = timed(loaded.batch for loaded in load(samples, order, 0, args.device))
        batch = noise_batch(cfg, rows, args)
        alone = timed(batch for _ in range(steps))
    show([{"samples/s with the loader": with_loader, "on one batch": alone,
           "share": with_loader / alone}])


def steps(args: Args) -> None:
    """Peak memory and samples per second of a step of each task."""
    rows = []
    for task, size, checkpointing in STEPS:
        for compiled in (False, True) if task == "pretrain" and args.compile else (False,):
            size = args.rows or size
            row = {"task": task, "micro-batch": size, "checkpointing": checkpointing,
                   "compiled": compiled}
            try:
                row |= time_task(task, size, checkpointing, compiled, args)
            except torch.OutOfMemoryError:
                row |= {"GB": "out of memory", "samples/s": "–"}
            rows.append(row)
    show(rows)


def time_task(task: str, size: int, checkpointing: bool, compiled: bool, args: Args) -> dict:
    """{"GB": peak memory of the tensors, "samples/s": speed} of a step after three others."""
    cfg = task_config(task, args)
    model, optimizer = new_model(cfg, args)
    if compiled:
        compile_layers(model)
    if checkpointing:
        use_grad_checkpointing(model)
    batch = task_batch(cfg, size, args)
    for _ in range(3):
        train_step(model, optimizer, batch, args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = clock(args)
    for _ in range(args.repeats):
        train_step(model, optimizer, batch, args)
    speed = size * args.repeats / (clock(args) - start)
    memory = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else "–"
    return {"GB": memory, "samples/s": speed}


def processes(args: Args) -> None:
    """Three steps on phantoms by torchrun, on all GPUs (at most 4), and by one process."""
    count = min(4, torch.cuda.device_count()) if args.device == "cuda" else 2
    with tempfile.TemporaryDirectory() as folder:
        losses = []
        for flags in (), ("--gpus", count):
            out = f"{folder}/{len(losses)}"
            command = [sys.executable, "train.py", "--device", args.device, "--dtype", "float32",
                       "--steps", 3, "--log_every", 1, "--test_samples", 0, "--micro_batch", 16,
                       "--out", out, *flags]
            command = list(map(str, command))
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            require(not done.returncode, f"{' '.join(command)}: {done.stderr[-500:]}")
            lines = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
            losses.append([line["loss"] for line in lines if line["split"] == "train"])
    gap = max(abs(a - b) for a, b in zip(*losses))
    show([{"processes": count, "largest difference of the losses": gap}])
    require(gap < 1e-2, f"{count} processes have other losses than one")


PARTS = {"tests": tests, "attention": attention_part, "types": types, "overlap": overlap,
         "steps": steps, "processes": processes, "compile": compile_part}


def run_parts(args: Args) -> None:
    """Run the parts named in args.parts; UserError at the end if one has failed."""
    require(args.device == "cpu" or torch.cuda.is_available(),
            "there is no GPU here: --device cpu --preset tiny rehearses without one")
    unknown = set(args.parts) - PARTS.keys()
    require(not unknown, f"there is no part {', '.join(unknown)}: use some of {', '.join(PARTS)}")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "a CPU"
    print(f"{device}, torch {torch.__version__}, {args.preset}")
    failed = []
    for name in args.parts:
        print(f"\n== {name}: {PARTS[name].__doc__.splitlines()[0]}")
        args.dtype, start = torch.bfloat16, time.perf_counter()
        try:
            PARTS[name](args)
        except Exception as error:               # the other parts still run
            print(f"FAILED: {type(error).__name__}: {error}")
            failed.append(name)
        print(f"{time.perf_counter() - start:.0f} s")
    require(not failed, f"failed: {', '.join(failed)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("parts", nargs="*", default=list(PARTS), metavar="PART",
        help="which of them [all]")
    add("--preset", choices=bench.VOCAB_SIZE, default="base", help="which model [base]")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--rows", type=int, default=0, help="rows of a batch in place of those of the table")
    add("--repeats", type=int, default=10, help="timed steps [10]")
    add("--compile", action="store_true", help="steps: time compiled pre-training, too")
    run_parts(parser.parse_args())


if __name__ == "__main__":
    run(main)
