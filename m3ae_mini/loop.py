"""What both scripts call: processes and devices, parameter groups and rates, checkpoints, the log."""
import contextlib
import json
import math
import os
import re
import signal
import sys
import zipfile
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .config import UserError
from .data import load


# ------------------------------------------------------------------------------------------- processes

# What torch says in a RuntimeError where it is nobody's bug, and what a user should read instead.
TROUBLES = {"out of memory|can't allocate": "out of memory: use a smaller --micro_batch",
            "[Tt]imed out|[Tt]imeout|[Cc]onnection (closed|reset)":
                "another process of this run is gone or hangs: look at its messages, then --resume",
            "PytorchStreamWriter|unexpected pos":
                "the checkpoint can't be written, perhaps the disk is full: make room, then --resume"}


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
        known = [text for pattern, text in TROUBLES.items() if re.search(pattern, f"{error!r} {error}")]
        if not known and not isinstance(error, MemoryError):
            raise
        sentence = known[0] if known else TROUBLES["out of memory|can't allocate"]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    sys.exit(2)


def begin(train_cfg, model_cfg, run_cfg, prepare):
    """Start the processes that --gpus asks for, or meet the others -> (Place, what prepare() returns).
    Whatever can be wrong is found, and the phantoms are drawn, before a process starts."""
    place = Place(run_cfg)
    if run_cfg.gpus and not place.under_torchrun:
        check_batches(train_cfg, model_cfg, run_cfg.gpus)
        prepare()
        launch(run_cfg.gpus)

    check_batches(train_cfg, model_cfg, place.world)
    place.join(run_cfg.timeout)
    place.from_main(lambda: prepare() and None)            # files that are made on first use: by one process
    return place, prepare()


def launch(processes):
    """Become torchrun: start this very command line in `processes` processes on this machine."""
    sys.stdout.flush()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                              "--nproc-per-node", str(processes), *sys.argv])


