"""Pack a large made-up data set, kill it halfway, continue, and start to train.

    python tests/experiments/large.py --rows 200000

Shows how long each part takes, how many cores are busy, and how much memory the processes hold.
The images are made in a temporary folder: up to 20,000 files, the rest are hard links to them.
"""
import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
from PIL import Image

from data.prepare import positive
from m3ae_mini.config import require

DISTINCT = 20_000                      # image files; more rows link to them
SIDE = 256                             # of an image, in pixels
WORDS = [a + b for a in "heart lung node rib mass left right upper lower clear".split()
         for b in ("", "s", "al", "ic", "ed", "ing", "er", "oid", "y", "ia")]


# --------------------------------------------------------------------------------------- the data

def image_name(row: int) -> str:
    """The image of a row: a fifth PNG, the rest JPEG, in folders of 2,000."""
    kind = "jpg" if row % DISTINCT % 5 else "png"
    return f"{row // 2000}/{row}.{kind}"


def draw(folder: Path, rows: range) -> None:
    """Draw smooth noise; a quarter is in colour."""
    for row in rows:
        rng = np.random.default_rng(row)
        shape = (12, 12) if row % 4 else (12, 12, 3)
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        image = image.resize((SIDE + row % 40, SIDE), Image.Resampling.BICUBIC)
        path = folder / image_name(row)
        path.parent.mkdir(exist_ok=True)
        image.save(path)


def make_table(folder: Path, rows: int) -> Path:
    """A folder of images and a table of `rows` rows -> the table"""
    parts = [range(start, min(start + 1000, rows)) for start in range(0, min(rows, DISTINCT), 1000)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(draw, [folder] * len(parts), parts))
    choose = random.Random(0)
    with open(folder / "table.csv", "w") as file:
        file.write("image,text,patient,group\n")
        for row in range(rows):
            path = folder / image_name(row)
            if row >= DISTINCT:
                path.parent.mkdir(exist_ok=True)
                os.link(folder / image_name(row % DISTINCT), path)
            text = " ".join(choose.choices(WORDS, k=choose.randint(8, 40)))
            file.write(f"{image_name(row)},{text},p{row % DISTINCT},{'CT' if row % 2 else 'MR'}\n")
    return folder / "table.csv"


# ----------------------------------------------------------------------------------- one command

def resident(pid: int) -> int:
    """MB that a process holds; pages shared with others count, too."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2 ** 20


def watched(command: list, kill_if: Callable[[], bool] = lambda: False) -> dict:
    """Run a command, looking at it twice a second -> its seconds, busy cores and memory

    "MB": of the command and of its largest child, when it first had children and at its end.
    """
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT,
                               stdout=subprocess.DEVNULL)
    memory = []
    while process.poll() is None:
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if children:
                memory.append((resident(process.pid), max(map(resident, map(int, children)))))
        except OSError:                        # one of them has just ended
            pass
        if kill_if():
            process.send_signal(signal.SIGKILL)
        time.sleep(0.5)
    seconds = time.monotonic() - began
    killed = process.returncode == -signal.SIGKILL
    require(process.returncode == 0 or killed, f"{' '.join(map(str, command))} failed")

    # A killed command has not waited for its children: their time is not known.
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    ends = [f"{parent} + {child}" for parent, child in memory[:1] + memory[-1:]]
    return {"seconds": round(seconds, 1), "cores": "" if killed else round(busy / seconds, 2),
            "MB": " to ".join(ends)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, default=200_000)
    parser.add_argument("--size", type=positive, default=48, help="stored pixels [48, of tiny]")
    args = parser.parse_args()
    if sys.platform != "linux":
        sys.exit("it reads /proc, which only Linux has")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "set").mkdir()
        table = make_table(folder / "set", args.rows)
        prepare = ["-m", "data.prepare", "table", "--root", table, "--size", args.size, "--out"]
        pixels, half = folder / "killed.part" / "pack" / "images.bin", 0

        def at_half_time() -> bool:
            return pixels.is_file() and pixels.stat().st_size >= half

        # The same pack twice; the second one is killed when half of its images are written.
        found = {"pack": watched([*prepare, folder / "whole"])}
        half = (folder / "whole" / "images.bin").stat().st_size // 2
        found["pack, killed at half time"] = watched([*prepare, folder / "killed"], at_half_time)
        found["pack, continued"] = watched([*prepare, folder / "killed"])
        for path in (folder / "whole").iterdir():
            same = path.read_bytes() == (folder / "killed" / path.name).read_bytes()
            require(same, f"{path.name} differs after a kill")

        # With the preset tiny: the tokenizer is trained each time, the token cache is made once.
        if args.size == 48:
            train = ["train.py", "--preset", "tiny", "--device", "cpu", "--steps", 1,
                     "--eval_samples", 32, "--test_samples", 0, "--data", folder / "whole", "--out"]
            found["first step of training"] = watched([*train, folder / "run1"])
            found["the same again"] = watched([*train, folder / "run2"])

    print(f"{args.rows:,} rows, {os.cpu_count()} cores")
    print("| what | seconds | cores busy | MB: parent + child, first to last |\n|---|--:|--:|---|")
    for what, row in found.items():
        print(f"| {what} | {row['seconds']} | {row['cores']} | {row['MB']} |")


if __name__ == "__main__":
    main()
