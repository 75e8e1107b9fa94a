"""What both scripts call: processes and devices, parameter groups and rates, checkpoints, the log."""
import contextlib
import json
import math
import os
import re
import sys
import zipfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from .config import UserError
from .data import Pack


# ------------------------------------------------------------------------------------------- processes

def run(main):
    """Call main(). A mistake of the user's making ends in one sentence and status 2, without a traceback."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:           # what torch raises is a RuntimeError
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate", str(error)):
            raise
        print(f"{name}: out of memory: use a smaller --micro_batch", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def launch(processes):
    """Become torchrun: start this very command line in `processes` processes on this machine."""
    sys.stdout.flush()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                              "--nproc-per-node", str(processes), *sys.argv])


def under_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ


class Place:
    """Where this process computes: rank, world, main (is it rank 0?), device, dtype (of matrix products)."""

    def __init__(self, run_cfg):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        kind = run_cfg.device
        if kind == "auto":
            kind = "cuda" if torch.cuda.is_available() else "cpu"
        if kind not in ("cuda", "cpu", "mps"):
            raise UserError(f"--device {kind} is not known: use auto, cuda, cpu or mps")
        if kind == "mps" and not torch.backends.mps.is_available():
            raise UserError("--device mps: there is no such device here; use --device cpu")

        if kind == "cuda":
            local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            wanted = max(local + 1, run_cfg.gpus)
            if wanted > there:
                raise UserError(f"{wanted} wanted, {there or 'no'} GPU is there: use fewer, or --device cpu")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device(kind)
        self.dtype = pick_dtype(run_cfg.dtype, self.device)

    def join(self, timeout):
        """Meet the other processes of a torchrun; timeout in seconds."""
        if under_torchrun() and not dist.is_initialized():
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
        names = self.from_main(lambda: sorted(sums))
        shape = self.from_main(lambda: sums[names[0]].shape)
        zero = torch.zeros(shape, device=self.device)
        table = torch.stack([sums.get(name, zero).float() for name in names])          # (names, *shape)
        if self.world > 1:
            dist.all_reduce(table)
        return dict(zip(names, table.tolist()))


def pick_dtype(name, device):
    """auto: bfloat16 where the hardware really has it, float16 on older GPUs, else float32."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name in known:
        if name == "float16" and device.type != "cuda" or name != "float32" and device.type == "mps":
            raise UserError(f"--dtype {name} is not for --device {device.type}: use --dtype float32")
        return known[name]
    if name != "auto":
        raise UserError(f"--dtype {name} is not known: use auto, float32, bfloat16 or float16")

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and any(flag in _cpu_flags() for flag in ("amx_bf16", "avx512_bf16")):
        return torch.bfloat16
    return torch.float32


def _cpu_flags():
    info = Path("/proc/cpuinfo")
    return info.read_text().split() if info.is_file() else []


# ------------------------------------------------------------------------------------------- the run's folder

def open_packs(names, size, task="pretrain"):
    """--data -> the packs. The name `phantoms` stands for the embedded data set, drawn on first use."""
    packs = []
    for name in names.split(","):
        if name == "phantoms":
            name = f"packs/phantoms-{task}-{size}"
            if not Path(name).exists():
                from data import phantoms, prepare         # nothing else in the package needs them
                prepare.pack(phantoms.rows(None, task), out=name, name="phantoms", task=task, size=size)
        packs.append(Pack(name))
    return packs


def check_batches(train_cfg, model_cfg, world):
    """Batch, micro-batch and processes must fit each other."""
    batch, micro = train_cfg.batch_size, train_cfg.micro_batch
    if min(batch, micro, train_cfg.steps) < 1:
        raise UserError("--steps, --batch_size and --micro_batch must be at least 1")
    if batch % (micro * world):
        raise UserError(f"--batch_size {batch} can't be divided among {world} processes with --micro_batch "
                        f"{micro}: use a multiple of {micro * world}, or another --micro_batch")
    if micro == 1 and model_cfg.task == "pretrain" and model_cfg.itm:
        raise UserError("--micro_batch 1 leaves no other row to take a wrong picture from: use 2, or --itm 0")
    if not 0 <= train_cfg.seed < 2 ** 63:
        raise UserError(f"--seed {train_cfg.seed} must lie in 0 … 2^63 - 1")


