"""A run that cannot be lost: kills, full disks, damage, signals, two runs in a folder. `--long` does more."""
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from m3ae_mini import loop
from m3ae_mini.config import UserError
from test_data import CAPTIONS, write_pack
from test_train import SMALL, logged, started

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs") / "pack"
    write_pack(folder, CAPTIONS, {"train": 40, "val": 8})
    return folder


def forked(*flags, prepare=lambda: None):
    """`python train.py flags` in a fork of this process, which has torch loaded -> its process number."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 70
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        sys.argv = ["train.py", *SMALL, *map(str, flags)]
        prepare()
        train.main()
        status = 0
    except UserError:
        status = 2
    finally:
        os._exit(status)


def ended(pid):
    """The exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def weights(out):
    return torch.load(out / "last.pt", weights_only=True)


def equal(a, b):
    a, b = a["model"] | {"step": torch.tensor(a["step"])}, b["model"] | {"step": torch.tensor(b["step"])}
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kills(request):
    return 200 if request.config.getoption("--long") else 20


def test_killed_at_any_moment_it_ends_with_the_same_weights(pack, tmp_path, request):
    """SIGKILL at random moments, a checkpoint every step; the run goes on until done, and begins anew."""
    flags = ["--data", pack, "--steps", 8, "--save_every", 1, "--eval_every", 4]
    began = time.monotonic()
    assert ended(forked(*flags, "--out", tmp_path / "whole")) == 0
    whole, length = weights(tmp_path / "whole"), time.monotonic() - began

    draw, killed, left = random.Random(0), 0, set()
    out = tmp_path / "parts"
    while killed < kills(request):
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
    """A full disk at any stage leaves the checkpoint before, and no half of one beside it."""
    out, flags = tmp_path / "run", ["--data", pack, "--steps", 4, "--save_every", 1, "--test_samples", 0]
    started(monkeypatch, *SMALL, *flags, "--out", tmp_path / "whole")

    def fail(*_):
        raise OSError(28, "No space left on device", "next.pt.tmp")

    save = loop.save_checkpoint
    with monkeypatch.context() as patch:
        def third_fails(folder, model, optimizer, scaler, step, best):
            if step == 3:
                stages = {"write": (torch, "save"), "flush": (os, "fsync"), "rename": (os, "replace")}
                patch.setattr(*stages[where], fail)
            save(folder, model, optimizer, scaler, step, best)
        patch.setattr(loop, "save_checkpoint", third_fails)
        patch.setattr(sys, "argv", ["train.py", *SMALL, *map(str, flags), "--out", str(out)])
        with pytest.raises(SystemExit, match="2"):
            loop.run(train.main)
    assert weights(out)["step"] == 2 and not list(out.glob("*.tmp"))
    started(monkeypatch, *SMALL, *flags, "--out", out, "--resume")
    assert equal(weights(out), weights(tmp_path / "whole"))


def test_a_disk_that_is_full(pack, tmp_path, capfd):
    """A real one: a tmpfs with room for two checkpoints, but not for a third written beside them."""
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


def test_a_second_signal_stops_at_once(pack, tmp_path):
    """While the step goes on (it sleeps here for a minute), the second signal ends the process."""
    def slow():
        loop.StopSignal.agree = lambda *_: (tmp_path / "in the step").touch() or time.sleep(60)

    pid = forked("--data", pack, "--out", tmp_path / "run", "--steps", 9, prepare=slow)
    while not (tmp_path / "in the step").exists():
        time.sleep(0.01)
    for _ in range(2):
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.5)
    assert ended(pid) == -signal.SIGTERM


def test_two_runs_in_one_folder(pack, tmp_path):
    flags = ["--data", pack, "--out", tmp_path / "run", "--steps", 300, "--test_samples", 0]
    first = forked(*flags)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    assert ended(forked(*flags, "--resume")) == 2
    os.kill(first, signal.SIGKILL)
    ended(first)


def test_damage_is_named_and_the_other_checkpoint_taken(pack, tmp_path, monkeypatch, capsys):
    out, flags = tmp_path / "run", ["--data", pack, "--steps", 4, "--save_every", 1, "--test_samples", 0]
    started(monkeypatch, *SMALL, *flags, "--out", out)
    whole = weights(out)
    data = bytearray((out / "last.pt").read_bytes())
    data[len(data) // 2] ^= 1                                # one bit
    (out / "last.pt").write_bytes(data)
    started(monkeypatch, *SMALL, *flags, "--out", out, "--resume")
    assert "last.pt is damaged" in capsys.readouterr().err
    assert equal(weights(out), whole)


def test_gradients_that_are_not_finite_skip_and_then_stop(pack, tmp_path, monkeypatch):
    """Three steps without a finite gradient are skipped, counted and logged; twenty in a row end the run."""
    learner = loop.learner

    def poisoned(steps):
        def make(model, *rest):
            net, *others = learner(model, *rest)
            calls = []

            def call(batch):
                calls.append(1)
                losses = net(batch)
                bad = float("nan") if (len(calls) + 1) // 2 in steps else 1.0      # two chunks a step
                return {name: value * bad if name == "loss" else value for name, value in losses.items()}
            return call, *others
        return make

    flags = ["--data", pack, "--eval_every", 1000, "--test_samples", 0]
    monkeypatch.setattr(loop, "learner", poisoned({2, 3, 4}))
    started(monkeypatch, *SMALL, *flags, "--out", tmp_path / "some", "--steps", 6)
    assert [line["skipped"] for line in logged(tmp_path / "some")] == [0, 1, 2, 3, 0, 0]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "some")["model"].values())

    monkeypatch.setattr(loop, "learner", poisoned(range(3, 99)))
    with pytest.raises(UserError, match="lower --lr"):
        started(monkeypatch, *SMALL, *flags, "--out", tmp_path / "many", "--steps", 60, "--save_every", 2)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "many")["model"].values())