class Place:
    """Where this process computes: rank, world, main (is it rank 0?), device, dtype (of matrix products)."""

    def __init__(self, run_cfg):
        self.under_torchrun = "RANK" in os.environ
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        kind, there = run_cfg.device, torch.cuda.device_count()
        if kind == "auto":
            kind = "cuda" if there else "cpu"
        if kind not in ("cuda", "cpu", "mps"):
            raise UserError(f"--device {kind} is not known: use auto, cuda, cpu or mps")
        if kind == "mps" and not torch.backends.mps.is_available():
            raise UserError("--device mps: there is no such device here; use --device cpu")
        local = int(os.environ.get("LOCAL_RANK", 0))
        if kind == "cuda" and (wanted := max(local + 1, run_cfg.gpus)) > there:
            raise UserError(f"{wanted} wanted, {there or 'no'} GPU is there: use fewer, or --device cpu")

        self.device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        self.dtype = pick_dtype(run_cfg.dtype, kind)

    def join(self, timeout):
        """Meet the other processes of a torchrun; timeout in seconds."""
        if self.under_torchrun and not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))

    def autocast(self):
        """Matrix products in self.dtype; a context that does nothing for float32."""
        on = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if on else contextlib.nullcontext()

    def from_main(self, make):
        """make() on the main process; its result, or its UserError, on every process."""
        box = [None]
        if self.main:
            try:
                box = [make()]
            except UserError as error:
                box = [error]
        if self.world > 1:
            dist.broadcast_object_list(box)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]

    def total(self, sums):
        """{name: tensor} summed over all processes, as floats: one transfer and one host read for all of
        them. A process may lack names that the main one has (it had no chunk to look at): it adds zeros."""
        names, shape = self.from_main(lambda: (sorted(sums), next(iter(sums.values())).shape))
        zero = torch.zeros(shape)
        table = torch.stack([sums.get(name, zero).float().to(self.device) for name in names])
        return dict(zip(names, self.sum(table).tolist()))

    def sum(self, tensor):
        """The tensor, summed in place over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


def pick_dtype(name, kind):
    """auto: bfloat16 where the hardware really has it, float16 on older GPUs, else float32."""
    if name == "auto" and kind == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif name == "auto":
        info = Path("/proc/cpuinfo")
        flags = info.read_text().split() if kind == "cpu" and info.is_file() else ()
        name = "bfloat16" if {"amx_bf16", "avx512_bf16"} & set(flags) else "float32"

    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {name} is not known: use auto, float32, bfloat16 or float16")
    if name == "float16" and kind != "cuda" or name == "bfloat16" and kind == "mps":
        raise UserError(f"--dtype {name} is not for --device {kind}: use --dtype float32")
    return getattr(torch, name)


class StopSignal:
    """SIGTERM and SIGINT ask the run to finish its step and write a checkpoint; a second stops at once."""

    def __init__(self):
        self.asked = False                                 # this process; `agree` asks them all
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, number, _):
        self.asked = True
        signal.signal(number, signal.SIG_DFL)

    def agree(self, norm, place):
        """norm: the gradient's, () -> it as a float, and whether any process was asked to stop: all of them
        then stop after the same step. The one host read of a step."""
        norm, asked = place.sum(torch.stack([norm / place.world, norm.new_tensor(self.asked)])).tolist()
        return norm, asked > 0


# ------------------------------------------------------------------------------------------- the run's folder

def check_batches(train_cfg, model_cfg, world):
    """Batch, micro-batch and processes must fit each other."""
    batch, micro = train_cfg.batch_size, train_cfg.micro_batch
    if min(batch, micro, train_cfg.steps) < 1:
        raise UserError("--steps, --batch_size and --micro_batch must be at least 1")
    if batch % (micro * world):
        raise UserError(f"--batch_size {batch} can't be divided among {world} processes with --micro_batch "
                        f"{micro}: use a multiple of {micro * world}, or another --micro_batch")
    if micro == 1 and (model_cfg.task == "pretrain" and model_cfg.itm or model_cfg.task == "irtr"):
        raise UserError("--micro_batch 1 leaves no other row to take a wrong picture or text from: use 2"
                        + (", or --itm 0" if model_cfg.task == "pretrain" else ""))
    if not 0 <= train_cfg.seed < 2 ** 63:
        raise UserError(f"--seed {train_cfg.seed} must lie in 0 … 2^63 - 1")


def in_steps(train_cfg, run_cfg, samples):
    """Lengths that were given in epochs, in steps -> both configurations, for so many training samples."""
    epoch = samples / train_cfg.batch_size
    steps = round(train_cfg.epochs * epoch) or train_cfg.steps
    every = max(1, round(epoch))
    return replace(train_cfg, steps=steps), replace(run_cfg, eval_every=run_cfg.eval_every or every,
                                                    save_every=run_cfg.save_every or every)


def open_run(run_cfg, settings):
    """Start or continue the run in --out, and lock it against a second run: the lock ends with the process.
    settings: the dict of config.json. A run that is continued must keep all of them but those under "run"
    (device and logging). -> the path of its newest checkpoint, or None."""
    out, config = Path(run_cfg.out), Path(run_cfg.out) / "config.json"
    settings = json.loads(json.dumps(settings))
    if not config.is_file():
        if out.is_dir() and any(file.name != "lock" for file in out.iterdir()):
            raise UserError(f"{out} is not empty and holds no run: choose another --out")
    elif not run_cfg.resume and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        raise UserError(f"{out} holds another run: go on with it by --resume, or choose another --out")
    else:
        try:
            there = json.loads(config.read_text())
            changed = [f"{name} {there.get(part, {}).get(name)} (now {value})" for part in settings
                       for name, value in settings[part].items()
                       if part != "run" and there.get(part, {}).get(name) != value]
        except (ValueError, AttributeError):
            raise UserError(f"{config} is damaged: choose another --out") from None
        if changed:
            raise UserError(f"{out} was started with other settings: {', '.join(changed)}; give the same, or "
                            "choose another --out")

    try:
        out.mkdir(parents=True, exist_ok=True)
        if sys.platform != "win32":
            lock(out)
        checkpoint = newest_checkpoint(out) if config.is_file() else None
        write_whole(config, lambda file: file.write(json.dumps(settings, indent=1).encode()))
    except OSError as error:
        raise UserError(f"{out} can't be written to ({error.strerror}): choose another --out") from None
    return checkpoint


def lock(out, held={}):
    """UserError where another process is at work in the folder `out`. Held until this process ends."""
    import fcntl                                           # Windows has none
    try:
        if out.resolve() not in held:
            file = open(out / "lock", "w")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held[out.resolve()] = file
    except BlockingIOError:
        raise UserError(f"another run is at work in {out}: wait for it, or choose another --out") from None


def write_whole(path, write):
    """Call write(file) on a file beside `path`, flush it to disk and rename it: a reader finds the old file
    or the new one, never half of one."""
    beside = Path(f"{path}.tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)                     # a disk that is full needs the room
        raise


# ------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(out, model, optimizer, scaler, step, best):
    """last.pt, whole or not at all; the one before stays as prev.pt."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
             "step": step, "best": best, "model_config": asdict(model.cfg)}
    write_whole(out / "next.pt", lambda file: torch.save(state, file))
    if (out / "last.pt").exists():
        os.replace(out / "last.pt", out / "prev.pt")
    os.replace(out / "next.pt", out / "last.pt")


