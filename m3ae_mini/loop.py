"""What both scripts call: processes and devices, parameter groups and rates, checkpoints, the log."""
import ctypes
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .config import UserError, require, reading
from .data import load
from .model import recompute

# What torch says in a RuntimeError where it is nobody's bug, and what a user should read instead.
KNOWN_ERRORS = {"MemoryError|out of memory|can't allocate":
                "out of memory: go on with --grad_checkpointing --resume, or start anew with a smaller --micro_batch",
            "[Tt]imed out|[Tt]imeout|[Cc]onnection (closed|reset)":
                "another process of this run is gone or hangs: look at its messages, then --resume"}
LINE = re.compile(r'{"step": \d{1,9}, "split": "\w+"'
                  r'(, "(\\.|[^"\\])*": (-?\d{1,20}(\.\d+)?(e[+-]\d+)?|null))*}')
DIVERGED = "no finite gradient in 20 steps in a row: try a lower --lr, a longer --warmup or --dtype float32"
LOCKS = []                             # the open files that lock a run's folder until this process ends


def run(main):
    """Call main(). A mistake of the user's making ends in one sentence and status 2, without a traceback."""
    try:
        return main()
    except UserError as error:
        sentence = str(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:                               # a full disk, a folder that may not be written to
        sentence = f"{error.filename or 'a file'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        known = [text for pattern, text in KNOWN_ERRORS.items() if re.search(pattern, f"{error!r} {error}")]
        if not known:
            raise
        sentence = known[0]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    time.sleep(1 if "another process" in sentence else 0)  # torchrun is to find the one that is gone first
    sys.exit(2)


def begin(train_cfg, model_cfg, run_cfg, prepare):
    """Meet the other processes, where there are any -> (DistEnv, what prepare() returns)."""
    dist_env = DistEnv(run_cfg)
    check_batches(train_cfg, model_cfg, run_cfg.gpus if dist_env.launching else dist_env.world_size)
    require(min(run_cfg.log_every, run_cfg.eval_samples, run_cfg.test_samples + 1) > 0,
         "--log_every and --eval_samples must be above 0, --test_samples at least 0")
    if dist_env.under_torchrun and not dist.is_initialized():
        timeout = timedelta(seconds=run_cfg.timeout)
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":      # torchrun's restarts share it, and old addresses
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "nccl" if dist_env.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
    made = []                                              # one process first: it writes files of first use
    dist_env.broadcast(lambda: made.append(prepare()))
    return dist_env, made[0] if made else prepare()


class DistEnv:
    """Where this process computes: rank, world_size, is_main (is it rank 0?), device, dtype (of matrix products)."""

    def __init__(self, run_cfg):
        self.under_torchrun = "RANK" in os.environ
        self.launching = run_cfg.gpus > 0 and not self.under_torchrun
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        kind, local = run_cfg.device, int(os.environ.get("LOCAL_RANK", 0))
        there = {"cuda": torch.cuda.device_count(), "mps": torch.mps.device_count(), "cpu": math.inf}
        if kind == "auto":
            kind = "cuda" if there["cuda"] else "cpu"
        require(kind in there, f"--device {kind} is not known: use auto, cuda, cpu or mps")
        wanted, gpus = max(local + 1, run_cfg.gpus), there[kind]
        require(wanted <= gpus, f"{wanted} wanted, {gpus or 'no'} GPU is there: use fewer, or --device cpu")
        self.device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        self.dtype = pick_dtype(run_cfg.dtype, kind)

    def autocast(self):
        """Matrix products in self.dtype; a context that does nothing for float32."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def print(self, text):
        """Print it, once for all processes."""
        if self.is_main:
            print(text)

    def broadcast(self, make):
        """make() on the main process; its result, or its UserError, on every process."""
        try:
            box = [make() if self.is_main else None]
        except UserError as error:
            box = [error]
        if self.world_size > 1:
            dist.broadcast_object_list(box)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]

    def all_reduce(self, tensor):
        """The tensor, summed in place over all processes."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def reduce_sums(self, sums):
        """{name: tensor} summed over all processes, as floats, by one host read; who lacks a name adds 0."""
        names, shape = self.broadcast(lambda: (sorted(sums), next(iter(sums.values())).shape))
        table = torch.stack([sums.get(name, torch.zeros(shape)).float().to(self.device) for name in names])
        return dict(zip(names, self.all_reduce(table).tolist()))


def pick_dtype(name, kind):
    """auto: bfloat16 where the hardware really has it, float16 on older GPUs, else float32."""
    if name == "auto" and kind == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif name == "auto":
        flags = Path("/proc/cpuinfo").read_text().split() if (kind, sys.platform) == ("cpu", "linux") else ()
        name = "bfloat16" if {"amx_bf16", "avx512_bf16"} & set(flags) else "float32"
    known = {"cuda": ("float32", "bfloat16", "float16"), "cpu": ("float32", "bfloat16"), "mps": ("float32",)}
    require(name in known[kind], f"--device {kind} has no --dtype {name}: use auto, {', '.join(known[kind])}")
    return getattr(torch, name)


def keep_freed_memory():
    """What is freed stays with this process. By default glibc gives large tensors back at once, and every
    step on a CPU pays for fresh pages of zeros (README, Speed)."""
    if sys.platform == "linux":
        for option, value in ((-4, 0), (-1, -1)):          # M_MMAP_MAX 0, M_TRIM_THRESHOLD -1: see malloc.h
            ctypes.CDLL(None).mallopt(option, value)


class StopSignal:
    """SIGTERM and SIGINT ask the run to finish its step and write a checkpoint; a second stops at once."""

    def __init__(self):
        self.asked = False                                 # this process; `agree` asks them all
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.hear)

    def hear(self, number, _):
        self.asked = True
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)

    def agree(self, norm, dist_env):
        """The gradient's norm, () -> it as a float, and whether any process was asked: all stop together."""
        norm, asked = dist_env.all_reduce(torch.stack([norm / dist_env.world_size, norm.new_full((), self.asked)])).tolist()
        return norm, asked > 0


