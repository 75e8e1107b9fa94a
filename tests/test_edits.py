"""One idea, one file: tests/edits/*.diff, each an edit of one file of this code.

Right edits pass the invariants, broken ones fail them with a sentence that says what is wrong."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EDITS = ROOT / "tests" / "edits"
RIGHT = {                                                             # name: flags of train.py
    "self_attention_fusion": "",
    "loss_alone": "--mlm 0 --mim 0 --itm 0",
    "mask_schedule": ""}
BROKEN = {                                                            # name: (test, what it says)
    "mixes_rows": ("rows_do_not_change_each_other", "the fusion mixes rows of the batch"),
    "sees_padding": ("padding_changes_no_real_token", "the fusion sees padding"),
    "infinite_loss": ("losses_are_finite",
                      "mlm_loss, loss of pretrain is not finite where nothing is masked")}


@pytest.fixture
def edited(tmp_path):
    """A function: name of an edit -> a copy of this checkout with it."""
    def copy(name):
        without = shutil.ignore_patterns("__pycache__", "experiments", "figures", "golden", "edits")
        for part in "m3ae_mini", "data", "tests":
            shutil.copytree(ROOT / part, tmp_path / part, ignore=without)
        for script in "train.py", "finetune.py":
            shutil.copy(ROOT / script, tmp_path)
        # The copy may lie in a repository: git must not look for one above it.
        outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
        done = subprocess.run(["git", "apply", EDITS / f"{name}.diff"], cwd=tmp_path, env=outside,
                              capture_output=True, text=True)
        assert done.returncode == 0, f"{name}.diff does not fit this code: {done.stderr}"
        return tmp_path
    return copy


def check_invariants(code: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "invariants", "-p", "no:cacheprovider",
               "tests/test_invariants.py", *flags]
    return subprocess.run(command, cwd=code, capture_output=True, text=True)


@pytest.mark.parametrize("name", sorted(path.stem for path in EDITS.glob("*.diff")))
def test_an_edit_says_what_it_does_and_changes_one_file(name, edited):
    assert name in RIGHT or name in BROKEN
    first, *lines = (EDITS / f"{name}.diff").read_text().splitlines()
    assert not first.startswith(("diff ", "---"))
    assert first.startswith("broken: ") == (name in BROKEN)
    assert sum(line.startswith("+++ b/") for line in lines) == 1
    code = edited(name)
    changed = [path for path in code.rglob("*.py")
               if path.read_bytes() != (ROOT / path.relative_to(code)).read_bytes()]
    assert len(changed) == 1


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_edit_is_found_and_named(name, edited):
    test, sentence = BROKEN[name]
    done = check_invariants(edited(name), "-k", test)
    assert done.returncode == 1 and sentence in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_edit_passes_every_invariant(name, edited, request):
    if not request.config.getoption("--long"):
        pytest.skip("a minute for each edit: --long")
    done = check_invariants(edited(name), f"--flags={RIGHT[name]}")
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-3000:]
