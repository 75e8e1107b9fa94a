"""The labels of a downstream task: answers or classes, as packs and finished runs list them."""
import json
from pathlib import Path

import numpy as np

from data.task_metrics import targets
from m3ae_mini.config import require
from m3ae_mini.loader import Samples

LABEL_KEY = {"vqa": "answer", "cls": "label"}      # where a pack's line says what is right


def label_ids(samples: Samples, labels: list[str]) -> np.ndarray:
    """The first right label of each sample that is in the list, or -1: int64 (n,)."""
    index = {label: i for i, label in enumerate(labels)}
    ids = np.full(samples.n, -1)
    for n in range(samples.n):
        names = targets(samples.line(n), samples.cfg.task)
        ids[n] = next((index[name] for name in names if name in index), -1)
    return ids


def list_labels(packs: list, task: str, answers: str) -> list[str]:
    """The answers of the training split (or of all) as they appear, or the classes, sorted."""
    if task == "irtr":
        return []
    for pack in packs:
        require(all(LABEL_KEY[task] in line for line in pack.lines()),
                f"{pack.folder} holds samples without {LABEL_KEY[task]}: prepare it with --task "
                f"{task}")

    # dict keys: a set that keeps the order.
    seen: dict[str, dict[str, None]] = {"train": {}, "val": {}, "test": {}}
    for split, names in seen.items():
        for pack in packs:
            for line in pack.lines(split):
                names.update(dict.fromkeys(targets(line, task)))
    if task == "vqa" and answers == "train":
        return list(seen["train"])
    if task == "vqa":
        return list(seen["train"] | seen["val"] | seen["test"])
    unseen = sorted((seen["val"] | seen["test"]).keys() - seen["train"].keys())
    require(not unseen,
            f"no training sample has the class {', '.join(unseen)}: prepare another split")
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
