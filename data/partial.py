"""The folder OUT.part, in which a pack is written. A preparation that was stopped continues there.

    lock            held by the preparation that writes here
    settings.json   what decides an image's bytes
    journal.jsonl   a line for each image that is done, in order (Done)
    pack/           the pack's files so far; renamed to OUT when they are whole
    old/            the pack that is being replaced, between two renames

Every SYNC_SECONDS images.bin is flushed to the disk, then the journal.
So a preparation that is killed, or loses its power, loses the images since then and no others.
"""
import hashlib
import json
import os
import shutil
import sys
import time
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, Callable, ContextManager, Iterator, NamedTuple

from data import Source
from data.images import map_images
from data.progress import progress
from m3ae_mini.config import UserError, require

SYNC_SECONDS = 20


class Done(NamedTuple):
    """An image that is done: a line of the journal."""
    stamp: str                # of its file, as in `stamp`
    length: int               # bytes in images.bin; 0 if it cannot be read
    sha256: str               # of these bytes, in hex
    notes: tuple[str, ...]    # StoredImage.notes
    cut: float                # StoredImage.cut
    why: str | None           # why it cannot be read


class HashedFile:
    """A file to write to, hashed as it is written. On success it is flushed to the disk, and
    files[name] gets its size and checksum.

    mode "a+b": what it holds stays; who continues it adds that to `digest`.
    """

    def __init__(self, path: Path, files: dict[str, dict], mode: str = "wb"):
        self.name = path.name
        self.files = files
        self.file = open(path, mode)
        self.digest = hashlib.sha256()

    def __enter__(self) -> "HashedFile":
        return self

    def write(self, part: bytes) -> None:
        self.file.write(part)
        self.digest.update(part)

    def __exit__(self, error_type, *_) -> None:
        with self.file:
            if error_type is None:
                flush_to_disk(self.file)
                self.files[self.name] = {"bytes": self.file.tell(),
                                         "sha256": self.digest.hexdigest()}


def flush_to_disk(file: BinaryIO) -> None:
    """Write what is buffered, and wait until the disk has it."""
    file.flush()
    os.fsync(file.fileno())


# --------------------------------------------------------------------------------------- the folder