def check_batches(train_cfg, model_cfg, world):
    """Every number must be one that makes sense; batch, micro-batch and processes must fit each other."""
    batch, micro, task = train_cfg.batch_size, train_cfg.micro_batch, model_cfg.task
    limits = {"warmup": 1, "mlm_ratio": 1, "hard_negatives": 1, "min_crop_area": 1, "beta2": 0.9999, "seed": 2 ** 63 - 1}
    for name, value in vars(train_cfg).items():
        least, most = int(name in ("steps", "batch_size", "micro_batch", "tokenizer_vocab")), limits.get(name, 10 ** 9)
        require(isinstance(value, str) or least <= value <= most, f"--{name} {value}: use {least} to {most:,}")
    require(batch % (micro * world) == 0, f"--batch_size {batch} can't be divided among {world} processes with "
         f"--micro_batch {micro}: use a multiple of {micro * world}, or another --micro_batch")
    require(micro > 1 or not (task == "irtr" or task == "pretrain" and model_cfg.itm),
         "--micro_batch 1 leaves no other row for a wrong image or text: use 2, or pre-train with --itm 0")


def epochs_to_steps(train_cfg, run_cfg, samples):
    """Lengths that were given in epochs, in steps -> both configurations, for so many training samples."""
    epoch = samples / train_cfg.batch_size
    steps = max(1, round(train_cfg.epochs * epoch)) if train_cfg.epochs else train_cfg.steps
    every = max(1, round(epoch))
    return replace(train_cfg, steps=steps), replace(run_cfg, eval_every=run_cfg.eval_every or every,
                                                    save_every=run_cfg.save_every or every)


