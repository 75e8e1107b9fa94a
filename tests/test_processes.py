"""Several processes: micro-batches that fit, --gpus N, stop signals, mistakes and peers that are
gone.

Runs are forks of this process, which has torch loaded. `--long` starts torchrun itself, 20 times,
and a save that takes longer than torchrun waits by default."""
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.run as torchrun
from tqdm import tqdm

import train
from m3ae_mini import checkpoint, distributed, evaluate
from m3ae_mini.config import (
    FEW_NEGATIVES, PRESETS, ModelConfig, RunConfig, TrainConfig, UserError, fit_micro_batch,
    preset_values)
from test_loader import CAPTIONS, write_pack
from test_train import SMALL, logged, losses, started

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("pretrain", "vqa", "cls", "irtr")
MATCHING = ("pretrain", "irtr")        # tasks whose wrong images and texts are other rows
TINY = SMALL[:SMALL.index("--batch_size")] + SMALL[SMALL.index("--device"):]  # batch of the preset
LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """These tests may run under a batch system themselves."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs") / "pack"
    write_pack(folder, CAPTIONS, {"train": 40, "val": 8})
    with pytest.MonkeyPatch.context() as patch:            # torch imports much at first use: once,
        started(patch, *TINY, "--data", folder, "--steps", 1, "--test_samples", 0,   # for all forks
                "--out", folder.parent / "first")
    return folder


# ----------------------------------------------------------------------------------- micro-batches

def fitted(preset, task, world_size, given=None, saved=None, **changes):
    """fit_micro_batch on a preset, as the scripts call it -> (TrainConfig, its lines)"""
    values = {"task": task, **changes}
    if given:
        values["micro_batch"] = given
    cfg, train_cfg = (cls(**preset_values(cls, preset, task, values))
                      for cls in (ModelConfig, TrainConfig))
    return train_cfg, fit_micro_batch(cfg, train_cfg, world_size, given, saved)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits(preset, task, world_size):
    """The largest micro-batch that divides; a line exactly where it is not the preset's."""
    train_cfg, lines = fitted(preset, task, world_size)
    before = TrainConfig(**preset_values(TrainConfig, preset, task))
    batch_size, wanted, size = train_cfg.batch_size, before.micro_batch, train_cfg.micro_batch
    assert batch_size == before.batch_size and batch_size % (size * world_size) == 0
    larger = range(size + 1, wanted + 1)
    assert not [n for n in larger if batch_size % (n * world_size) == 0]
    assert world_size > 1 or size == wanted and not lines

    says = [line for line in lines if re.match(f"--micro_batch {size} .*{wanted}", line)]
    assert len(says) == (size != wanted)
    warned = [line for line in lines if line.startswith("warning: ")]
    assert len(warned) == (size < FEW_NEGATIVES and task in MATCHING)
    assert len(lines) == len(says) + len(warned)

    # One process with that flag has the same micro-batches.
    one, lines = fitted(preset, task, 1, given=size)
    assert (one.batch_size, one.micro_batch) == (batch_size, size)
    assert not [line for line in lines if line.startswith("--micro_batch")]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("given", [None, 4])
def test_few_negatives_are_warned_of(task, given):
    """And the flags that the warning names mend it."""
    _, lines = fitted("tiny", task, 8, given, batch_size=32)
    warned = [line for line in lines if line.startswith("warning: --micro_batch 4 ")]
    assert len(warned) == (task in MATCHING)
    if warned:
        assert re.search(": use 8, .*--batch_size .*64$", warned[0])
        for size, rows in (None, 24), (8, 8):
            train_cfg, lines = fitted("tiny", task, 8, size, batch_size=3 * 64)
            assert train_cfg.micro_batch == rows
            assert not [line for line in lines if line.startswith("warning")]


def test_few_negatives_matter_to_matching_alone():
    for weights, count in (dict(itm=0.0), 0), (dict(itm=0.0, itc=1.0), 1), (dict(itc=1.0), 1):
        _, lines = fitted("tiny", "pretrain", 8, 4, batch_size=32, **weights)
        assert len(lines) == count