class Part:
    """An open folder OUT.part.

    folder: Path; pack: where the pack's files belong; kept: images in the journal at the start;
    total: images in all, once known; worth_keeping: can another preparation continue here? Not
    with images that code draws, since the code may change.
    """

    def __init__(self, folder: Path):
        self.folder, self.pack = folder, folder / "pack"
        self.journal = folder / "journal.jsonl"
        self.total = 0
        self.worth_keeping = True
        self.kept = self.count_kept()

    def count_kept(self) -> int:
        """The images in the journal, as far as it is on the disk."""
        if not (self.journal.is_file() and (self.pack / "images.bin").is_file()):
            return 0
        with open(self.journal, "rb") as file:
            return sum(line.endswith(b"\n") for line in file)

    def open(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Make the folder ready. UserError if it holds images made with other settings, unless
        `overwrite` is set."""
        path = self.folder / "settings.json"
        saved: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            saved = dict(json.loads(path.read_text()))
        settings = json.loads(json.dumps(settings))            # tuples become lists
        changed = ", ".join(f"{name} {saved.get(name)} (now {value})"
                            for name, value in settings.items() if saved.get(name) != value)
        if self.kept and changed:
            require(overwrite, f"{self.folder} holds {self.kept:,} images of a stopped "
                               f"preparation with {changed}: give the same flags to continue it, "
                               "or start anew with --overwrite")
            say(f"{self.folder} was begun with {changed}: its {self.kept:,} images are removed")
            self.kept = 0

        # Only images.bin is continued; the other files of a pack are quickly written.
        if not self.kept:
            self.journal.unlink(missing_ok=True)
            shutil.rmtree(self.pack, ignore_errors=True)
        self.pack.mkdir(exist_ok=True)
        for file in self.pack.iterdir():
            if file.name != "images.bin":
                file.unlink()
        if changed:
            with HashedFile(path, {}) as file:
                file.write(json.dumps(settings).encode())

    def images(self, make: Callable[[Source], Any], sources: list[Source], workers: int | None,
               files: dict[str, dict]) -> Iterator[Done]:
        """For each source, in order, what is known of it. Writes images.bin on the way.

        make: source -> StoredImage. files: as in HashedFile. The first ones come from the journal.
        """
        self.total = len(sources)
        self.worth_keeping = not any(map(callable, sources))
        stamps = [stamp(source) for source in sources]
        with (open(self.journal, "a+b") as journal,
              HashedFile(self.pack / "images.bin", files, "a+b") as pixels):
            count = 0
            for done in self._from_journal(journal, pixels, sources, stamps):
                count += 1
                yield done

            # Decode the rest.
            synced = time.monotonic()
            try:
                with closing(map_images(make, sources[count:], workers)) as results:
                    shown = progress(results, "packing", "images", self.total, count)
                    for stamped, result in zip(stamps[count:], shown, strict=True):
                        done, stored = as_done(stamped, result)
                        pixels.write(stored)
                        journal.write(f"{json.dumps(done)}\n".encode())
                        if time.monotonic() - synced > SYNC_SECONDS:
                            sync(pixels, journal)
                            synced = time.monotonic()
                        yield done
            finally:
                sync(pixels, journal)

    def _from_journal(self, journal: BinaryIO, pixels: HashedFile, sources: list[Source],
                      stamps: list[str]) -> Iterator[Done]:
        """The images that are done already, as long as they are the same and intact.

        Then both files are cut to these.
        """
        count = journal_end = pixels_end = 0
        journal.seek(0)
        pixels.file.seek(0)
        lines = progress(journal, "checking what is done", "images", self.kept)
        for stamped, line in zip(stamps, lines):
            done = parse_done(line)
            stored = pixels.file.read(done.length) if done and done.stamp == stamped else b""
            if done is None or done[:3] != (stamped, *length_and_sha256(stored)):
                break
            pixels.digest.update(stored)
            count += 1
            journal_end += len(line)
            pixels_end += len(stored)
            yield done

        for file, end in (journal, journal_end), (pixels.file, pixels_end):
            file.seek(end)
            file.truncate()
        if self.kept:
            say(f"continuing {self.folder}: {count:,} of {self.total:,} images are done")
        if self.kept > count:
            reason = (f"{sources[count]} has changed, is another image, or is drawn by code"
                      if count < len(sources) else "there are fewer images now")
            say(f"the other {self.kept - count:,} images in it are not used: {reason}")


def as_done(stamped: str, result: Any) -> tuple[Done, bytes]:
    """What map_images yields for an image -> its line of the journal, its bytes in images.bin"""
    if isinstance(result, str):
        return Done(stamped, *length_and_sha256(b""), (), 0.0, result), b""
    return Done(stamped, *length_and_sha256(result.pixels), result.notes, result.cut,
                None), result.pixels


def length_and_sha256(stored: bytes) -> tuple[int, str]:
    """What the journal holds of an image's bytes."""
    return len(stored), hashlib.sha256(stored).hexdigest()


def parse_done(line: bytes) -> Done | None:
    """A line of the journal; None if a kill or a power cut has torn it."""
    try:
        done = Done(*json.loads(line))
        return done if line.endswith(b"\n") and done.length >= 0 else None
    except (ValueError, TypeError):
        return None


def stamp(source: Source) -> str:
    """A text that changes with an image's file: its path, size and times. Of an image that code
    draws: a text that never comes again."""
    if callable(source):
        return os.urandom(8).hex()
    path, times = os.fsencode(os.path.abspath(source)), b""
    with suppress(OSError):
        found = os.stat(source)
        times = b"%d %d %d" % (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return hashlib.sha256(path + b"\0" + times).hexdigest()[:16]


def sync(pixels: HashedFile, journal: BinaryIO) -> None:
    """Write to the disk: images.bin first, since the journal vouches for it."""
    flush_to_disk(pixels.file)
    flush_to_disk(journal)


def say(line: str) -> None:
    print(f"prepare: {line}", file=sys.stderr)


# ------------------------------------------------------------------------------- opening and ending

@contextmanager
def open_part(out: Path, overwrite: bool, settings: dict[str, Any],
              wait: bool = False) -> Iterator[Part]:
    """Open OUT.part. When the block succeeds, its pack is renamed to `out`.

    Else the folder stays if it holds images, and a line says so. settings: what decides an
    image's bytes. wait: for another preparation of the same pack. UserError if there is one (and
    not `wait`), if `out` was created meanwhile (unless `overwrite`), if the folder was begun with
    other settings, or if it cannot be written.
    """
    target = out.resolve()   # follows a link, and gives "." a name
    folder = target.with_name(f"{target.name}.part")
    meanwhile = (f"{out} was created meanwhile and is not replaced: choose another --out, or "
                 "replace it with --overwrite")
    try:
        with lock_folder(folder, out, wait):
            put_back(folder, target)   # a kill between the two renames
            shutil.rmtree(folder / "old", ignore_errors=True)   # or while it was removed
            part = Part(folder)
            try:
                require(overwrite or not target.exists(), meanwhile)
                part.open(settings, overwrite)
                yield part
                if target.exists():
                    require(overwrite, meanwhile)
                    target.rename(folder / "old")
                part.pack.rename(target)
                part.worth_keeping = False
            finally:
                put_back(folder, target)
                kept = part.count_kept()
                if kept and part.worth_keeping:
                    of = f" of {part.total:,}" if part.total else ""
                    say(f"{folder} keeps {kept:,}{of} images: the same command continues there")
                else:
                    remove(folder)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}): "
                        "make room or choose another --out") from None


def put_back(folder: Path, target: Path) -> None:
    """Undo the first of the two renames, if the second one did not follow."""
    if (folder / "old").exists() and not target.exists():
        (folder / "old").rename(target)


def lock_folder(folder: Path, out: Path, wait: bool) -> ContextManager:
    """Make the folder, and lock it against other preparations of the pack `out` -> the open lock

    The lock ends when it is closed, or with this process.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":            # it has no fcntl
            return nullcontext()
        import fcntl
        lock = open(folder / "lock", "w")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            require(wait, f"another preparation writes {out}: wait until it ends, or choose "
                          "another --out")
            say(f"another process writes {out}: waiting for it")
            fcntl.lockf(lock, fcntl.LOCK_EX)
        # The one before may have removed the folder meanwhile: then a new one is locked.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(folder / "lock"), os.fstat(lock.fileno())):
                return lock
        lock.close()


def remove(folder: Path) -> None:
    """Remove the folder, its lock last: until then no one else writes there."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != "lock":
                path.unlink()
        (folder / "lock").unlink(missing_ok=True)
        folder.rmdir()