def open_run(run_cfg, settings, dist_env):
    """Start or continue the run in --out, locked against a second -> the newest checkpoint's path, or None.
    settings: the dict of config.json; a run that goes on must keep all but those under "run" (device, …).
    Where --gpus asks for processes, they start here, as whatever can be wrong has been found by now."""
    out, config = Path(run_cfg.out), Path(run_cfg.out) / "config.json"
    settings = json.loads(json.dumps(settings))
    if config.is_file():
        require(run_cfg.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
             f"{out} holds another run: go on with it by --resume, or choose another --out")
        with reading(config):
            old = json.loads(config.read_text())
            changed = [f"{name} {was!r:.60} (now {now!r:.60})" for part in settings if part != "run"
                       for name, now in settings[part].items() if (was := old.get(part, {}).get(name)) != now]
        require(not changed, f"{out} was started with other settings: {', '.join(changed)}; give the same, or "
                          "choose another --out")
    elif out.is_dir():
        require({file.name for file in out.iterdir()} <= {"lock", "config.json.tmp"},      # killed at its start
             f"{out} is not empty and holds no run: choose another --out")
    if dist_env.launching:
        sys.stdout.flush()                                 # torchrun takes over with this command line
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // run_cfg.gpus)))
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                  "--nproc-per-node", str(run_cfg.gpus), *sys.argv])
    try:
        out.mkdir(parents=True, exist_ok=True)
        if sys.platform != "win32":
            import fcntl                                   # Windows has none
            LOCKS.append(open(out / "lock", "w"))
            fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        write_atomic(config, lambda file: file.write(json.dumps(settings, indent=1).encode()))
        (out / "plots").mkdir(exist_ok=True)
        return latest_valid_checkpoint(out, "new.pt", "last.pt", "prev.pt")       # new.pt: killed between renames
    except BlockingIOError:
        raise UserError(f"another run is at work in {out}: wait for it, or choose another --out") from None
    except OSError as error:
        raise UserError(f"{out} can't be written to ({error.strerror}): choose another --out") from None


