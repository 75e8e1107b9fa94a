"""The run's folder: opened and locked, atomic writes, checkpoints, resuming, the log."""
import atexit
import json
import math
import os
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from .config import TrainConfig, UserError, reading, require
from .distributed import DistEnv

# A line of metrics.jsonl as Log writes it: {"step": 20, "split": "train", "loss": 1.5, ...}
LINE = re.compile(r'{"step": \d{1,9}, "split": "\w+"'
                  r'(, "(\\.|[^"\\])*": (-?\d{1,20}(\.\d+)?(e[+-]\d+)?|null))*}')
CHECKPOINTS = ("new.pt", "last.pt", "prev.pt")     # new.pt: left by a kill between two renames
LOCKS: list = []                  # open lock files; they lock their folders until this process ends


# --------------------------------------------------------------------------------------- the folder

def check_run_dir(out: Path, resume: bool) -> None:
    """Raise UserError if `out` holds something that this run must not overwrite."""
    if (out / "config.json").is_file():
        require(resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),    # restarted
                f"{out} holds another run: continue it with --resume, or choose another --out")
    elif out.is_dir():
        # A run that was killed at its start has left these.
        require({file.name for file in out.iterdir()} <= {"lock", "config.json.tmp"},
                f"{out} is not empty and holds no run: choose another --out")


def open_run_dir(out: Path, resume: bool) -> Path | None:
    """Make the run's folder and lock it against other runs -> its newest whole checkpoint, or None

    A folder in which no run was started, because of a mistake, is removed when Python ends (under
    torchrun it stays, empty but for its lock, and may be used)."""
    check_run_dir(out, resume)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if sys.platform != "win32":
            import fcntl                                   # Windows has none
            LOCKS.append(open(out / "lock", "w"))
            fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run uses {out}: wait, or choose another --out") from None
    except OSError as error:
        raise UserError(f"{out} can't be written ({error.strerror}): use another --out") from None
    atexit.register(remove_unused_run_dir, out)
    return latest_valid_checkpoint(out, *CHECKPOINTS)


def remove_unused_run_dir(out: Path) -> None:
    """Remove a run's folder that holds nothing but its lock."""
    if out.is_dir() and [file.name for file in out.iterdir()] == ["lock"]:
        (out / "lock").unlink()
        out.rmdir()


def saved_settings(out: Path) -> dict | None:
    """The settings in a run's config.json, or None if there is none."""
    path = out / "config.json"
    if not path.is_file():
        return None
    with reading(path):
        return {part: dict(values) for part, values in json.loads(path.read_text()).items()}


def check_same_settings(out: Path, settings: dict[str, dict]) -> None:
    """Raise UserError if a resumed run has other settings. Those under "run" may change, and the
    paths of first weights."""
    saved, changed = saved_settings(out), []
    with reading(out / "config.json"):
        for part in settings.keys() - {"run"} if saved else ():
            for name, value in json.loads(json.dumps(settings[part])).items():
                if (old := saved.get(part, {}).get(name)) != value and name[:4] != "init":
                    changed.append(f"{name} {old!r:.60} (now {value!r:.60})")
    require(not changed, f"{out} was started with other settings: {', '.join(sorted(changed))}; "
            "give the same, or choose another --out")


def save_settings(out: Path, settings: dict[str, dict], tokenizer) -> None:
    """Write config.json and tokenizer.json, and make the folder of the plots."""
    text = json.dumps(settings, indent=1)
    write_atomic(out / "config.json", lambda file: file.write(text.encode()))
    write_atomic(out / "tokenizer.json", lambda file: file.write(tokenizer.json.encode()))
    (out / "plots").mkdir(exist_ok=True)                   # last: config.json makes it a run


def write_atomic(path: Path | str, write: Callable[[BinaryIO], Any]) -> None:
    """Call write(file) on a temporary file, then rename it: readers never see half a file.

    UserError if the disk is full or may not be written to."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:            # the latter is torch.save's for a full disk
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} can't be written ({reason}): earlier files are intact; free some "
                        "space, then --resume, or choose another folder") from None
    finally:
        temporary.unlink(missing_ok=True)                  # a full disk needs the room


# -------------------------------------------------------------------------------------- checkpoints

def save_weights(path: Path, model: nn.Module, step: int, **more) -> None:
    """Write the weights, the step, the model's settings, and `more`."""
    state = {"model": model.state_dict(), "step": step, "model_config": asdict(model.cfg)} | more
    write_atomic(path, lambda file: torch.save(state, file))


