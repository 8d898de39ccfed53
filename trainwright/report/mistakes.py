"""Which samples a classifier gets wrong or wavers at: as pictures, and all mistakes as a table."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from trainwright.report import style
from trainwright.report.scored import Scored

Pictures = Callable[[Sequence[int]], Tensor | None]

COLUMNS, ROWS = 5, 4


def worst(scored: Scored) -> np.ndarray:
    """The samples that are wrong, the most confident first."""
    wrong = np.flatnonzero(scored.wrong)
    return np.asarray(wrong[np.argsort(-scored.confidence[wrong], kind="stable")])


def uncertain(scored: Scored) -> np.ndarray:
    """All samples, the one whose likeliest class is the least likely first."""
    return np.argsort(scored.confidence, kind="stable")


def gallery(scored: Scored, order: np.ndarray, title: str, pictures: Pictures) -> Figure | None:
    """The first samples of an order as images over what they are and what the model says; None where they aren't images."""
    chosen = order[: COLUMNS * ROWS]
    images = pictures(scored.ids[chosen].tolist()) if len(chosen) else None
    if images is None:
        return None
    rows = -(-len(chosen) // COLUMNS)
    height = style.WIDTH / COLUMNS * float(np.clip(images.shape[2] / images.shape[3], 0.25, 1.5))
    made = style.figure(title, 0.5 + (height + 0.6) * rows)
    # Always five wide, so that few images aren't blown up.
    grid = made.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, index, image in zip(grid, chosen, images, strict=False):
        axes.imshow(style.image(image))
        axes.set_title(_caption(scored, index), fontsize=7, loc="center")
    return made


def _caption(scored: Scored, index: int) -> str:
    actual, predicted = (style.short(scored.labels[name], 15) for name in (scored.actual[index], scored.predicted[index]))
    sure = style.percent(scored.confidence[index])
    return f"{style.short(scored.name(index), 25)}\nactual: {actual}\npredicted: {predicted}\nprobability: {sure}"


def table(scored: Scored, path: Path) -> Path:
    """All mistakes, the most confident first: name, actual, predicted, probability."""
    rows = (
        (
            scored.name(index), scored.labels[scored.actual[index]], scored.labels[scored.predicted[index]],
            f"{scored.confidence[index]:.6f}",
        )
        for index in worst(scored)
    )  # fmt: skip
    return write(path, ("name", "actual", "predicted", "probability"), rows)


def write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """A CSV file, atomically."""

    def fill(temporary: Path) -> None:
        # Names of files may hold bytes that aren't UTF-8.
        with temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)

    return style.whole(path, fill)
