"""The summary of a pack: what was packed, what was decided for the user, and what looks wrong.

A person reads it in ten seconds. It is printed when a pack is ready and kept as summary.txt in
it. A line that begins with "warning:" asks for a look.
"""
import os
from array import array
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Iterable, Iterator

from data import Row, Source
from data.decode import DEEP_COLOUR, DEEP_GREY, UNUSED_ALPHA
from data.images import CONSTANT, NEARLY_BLACK
from data.labels import NO_FINDING, split_labels
from data.leaks import crossing, leaked, leaks

# Why an image cannot be packed.
OUTSIDE = "outside the data set's folder"
MISSING = "missing image"
UNREADABLE = "unreadable image"
GROUPS_SHOWN = 6
EXAMPLES = 3         # merged spellings that are shown


@dataclass
class TableReport:
    """What table.rows did with the columns of a table; complete when all rows are read."""
    columns: dict[str, str] = field(default_factory=dict)   # {"image": the column's name, …}
    unused: dict[str, None] = field(default_factory=dict)   # names in the table's order
    split_given: bool = False                               # by a column, not by a hash


@dataclass
class PackedImages:
    """The images of a pack, in the order in which they are stored."""
    index: dict[Source, int] = field(default_factory=dict)
    digests: list[bytes] = field(default_factory=list)      # a hash of the stored pixels
    cuts: array = field(default_factory=lambda: array("d"))   # StoredImage.cut
    notes: dict[str, list[Source]] = field(default_factory=dict)   # the images with each note

    def add(self, source: Source, digest: bytes, notes: Iterable[str], cut: float) -> None:
        """Add the next image."""
        self.index[source] = len(self.digests)
        self.digests.append(digest)
        self.cuts.append(cut)
        for note in notes:
            self.notes.setdefault(note, []).append(source)

    def content(self, source: Source) -> bytes:
        """Equal for images with equal pixels."""
        return self.digests[self.index[source]]


def summarise(meta: dict, rows: list[Row], images: PackedImages, spellings: dict[str, set[str]],
              table: TableReport | None, root: Path | None) -> str:
    """The lines of summary.txt, warnings last.

    meta: as in meta.json, but for "files". rows: those packed. spellings: as
    answers.collect_spellings has them. table: if the rows come from a user's table.
    """
    lines = [f"{meta['name']} for {meta['task']}: {meta['images']:,} images of {meta['size']} x "
             f"{meta['size']}",
             *_about_splits(meta["samples"], rows, table),
             *_about_crossings(rows, images, root),
             *_about_leaks(meta["task"], rows, images, table, root),
             *_about_answers(spellings),
             *_about_images(meta, images, root),
             *_about_names("groups", [row.group for row in rows])]
    if meta["task"] == "cls" and meta["several_labels"]:
        lines += _about_names("labels", [name for row in rows
                                         for name in split_labels(row.label) or [NO_FINDING]])
    elif meta["task"] == "cls":
        lines += _about_names("classes", [row.label for row in rows])
    lines += _about_skipped(meta["skipped"], rows)
    lines.sort(key=lambda line: line.startswith("warning:"))
    return "".join(f"{line}\n" for line in lines)


# ---------------------------------------------------------------------------------------- the lines

def _about_splits(samples: dict[str, int], rows: list[Row],
                  table: TableReport | None) -> Iterator[str]:
    """Samples per split, what decided the split, and the columns of a table."""
    counts = ", ".join(f"{count:,} {split}" for split, count in samples.items())
    for split, need in (("val", "training needs some"), ("test", "there will be no test report")):
        if not samples[split]:
            yield f"warning: no {split} samples: {need}; give more patients, or a split column"
    if table is None:
        yield f"samples: {counts}; the data set's own splits"
        return

    patient = table.columns.get("patient")
    by_hash = f"a hash of {shown(patient)}" if patient else "a hash of the image's path"
    by = f"the column {shown(table.columns['split'])}" if table.split_given else by_hash
    yield f"samples: {counts}; split by {by}"
    names = ", ".join(f"{role} from {shown(name)}" for role, name in table.columns.items())
    unused = ", ".join(map(shown, table.unused)) or "none"
    yield f"columns: {names}; not used: {unused}"
    if not any(row.patient for row in rows) and not table.split_given:
        yield ("warning: no column names the patient: one patient's images can be in several "
               "splits")


def _about_crossings(rows: list[Row], images: PackedImages, root: Path | None) -> Iterator[str]:
    """Patients, texts and image contents that stand in several splits."""
    found = {"patients": crossing((row.patient, row) for row in rows if row.patient),
             "texts": crossing((row.text, row) for row in rows),
             "images": crossing((images.content(row.image), row) for row in rows)}
    known = [f"{len(things.pairs):,} of {things.total:,} {kind}"
             for kind, things in found.items() if things.total]
    if not found["patients"].total:
        known.append("patients are not known")
    shared_text = found["texts"].pairs[:1]
    example = f"; the first text: {shown(shared_text[0][0].text)}" if shared_text else ""
    yield f"in several splits: {', '.join(known)}{example}"

    for kind in "patients", "images":   # a text alone is no trouble: "Normal chest." is often right
        if found[kind].pairs:
            one, other = found[kind].pairs[0]
            who = f"{shown(one.patient)}: " if kind == "patients" else ""
            yield (f"warning: {kind} in several splits: {len(found[kind].pairs):,}, the first: "
                   f"{who}{place(one, root)}, {place(other, root)}")


