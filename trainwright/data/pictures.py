"""Images with their targets as a source has them: files or arrays, nothing decoded or resized yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from trainwright.recipe import InputError, nearest


@dataclass(frozen=True, eq=False)
class Pictures:
    """One split.

    images   files, or (n, height, width) or (n, height, width, channels) uint8
    targets  classes: (n,) int64; values: (n, values) float32; masks: (n, height, width) uint8, or files
    names    what the user knows an image by
    labels   of the classes or values; of masks: what classes.txt says, else empty
    """

    images: Sequence[Path] | np.ndarray
    targets: Sequence[Path] | np.ndarray
    names: Sequence[str]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def masked(self) -> bool:
        return not isinstance(self.targets, np.ndarray) or self.targets.ndim == 3

    @property
    def classes(self) -> np.ndarray | None:
        """(n,) int64 where each image has a class, to stratify by."""
        return self.targets if isinstance(self.targets, np.ndarray) and self.targets.ndim == 1 else None

    def part(self, ids: np.ndarray) -> Pictures:
        """Those with these numbers."""
        return replace(self, images=_at(self.images, ids), targets=_at(self.targets, ids), names=[self.names[i] for i in ids])


@dataclass(frozen=True, eq=False)
class Source:
    """What a source offers: ``splits`` has 'train' and maybe 'held_out' and 'test'; ``form`` says in words what it is."""

    form: str
    splits: Mapping[str, Pictures]
    notes: tuple[str, ...] = field(default=())


def relabelled(pictures: Pictures, labels: tuple[str, ...], where: str) -> Pictures:
    """Its classes numbered as the training data's are.

    Raises:
        InputError: a class that the training data doesn't have.
    """
    if pictures.classes is None or pictures.labels == labels:
        return pictures
    for label in pictures.labels:
        if label not in labels:
            known = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
            raise InputError(f"{where} has the class {label!r}{nearest(label, labels)}; the training data's are {known}")
    numbers = np.array([labels.index(label) for label in pictures.labels], dtype=np.int64)
    return replace(pictures, targets=numbers[pictures.classes], labels=labels)


def _at(values: Sequence[Path] | np.ndarray, ids: np.ndarray) -> Sequence[Path] | np.ndarray:
    return values[ids] if isinstance(values, np.ndarray) else [values[i] for i in ids]
