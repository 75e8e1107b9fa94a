"""A run that cannot be lost: kills, full disks, damage, signals, two runs in a folder. `--long` does more."""
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import finetune
import train
from data import Row, prepare
from data.pack import Pack
from m3ae_mini import M3AE, checkpoint, distributed
from m3ae_mini.config import UserError
from m3ae_mini.tokenizer import Tokenizer
from test_loader import CAPTIONS, write_pack
from test_finetune import labelled_rows, packed
from test_processes import ended, fork
from test_train import SMALL, logged, losses, started

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs") / "pack"
    write_pack(folder, CAPTIONS, {"train": 40, "val": 8})
    return folder


def forked(*flags, script=train, task=(), prepare=lambda: None, said=os.devnull, env={}):
    """`python train.py flags` in a fork, after prepare() -> its process number."""
    def act():
        sys.argv = [Path(script.__file__).name, *task, *SMALL, *map(str, flags)]
        prepare()
        distributed.run(script.main)
    return fork(act, said, env)


def together(folder, *flags, prepare=lambda rank: None):
    """Two processes of one run -> their numbers. What they print goes to said0 and said1 in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [forked(*flags, prepare=lambda: prepare(rank), said=folder / f"said{rank}",
                   env=env | {"RANK": str(rank)}) for rank in range(2)]


def at_step(number, act):
    """Make this process act() before all processes synchronise at the end of step `number`."""
    sync, calls = distributed.StopSignal.sync, []

    def counted(self, norm, dist_env):
        calls.append(1)
        if len(calls) == number:
            act()
        return sync(self, norm, dist_env)
    distributed.StopSignal.sync = counted


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def weights(out):
    return torch.load(out / "last.pt", weights_only=True)


def equal(a, b):
    a, b = a["model"] | {"step": torch.tensor(a["step"])}, b["model"] | {"step": torch.tensor(b["step"])}
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kills(request):
    return 200 if request.config.getoption("--long") else 20


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A pack of questions, and the folder of a tokenizer."""
    folder = tmp_path_factory.mktemp("questions")
    packed(labelled_rows(folder, "vqa", {"train": 40, "val": 8, "test": 4}), folder / "pack", "vqa", folder)
    Tokenizer.train(CAPTIONS, 300).backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("script, share", [(train, 1), (finetune, 2)], ids=["train", "finetune"])
def test_killed_at_any_moment_it_ends_the_same(pack, questions, tmp_path, request, script, share):
    """SIGKILL at random moments, a checkpoint every step, dropout on; a run resumes until it is done, then a
    new one starts."""
    flags = ["--data", pack, "--steps", 8, "--save_every", 1, "--eval_every", 4]
    if script is finetune:
        flags[1:2] = [questions / "pack", "--init", "none", "--tokenizer", questions, "--min_crop_area", 0.9]
    forked = partial(globals()["forked"], script=script, task=["vqa"] if script is finetune else [])
    began = time.monotonic()
    assert ended(forked(*flags, "--out", tmp_path / "whole")) == 0
    whole, length = weights(tmp_path / "whole"), time.monotonic() - began

    draw, killed, left, enough = random.Random(0), 0, set(), kills(request) // share
    out = tmp_path / "parts"
    while killed < enough or len(left) < 3 and killed < 5 * enough:      # a busy machine moves the moments
        pid = forked(*flags, "--out", out, "--resume")
        time.sleep(draw.random() * length)
        os.kill(pid, signal.SIGKILL)
        if (status := ended(pid)) == -signal.SIGKILL:
            killed += 1
            left.add(weights(out)["step"] if (out / "last.pt").exists() else 0)
        else:
            assert status == 0 and equal(weights(out), whole)
            shutil.rmtree(out)
    assert ended(forked(*flags, "--out", out, "--resume")) == 0
    assert equal(weights(out), whole)
    assert len(left) > 2                                     # it was caught at different steps


