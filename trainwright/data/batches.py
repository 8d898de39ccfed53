"""Batches of samples with targets, as a function of the step: nothing has to be saved to resume, or to use more processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainwright.data import sampler
from trainwright.data.examples import Examples
from trainwright.data.sampler import ALONE, Share

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
    """What a process trains on. Sizes are in samples; ``augment`` is an ``augment.Augmenter``, or None.

    ``batch_size`` is that of all processes together, ``micro_batch_size`` that of one.
    """

    examples: Examples
    batch_size: int
    micro_batch_size: int
    seed: int
    augment: Augment | None = None
    share: Share = ALONE

    @property
    def steps_per_epoch(self) -> int:
        return sampler.steps_per_epoch(len(self.examples), self.batch_size)

    @property
    def micro_batches(self) -> int:
        return len(self._parts(self.batch_size))

    def batch(self, step: int) -> list[SampleBatch]:
        """The micro-batches of an optimizer step (from 0), fewer or smaller at the end of an epoch."""
        ids = self._ids(step)
        self._announce(step + 1)
        fetch = self._fetching(ids)
        positions = [np.arange(part.start, part.stop) for part in self._parts(len(ids))]
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

    def _parts(self, count: int) -> list[slice]:
        return sampler.micro_batches(count, self.micro_batch_size, self.share)

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
            ids = self._ids(step)
            prefetch(np.concatenate([ids[part] for part in self._parts(len(ids))]))


def in_order(examples: Examples, size: int, share: Share = ALONE) -> Iterator[SampleBatch]:
    """Batches for evaluation: every sample once over all processes and in order, the last batches perhaps smaller or empty."""
    for part in sampler.micro_batches(len(examples), size, share):
        yield SampleBatch(examples.inputs.take(np.arange(part.start, part.stop)), examples.targets[part])