@pytest.mark.parametrize("task", TASKS)
def test_a_micro_batch_that_is_given_must_divide(task):
    train_cfg, lines = fitted("tiny", task, 4, 16, batch_size=64)
    assert train_cfg.micro_batch == 16 and not lines
    with pytest.raises(UserError, match="^--batch_size 64 .*--micro_batch 32 .*4 processes: "
                       "1 or 2 would do$"):
        fitted("tiny", task, 4, 32, batch_size=64)
    with pytest.raises(UserError, match="--micro_batch 48 .*: no number of them would do$"):
        fitted("tiny", task, 1, 48, batch_size=64)
    with pytest.raises(UserError, match="^--batch_size 64 .*3 processes: 1 or 2 or 4 or "):
        fitted("tiny", task, 3, batch_size=64)


@pytest.mark.parametrize("batch_size, world_size", [(64, 3), (64, 48), (74, 2), (6, 6), (96, 96)])
@pytest.mark.parametrize("task", TASKS)
def test_the_numbers_of_processes_that_are_named_fit(task, batch_size, world_size):
    """Matching needs two rows a micro-batch: numbers that leave it one are not named, and no
    micro-batch of one is chosen."""
    try:
        train_cfg, _ = fitted("tiny", task, world_size, batch_size=batch_size)
        assert train_cfg.micro_batch > (task in MATCHING)
    except UserError as error:
        counts = str(error).split("processes: ")[1].removesuffix(" would do").split(" or ")
        assert counts[0] == "1" and str(world_size) not in counts
        for count in map(int, counts):
            fitted("tiny", task, count, batch_size=batch_size)


def test_a_run_that_goes_on_keeps_its_own():
    saved = {"train": {"micro_batch": 16}}
    for world_size in 1, 2, 4:
        train_cfg, lines = fitted("tiny", "pretrain", world_size, saved=saved)
        assert train_cfg.micro_batch == 16 and not lines
    for world_size in 3, 8:
        with pytest.raises(UserError, match=f"--micro_batch 16 .*{world_size} processes: "
                           "1 or 2 or 4 would do$"):
            fitted("tiny", "pretrain", world_size, saved=saved)
    train_cfg, _ = fitted("tiny", "pretrain", 2, given=8, saved=saved)     # refused later, by name
    assert train_cfg.micro_batch == 8


# ------------------------------------------------------------------------------- processes, forked

def fork(act, said=os.devnull, env={}):
    """Call act() in a fork of this process -> its process number. What it prints goes to `said`."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 70
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(120)                                      # it outlives no test
    try:
        tqdm.set_lock(threading.RLock())                   # its own: a kill keeps a shared one
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False)
                                  for number in (1, 2))
        os.chdir(ROOT)
        os.environ |= env
        act()
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(pid):
    """The exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(true, seconds=100):
    """Until true() is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def forking_torchrun(_, argv):
    """In place of os.execv: torchrun here, whose ranks are forks."""
    assert argv[1:3] == ["-m", "torch.distributed.run"]
    torchrun.main(["--start-method", "fork", "--run-path", *argv[3:]])
    sys.exit(0)


def training(*flags, prepare=lambda: None):
    """A function: `python train.py flags`, after prepare()."""
    def act():
        sys.argv = ["train.py", *map(str, flags)]
        os.execv = forking_torchrun
        leave = distributed.exit_process                   # a fork of torchrun's has to return
        distributed.exit_process = lambda status: leave(status) if status else None
        prepare()
        distributed.run(train.main)
    return act


def two_ranks(folder, act):
    """act() on two ranks -> their process numbers. What they print goes to said0 and said1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]),
               "WORLD_SIZE": "2"}
    return [fork(act, folder / f"said{rank}", env | {"RANK": str(rank)}) for rank in range(2)]


# -------------------------------------------------------------------------------------- tiny starts

