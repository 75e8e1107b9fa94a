"""Preparations that take long: stopped and continued, two at a time, their progress, their memory."""
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import Row, images, partial as partial_module, prepare, progress, table, write_pack as writer
from data.pack import Pack
from m3ae_mini.config import UserError

REPO = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path):
    """A table of 400 images in a folder of its own; two of them cannot be read, some are bright."""
    root = tmp_path / "set"
    root.mkdir()
    for i in range(400):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50 + i % 9), dtype=np.uint8)
        Image.fromarray(pixels if i % 7 else pixels // 200).save(root / f"{i}.png")
    for i in 3, 90:
        (root / f"{i}.png").write_bytes(b"no image")
    lines = [f"{i}.png,Finding {i},{'train' if i % 5 else 'val'}" for i in range(400)]
    (root / "t.csv").write_text("\n".join(["image,text,split", *lines]))
    return root


def pack(root, out, size=16, **options):
    options = {"workers": 1} | options
    return writer.write_pack(table.rows(root, "pretrain"), out, "table", "pretrain", size, root=root, **options)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Stop(Exception):
    """What ends a preparation in these tests."""


def stop_after(monkeypatch, count, error=Stop):
    """The next preparation ends with `error` when `count` images were decoded; -> those that it decodes."""
    decoded = []

    def store(source, **options):
        if len(decoded) == count:
            raise error
        decoded.append(source.name)
        return images.store_image(source, **options)

    def map_images(function, sources, workers):                # without the processes' batches
        for source in sources:
            try:
                yield function(source)
            except OSError as reason:
                yield str(type(reason))
    monkeypatch.setattr(writer, "store_image", store)
    monkeypatch.setattr(partial_module, "map_images", map_images)
    return decoded


# ---------------------------------------------------------------------------------------------- continuing

def test_a_stopped_preparation_is_continued(folder, tmp_path, monkeypatch, capsys):
    """It ends with the files of one that was never stopped, and decodes no image twice."""
    stop_after(monkeypatch, None)
    pack(folder, tmp_path / "whole")
    first = stop_after(monkeypatch, 130)
    with pytest.raises(Stop):
        pack(folder, tmp_path / "p")
    assert "p.part keeps 130 of 400 images: the same command continues there" in capsys.readouterr().err
    second = stop_after(monkeypatch, 100, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        pack(folder, tmp_path / "p")
    assert "p.part: 130 of 400 images are done\n" in capsys.readouterr().err
    third = stop_after(monkeypatch, None)
    pack(folder, tmp_path / "p")
    assert "p.part: 230 of 400 images are done\n" in capsys.readouterr().err
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")
    assert len(first + second + third) == 400 == len({*first, *second, *third})
    assert not (tmp_path / "p.part").exists()


@pytest.mark.parametrize("moment", [0.2, 0.7])
def test_a_preparation_that_is_killed_is_continued(folder, tmp_path, moment, request):
    """SIGKILL: the work since the journal was last written is lost. The workers end, too."""
    if moment > 0.5 and not request.config.getoption("--long"):
        pytest.skip("a second moment with --long")
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(REPO)!r})\n"
                      "import time\nfrom data import partial, prepare\npartial.SYNC_SECONDS = 0.1\n"
                      "as_done = partial.as_done\n"             # slowly, so that the kill comes in time
                      "partial.as_done = lambda *known: time.sleep(0.01) or as_done(*known)\n"
                      "sys.exit(prepare.main())\n")
    flags = ["table", "--root", str(folder), "--size", "16", "--workers", "2", "--out"]
    command = [sys.executable, script, *flags]
    assert prepare.main([*flags, str(tmp_path / "whole")]) == 0

    journal = tmp_path / "p.part" / "journal.jsonl"
    process = subprocess.Popen([*command, tmp_path / "p"], stderr=subprocess.DEVNULL)
    workers = []
    while process.poll() is None:
        if journal.is_file() and len(journal.read_bytes().splitlines()) > 400 * moment:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            workers = children.read_text().split() if children.is_file() else []
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "p").exists()
    done = len(journal.read_bytes().splitlines())
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)

    said = subprocess.run([*command, tmp_path / "p"], check=True, capture_output=True, text=True).stderr
    found = int(re.search(r"continuing .*p.part: (\d+) of 400 images are done", said)[1])
    assert 0 < found <= done                                   # the last lines may be ahead of their images
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")


def test_an_interrupt_keeps_what_is_done(folder, tmp_path):
    """Ctrl-C reaches every process of a terminal."""
    for i in range(400, 5000):                                 # half a minute of work
        os.link(folder / "1.png", folder / f"{i}.png")
    with open(folder / "t.csv", "a") as file:
        file.writelines(f"\n{i}.png,Finding {i},train" for i in range(400, 5000))
    process = subprocess.Popen(
        [sys.executable, "-m", "data.prepare", "table", "--root", folder, "--out", tmp_path / "p", "--size", "500"],
        cwd=REPO, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))   # a background job ignores it
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if any(file.stat().st_size > 2 * 500 ** 2 for file in tmp_path.glob("p.part/pack/images.bin")):
            os.killpg(process.pid, signal.SIGINT)
            break
        time.sleep(0.01)
    _, said = process.communicate(timeout=60)
    *_, kept, last = said.splitlines()
    assert process.returncode == 130 and last == "prepare: interrupted, no pack was written"
    count = re.fullmatch(r"prepare: .*p.part keeps ([\d,]+) of 5,000 images: the same command continues there", kept)
    assert len((tmp_path / "p.part" / "journal.jsonl").read_bytes().splitlines()) == int(count[1].replace(",", ""))
    assert "Traceback" not in said and not (tmp_path / "p").exists()