def save_best(out, model, step):
    """best.pt: the weights alone."""
    state = {"model": model.state_dict(), "step": step, "model_config": asdict(model.cfg)}
    write_whole(out / "best.pt", lambda file: torch.save(state, file))


def load_checkpoint(path):
    """A checkpoint: tensors and plain containers, nothing else. UserError where it is missing or where its
    archive's own check sums say that it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise UserError(f"{path} is damaged: {damaged} does not have its check sum")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is no checkpoint that can be read ({error})") from None


def newest_checkpoint(out):
    """The path of a run's newest checkpoint that is whole, or None where none was written yet."""
    paths = [path for name in ("last.pt", "prev.pt") if (path := Path(out) / name).exists()]
    for path in paths:
        try:
            load_checkpoint(path)
            return path
        except UserError as error:
            if path == paths[-1]:
                raise UserError(f"no checkpoint in {out} can be read: {error}") from None
            print(f"warning: {error}; going on from {paths[-1]}", file=sys.stderr)


# ------------------------------------------------------------------------------------------- learning

def learner(model, train, train_cfg, run_cfg, place, checkpoint):
    """What a loop over the samples `train` needs besides the model, as `checkpoint` (a path or None) left it
    -> net (the model as it is called: compiled, wrapped), optimizer, gradient scaler, step, best score."""
    unread = unread_parameters(model, next(load(train, iter([(0, 0, np.arange(2) % train.n)]), 0, "cpu"))[3])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in unread)
    model.to(place.device)
    optimizer = torch.optim.AdamW(parameter_groups(model, train_cfg), lr=train_cfg.lr, eps=1e-8,
                                  betas=(0.9, train_cfg.beta2), fused=place.device.type != "mps")
    scaler = torch.amp.GradScaler(place.device.type, enabled=place.dtype == torch.float16)

    step, best = 0, -math.inf
    if checkpoint:
        state = load_checkpoint(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, best = state["step"], state["best"]

    net = torch.compile(model) if run_cfg.compile else model
    if place.world > 1:
        device = [place.device] if place.device.type == "cuda" else None
        net = DistributedDataParallel(net, device_ids=device, gradient_as_bucket_view=True)
    if place.main:
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(f"{size:.1f} million parameters on {place.world} × {place.device.type} in "
              f"{str(place.dtype)[6:]}; steps {step:,} to {train_cfg.steps:,}")
    return net, optimizer, scaler, step, best


def unread_parameters(model, batch):
    """The names of the parameters that no loss reads (the last layer's image stream without ITM, say): found
    by one step, on any batch, of a shadow of the model that has shapes and no numbers. DDP would wait for
    their gradients for ever."""
    with torch.device("meta"):
        shadow = type(model)(model.cfg)
    shadow.to("meta")({name: tensor.to("meta") for name, tensor in batch.items()})["loss"].backward()
    return {name for name, parameter in shadow.named_parameters() if parameter.grad is None}


def parameter_groups(model, train_cfg):
    """AdamW's groups: three rates (encoders, fusion, heads), and decay for matrices alone."""
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = name.split(".")[0]
        scale = {"vit": 1.0, "text": 1.0, "objectives": train_cfg.head_lr}.get(part, train_cfg.fusion_lr)
        decay = train_cfg.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return [{"params": parameters, "scale": scale, "weight_decay": decay}
            for (scale, decay), parameters in groups.items()]


def set_rate(optimizer, step, train_cfg):
    """Linear warm-up over a share of the steps, then linear decay to 0; each group at its own multiple."""
    warm = max(1, round(train_cfg.warmup * train_cfg.steps))
    rate = train_cfg.lr * min((step + 1) / warm, (train_cfg.steps - step) / max(1, train_cfg.steps - warm))
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    return rate


def give_up(skipped, step, out):
    """Called when a step was skipped because its gradient was not finite; the 20th in a row ends the run."""
    if skipped >= 20:
        raise UserError(f"the gradient was not finite in {skipped} steps up to {step}; what {out} holds is "
                        "from before: try a lower --lr, a longer --warmup or --dtype float32")


# ------------------------------------------------------------------------------------------- the log

class Log:
    """metrics.jsonl: one object a line. Opened at a checkpoint's step, it is cut back to that step."""

    def __init__(self, out, step):
        self.path = Path(out) / "metrics.jsonl"
        kept = [line for line in self.lines() if line["step"] <= step and line["split"] != "test"]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_whole(self.path, lambda file: file.write(text.encode()))

    def lines(self):
        """All whole lines, as dicts."""
        found = []
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(ValueError):      # a kill can leave half a line at the end
                    found.append(json.loads(line))
        return found

    def write(self, step, split, **values):
        plain = {name: round(value, 6) if math.isfinite(value) else None for name, value in values.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, "split": split, **plain}) + "\n")
