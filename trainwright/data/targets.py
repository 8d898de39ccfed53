"""What is to be predicted: classes with their labels, or values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainwright.data.examples import moments
from trainwright.recipe import InputError

VALUE_LOSSES, CLASS_LOSSES = "mse, l1 or huber", "cross_entropy or focal"
MOST_CLASSES, MOST_SHARE = 20, 0.25  # more classes than both are values, if they are numbers


def classes(parts: Sequence[np.ndarray], where: str, order: Sequence[str] = ()) -> tuple[tuple[str, ...], list[Tensor]]:
    """The labels over all parts, and each part's classes as (n,) int64.

    Args:
        parts: (n,) each, numbers or text.
        where: 'rows.csv, column 'y'': begins messages.
        order: labels that come first, in this order; the others are sorted, numbers by their size.

    Raises:
        InputError: fewer than two classes, or numbers that are no classes.
    """
    numeric = [part.dtype.kind in "biuf" for part in parts]
    if any(numeric) != all(numeric):
        raise InputError(f"{where}: numbers in one of the files of data, text in another; give all the same classes")
    distinct, codes = np.unique(np.concatenate(parts), return_inverse=True)
    if all(numeric):
        _check_numbers(distinct, len(codes), where)
    texts = [str(value if value.dtype.kind in "bU" else int(value)) for value in distinct]
    if len(texts) < 2:
        raise InputError(f"{where}: one class only, {texts[0]!r}; there is nothing to tell apart")
    labels = [*(label for label in order if label in texts), *(text for text in texts if text not in order)]
    place = np.array([labels.index(text) for text in texts])
    ends = np.cumsum([len(part) for part in parts])
    return tuple(labels), [torch.from_numpy(part) for part in np.split(place[codes], ends[:-1])]


def _check_numbers(distinct: np.ndarray, count: int, where: str) -> None:
    """That numbers can be classes: whole, and not nearly as many as samples."""
    if distinct.dtype.kind == "f" and not (whole := np.equal(np.mod(distinct, 1), 0)).all():
        raise InputError(f"{where}: {distinct[~whole][0]} is no class; to predict values set loss.name to {VALUE_LOSSES}")
    if len(distinct) > MOST_CLASSES and len(distinct) > MOST_SHARE * count:
        raise InputError(
            f"{where}: {len(distinct)} different numbers in {count} samples are values rather than classes; set loss.name to "
            f"{VALUE_LOSSES} (if they are classes indeed: save them as text, or say data.types: category for a table's column)"
        )


def absent(labels: Sequence[str], train: Tensor) -> list[str]:
    """A note for people if the training split lacks some classes."""
    seen = set(train.unique().tolist())
    lacking = [label for number, label in enumerate(labels) if number not in seen]
    return [f"not in the training split, so never learned: {', '.join(lacking)}"] if lacking else []


def scale(train: Tensor, normalize: bool) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and standard deviation of the training targets (n, values); None for classes, and where not wanted."""
    return moments(train, -1) if normalize and train.is_floating_point() else (None, None)