def change_file(root):
    (root / "61.png").write_bytes((root / "62.png").read_bytes())


def change_rows(root):
    lines = (root / "t.csv").read_text().split("\n")
    (root / "t.csv").write_text("\n".join(line for line in lines if not line.startswith("61.")))


def change_mode(root):
    os.chmod(root / "3.png", 0o600)


@pytest.mark.parametrize("change, used", [(change_file, 48), (change_rows, 48), (change_mode, 2)])
def test_images_that_changed_meanwhile_are_decoded_again(folder, tmp_path, monkeypatch, capsys, change, used):
    """The images from the first that changed on, with a line. Training rows come first: 1, 2, 3, 4, 6, …"""
    stop_after(monkeypatch, 130)
    with pytest.raises(Stop):
        pack(folder, tmp_path / "p")
    time.sleep(0.02)                                           # file times have a resolution
    change(folder)
    rest = stop_after(monkeypatch, None)
    pack(folder, tmp_path / "p")
    pack(folder, tmp_path / "whole")
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")
    said = capsys.readouterr().err
    assert re.search(rf"p.part: {used} of (400|399) images are done", said)
    assert f"the other {130 - used} images in it are not used: " in said
    assert rest[0] == {48: "61.png", 2: "3.png"}[used] or change == change_rows


@pytest.mark.parametrize("damage", ["journal torn", "journal garbled", "images cut", "images changed", "no images"])
def test_a_damaged_part_is_used_as_far_as_it_is_whole(folder, tmp_path, monkeypatch, damage):
    stop_after(monkeypatch, None)
    pack(folder, tmp_path / "whole")
    stop_after(monkeypatch, 130)
    with pytest.raises(Stop):
        pack(folder, tmp_path / "p")
    journal, pixels = tmp_path / "p.part" / "journal.jsonl", tmp_path / "p.part" / "pack" / "images.bin"
    lines, stored = journal.read_bytes().splitlines(keepends=True), pixels.read_bytes()
    if damage == "journal torn":
        journal.write_bytes(b"".join(lines)[:-9])
    if damage == "journal garbled":
        journal.write_bytes(b"".join(lines[:50]) + b"[1, -2]\n\0\0\xff\n" + b"".join(lines[50:]))
    if damage == "images cut":
        pixels.write_bytes(stored[:5000])
    if damage == "images changed":
        pixels.write_bytes(stored[:5000] + b"changed" + stored[5007:])
    if damage == "no images":
        pixels.unlink()
    rest = stop_after(monkeypatch, None)
    pack(folder, tmp_path / "p")
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")
    kept = {"journal torn": 129, "journal garbled": 50, "no images": 0}.get(damage, 5000 // 256 + 1)
    assert len(rest) == 400 - kept                             # of 256 bytes each; 3.png takes none


def test_other_flags_do_not_continue(folder, tmp_path, monkeypatch, capsys):
    """Nothing is lost without --overwrite."""
    stop_after(monkeypatch, 130)
    with pytest.raises(Stop):
        pack(folder, tmp_path / "p")
    before = contents(tmp_path / "p.part" / "pack")
    stop_after(monkeypatch, None)
    for options, changed in (({"size": 8}, r"size 16 \(now 8\)"), ({"fit": "pad"}, r"fit crop \(now pad\)"),
                             ({"window": (0.0, 9.0)}, r"window None \(now \[0.0, 9.0\]\)")):
        with pytest.raises(UserError, match=f"p.part holds 130 images .* with {changed}: give the same flags"):
            pack(folder, tmp_path / "p", **options)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"decoder Pillow .* \(now Pillow 0"):
        patch.setattr(writer, "decoder_version", lambda: "Pillow 0")
        pack(folder, tmp_path / "p")
    assert contents(tmp_path / "p.part" / "pack") == before

    capsys.readouterr()
    assert pack(folder, tmp_path / "p", size=8, overwrite=True)["size"] == 8
    assert "begun with size 16 (now 8): its 130 images are removed" in capsys.readouterr().err
    pack(folder, tmp_path / "q", size=8)
    assert contents(tmp_path / "p") == contents(tmp_path / "q")


def drawn(size, shade=0):
    return Image.new("L", (size, size), shade)


