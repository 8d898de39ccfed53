"""Masks as files have them to masks of classes: numbered from 0 without gaps, or 0 and 255 for two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainwright.recipe import InputError


@dataclass(frozen=True, eq=False)
class RawMasks:
    """Of one split: ``masks`` (n, height, width) uint8; ``values`` (n, 256) bool, which of them occur; and their names."""

    masks: np.ndarray
    values: np.ndarray
    names: Sequence[str]


def number(splits: Sequence[RawMasks], labels: tuple[str, ...]) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """The masks of each split as classes, and the names of the classes: ``labels``, or where there are none '0', '1', ...

    NOTE: all splits are looked at together, because a rare class may occur in only one of them.

    Raises:
        InputError: a value that is no class, with the mask and its values.
    """
    occurring = np.any([split.values.any(0) for split in splits], axis=0)
    two_valued = set(np.flatnonzero(occurring).tolist()) in ({0, 255}, {255}) and len(labels) in (0, 2)
    if two_valued:
        return [split.masks // 255 for split in splits], labels or ("0", "1")
    count = len(labels) or int(np.argmin([*occurring, False]))
    for split in splits:
        for i in np.flatnonzero(split.values[:, count:].any(1))[:1]:
            raise InputError(_wrong(split.names[i], np.flatnonzero(split.values[i]), labels))
    return [split.masks for split in splits], labels or tuple(map(str, range(count)))


def _wrong(name: str, values: np.ndarray, labels: tuple[str, ...]) -> str:
    listed = ", ".join(map(str, values[:12])) + (", ..." if len(values) > 12 else "")
    wanted = (
        f"from 0 to {len(labels) - 1}, as there are {len(labels)} classes" if labels else "from 0 without gaps in all masks"
    )
    return f"the mask of {name} has the values {listed}; masks number the classes {wanted}, or are 0 and 255 for two classes"
