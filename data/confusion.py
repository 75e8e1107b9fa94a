"""Draws the confusion matrix of a classification."""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data.scores import confusion_matrix
from m3ae_mini.plots import BACK, FONT, GREEN, INK

CELL, MARGIN, HEAD = 64, 12, 34        # pixels: a cell, around the sheet, above the cells
LONGEST = 30                           # letters of a class's name that are shown


def draw_confusion(table: dict[str, np.ndarray], path: Path) -> None:
    """A row for each true class, a column for each predicted one; a cell shows how many test rows,
    the greener the larger their share of the row.

    table: of the task cls (task_metrics.py)."""
    labels = [name.removeprefix("p: ") for name in table if name.startswith("p: ")]
    index = {label: i for i, label in enumerate(labels)}
    target = np.array([index[label] for label in table["target"]])    # (n,)
    prediction = np.array([index[label] for label in table["prediction"]])
    counts = confusion_matrix(target, prediction, np.ones(len(target)), len(labels))  # (C, C)

    # Names stand to the left; columns have the numbers of the rows.
    names = [f"{i + 1} {label[:LONGEST]}" for i, label in enumerate(labels)]
    left = MARGIN + max(int(FONT.getlength(name)) for name in names) + 10
    side = CELL * len(labels)
    sheet = Image.new("RGB", (left + side + MARGIN, HEAD + 20 + side + MARGIN), BACK)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 8), "true class (rows), predicted class (columns)", INK, FONT)
    for i, name in enumerate(names):
        top = HEAD + 20 + i * CELL
        draw.text((left - 6, top + CELL // 2), name, INK, FONT, "rm")
        draw.text((left + i * CELL + CELL // 2, HEAD + 10), str(i + 1), INK, FONT, "mm")
        for j, count in enumerate(counts[i]):
            share = count / max(1.0, counts[i].sum())
            colour = tuple(round(b + share * (g - b)) for b, g in zip(BACK, GREEN))
            box = (left + j * CELL, top, left + (j + 1) * CELL - 2, top + CELL - 2)
            draw.rectangle(box, fill=colour)
            draw.text((box[0] + CELL // 2, top + CELL // 2), f"{count:,.0f}",
                      BACK if share > 0.5 else INK, FONT, "mm")
    sheet.save(path)