@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_gpus_starts_so_many_processes(pack, tmp_path, monkeypatch, gpus, request):
    """Two steps of the preset's batch: the losses are those of one process with the micro-batch
    that the line names. torch warns of nothing that will go away."""
    if gpus == 8 and not request.config.getoption("--long"):
        pytest.skip("--long")
    flags = [*TINY, "--data", pack, "--steps", 2, "--test_samples", 0]
    several = training(*flags, "--out", tmp_path / "several", "--gpus", gpus,
                       prepare=lambda: warnings.simplefilter("error", FutureWarning))
    status = ended(fork(several, tmp_path / "said"))
    said = (tmp_path / "said").read_text()
    assert status == 0, said
    assert f"on {gpus} × cpu in float32" in said

    flag, changed = [], [line for line in said.splitlines() if line.startswith("--micro_batch")]
    assert len(changed) == (gpus > 2)                      # 64 rows, 32 a micro-batch
    if changed:
        _, same = changed[0].split("; one process with ")
        flag = same.removesuffix(" has the same losses").split()
        assert flag == ["--micro_batch", str(64 // gpus)]
    started(monkeypatch, *flags, *flag, "--out", tmp_path / "one")
    one, several = (torch.tensor(losses(tmp_path / name)) for name in ("one", "several"))
    assert one.shape == (2, 3) and (one - several).abs().max() < 1e-4


def test_another_folder_of_a_run_is_named_first(pack, tmp_path):
    """`python train.py`, then the same with more GPUs: the folder is the mistake, not its
    micro-batch."""
    flags = [*TINY, "--data", pack, "--steps", 1, "--test_samples", 0, "--out", tmp_path / "run"]
    assert ended(fork(training(*flags))) == 0
    said = tmp_path / "said"
    assert ended(fork(training(*flags, "--gpus", 4), said)) == 2
    assert "holds another run: continue it with --resume" in said.read_text()
    assert ended(fork(training(*flags, "--gpus", 4, "--resume"), said)) == 2
    assert said.read_text().endswith("4 processes: 1 or 2 would do\n")


def test_what_torchrun_is_started_with(monkeypatch):
    """The time that torchrun waits for a save, and the cores of each process; what the user has
    set stays."""
    calls = []
    monkeypatch.setattr(os, "execv", lambda *args: calls.append((args, dict(os.environ))))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "--gpus", "4"])
    for name, default, own in (("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300", "110"),
                               ("OMP_NUM_THREADS", "3", "2")):
        for value in None, own:
            monkeypatch.delenv(name, raising=False)
            if value:
                monkeypatch.setenv(name, value)
            distributed.launch_torchrun(4)
            (program, argv), env = calls.pop()
            assert env[name] == (value or default)
        monkeypatch.delenv(name)
    assert program == argv[0] == sys.executable
    args = torchrun.parse_args(argv[3:])
    assert args.standalone and args.nproc_per_node == "4" and args.training_script == "train.py"


# ------------------------------------------------------------------------------------- pre-emption

SCRIPT = """
import os, sys, time
sys.path.insert(0, {root!r})
import train
from m3ae_mini import checkpoint, distributed

if "RANK" in os.environ:
    with open({folder!r} + "/rank" + os.environ["RANK"], "w") as file:
        file.write(str(os.getpid()))

    # Both signals come in one step, where the process may answer them.
    sync = distributed.StopSignal.sync
    distributed.StopSignal.sync = lambda *args: time.sleep({step}) or sync(*args)
    save = checkpoint.save_checkpoint
    checkpoint.save_checkpoint = lambda *args: time.sleep({save}) or save(*args)
distributed.run(train.main)
"""


def preempted(pack, folder, start, order, number=signal.SIGTERM, step=1.0, save=0.0):
    """Two ranks under torchrun, all three signalled at once, in an order -> the checkpoint."""
    (folder / "script.py").write_text(SCRIPT.format(
        root=str(ROOT), folder=str(folder), step=step, save=save))
    command = [sys.executable, folder / "script.py", "--gpus", 2]
    env = dict(os.environ)
    if start == "torchrun":
        command[1:] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
                       folder / "script.py"]
        if save:
            env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "300"
    out = folder / "run"
    flags = [*SMALL, "--data", pack, "--out", out, "--steps", 9999, "--test_samples", 0]
    with open(folder / "said", "w") as said:
        process = subprocess.Popen(list(map(str, [*command, *flags])), env=env, stdout=said,
                                   stderr=said, start_new_session=True)
    try:
        log = out / "metrics.jsonl"
        wait_for(lambda: process.poll() is not None or log.exists() and len(logged(out)) > 1)
        ranks = [int((folder / f"rank{rank}").read_text()) for rank in range(2)]
        pids = [*ranks, process.pid] if order == "ranks first" else [process.pid, *ranks]
        for pid in pids:
            os.kill(pid, number)
        process.wait(100)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = (folder / "said").read_text()
    assert (out / "last.pt").exists(), said[-3000:]
    state = checkpoint.load_checkpoint(out / "last.pt")
    assert state["step"] == len(logged(out)) >= 2
    assert f"stopped after step {state['step']}; continue with --resume" in said
    return state