def _about_leaks(task: str, rows: list[Row], images: PackedImages, table: TableReport | None,
                 root: Path | None) -> Iterator[str]:
    """Samples of val and test that repeat a training sample. See leaks.py."""
    found = leaks(rows, task, images.content)
    if found:
        trained, held_out = found[0]
        own_split = "--allow_leaks" if table and table.split_given else "a hash made the split"
        why = "as the set is published" if table is None else own_split
        yield (f"warning: {len(found):,} samples of val or test have the {leaked(task)} of a "
               f"training sample ({why}), the first: {place(trained, root)}, "
               f"{place(held_out, root)}: {shown(held_out.text)}")


def _about_answers(spellings: dict[str, set[str]]) -> Iterator[str]:
    """Answers that were spelt in several ways and became one."""
    if not spellings:
        return
    merged = {answer: sorted(given) for answer, given in spellings.items() if len(given) > 1}
    if not merged:
        yield "answers: no two spellings were merged"
        return

    def beyond_case(answer: str) -> int:
        return -len({given.casefold() for given in merged[answer]})
    first = sorted(merged, key=lambda answer: (beyond_case(answer), answer))[:EXAMPLES]
    examples = "; ".join(f"{' and '.join(map(shown, merged[answer][:3]))} -> {shown(answer)}"
                         for answer in first)
    yield (f"answers: {sum(map(len, merged.values())):,} spellings were merged into "
           f"{len(merged):,}, such as {examples}")


def _about_images(meta: dict, images: PackedImages, root: Path | None) -> Iterator[str]:
    """What was done to the pixels, and images that look wrong."""
    count = {note: len(sources) for note, sources in images.notes.items()}
    deep = count.get(DEEP_GREY, 0) + count.get(DEEP_COLOUR, 0)
    cut = 100 * sum(images.cuts) / len(images.cuts)
    edges = ("nothing cut off (--fit pad)" if meta["fit"] == "pad" else
             f"{cut:.1f} % of the area cut off on average, {100 * max(images.cuts):.0f} % at most"
             + (" (--fit pad keeps all)" if cut else ""))
    yield (f"images: {count.get(CONSTANT, 0):,} constant, {count.get(NEARLY_BLACK, 0):,} nearly "
           f"black, {deep:,} of more than 8 bits; {edges}")

    window = meta["window"]
    if window and not deep:
        yield "warning: --window changed nothing: no image has more than 8 bits"
    troubles = {
        CONSTANT: "constant images",
        NEARLY_BLACK: "nearly black images",
        DEEP_GREY: "images of more than 8 bits, each stretched from its own minimum to its own "
                   "maximum (--window LOW,HIGH treats all alike)",
        DEEP_COLOUR: "colour images of more than 8 bits, which keep the upper 8",
        UNUSED_ALPHA: "images with an alpha of 0 everywhere, which was ignored"}
    for note, sources in images.notes.items():
        name = shown(source_name(sources[0], root))
        if note == DEEP_GREY and window:
            yield (f"window: {window[0]:g} is black and {window[1]:g} is white in images of more "
                   f"than 8 bits: {len(sources):,}, the first: {name}")
        else:
            yield f"warning: {troubles[note]}: {len(sources):,}, the first: {name}"


def _about_names(kind: str, names: list[str | None]) -> Iterator[str]:
    """Sizes of groups or classes, the largest first."""
    sizes = Counter(filter(None, names))
    if not sizes:
        yield f"{kind}: none"
        return
    listed = ", ".join(f"{printable(name)} {count:,}"
                       for name, count in sizes.most_common(GROUPS_SHOWN))
    more = len(sizes) - GROUPS_SHOWN
    yield f"{kind} (samples): {listed}" + (f" and {more:,} more" if more > 0 else "")

    spelt: dict[str, list[str]] = {}
    for name in sizes:
        spelt.setdefault(name.casefold(), []).append(name)
    alike = [same for same in spelt.values() if len(same) > 1]
    if alike:
        yield (f"warning: {len(alike):,} {kind} differ from another only in case and are kept "
               f"apart, the first: {' and '.join(map(shown, alike[0]))}")


def _about_skipped(reasons: dict[str, int], rows: list[Row]) -> Iterator[str]:
    """Rows left out, by reason."""
    listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
    yield f"skipped rows: {listed} (listed in skipped.jsonl)" if listed else "skipped rows: none"
    lost = sum(reasons.get(reason, 0) for reason in (OUTSIDE, MISSING, UNREADABLE))
    if lost:
        yield f"warning: {lost:,} of the skipped rows have an image that cannot be packed"
    if any(reason.startswith("excluded") for reason in reasons):
        if not any(row.patient for row in rows):
            yield ("warning: --exclude left out images, but patients are not known: other images "
                   "of the same patients stay")


# ------------------------------------------------------------------------------------------- naming

def source_name(source: Source, root: Path | None) -> str:
    """An image as samples.jsonl names it: its path, relative to the data set's folder."""
    is_file = root is not None and isinstance(source, Path)
    return os.path.relpath(source, root) if is_file else str(source)


def place(row: Row, root: Path | None) -> str:
    """An image and its split."""
    return f"{shown(source_name(row.image, root))} ({row.split})"


def printable(text: str, limit: int = 60) -> str:
    """A text, short, and without what commands a terminal."""
    plain = "".join(sign if sign.isprintable() else " " for sign in islice(text, limit + 1))
    return f"{plain[:limit]}…" if len(plain) > limit else plain


def shown(text: str) -> str:
    """The same in quotes."""
    return f"'{printable(text)}'"
