"""The labels of a downstream task: answers or classes, as packs and finished runs list them.

A row of cls may have several labels, "A|B". The labels of such data are predicted one by one, and
"No Finding" alone means that none is present."""
import json
from pathlib import Path

import numpy as np

from m3ae_mini.config import require
from m3ae_mini.loader import Samples, validation_micro_batches

LABEL_KEY = {"vqa": "answer", "cls": "label"}      # where a pack's line says what is right
NO_FINDING = "No Finding"


# --------------------------------------------------------------------------------- what a line says

def split_labels(cell: str, location: str = "") -> list[str]:
    """The labels of "A|B", each once; none of "No Finding". UserError if others stand with it."""
    names = list(dict.fromkeys(filter(None, map(str.strip, cell.split("|")))))
    require(names, f"{location}the label '{cell}' is empty between its bars: correct it")
    is_none = [name.casefold() == NO_FINDING.casefold() for name in names]
    require(not any(is_none) or len(names) == 1,
            f"{location}the label '{cell}' holds '{NO_FINDING}' and a finding: correct it")
    return [] if any(is_none) else names


def join_labels(names: list[str]) -> str:
    """The reverse of split_labels."""
    return "|".join(names) or NO_FINDING


def targets(line: dict, task: str, several: bool = False) -> list[str]:
    """The right answers of a sample ("#" separates alternatives), its class, or its labels."""
    if task == "vqa":
        return line["answer"].split("#")
    return split_labels(line["label"]) if several else [line["label"]]


# ------------------------------------------------------------------------------------- of all lines

def several_labels(packs: list, task: str) -> bool:
    """May a row of cls have several labels? So it is if any pack says so."""
    return task == "cls" and any(
        pack.meta.get("several_labels", any("|" in label for label in pack.meta.get("labels", ())))
        for pack in packs)


def label_ids(samples: Samples, labels: list[str]) -> np.ndarray:
    """The first right label of each sample that is in the list, or -1: int64 (n,).

    With several labels a row: which of the C labels each sample has: float32 (n, C)."""
    index = {label: i for i, label in enumerate(labels)}
    task = samples.cfg.task
    several = several_labels(samples.packs, task)
    ids = np.zeros((samples.n, len(labels)), np.float32) if several else np.full(samples.n, -1)
    for n in range(samples.n):
        known = [index[name] for name in targets(samples.line(n), task, several) if name in index]
        if several:
            ids[n, known] = 1
        elif known:
            ids[n] = known[0]
    return ids


def label_note(samples: Samples, labels: list[str]) -> str:
    """How many labels there are; with several a row, how many training samples have each."""
    if samples.label_ids is None or samples.label_ids.ndim == 1:
        return f"{len(labels):,}"
    shares = samples.label_ids.mean(0)                                # (C,)
    listed = ", ".join(f"{label} {share:.1%}" for label, share in zip(labels, shares))
    return f"{len(labels):,}, a sample may have several: {listed}"


def check_scored(samples: Samples, limit: int) -> None:
    """UserError if AUROC, which chooses the best checkpoint, is not defined for any label.

    samples: of the validation, which takes at most `limit` of them."""
    indices = np.concatenate([n for _, _, n in validation_micro_batches(samples, limit)])
    share = samples.label_ids[indices].mean(0)                        # (C,) of the positives
    require(((0 < share) & (share < 1)).any(),
            "no label is present in some validation samples and absent in others, so AUROC is not "
            "defined and can't choose the best checkpoint: prepare another split")


def list_labels(packs: list, task: str, answers: str) -> list[str]:
    """The answers of the training split (or of all) as they appear, or the classes, sorted."""
    if task == "irtr":
        return []
    for pack in packs:
        require(all(LABEL_KEY[task] in line for line in pack.lines()),
                f"{pack.folder} holds samples without {LABEL_KEY[task]}: prepare it with --task "
                f"{task}")

    # dict keys: a set that keeps the order.
    several = several_labels(packs, task)
    seen: dict[str, dict[str, None]] = {"train": {}, "val": {}, "test": {}}
    for split, names in seen.items():
        for pack in packs:
            for line in pack.lines(split):
                names.update(dict.fromkeys(targets(line, task, several)))
    if task == "vqa" and answers == "train":
        return list(seen["train"])
    if task == "vqa":
        return list(seen["train"] | seen["val"] | seen["test"])
    unseen = sorted((seen["val"] | seen["test"]).keys() - seen["train"].keys())
    require(not unseen,
            f"no training sample has the class {', '.join(unseen)}: prepare another split")
    least = 1 if several else 2
    require(len(seen["train"]) >= least, f"the training samples have {len(seen['train'])} labels, "
            f"so there is nothing to learn: prepare data with {least} or more")
    return sorted(seen["train"])


def saved_labels(run: Path, task: str, with_blind: bool = True) -> list[str] | None:
    """The answers or classes that a run has learned for a task, from its config.json, or None.

    run: its folder, or a checkpoint in it. with_blind: also those of a run with --blind."""
    try:
        folder = run if run.is_dir() else run.parent
        saved = json.loads((folder / "config.json").read_text())
        if saved["model"]["task"] != task or saved["task"]["blind"] and not with_blind:
            return None
        return [str(label) for label in saved["data"]["labels"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