@pytest.mark.parametrize("start, order", [("gpus", "ranks first"), ("torchrun", "torchrun first")])
def test_a_signal_to_all_saves(pack, tmp_path, start, order):
    """As a batch system, or Ctrl-C, sends it: to torchrun and to every rank."""
    preempted(pack, tmp_path, start, order)


@pytest.mark.parametrize("trial", range(10))
@pytest.mark.parametrize("order", ["ranks first", "torchrun first"])
def test_a_signal_to_all_saves_each_time(pack, tmp_path, order, trial, request):
    if not request.config.getoption("--long"):
        pytest.skip("--long")
    preempted(pack, tmp_path, ("gpus", "torchrun")[trial % 2], order, step=trial // 2 * 0.1,
              number=(signal.SIGTERM, signal.SIGTERM, signal.SIGINT)[trial % 3])


@pytest.mark.parametrize("start", ["gpus", "torchrun"])
def test_a_save_of_35_seconds(pack, tmp_path, start, request):
    """torchrun's own default would kill it after 30."""
    if not request.config.getoption("--long"):
        pytest.skip("--long")
    preempted(pack, tmp_path, start, "ranks first", save=35)


def waiting_validation(folder):
    """Validations wait for the file `go` in `folder`; their ranks leave their numbers there."""
    pretraining = evaluate.pretraining

    def wait(*args):
        (folder / f"validates{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
        wait_for((folder / "go").exists)
        return pretraining(*args)
    evaluate.pretraining = wait


@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize("when", ["in the validation", "in the step before it"])
def test_a_signal_in_a_validation_saves_at_once(pack, tmp_path, gpus, when):
    """The checkpoint has the step before it while the validation still runs. If the run may end it,
    its score is saved, too."""
    sync, steps = distributed.StopSignal.sync, []
    early = when == "in the step before it"

    def signalled(self, norm, dist_env):
        steps.append(1)
        if early and len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return sync(self, norm, dist_env)

    def prepare():
        distributed.StopSignal.sync = signalled
        waiting_validation(tmp_path)

    out, ranks = tmp_path / "run", range(max(1, gpus))
    flags = [*SMALL, "--data", pack, "--out", out, "--steps", 9, "--eval_every", 3,
             "--test_samples", 0, *(["--gpus", gpus] if gpus else [])]
    pid = fork(training(*flags, prepare=prepare), tmp_path / "said")
    try:
        validate = [tmp_path / f"validates{rank}" for rank in ranks]
        wait_for(lambda: all(path.exists() and path.read_text() for path in validate))
        pids = [int(path.read_text()) for path in validate]
        if not early:
            assert not (out / "last.pt").exists()
            for rank_pid in pids:
                os.kill(rank_pid, signal.SIGTERM)
        wait_for((out / "last.pt").exists, 20)             # the validation waits all the while
        assert checkpoint.load_checkpoint(out / "last.pt")["step"] == 3 == len(logged(out))
        assert not logged(out, "val")
    finally:
        (tmp_path / "go").touch()
    assert ended(pid) == 0, (tmp_path / "said").read_text()
    line, state = logged(out, "val")[0], checkpoint.load_checkpoint(out / "last.pt")
    assert state["step"] == (3 if early else 4) and state["best"] == pytest.approx(line["score"])


@pytest.mark.parametrize("rank, seconds, stops", [
    ("0", [0, 0], False), ("0", [0, 0.1, 4.9], False), ("0", [0, 4.9, 5.1], True),
    (None, [0, 0], True), (None, [0, 99], True)])
def test_what_counts_as_a_second_signal(monkeypatch, rank, seconds, stops):
    """Under torchrun, which passes its own on, repeats within five seconds count as one."""
    clock, killed = [0.0], []
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(os, "kill", lambda *args: killed.append(args))
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    if rank:
        monkeypatch.setenv("RANK", rank)
    stop_signal = distributed.StopSignal()
    for at in seconds:
        assert not killed
        clock[0] = 1000.0 + at
        stop_signal.on_signal(signal.SIGTERM, None)
    assert stop_signal.requested and killed == [(os.getpid(), signal.SIGTERM)] * stops


def test_a_slow_save_in_a_validation_is_not_stopped_by_its_own_signal(monkeypatch):
    """torchrun's signal comes once more after a save of 35 seconds."""
    clock, saved = [1000.0], []
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(os, "kill", lambda *args: pytest.fail("stopped"))
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setenv("RANK", "0")

    def save():
        clock[0] += 35
        saved.append(clock[0])
    stop_signal = distributed.StopSignal()
    with stop_signal.saving_at_once(save):
        stop_signal.on_signal(signal.SIGTERM, None)
        stop_signal.on_signal(signal.SIGTERM, None)
    assert saved == [1035.0]


# ------------------------------------------------------------------------------------------- errors

def test_a_rank_leaves_without_the_clean_up_of_python(tmp_path):
    """Threads of gloo may still hold tensors then: one run in thousands was aborted by them."""
    def main():
        distributed.DistEnv(RunConfig(device="cpu"))
        dist.barrier()                                     # rank 0 holds the store of both

    def act():
        distributed.run(main)
        raise AssertionError("run() returned: Python's clean-up would follow")
    assert [ended(pid) for pid in two_ranks(tmp_path, act)] == [0, 0]


@pytest.mark.parametrize("error, status, words", [
    (UserError("use fewer of them"), 2, "train.py: use fewer of them\n"),
    (torch.OutOfMemoryError("CUDA out of memory."), 2, "train.py: out of memory: "),
    (dist.DistBackendError("NCCL error in: x"), 2, "train.py: another process of this run has "),
    (OSError(28, "No space left on device", "new.pt"), 2, "train.py: new.pt: No space left on "),
    (RuntimeError("shape '[2]' is invalid"), 1, "RuntimeError: shape '[2]' is invalid\n")])
def test_an_error_among_others_is_told_and_ends_the_process(tmp_path, error, status, words):
    """Others may wait in a collective: leaving the process group may hang, and is not tried."""
    def main():
        distributed.DistEnv(RunConfig(device="cpu"))
        dist.barrier()                                     # rank 0 holds the store of both
        dist.destroy_process_group = lambda: time.sleep(600)
        raise error

    def act():
        sys.argv = ["train.py"]
        distributed.run(main)
    pids = two_ranks(tmp_path, act)
    assert [ended(pid) for pid in pids] == [status, status]
    for rank in range(2):
        said = (tmp_path / f"said{rank}").read_text()
        assert words in said and ("Traceback" in said) == (status == 1)


NCCL = ("NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, {}, NCCL version "
        "2.21.5\n{}\nLast error:\n{}")
TEXTS = {
    distributed.OUT_OF_MEMORY: [
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB "
        "of which 1.2 GiB is free.",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)",
        NCCL.format("unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
                    "ncclUnhandledCudaError: Call to CUDA function failed.",
                    "Cuda failure 2 'out of memory'")],
    distributed.OLD_DRIVER: [
        "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
        "driver by downloading and installing a new version",
        "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors "
        "might be asynchronously reported at some other API call"],
    distributed.PEER_IS_GONE: [
        NCCL.format("remote process exited or there was a network error",
                    "ncclRemoteError: A call failed possibly due to a network error or a remote "
                    "process exiting prematurely.",
                    "socketProgressOpt: Call to recv from 10.1.1.2<33759> failed : Broken pipe"),
        "NCCL communicator was aborted on rank 1.",
        "NCCL communicator was aborted on rank 1. Original reason for failure was: Work: "
        "WorkNCCL(OpType=ALLREDUCE, Timeout(ms)=2000) timed out in call to wait().",
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, "
        "OpType=ALLREDUCE) ran for 600029 milliseconds before timing out.",
        "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d "
        "key-value store by store->get('0'), but store->get('0') got error: Socket Timeout",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer "
        "[127.0.0.1]:12345",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:589] Read error [10.1.1.2]:25266: "
        "Connection reset by peer",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:446] writev [10.1.1.2]:25266: "
        "Broken pipe",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting "
        "3000ms for recv operation to complete",
        "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown "
        "or crash?",
        "The client socket has timed out after 600000ms while trying to connect to (n0, 29500)."]}