def open_run(run_cfg, settings):
    """Start or continue the run in --out. settings: the dict of config.json. A run that is continued must
    keep them all but those under "run" (device and logging). -> the path of its newest checkpoint, or
    None."""
    out, config = Path(run_cfg.out), Path(run_cfg.out) / "config.json"
    settings = json.loads(json.dumps(settings))
    if not config.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out} is not empty and holds no run: choose another --out")
    elif not run_cfg.resume and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        raise UserError(f"{out} holds another run: go on with it by --resume, or choose another --out")
    else:
        try:
            there = json.loads(config.read_text())
            changed = [f"{name} {there[part].get(name)} (now {value})" for part in settings if part != "run"
                       for name, value in settings[part].items() if there[part].get(name) != value]
        except (ValueError, KeyError, AttributeError):
            raise UserError(f"{config} is damaged: choose another --out") from None
        if changed:
            raise UserError(f"{out} was started with other settings: {', '.join(changed)}; give the same, or "
                            "choose another --out")

    checkpoint = newest_checkpoint(out) if config.is_file() else None
    out.mkdir(parents=True, exist_ok=True)
    write_whole(config, lambda file: file.write(json.dumps(settings, indent=1).encode()))
    return checkpoint


def write_whole(path, write):
    """Call write(file) on a file beside `path`, flush it to disk and rename it: a reader finds the old file or the
    new one, never half of one."""
    beside = Path(f"{path}.tmp")
    with open(beside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


# ------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(out, state):
    """last.pt, whole or not at all; the one before stays as prev.pt."""
    write_whole(out / "next.pt", lambda file: torch.save(state, file))
    if (out / "last.pt").exists():
        os.replace(out / "last.pt", out / "prev.pt")
    os.replace(out / "next.pt", out / "last.pt")


def check_sums(path):
    """UserError where a checkpoint is missing or its archive's own check sums say that it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no checkpoint that can be read ({error})") from None
    if damaged:
        raise UserError(f"{path} is damaged: {damaged} does not have its check sum")


def load_checkpoint(path):
    """A checkpoint: tensors and plain containers, nothing else. UserError where it is missing or damaged."""
    check_sums(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is no checkpoint that can be read ({type(error).__name__})") from None


def newest_checkpoint(out):
    """The path of a run's newest checkpoint that is whole, or None where none was written yet."""
    paths = [path for name in ("last.pt", "prev.pt") if (path := Path(out) / name).exists()]
    for path in paths:
        try:
            check_sums(path)
            return path
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
    if paths:
        raise UserError(f"no checkpoint in {out} can be read: choose another --out")
    return None


# ------------------------------------------------------------------------------------------- learning

def unread_parameters(model_class, cfg):
    """The names of the parameters that no loss reads (the last layer's image stream without ITM, say): found
    by one step of a shadow model that has shapes and no numbers. DDP would wait for their gradients for
    ever."""
    with torch.device("meta"):
        model = model_class(cfg)
    model = model.to("meta").train()
    rows, length, patches = 2, 4, (cfg.image_size // cfg.patch_size) ** 2

    def whole(*shape):
        return torch.zeros(*shape, dtype=torch.long, device="meta")

    batch = {name: whole(rows, length) for name in ("text_ids", "text_mask", "mlm_ids", "mlm_labels")}
    batch |= {name: whole(rows) for name in ("itm_index", "mlm_positions", "vqa_labels", "cls_labels")}
    batch |= {"false_text_index": whole(rows, 1), "mim_noise": torch.zeros(rows, patches, device="meta"),
              "image": torch.zeros(rows, 3, cfg.image_size, cfg.image_size, device="meta")}
    model(batch)["loss"].backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}


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
        kept = [line for line in self.lines() if line["step"] <= step]
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
