"""What building gives on its way: a model with its techniques applied, and what a kind of data adds to a program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainwright.loop import Batch, Sample
from trainwright.memory.precision import Precision
from trainwright.models.contract import Change
from trainwright.models.pretrained import Source
from trainwright.recipe import Task


@dataclass(frozen=True)
class Shape:
    """What the data asks of a model: the shape of one sample, and the task."""

    inputs: tuple[int, ...]
    task: Task


@dataclass(frozen=True)
class Built:
    """A model with its techniques applied, and where it came from."""

    model: nn.Module
    changes: list[Change]
    config: dict[str, Any]
    source: Source | None
    precision: Precision
    device: torch.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """What products are made in."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


class Batches(Protocol):
    """The batches of a run, as a function of the step."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every row is seen once."""

    def batch(self, step: int) -> Sequence[Batch]:
        """The micro-batches of an optimizer step, from 0."""

    def identity(self, step: int) -> str:
        """What a step trains on, in words."""


@dataclass(frozen=True)
class Part:
    """What a kind of data adds to a program; ``loop.Run`` explains the callables.

    ``fingerprint`` is another one where the data of a split is.
    """

    batches: Batches
    objective: Callable[[Any], Tensor]
    count: Callable[[Any], Tensor | int]
    splits: Mapping[str, Callable[[], Iterable[Batch]]]
    measure: Callable[[Iterable[Any], Callable[[int], None]], dict[str, float]]
    measures: tuple[str, ...]
    save: Callable[[Path], None]
    unit: str
    fingerprint: str
    flops: Callable[[Any], float] | None = None
    samples: Callable[[int], list[Sample]] | None = None
    pictures: Callable[[Path, str, Mapping[str, float]], list[Path]] | None = None
    notes: list[str] = field(default_factory=list)