BUGS = ["CUDA error: device-side assert triggered", "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
        "cpu!", "shape '[2, 3]' is invalid for input of size 5",
        "Expected to have finished reduction in the prior iteration before starting a new one.",
        "CUDA error: an illegal memory access was encountered"]


@pytest.mark.parametrize("sentence, text", [(sentence, text) for sentence, texts in TEXTS.items()
                                            for text in texts])
def test_known_errors(monkeypatch, capsys, sentence, text):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for kind in RuntimeError, dist.DistBackendError, torch.AcceleratorError:
        def fail():
            raise kind(text)
        with pytest.raises(SystemExit) as status:
            distributed.run(fail)
        assert status.value.code == 2
        assert capsys.readouterr().err == f"train.py: {sentence}\n"


@pytest.mark.parametrize("text", BUGS)
def test_unknown_errors_keep_their_traceback(text):
    def fail():
        raise RuntimeError(text)
    with pytest.raises(RuntimeError):
        distributed.run(fail)


# -------------------------------------------------------------------------- devices, batch systems

@pytest.mark.parametrize("flags", [[], ["--gpus", 4]])
def test_srun_without_torchrun_is_one_sentence(pack, tmp_path, monkeypatch, capsys, flags):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags), "--out", f"{tmp_path}/run"])
    with pytest.raises(SystemExit) as status:
        distributed.run(train.main)
    said = capsys.readouterr().err
    assert status.value.code == 2 and said.count("\n") == 1
    assert re.match("train.py: srun started 4 .* let srun start torchrun, one task ", said)
    assert not (tmp_path / "run").exists()


