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
from trainwright.parallel.mesh import Mesh
from trainwright.recipe import Task

Forward = Callable[[nn.Module, Any, Tensor | None], Tensor]


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
    mesh: Mesh = field(default_factory=Mesh)

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
    """What a kind of data adds to a program; ``loop.Run`` explains what isn't explained here.

    forward   (module, batch, hidden) to the module's outputs; where ``module`` isn't the first part of the model, ``hidden`` is
              what the parts before it made of the batch
    sums      (outputs, batch) to the sums of the loss, 0-dim or (terms,)
    count     a batch to what those are divided by, known before the forward
    measure   batches with their outputs to metrics, over all processes that share the data
    fingerprint  another one where the data of a split is
    """

    batches: Batches
    forward: Forward
    sums: Callable[[Tensor, Any], Tensor]
    count: Callable[[Any], Tensor | int]
    splits: Mapping[str, Callable[[], Iterable[Batch]]]
    measure: Callable[[Iterable[tuple[Any, Tensor]], Callable[[int], None]], dict[str, float]]
    measures: tuple[str, ...]
    save: Callable[[Path], None]
    unit: str
    fingerprint: str
    flops: Callable[[Any], float] | None = None
    samples: Callable[[int], list[Sample]] | None = None
    pictures: Callable[[Path, str, Mapping[str, float]], list[Path]] | None = None
    notes: list[str] = field(default_factory=list)
