"""What building gives on its way: a model with its techniques applied, and what a kind of data adds to a program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainwright.loop import Batch, Sample
from trainwright.memory.precision import DTYPES, Precision
from trainwright.models.contract import Change
from trainwright.models.pretrained import Source
from trainwright.parallel.mesh import Mesh
from trainwright.parallel.pipeline import Split
from trainwright.pieces import Held, Piece
from trainwright.recipe import Task

Forward = Callable[[nn.Module, Any, Tensor | None], Tensor]


@dataclass(frozen=True)
class Shape:
    """What the data asks of a model: the shape of one sample, and the task."""

    inputs: tuple[int, ...]
    task: Task


@dataclass(frozen=True)
class Division:
    """What of a model this process has, before data ranks share it.

    plain    the names of all parameters that learn in the whole model, and of all its tensors
    pieces   boxes of what tensor parallelism splits
    partial  whole parameters whose gradients the tensor ranks have in summands
    head     the part of the vocabulary, where it is split
    """

    plain: tuple[str, ...] = ()
    everything: frozenset[str] = frozenset()
    pieces: Mapping[str, Piece] = field(default_factory=dict)
    partial: tuple[str, ...] = ()
    head: Piece | None = None
    split: Split | None = None

    def absent(self, model: nn.Module) -> Callable[[str], bool]:
        """Whether a name of the whole model belongs to another process's stage."""
        here = {*model.state_dict(keep_vars=True), *self.copies.values()}
        return lambda name: name in self.everything and name not in here

    @property
    def copies(self) -> Mapping[str, str]:
        """Local names of tied parameters to their names in the whole model, where the first stage has them, too."""
        return self.split.copies if self.split else {}


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
    division: Division = field(default_factory=Division)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What products are made in."""
        return DTYPES[self.precision]


class Batches(Protocol):
    """The batches of a run, as a function of the step."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every row is seen once."""

    @property
    def micro_batches(self) -> int:
        """Of a whole batch, in each process."""

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
    shape     what decides the shapes of all that a model makes of a batch
    fingerprint  another one where the data of a split is
    """

    batches: Batches
    forward: Forward
    sums: Callable[[Tensor, Any], Tensor]
    count: Callable[[Any], Tensor | int]
    shape: Callable[[Any], tuple[int, ...]]
    splits: Mapping[str, Callable[[], Iterable[Batch]]]
    measure: Callable[[Iterable[tuple[Any, Tensor]], Callable[[int], None]], dict[str, float]]
    measures: tuple[str, ...]
    save: Callable[[Mapping[str, Held], Path], None]
    unit: str
    fingerprint: str
    flops: Callable[[Any], float] | None = None
    samples: Callable[[int], list[Sample]] | None = None
    pictures: Callable[[Path, str, Mapping[str, float]], list[Path]] | None = None
    notes: list[str] = field(default_factory=list)