@pytest.mark.parametrize("where", ["write", "flush", "rename"])
def test_a_checkpoint_that_can_not_be_written(pack, tmp_path, monkeypatch, where):
    """A full disk at any stage leaves the checkpoint before, and no temporary file."""
    out, flags = tmp_path / "run", ["--data", pack, "--steps", 4, "--save_every", 1, "--test_samples", 0]
    started(monkeypatch, *SMALL, *flags, "--out", tmp_path / "whole")

    def fail(*_):
        raise OSError(28, "No space left on device", "new.pt.tmp")

    save = checkpoint.save_checkpoint
    with monkeypatch.context() as patch:
        def third_fails(folder, model, optimizer, scaler, step, best):
            if step == 3:
                stages = {"write": (torch, "save"), "flush": (os, "fsync"), "rename": (os, "replace")}
                patch.setattr(*stages[where], fail)
            save(folder, model, optimizer, scaler, step, best)
        patch.setattr(checkpoint, "save_checkpoint", third_fails)
        patch.setattr(sys, "argv", ["train.py", *SMALL, *map(str, flags), "--out", str(out)])
        with pytest.raises(SystemExit, match="2"):
            distributed.run(train.main)
    assert weights(out)["step"] == 2 and not list(out.glob("*.tmp"))
    started(monkeypatch, *SMALL, *flags, "--out", out, "--resume")
    assert equal(weights(out), weights(tmp_path / "whole"))


