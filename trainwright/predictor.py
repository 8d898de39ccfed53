"""A trained model with all that it takes to use it on new samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainwright.data.examples import Preparation
from trainwright.recipe import Task


@dataclass(frozen=True)
class Predictor:
    """New samples in, outputs out.

    read     files or folders to names and raw samples, one at a time; InputError for a bad one
    outputs  raw samples (n, *shape) to the model's outputs, float32 on the CPU; values in the user's units
    """

    preparation: Preparation
    task: Task
    read: Callable[[Sequence[Path]], Iterator[tuple[str, Tensor]]]
    outputs: Callable[[Tensor], Tensor]
