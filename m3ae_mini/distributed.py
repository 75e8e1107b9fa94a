"""Processes, devices, stop signals and error messages."""
import ctypes
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .config import RunConfig, UserError, require

# Errors of torch that are not bugs, as patterns, and what to tell the user instead.
OUT_OF_MEMORY = ("out of memory: continue with --grad_checkpointing --resume, or start anew with a "
                 "smaller --micro_batch")
PEER_IS_GONE = ("another process of this run has ended or hangs: look at its messages, then "
                "continue with --resume")
OLD_DRIVER = ("the GPU or its driver is too old for this build of torch: update the driver, "
              "install torch's build for an older CUDA (cu126), or use --device cpu")
KNOWN_ERRORS = {
    "MemoryError|out of memory|can't allocate|ALLOC_FAILED": OUT_OF_MEMORY,
    "driver.{0,40} too old|no kernel image": OLD_DRIVER,
    "(?i)timed? ?out|connection .*(closed|reset)|broken pipe|NCCL (error|comm)": PEER_IS_GONE}
REPEAT_SECONDS = 5.0                     # seconds in which further signals count as the first one's


# ---------------------------------------------------------------------------------------- processes

class DistEnv:
    """Where this process runs: rank, world_size, is_main (rank 0), device, dtype (matmuls)."""

    def __init__(self, run_cfg: RunConfig):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self.device = pick_device(run_cfg)
        self.dtype = pick_dtype(run_cfg.dtype, self.device.type)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            # The same attention kernels on every GPU; cuDNN's lack some shapes (single queries).
            torch.backends.cuda.enable_cudnn_sdp(False)
        if started_by_torchrun() and not dist.is_initialized():
            self._init_process_group(run_cfg.timeout)

    def _init_process_group(self, seconds: int) -> None:
        timeout = timedelta(seconds=seconds)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # On one node torchrun's restarts share a store that holds the addresses of ended processes.
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, None, timeout, world_size, rank, store)

    def autocast(self) -> AbstractContextManager:
        """A context in which matrix products have self.dtype; it does nothing for float32."""
        return torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)

    def print(self, text: str) -> None:
        """Print once, on rank 0."""
        if self.is_main:
            print(text)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Rank 0 runs the block first, then the others. All ranks raise a UserError of rank 0."""
        if not self.is_main and (error := self.broadcast(None)):
            raise error
        try:
            yield
        except UserError as error:
            if self.is_main:
                self.broadcast(error)
            raise
        if self.is_main:
            self.broadcast(None)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The tensor, summed in place over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def reduce_sums(self, sums: dict[str, Tensor]) -> dict[str, Any]:
        """{name: tensor} summed over all ranks, as floats. A missing name counts as 0."""
        shape = next(iter(sums.values())).shape if sums else None
        names, shape = self.broadcast((sorted(sums), shape))
        rows = [sums.get(name, torch.zeros(shape)).float().to(self.device) for name in names]
        return dict(zip(names, self.all_reduce(torch.stack(rows)).tolist()))


def started_by_torchrun() -> bool:
    return "RANK" in os.environ


def num_processes(run_cfg: RunConfig) -> int:
    """How many processes this run has, or will have. UserError if srun started several alone."""
    if started_by_torchrun():
        return int(os.environ["WORLD_SIZE"])
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")    # of srun; a batch script has none
    require(tasks == "1", f"srun started {tasks} independent tasks: let srun start torchrun, one "
            "task per node (README, Scale)")
    require(not run_cfg.gpus or sys.platform != "win32",
            "--gpus needs Linux or macOS: leave it out on Windows")
    return max(1, run_cfg.gpus)


def launch_torchrun(num_processes: int) -> None:
    """Replace this process by torchrun, which starts this command line `num_processes` times."""
    sys.stdout.flush()
    # A batch system may have given this process a few of the machine's cores.
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
    # torchrun kills what has not ended so many seconds after a signal; base takes a while to save.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                              "--nproc-per-node", str(num_processes), *sys.argv])


# ------------------------------------------------------------------------------------------ devices

def pick_device(run_cfg: RunConfig) -> torch.device:
    """The device of this process. UserError if there are fewer GPUs than processes."""
    num_gpus, local_rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    require(run_cfg.device in ("auto", "cuda", "cpu"), f"--device {run_cfg.device}: cuda or cpu?")
    if run_cfg.device == "cpu" or run_cfg.device == "auto" and not num_gpus and not run_cfg.gpus:
        return torch.device("cpu")
    if started_by_torchrun() and num_gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        local_rank = 0                                     # each process sees its own GPU alone
    wanted = max(local_rank + 1, 0 if started_by_torchrun() else run_cfg.gpus)
    require(wanted <= num_gpus, f"{wanted} GPUs are needed, {num_gpus or 'none'} available: "
            "use fewer, or --device cpu")
    return torch.device("cuda", local_rank)


def pick_dtype(name: str, device: str) -> torch.dtype:
    """auto: bfloat16 where the hardware computes in it, float16 on older GPUs, else float32."""
    if name == "auto" and device == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif name == "auto":
        cpu_info = Path("/proc/cpuinfo")                   # Linux has it
        flags = cpu_info.read_text().split() if cpu_info.exists() else []
        name = "bfloat16" if {"amx_bf16", "avx512_bf16"} & set(flags) else "float32"
    known = ["float32", "bfloat16", "float16"][:3 if device == "cuda" else 2]
    require(name in known, f"--device {device} has no --dtype {name}: use auto, {', '.join(known)}")
    return getattr(torch, name)


def keep_freed_memory() -> None:
    """Freed memory stays with this process, on Linux. By default glibc gives large tensors back at
    once, and every step on a CPU pays for fresh pages of zeros (tests/README.md, Speed)."""
    if sys.platform == "linux":
        for option, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX 0, M_TRIM_THRESHOLD -1: see malloc.h
            ctypes.CDLL(None).mallopt(option, value)


# ---------------------------------------------------------------------------------- signals, errors

class StopSignal:
    """SIGTERM and SIGINT ask the run to finish its step and save a checkpoint.

    A second signal stops at once. Under torchrun signals within REPEAT_SECONDS count as one: batch
    systems and Ctrl-C signal torchrun and all ranks, and torchrun forwards its own."""

    def __init__(self):
        self.requested = False                             # on this rank; `sync` asks all
        self.time = 0.0                                    # of the first signal
        self.save: Callable = lambda: None                 # in a validation: saves at once
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: Any) -> None:
        if self.requested:
            if time.monotonic() - self.time >= (REPEAT_SECONDS if started_by_torchrun() else 0):
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.requested, self.time = True, time.monotonic()
        self.save()
        self.time = time.monotonic()

    @contextmanager
    def saving_at_once(self, save: Callable) -> Iterator[None]:
        """In this block, a validation, the first signal calls save() before the block goes on. A
        signal that came in the step before it does so, too."""
        self.save = save
        if self.requested:
            save()
        yield
        self.save = lambda: None

    def sync(self, norm: Tensor, dist_env: DistEnv) -> tuple[float, bool]:
        """The gradient's norm () -> (the norm as a float, whether any rank got a stop signal)

        Both travel in one all-reduce and one host read a step."""
        both = torch.stack([norm / dist_env.world_size, norm.new_full((), self.requested)])
        norm, requested = dist_env.all_reduce(both).tolist()
        return norm, requested > 0


def run(main: Callable) -> Any:
    """Call main(). A UserError ends in one sentence and exit status 2, without a traceback."""
    sentence = None
    try:
        result = main()
    except UserError as error:
        sentence = str(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:                               # a full disk, a folder without rights
        sentence = f"{error.filename or 'a file'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        text = f"{error!r} {error}"
        known = [sentence for pattern, sentence in KNOWN_ERRORS.items() if re.search(pattern, text)]
        if not known and not dist.is_initialized():
            raise
        if not known:
            traceback.print_exc()
            exit_process(1)
        sentence = known[0]
    if sentence is None:
        if dist.is_initialized():
            dist.destroy_process_group()
            exit_process(0)
        return result

    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    if sentence == PEER_IS_GONE:
        time.sleep(1)                                    # let torchrun find the ended process first
    exit_process(2)


def exit_process(status: int) -> None:
    """Exit with `status`. Under torchrun, skip Python's clean-up.

    After an error it would wait for the other ranks. After success it would race with gloo's
    threads: one that still holds a tensor then aborts the process."""
    if started_by_torchrun():
        print(end="", flush=True)
        os._exit(status)
    sys.exit(status)