def test_images_that_code_draws_are_drawn_again(tmp_path, monkeypatch, capsys):
    """The code may have changed since."""
    rows = [Row("train", partial(drawn, shade=shade), f"shade {shade}") for shade in range(30)]
    rows.append(Row("train", partial(drawn, shade="none"), "an error"))
    with pytest.raises(ValueError):
        writer.write_pack(rows, tmp_path / "p", "drawn", "pretrain", 8, workers=1)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(partial_module, "remove", lambda folder: None)     # a SIGKILL
    with pytest.raises(ValueError):
        writer.write_pack(rows, tmp_path / "p", "drawn", "pretrain", 8, workers=1)
    monkeypatch.undo()
    writer.write_pack(rows[5:30], tmp_path / "p", "drawn", "pretrain", 8, workers=1)
    assert "0 of 25 images are done" in capsys.readouterr().err
    assert (tmp_path / "p" / "images.bin").read_bytes()[::64] == bytes(range(5, 30))


# ------------------------------------------------------------------------------------------- what goes wrong

def test_two_preparations_of_one_pack(folder, tmp_path, capsys):
    """The second one is refused while the first one holds the folder, and touches nothing of it."""
    script = ("import sys\n"
              f"sys.path.insert(0, {str(REPO)!r})\n"
              "from data.partial import open_part\nfrom pathlib import Path\n"
              f"with open_part(Path({str(tmp_path / 'p')!r}), False, {{'size': 16}}) as part:\n"
              "    print('locked', flush=True)\n    input()\n")
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True)
    assert other.stdout.readline() == "locked\n"
    command = ["table", "--root", str(folder), "--size", "16", "--out", str(tmp_path / "p")]
    assert prepare.main(command) == 2
    assert "prepare: another preparation writes" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(file.name for file in (tmp_path / "p.part").iterdir()) == ["lock", "pack", "settings.json"]

    # With `wait` it goes on when the other one has ended: here in an empty pack.
    waiting = subprocess.Popen([sys.executable, "-c", script.replace("16})", "16}, wait=True)")],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "waiting for it" in waiting.stderr.readline()
    other.communicate("\n")
    assert other.returncode == 0 and (tmp_path / "p").is_dir()
    said = waiting.communicate("\n")
    assert waiting.returncode == 1 and "was created meanwhile" in said[1] and "locked" not in said[0]
    assert not (tmp_path / "p.part").exists()


def test_a_full_disk_keeps_what_fits(folder, tmp_path, monkeypatch, capsys):
    fsync = os.fsync
    calls = []

    def full(file):
        calls.append(file)
        if len(calls) > 29:
            raise OSError(28, "No space left on device")
        fsync(file)
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(partial_module, "SYNC_SECONDS", 0)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): make room"):
        pack(folder, tmp_path / "p")
    kept = int(re.search(r"p.part keeps (\d+) of 400 images", capsys.readouterr().err)[1])
    monkeypatch.undo()
    pack(folder, tmp_path / "p")
    assert f": {kept} of 400 images are done" in capsys.readouterr().err and 4 <= kept < 400
    Pack(tmp_path / "p").verify()


def test_the_journal_is_on_the_disk_in_time(folder, tmp_path, monkeypatch):
    """Both files are flushed when SYNC_SECONDS have passed, images.bin first."""
    now, synced = [0.0], []
    monkeypatch.setattr(partial_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(partial_module, "flush_to_disk", lambda file: synced.append((Path(file.name).name, now[0])))
    store = writer.store_image

    def slow(source, **options):
        now[0] += 1                                            # a second an image
        return store(source, **options)
    monkeypatch.setattr(writer, "store_image", slow)
    pack(folder, tmp_path / "p")
    for name in "images.bin", "journal.jsonl":
        times = [0.0, *(moment for file, moment in synced if file == name)]
        assert max(np.diff(times)) <= partial_module.SYNC_SECONDS + images.DECODE_BATCH
    assert [file for file, _ in synced if file.startswith(("images", "journal"))][:2] == ["images.bin", "journal.jsonl"]


# --------------------------------------------------------------------------------------- progress and memory

def test_a_log_gets_a_line_every_half_a_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def items(count, seconds):
        for _ in range(count):
            now[0] += seconds
            yield None
    assert len(list(progress.progress(items(3, 1), "packing", "images", 3))) == 3
    assert capsys.readouterr().err == ""                       # soon done
    assert len(list(progress.progress(items(100, 1), "packing", "images", 12_100, 12_000))) == 100
    assert capsys.readouterr().err.splitlines() == [
        f"packing: {12_000 + at:,} of 12,100 images, 60 a minute, {left} left"
        for at, left in ((4, "2 min"), (34, "2 min"), (64, "36 s"), (94, "6 s"))]
    list(progress.progress(items(100, 0.0625), "reading", "rows"))
    assert capsys.readouterr().err == "reading: 64 rows, 16 a second\n"


@pytest.mark.parametrize("seconds, words", [(0, "0 s"), (59, "59 s"), (59.5, "1 min"), (60, "1 min"),
                                            (61, "2 min"), (3600, "1 h 0 min"), (7790, "2 h 10 min")])
def test_a_time_in_words(seconds, words):
    assert progress.in_words(seconds) == words


def test_a_terminal_gets_one_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0)
    assert list(progress.progress(range(4), "packing", "images", 10, 6)) == [0, 1, 2, 3]
    assert re.search(r"packing: 100%.*10/10 .* images/s", capsys.readouterr().err)
