"""MedICaT (github.com/allenai/medicat): figures of medical papers, with captions and mentions.

    release/s2_full_figures_oa_nonroco_combined_medical_top4_public.jsonl
    release/figures/{pdf_hash}_{fig_uri}
"""
from pathlib import Path
from typing import Iterator

from data import Row, draw, records, texts, too_short
from m3ae_mini.config import UserError

ANNOTATIONS = "s2_full_figures_oa_nonroco_combined_medical_top4_public.jsonl"
HELD_OUT = 1000   # images for validation, and as many for test


def rows(root: Path, task: str) -> Iterator[Row]:
    """Radiology figures only; its caption and the sentences that mention it are texts of a figure. `root` is
    the folder that holds release.

    Validation and test are the first and the second thousand in an order drawn by the papers' names, so the
    figures of one paper stay together (but for two papers, at the borders)."""
    if task != "pretrain":
        raise UserError(f"medicat has nothing for the task {task}: choose --task pretrain")

    figures = []   # (paper, image's file name, texts)
    path, keys = root / "release" / ANNOTATIONS, ("radiology", "pdf_hash", "fig_uri", "s2_caption")
    for number, record in records(path, *keys):
        if record["radiology"]:
            paper = str(record["pdf_hash"])
            captions = texts(record, "s2orc_references", f"{path}, line {number}")
            captions.insert(0, str(record["s2_caption"] or ""))
            figures.append((paper, f"{paper}_{record['fig_uri']}", captions))
    figures.sort(key=lambda figure: (draw(figure[0]), figure[1]))

    held = 0
    for _, name, captions in figures:
        split = "val" if held < HELD_OUT else "test" if held < 2 * HELD_OUT else "train"
        held += any(too_short(text) is None for text in captions)   # an image without a text takes no place
        for text in captions:
            yield Row(split, root / "release" / "figures" / name, text, skip=too_short(text))
