"""What a training step asks of the processes that share its batches: the same at every ZeRO stage, and alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from trainwright.parallel.mesh import Axis
from trainwright.pieces import Piece

Named = list[tuple[str, nn.Parameter]]


class Sharing(Protocol):
    """How the processes of the axis ``data`` share gradients, and at stages 1 to 3 what is updated (Rajbhandari et al. 2020).

    A step is any number of portions, ``finish``, ``optimizer.step``, ``updated``. All processes make the same calls, each with
    its own part of the batch, which may be empty: its forward and backward run all the same.

    named: what the optimizer gets: the trainable parameters, or plain local parts of them that share their memory, under the
        model's names and in its order; tied ones once. Parts may be empty.
    shards_parameters: the model's own parameters, frozen ones too, are parts (``pieces.local``), gathered only while they
        compute.
    """

    named: Named
    shards_parameters: bool

    def portion(self, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward of a micro-batch; ``last``: of those of the step.

        Only the last portion may overlap its backward with communication, so it must hold one backward only; who has several
        (a pipeline) says False to all.
        """

    def finish(self) -> None:
        """After the last backward: every parameter of ``named`` has the sum over all processes as ``grad``.

        None where no process had one, as in a single process. The model's other gradients are gone.
        """

    def updated(self) -> None:
        """After the optimizer's step: the model computes with the new values at every process."""

    def splits(self, name: str) -> bool:
        """Whether the processes have different parts of a trainable parameter in ``named``."""

    def piece(self, name: str, outer: Piece) -> Piece:
        """The box of the parameter that ``named`` has here, where ``outer`` is what the axis ``data`` shares."""

    def rest(self) -> None:
        """After forwards without a backward: free whatever they gathered."""


class Alone:
    """One process shares with nobody."""

    shards_parameters = False

    def __init__(self, model: nn.Module) -> None:
        self.named = trainable(model)

    def portion(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self) -> None:
        """Nothing to wait for."""

    def updated(self) -> None:
        """Nothing to tell."""

    def splits(self, name: str) -> bool:
        return False

    def piece(self, name: str, outer: Piece) -> Piece:
        return outer

    def rest(self) -> None:
        """Nothing to free."""


def alone(model: nn.Module) -> Sharing:
    """For a single process, at no cost."""
    return Alone(model)


def trainable(model: nn.Module) -> Named:
    """The parameters that learn, tied ones once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


class Arrivals:
    """Which parameters got a gradient in this step, at any process: the others must have none, not zeros.

    An optimizer decays a parameter whose gradient is zero, and leaves one alone that has none.
    """

    def __init__(self, count: int, axis: Axis, device: torch.device) -> None:
        self._here = torch.zeros(count, dtype=torch.uint8)
        self._axis, self._device = axis, device

    def note(self, index: int) -> None:
        """One has its gradient here."""
        self._here[index] = 1

    def settle(self) -> list[bool]:
        """For each, whether any process noted it since the last call."""
        anywhere = self._here.to(self._device, copy=True)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=self._axis.group)
        self._here.zero_()
        return [bool(flag) for flag in anywhere.tolist()]
