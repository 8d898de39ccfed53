"""What a classifier said of samples whose class is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from trainwright.recipe import Task


@dataclass(frozen=True)
class Scored:
    """Probabilities beside actual classes.

    probabilities  (n, classes) float64; of a binary task those of both classes
    actual         (n,) int64
    ids            (n,) int64: where the samples stand in the split; those that don't count (an ignored class) are left out
    """

    labels: tuple[str, ...]
    probabilities: np.ndarray
    actual: np.ndarray
    ids: np.ndarray
    names: Sequence[str]
    binary: bool
    split: str

    def __len__(self) -> int:
        return len(self.actual)

    @cached_property
    def predicted(self) -> np.ndarray:
        """(n,) int64."""
        return np.asarray(self.probabilities.argmax(1))

    @cached_property
    def confidence(self) -> np.ndarray:
        """The probability of the predicted class, (n,)."""
        return np.asarray(self.probabilities.max(1))

    @cached_property
    def wrong(self) -> np.ndarray:
        """(n,) bool."""
        return np.asarray(self.predicted != self.actual)

    def name(self, index: int) -> str:
        """What the user knows a sample by."""
        return self.names[int(self.ids[index])]


def score(task: Task, outputs: Tensor, targets: Tensor, names: Sequence[str], split: str) -> Scored:
    """From a model's outputs: (n, classes) logits, or (n, 1) of a binary task; targets (n,) int64."""
    probabilities = likelihoods(task, outputs).numpy()
    actual = targets.long().numpy()
    ids = np.flatnonzero((actual >= 0) & (actual < probabilities.shape[1]))
    binary = task.kind == "binary"
    return Scored(class_labels(task), probabilities[ids], actual[ids], ids, names, binary, split)


def likelihoods(task: Task, outputs: Tensor) -> Tensor:
    """Logits (n, outputs, ...) as probabilities of all classes (n, classes, ...), float64: a binary task has two."""
    wide = outputs.double()
    if task.kind == "binary":
        return torch.cat([(-wide).sigmoid(), wide.sigmoid()], 1)
    return wide.softmax(1)


def class_labels(task: Task) -> tuple[str, ...]:
    """The names of all classes; their numbers where they have none."""
    count = 2 if task.kind == "binary" else task.outputs
    return task.labels if len(task.labels) == count else tuple(map(str, range(count)))