def test_what_a_batch_system_sets_without_harm(monkeypatch):
    """A batch script of four tasks that calls python itself, one task a node, torchrun's ranks."""
    monkeypatch.setenv("SLURM_NTASKS", "4")                # `#SBATCH --ntasks 4`, no srun
    assert distributed.num_processes(RunConfig()) == 1
    assert distributed.num_processes(RunConfig(gpus=4)) == 4
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")        # srun --ntasks 1
    assert distributed.num_processes(RunConfig(gpus=4)) == 4
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")        # srun torchrun, on two nodes
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert distributed.num_processes(RunConfig()) == 8


def test_a_process_that_sees_its_own_gpu_alone(monkeypatch):
    """Its number among the processes of its node is no number of a GPU then."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert distributed.pick_device(RunConfig()) == torch.device("cuda", 0)

    # Four processes on a machine with one GPU, or with two.
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match="^4 GPUs are .*, 1 available: use fewer, or "):
        distributed.pick_device(RunConfig())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(UserError, match="^4 GPUs are .*, 2 available: use fewer, or "):
        distributed.pick_device(RunConfig())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert distributed.pick_device(RunConfig()) == torch.device("cuda", 3)


def test_a_gpu_uses_the_same_attention_kernels_everywhere(monkeypatch):
    """cuDNN's attention, which H100 alone prefers, is off."""
    calls = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", calls.append)
    dist_env = distributed.DistEnv(RunConfig())
    assert calls == [torch.device("cuda", 0), False] and dist_env.dtype == torch.bfloat16
    distributed.DistEnv(RunConfig(device="cpu"))
    assert len(calls) == 2


# --------------------------------------------------------------------------------------- gradients

def test_gradients_stay_in_the_buckets(pack, tmp_path):
    """Two micro-batches a step on each of two ranks, the first without all-reduce: no gradient
    moves, from the second step on, when DDP has laid its buckets out."""
    def watched(model, *rest):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda parameter, name=name: pointers.setdefault(name, []).append(
                        parameter.grad.data_ptr()))
        finished = fit(model, *rest)
        torch.save(pointers, tmp_path / f"pointers{os.environ['RANK']}")
        return finished

    pointers, fit = {}, train.fit
    flags = [*SMALL, "--data", pack, "--out", tmp_path / "run", "--steps", 4, "--micro_batch", 2,
             "--test_samples", 0]
    pids = two_ranks(tmp_path, training(*flags, prepare=lambda: setattr(train, "fit", watched)))
    assert [ended(pid) for pid in pids] == [0, 0]
    for rank in range(2):
        pointers = torch.load(tmp_path / f"pointers{rank}")
        assert len(pointers) > 50 and {len(seen) for seen in pointers.values()} == {8}
        assert all(len(set(seen[2:])) == 1 for seen in pointers.values())
