"""MedICaT (github.com/allenai/medicat): figures of medical papers, with captions and mentions.

    release/s2_full_figures_oa_nonroco_combined_medical_top4_public.jsonl
    release/figures/{pdf_hash}_{fig_uri}
"""
from pathlib import Path
from typing import Iterator

from data import Row, find_root, hash_to_unit, read_jsonl, text_list, too_short
from m3ae_mini.config import require

ANNOTATIONS = "s2_full_figures_oa_nonroco_combined_medical_top4_public.jsonl"
MARKERS = (f"release/{ANNOTATIONS}",)
HELD_OUT = 1000   # images for validation, and as many for test


def rows(root: Path, task: str) -> Iterator[Row]:
    """Radiology figures only. The texts of a figure are its caption and the sentences that
    mention it. `root` is the folder that holds release.

    Figures are ordered by a hash of the paper's name. Validation takes the first thousand, test
    the second. So the figures of a paper stay together, but for two papers at the borders.
    """
    require(task == "pretrain",
            f"medicat has nothing for the task {task}: choose --task pretrain")
    root = find_root(root, *MARKERS)

    figures = []                                                 # (paper, image's file name, texts)
    path = root / "release" / ANNOTATIONS
    keys = ("radiology", "pdf_hash", "fig_uri", "s2_caption")
    for number, record in read_jsonl(path, *keys):
        if record["radiology"]:
            paper = str(record["pdf_hash"])
            texts = text_list(record, "s2orc_references", f"{path}, line {number}")
            texts.insert(0, str(record["s2_caption"] or ""))
            figures.append((paper, f"{paper}_{record['fig_uri']}", texts))
    figures.sort(key=lambda figure: (hash_to_unit(figure[0]), figure[1]))

    held = 0
    for _, name, texts in figures:
        split = "val" if held < HELD_OUT else "test" if held < 2 * HELD_OUT else "train"
        held += any(too_short(text) is None for text in texts)   # only usable images count
        for text in texts:
            yield Row(split, root / "release" / "figures" / name, text, skip=too_short(text))