def save_checkpoint(out: Path, model: nn.Module, optimizer, scaler, step: int, best: float) -> None:
    """Write last.pt; the one before stays as prev.pt."""
    states = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    save_weights(out / "new.pt", model, step, best=best, **states)
    if (out / "last.pt").exists():
        os.replace(out / "last.pt", out / "prev.pt")
    os.replace(out / "new.pt", out / "last.pt")


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint: tensors and plain containers only. UserError if it is damaged."""
    with reading(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        require(not damaged, f"{path} is damaged: entry {damaged} does not match its checksum")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def load_training_state(path: Path, model: nn.Module, optimizer, scaler) -> tuple[int, float]:
    """Load a checkpoint into the three -> its step, its best score. UserError if it doesn't fit."""
    with reading(path):
        state = load_checkpoint(path)
        model.load_state_dict(state["model"])
        # Rates and decay come from the settings, the moments from the file.
        state["optimizer"]["param_groups"] = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(state["optimizer"])
        # The scaler's state is empty where another dtype was used.
        scaler.load_state_dict(state["scaler"] or scaler.state_dict())
        fits = state["step"] >= 0
        for parameter, moments in optimizer.state.items():
            shapes = {moments["exp_avg"].shape, moments["exp_avg_sq"].shape}
            fits &= shapes == {parameter.shape} and moments["step"].ndim == 0
        require(fits, f"{path} was written by another run: choose another --out")
        return int(state["step"]), float(state["best"])


def latest_valid_checkpoint(out: Path, *names: str) -> Path | None:
    """The first checkpoint of `names` that exists and is whole, or None.

    UserError if all that are there are damaged."""
    paths = [out / name for name in names if (out / name).exists()]
    for path in paths:
        try:
            load_checkpoint(path)
            return path
        except UserError as error:
            require(path != paths[-1], f"no checkpoint in {out} can be read: {error}")
            print(f"warning: {error}; trying the next one", file=sys.stderr)
    return None


def load_best(out: Path, dist_env: DistEnv) -> dict:
    """The checkpoint of the best score; the last one where it is missing or damaged, and said."""
    path = None
    if dist_env.is_main:
        path = latest_valid_checkpoint(out, "best.pt", "last.pt")
        require(path, f"{out} holds no checkpoint to test: continue it with --resume")
    return load_checkpoint(dist_env.broadcast(path))


# ------------------------------------------------------------------------------------------ the log

class Log:
    """metrics.jsonl, one JSON object a line. Opening it at a step drops later lines, but those of
    tests, which nothing makes again."""

    def __init__(self, out: Path | str, step: float):
        self.path = Path(out) / "metrics.jsonl"
        kept = [line for line in read_log(out) if line["step"] <= step or line["split"] == "test"]
        text = "".join(f"{json.dumps(line)}\n" for line in kept)
        write_atomic(self.path, lambda file: file.write(text.encode()))

    def write(self, step: int, split: str, **values: float) -> None:
        """Append a line; numbers that are not finite become null."""
        plain = {name: round(value, 10) if math.isfinite(value) else None
                 for name, value in values.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, "split": split, **plain}) + "\n")


def read_log(out: Path | str) -> list[dict]:
    """The lines of a run's metrics.jsonl as dicts, without lines that a power cut has torn."""
    path = Path(out) / "metrics.jsonl"
    text = path.read_text(errors="replace") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines() if LINE.fullmatch(line)]


def format_metrics(metrics: dict[str, float]) -> str:
    """Metrics in one line for the terminal, without the recall of each class."""
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if " " not in name)


def progress_line(step: int, train_cfg: TrainConfig, lr: float, speed: float,
                  losses: dict[str, float]) -> str:
    """A line for a log that is no terminal: losses, rate, samples/s, GPU memory, remaining time."""
    seconds = (train_cfg.steps - step) * train_cfg.batch_size / speed
    memory = f"  {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" * torch.cuda.is_initialized()
    return (f"step {step:,} of {train_cfg.steps:,}  {format_metrics(losses)}  lr {lr:.2e}  "
            f"{speed:,.0f} samples/s{memory}  {timedelta(seconds=round(seconds))} left")
