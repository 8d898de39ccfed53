"""Batches of samples with targets, as a function of the step: nothing has to be saved to resume, or to use more processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainwright.data import sampler
from trainwright.data.examples import Examples

NAMED = 5  # samples that a message names
Augment = Callable[[int, np.ndarray, int, Callable[[np.ndarray], tuple[Tensor, Tensor]]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SampleBatch:
    """Raw samples and targets, neither normalised nor on the device yet.

    inputs   (n, *shape) uint8 or float32
    targets  as ``examples.Examples`` has them; (n, classes) float32 probabilities where samples were mixed
    """

    inputs: Tensor
    targets: Tensor

    @property
    def size(self) -> int:
        return len(self.inputs)

    @property
    def supervised(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class SampleBatches:
    """What a run trains on. Sizes are in samples; ``augment`` is an ``augment.Augmenter``, or None."""

    examples: Examples
    batch_size: int
    micro_batch_size: int
    seed: int
    augment: Augment | None = None

    @property
    def steps_per_epoch(self) -> int:
        return sampler.steps_per_epoch(len(self.examples), self.batch_size)

    def batch(self, step: int) -> list[SampleBatch]:
        """The micro-batches of an optimizer step (from 0), fewer or smaller at the end of an epoch."""
        ids = self._ids(step)
        self._announce(step + 1)
        fetch = self._fetching(ids)
        positions = sampler.micro_batches(np.arange(len(ids)), self.micro_batch_size)
        if self.augment is None:
            return [SampleBatch(*fetch(part)) for part in positions]
        return [SampleBatch(*self.augment(step, part, len(ids), fetch)) for part in positions]

    def identity(self, step: int) -> str:
        """What a step trains on, to be found in the source."""
        names = [self.examples.names[i] for i in self._ids(step)]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return f"epoch {step // self.steps_per_epoch + 1}, {', '.join(names[:NAMED])}{more}"

    def _ids(self, step: int) -> np.ndarray:
        return sampler.global_batch(self.seed, step, len(self.examples), self.batch_size)

    def _fetching(self, ids: np.ndarray) -> Callable[[np.ndarray], tuple[Tensor, Tensor]]:
        """Positions in the global batch to their inputs and targets."""

        def fetch(positions: np.ndarray) -> tuple[Tensor, Tensor]:
            chosen = ids[positions]
            return self.examples.inputs.take(chosen), self.examples.targets.index_select(0, torch.from_numpy(chosen))

        return fetch

    def _announce(self, step: int) -> None:
        """Tell inputs that are decoded elsewhere what comes next."""
        prefetch = getattr(self.examples.inputs, "prefetch", None)
        if prefetch is not None:
            prefetch(self._ids(step))


def in_order(examples: Examples, size: int) -> Iterator[SampleBatch]:
    """Batches for evaluation: every sample once and in order, the last batch perhaps smaller."""
    for first in range(0, len(examples), size):
        ids = np.arange(first, min(first + size, len(examples)))
        yield SampleBatch(examples.inputs.take(ids), examples.targets[first : first + size])