def test_a_disk_that_is_full(pack, tmp_path, capfd):
    """A real one: a tmpfs with room for two checkpoints, but not for a third."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=6500k", "tmpfs", disk]).returncode:
        pytest.skip("no right to mount a tmpfs here")
    try:
        flags = [*SMALL, "--data", pack, "--steps", 40, "--save_every", 1, "--out", disk / "run"]
        command = [sys.executable, "train.py", *flags]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "No space left" in done.stderr or "disk is full" in done.stderr
        assert weights(disk / "run")["step"] >= 1 and not list((disk / "run").glob("*.tmp"))
    finally:
        subprocess.run(["umount", disk])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves(pack, tmp_path, number):
    flags = ["--data", pack, "--steps", 300, "--save_every", 1000, "--eval_every", 1000, "--test_samples", 0]
    out = tmp_path / "run"
    pid = forked(*flags, "--out", out)
    while not (out / "metrics.jsonl").exists() or len(logged(out)) < 3:
        time.sleep(0.01)
    os.kill(pid, number)
    assert ended(pid) == 0
    step = weights(out)["step"]
    assert 3 <= step < 300 and len(logged(out)) == step


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(pack, tmp_path, first):
    """While the step goes on (it sleeps here for a minute), the second signal ends the process."""
    def slow():
        distributed.StopSignal.sync = lambda *_: (tmp_path / "in the step").touch() or time.sleep(60)

    pid = forked("--data", pack, "--out", tmp_path / "run", "--steps", 9, prepare=slow)
    while not (tmp_path / "in the step").exists():
        time.sleep(0.01)
    for number in first, signal.SIGTERM:
        os.kill(pid, number)
        time.sleep(0.5)
    assert ended(pid) == -signal.SIGTERM


def test_two_runs_in_one_folder(pack, tmp_path):
    flags = ["--data", pack, "--out", tmp_path / "run", "--steps", 300, "--test_samples", 0]
    first = forked(*flags)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    assert ended(forked(*flags, "--resume", said=tmp_path / "said")) == 2
    os.kill(first, signal.SIGKILL)
    ended(first)
    assert "another run uses" in (tmp_path / "said").read_text()


def test_damage_is_named_and_the_other_checkpoint_taken(pack, tmp_path, monkeypatch, capsys):
    out, flags = tmp_path / "run", ["--data", pack, "--steps", 4, "--save_every", 1, "--test_samples", 0]
    started(monkeypatch, *SMALL, *flags, "--out", out)
    whole = weights(out)
    data = bytearray((out / "last.pt").read_bytes())
    data[len(data) // 2] ^= 1                                # one bit
    (out / "last.pt").write_bytes(data)
    started(monkeypatch, *SMALL, *flags, "--out", out, "--resume")
    said = capsys.readouterr()
    assert "last.pt is damaged" in said.err and f"continuing from {out / 'prev.pt'}, step 3" in said.out
    assert equal(weights(out), whole)

    for name in "last.pt", "prev.pt":
        (out / name).write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        started(monkeypatch, *SMALL, *flags, "--out", out, "--resume")


@pytest.mark.parametrize("renames, name", [(1, "new.pt"), (2, "new.pt"), (3, "last.pt")])
def test_a_kill_between_the_renames(pack, tmp_path, renames, name):
    """Step 3's checkpoint is whole when the process dies after its first, second or third rename: it is not
    lost."""
    def killed_there():
        replace, save, seen = os.replace, checkpoint.save_checkpoint, []

        def counted(old, new):
            replace(old, new)
            seen.append(1)
            len(seen) == renames and die()

        def third(*args):
            if args[4] == 3:
                os.replace = counted
            save(*args)
        checkpoint.save_checkpoint = third

    flags = ["--data", pack, "--steps", 4, "--save_every", 1, "--test_samples", 0]
    assert ended(forked(*flags, "--out", tmp_path / "whole")) == 0
    assert ended(forked(*flags, "--out", tmp_path / "run", prepare=killed_there)) == -signal.SIGKILL
    assert ended(forked(*flags, "--out", tmp_path / "run", "--resume", said=tmp_path / "said")) == 0
    assert f"continuing from {tmp_path / 'run' / name}, step 3" in (tmp_path / "said").read_text()
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert sorted(file.name for file in (tmp_path / "run").glob("[!b]*.pt")) == ["last.pt", "prev.pt"]


def test_a_kill_before_the_configuration_is_written(pack, tmp_path):
    flags = ["--data", pack, "--steps", 1, "--out", tmp_path / "run", "--test_samples", 0]
    assert ended(forked(*flags, prepare=lambda: setattr(os, "fsync", lambda _: die()))) == -signal.SIGKILL
    assert [file.name for file in (tmp_path / "run").glob("*.tmp")] == ["config.json.tmp"]
    assert ended(forked(*flags, "--resume")) == 0 and weights(tmp_path / "run")["step"] == 1


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"optimizer": {"state": {0: {"exp_avg": 3}}}},
                                     {"step": -1}, {"step": None}])
def test_a_checkpoint_of_something_else(pack, tmp_path, monkeypatch, content):
    out = tmp_path / "run"
    flags = [*SMALL, "--data", pack, "--steps", 2, "--save_every", 1, "--test_samples", 0, "--out", out]
    started(monkeypatch, *flags)
    torch.save(weights(out) | content if content else {}, out / "last.pt")
    with pytest.raises(UserError, match="last.pt (can't be read|was written by another run)"):
        started(monkeypatch, *flags, "--resume")


def test_a_folder_that_may_only_be_read(pack, tmp_path):
    """It turns read-only during the run: one sentence; what was saved stays, a run can start from it, and
    --resume continues from it when the folder may be written to again."""
    run, said = tmp_path / "run", tmp_path / "said"

    def mount(*flags):
        return subprocess.run(["mount", *flags, run], stderr=subprocess.DEVNULL).returncode == 0

    def read_only():
        return mount("--bind", run) and mount("-o", "remount,bind,ro")

    run.mkdir()
    if not shutil.which("mount") or not read_only():
        pytest.skip("no right to mount here")
    subprocess.run(["umount", run])
    try:
        flags = ["--data", pack, "--save_every", 1, "--test_samples", 0, "--steps", 4, "--out", run]
        assert ended(forked(*flags, said=said, prepare=lambda: at_step(3, read_only))) == 2
        assert re.search("train.py: .*Read-only file system", said.read_text())
        assert "Traceback" not in said.read_text() and weights(run)["step"] == 2

        said.unlink()
        assert ended(forked(*flags, "--resume", said=said)) == 2
        assert f"{run} can't be written (Read-only file system)" in said.read_text()
        assert ended(forked(*flags[:-3], 1, "--init", run, "--out", tmp_path / "next")) == 0
    finally:
        subprocess.run(["umount", run])
    said.unlink()
    assert ended(forked(*flags, "--resume", said=said)) == 0
    assert f"continuing from {run / 'last.pt'}, step 2" in said.read_text()


# -------------------------------------------------------------------------------- several processes

def test_one_process_is_asked_to_stop_and_all_do(pack, tmp_path):
    flags = ["--data", pack, "--steps", 300, "--out", tmp_path / "run", "--test_samples", 0]

    def stop_rank_1(rank):
        if rank == 1:
            at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))

    pids = together(tmp_path, *flags, prepare=stop_rank_1)
    assert [ended(pid) for pid in pids] == [0, 0]
    assert weights(tmp_path / "run")["step"] == len(logged(tmp_path / "run")) == 4
    assert "stopped after step 4; continue with --resume" in (tmp_path / "said0").read_text()


def test_a_mistake_that_rank_0_finds_ends_all_ranks_with_its_sentence(pack, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    pids = together(tmp_path, "--data", pack, "--steps", 1, "--out", tmp_path / "run")
    assert [ended(pid) for pid in pids] == [2, 2]
    for rank in range(2):
        assert "is not empty and holds no run" in (tmp_path / f"said{rank}").read_text()


def test_a_bad_gradient_of_one_process_skips_the_step_on_all(pack, tmp_path):
    def spoiled(rank):
        fit, calls = train.fit, []

        def spoil(gradient):                                 # of rank 1, in the second step
            calls.append(1)
            return gradient * float("nan") if rank and len(calls) == 2 else gradient

        def with_hook(model, *rest):
            [first, *_] = (parameter for parameter in model.parameters() if parameter.requires_grad)
            first.register_hook(spoil)
            finished = fit(model, *rest)
            torch.save(model.state_dict(), tmp_path / f"model{rank}")
            return finished
        train.fit = with_hook

    pids = together(tmp_path, "--data", pack, "--steps", 4, "--out", tmp_path / "run", "--test_samples", 0,
                    prepare=spoiled)
    assert [ended(pid) for pid in pids] == [0, 0]
    assert [line["skipped"] for line in logged(tmp_path / "run")] == [0, 1, 0, 0]
    one, two = (torch.load(tmp_path / f"model{rank}") for rank in range(2))
    assert all(torch.equal(one[name], two[name]) and one[name].isfinite().all() for name in one)


@pytest.mark.parametrize("act", [die, lambda: time.sleep(600)], ids=["dies", "hangs"])
def test_a_process_that_is_missing(pack, tmp_path, act):
    """The other rank ends within --timeout, in one sentence."""
    pids = together(tmp_path, "--data", pack, "--steps", 300, "--out", tmp_path / "run", "--timeout", 3,
                    "--save_every", 1, prepare=lambda rank: rank and at_step(3, act))
    began = time.monotonic()
    assert ended(pids[0]) == 2
    assert time.monotonic() - began < 60
    os.kill(pids[1], signal.SIGKILL)
    ended(pids[1])
    said = (tmp_path / "said0").read_text()
    assert "train.py: another process of this run has ended or hangs" in said and "Traceback" not in said
    assert weights(tmp_path / "run")["step"] == 2


def test_it_goes_on_with_another_number_of_processes(pack, tmp_path):
    """One process, then two, then one: the same losses to 1e-5, dropout on."""
    flags = ["--data", pack, "--steps", 9, "--save_every", 1, "--test_samples", 0]
    assert ended(forked(*flags, "--out", tmp_path / "whole")) == 0
    flags += ["--out", tmp_path / "run", "--resume"]
    assert ended(forked(*flags, prepare=lambda: at_step(4, die))) == -signal.SIGKILL
    pids = together(tmp_path, *flags, prepare=lambda rank: at_step(3, lambda: os.kill(os.getpid(), 15)))
    assert [ended(pid) for pid in pids] == [0, 0] and weights(tmp_path / "run")["step"] == 6
    assert ended(forked(*flags)) == 0
    whole, parts = torch.tensor(losses(tmp_path / "whole")), torch.tensor(losses(tmp_path / "run"))
    assert whole.shape == (9, 3) and (whole - parts).abs().max() < 1e-5


def test_torchrun_starts_the_group_anew(pack, tmp_path):
    """With --max-restarts a worker that is killed, twice, restarts the group, which resumes by itself and
    ends with the weights of a group that was left alone; torchrun says which worker it was."""
    flags = ["--data", pack, "--steps", 8, "--save_every", 1, "--test_samples", 0]
    assert [ended(pid) for pid in together(tmp_path, *flags, "--out", tmp_path / "whole")] == [0, 0]
    script = tmp_path / "script.py"
    script.write_text(f"import os, sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
                      "import test_reliability as t\n"
                      "life = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
                      "if os.environ['RANK'] == '1' and life < 2:\n"
                      "    t.at_step(3, t.die)\n"
                      "t.distributed.run(t.train.main)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
               "--max-restarts", 2, script, *SMALL, *flags, "--out", tmp_path / "run"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"failed \(exitcode: -9\) local_rank: 1 ", done.stderr)) == 2
    assert done.stdout.count("million parameters") == 3
    assert [int(step) for step in re.findall(r"continuing from .*, step (\d)", done.stdout)] == [2, 4]
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


# -------------------------------------------------------------------------------- packs

class Peeking:
    """An image that tries to open the pack while it is drawn for it."""
    def __init__(self, out, found):
        self.out, self.found = out, found

    def __call__(self, size):
        for folder in (self.out, *self.out.parent.glob("pack.part/pack")):
            with pytest.raises(UserError, match="there is no pack at"):
                Pack(folder)
            self.found.append(folder)
        return Image.new("L", (size, size))


def test_a_pack_that_is_being_written_is_not_opened(tmp_path):
    found = []
    rows = [Row("train", Peeking(tmp_path / "pack", found), "An image.")]
    prepare.write_pack(rows, tmp_path / "pack", "drawn", "pretrain", 8, workers=1)
    assert len(found) == 2 and len(Pack(tmp_path / "pack").samples) == 1


# -------------------------------------------------------------------------------- numbers

def test_gradients_that_are_not_finite_skip_and_then_stop(pack, tmp_path, monkeypatch):
    """Three steps without a finite gradient are skipped, counted and logged; twenty in a row end the run."""
    forward = M3AE.forward

    def poisoned(steps):
        calls = []

        def call(self, batch):
            outputs = forward(self, batch)
            if not batch["image"].is_meta:
                calls.append(1)
                bad = float("nan") if (len(calls) + 1) // 2 in steps else 1.0   # two micro-batches a step
                outputs["loss"] = outputs["loss"] * bad
            return outputs
        return call

    flags = ["--data", pack, "--eval_every", 1000, "--test_samples", 0]
    monkeypatch.setattr(M3AE, "forward", poisoned({2, 3, 4}))
    started(monkeypatch, *SMALL, *flags, "--out", tmp_path / "some", "--steps", 6)
    assert [line["skipped"] for line in logged(tmp_path / "some")] == [0, 1, 1, 1, 0, 0]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "some")["model"].values())

    monkeypatch.setattr(M3AE, "forward", poisoned(range(3, 99)))
    with pytest.raises(UserError, match="lower --lr"):
        started(monkeypatch, *SMALL, *flags, "--out", tmp_path / "many", "--steps", 60, "--save_every", 2)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "many")["model"].values())