def write_atomic(path, write):
    """Call write(file) on a file beside `path`, then rename it: a reader finds the old or the new one."""
    beside = Path(f"{path}.tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:               # the latter is torch.save's for a full disk
        raise UserError(f"{path} can't be written ({getattr(error, 'strerror', None) or error}): what was "
                        "saved before is whole; make room, then --resume, or choose another place") from None
    finally:
        beside.unlink(missing_ok=True)                     # a disk that is full needs the room


def save(path, model, step, **more):
    """The weights, and what else is given, whole or not at all."""
    state = {"model": model.state_dict(), "step": step, "model_config": asdict(model.cfg)} | more
    write_atomic(path, lambda file: torch.save(state, file))


def save_checkpoint(out, model, optimizer, scaler, step, best):
    """last.pt; the one before stays as prev.pt."""
    save(out / "new.pt", model, step, best=best, optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
    if (out / "last.pt").exists():
        os.replace(out / "last.pt", out / "prev.pt")
    os.replace(out / "new.pt", out / "last.pt")


def load_checkpoint(path):
    """A checkpoint: tensors and plain containers, nothing else. UserError where it is missing or damaged."""
    with reading(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        require(not damaged, f"{path} is damaged: its entry {damaged} does not have its check sum")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def restore(path, model, optimizer, scaler):
    """Load a checkpoint into the three -> its step, its best score. UserError where it is not of this run."""
    with reading(path):
        state = load_checkpoint(path)
        state["optimizer"]["param_groups"] = optimizer.state_dict()["param_groups"]    # from the settings
        for name, part in ("model", model), ("optimizer", optimizer):
            part.load_state_dict(state[name])
        scaler.load_state_dict(state["scaler"] or scaler.state_dict())     # empty: saved in another dtype
        fits = all(moments["exp_avg"].shape == moments["exp_avg_sq"].shape == parameter.shape
                   and moments["step"].ndim == 0 for parameter, moments in optimizer.state.items())
        require(fits and state["step"] >= 0, f"{path} was written by another run: choose another --out")
        return int(state["step"]), float(state["best"])


def latest_valid_checkpoint(out, *names):
    """The path of the first of a run's checkpoints `names` that is there and whole, or None."""
    paths = [path for name in names if (path := out / name).exists()]
    for path in paths:
        try:
            load_checkpoint(path)
            return path
        except UserError as error:
            require(path != paths[-1], f"no checkpoint in {out} can be read: {error}")
            print(f"warning: {error}; another one is taken", file=sys.stderr)


class Log:
    """metrics.jsonl: one object a line. Opened at a step it loses later lines, and those of the test."""

    def __init__(self, out, step):
        self.path = Path(out) / "metrics.jsonl"
        kept = [line for line in self.lines() if line["step"] <= step and line["split"] != "test"]
        write_atomic(self.path, lambda file: file.writelines(f"{json.dumps(x)}\n".encode() for x in kept))

    def lines(self):
        """Its lines as dicts, where they are as `write` left them: a power cut leaves anything."""
        text = self.path.read_text(errors="replace") if self.path.is_file() else ""
        return [json.loads(line) for line in text.splitlines() if LINE.fullmatch(line)]

    def write(self, step, split, **values):
        plain = {name: round(value, 10) if math.isfinite(value) else None for name, value in values.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, "split": split, **plain}) + "\n")


def learner(model, train, train_cfg, run_cfg, dist_env, checkpoint):
    """What a loop over the samples `train` needs besides the model, as `checkpoint` (a path or None) left it
    -> net (the model as it is called: compiled, wrapped), optimizer, gradient scaler, step, best score."""
    freeze_unused(model, next(load(train, [(0, 0, [0, 1 % train.n])], 0, "cpu"))[3])
    model.to(dist_env.device)
    keep_freed_memory()
    optimizer = torch.optim.AdamW(parameter_groups(model, train_cfg), lr=train_cfg.lr, eps=1e-8,
                                  betas=(0.9, train_cfg.beta2), fused=dist_env.device.type != "mps")
    scaler = torch.amp.GradScaler(dist_env.device.type, enabled=dist_env.dtype == torch.float16)
    step, best = restore(checkpoint, model, optimizer, scaler) if checkpoint else (0, -math.inf)
    if run_cfg.grad_checkpointing:
        recompute(model)
    net = torch.compile(model) if run_cfg.compile else model
    if dist_env.world_size > 1:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True, broadcast_buffers=False)
    dist_env.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters on {dist_env.world_size} × "
              f"{dist_env.device.type} in {str(dist_env.dtype)[6:]}; steps {step:,} to {train_cfg.steps:,}"
              + (f", from {checkpoint}" if checkpoint else ""))
    return net, optimizer, scaler, step, best


def freeze_unused(model, batch):
    """Freeze what no loss reads (the last layer's image stream without ITM, say): DDP refuses parameters that
    get no gradient. They are found by one step, on any batch, of a copy on the meta device."""
    with torch.device("meta"):
        shadow = type(model)(model.cfg)
    shadow.to("meta")({name: tensor.to("meta") for name, tensor in batch.items()})["loss"].backward()
    for parameter, twin in zip(model.parameters(), shadow.parameters(), strict=True):
        parameter.requires_grad_(parameter.requires_grad and twin.grad is not None)


def parameter_groups(model, train_cfg):
    """AdamW's groups: four rates (text and image encoder, fusion, heads), and decay for matrices alone."""
    scales, groups = {"vit": train_cfg.vit_lr_mult, "text": 1.0, "objectives": train_cfg.head_lr_mult}, {}
    for name, parameter in model.named_parameters():
        scale = scales.get(name.split(".")[0], train_cfg.fusion_lr_mult)
        decay = train_cfg.weight_decay if parameter.ndim > 1 else 0.0
        if parameter.requires_grad:
            group = {"params": [], "scale": scale, "weight_decay": decay}
            groups.setdefault((scale, decay), group)["params"].append(parameter)
    return list(groups.values())


def set_lr(optimizer, step, train_cfg):
    """Linear warm-up over a share of the steps, then linear decay to 0; each group at its own multiple."""
    warm = max(1, round(train_cfg.warmup * train_cfg.steps))
    rate = train_cfg.lr * min((step + 1) / warm, (train_cfg.steps - step) / max(1, train_cfg.steps - warm))
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    return rate
