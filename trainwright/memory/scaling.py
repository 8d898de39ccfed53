"""Dynamic loss scaling for float16 (Micikevicius et al. 2018, section 3.2), by the rule of torch's GradScaler.

The loss is multiplied by a power of two, so that small gradients of activations don't vanish in float16, and the gradients
of parameters, which are float32, are divided by it before anybody looks at them. A step whose gradient overflowed is left
out and the scale halved; after ``GROWTH`` good steps in a row it doubles.

Whether a gradient overflowed is read off its global norm, which has the same bits in all processes: so all agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.memory.precision import with_kernels
from trainwright.models.contract import Change
from trainwright.pieces import local
from trainwright.recipe import RunError

START, GROWTH = 65536.0, 2000  # GradScaler's
LEAST, MOST = 1.0, 2.0**127
SCALE, GOOD = "loss scale", "good steps"  # in checkpoints, beside names of parameters, which have no spaces


class Scaler:
    """The scale of a run's loss, and what it does to the parts of a step.

    scale   what the loss is multiplied by, a power of two
    good    steps without overflow since the scale changed last
    """

    def __init__(self, device: torch.device) -> None:
        self.scale, self.good = START, 0
        self._device = device

    def count(self, count: Callable[[Any], Tensor | int]) -> Callable[[Any], Tensor]:
        """What losses are divided by, divided by the scale: all losses of a step then are scaled, exactly."""
        return lambda batch: torch.as_tensor(count(batch), dtype=torch.float64) / self.scale

    def forward_backward(
        self, inner: Callable[[Sequence[Any]], Tensor], trained: Iterable[tuple[str, nn.Parameter]]
    ) -> Callable[[Sequence[Any]], Tensor]:
        """A step's backwards with a scaled loss; the loss and the gradients that it gives are unscaled.

        Args:
            inner: divides its losses by what ``count`` gives.
            trained: what has gradients afterwards.
        """
        parameters = [parameter for _, parameter in trained]

        def forward_backward(batches: Sequence[Any]) -> Tensor:
            with with_kernels("fp16", self._device):
                loss = inner(batches)
            if gradients := [local(p.grad) for p in parameters if p.grad is not None]:
                torch._foreach_mul_(gradients, 1 / self.scale)
            return loss / self.scale

        return forward_backward

    def judge(self, loss: float, norm: float) -> str:
        """After a step's gradients: nothing if they may be used, else why not; the scale is that of the next step.

        Raises:
            RunError: no scale above 1 keeps the gradients finite, so it isn't the scale that makes them overflow.
        """
        if math.isfinite(norm):
            self.good += 1
            if self.good == GROWTH:
                self.scale, self.good = min(2 * self.scale, MOST), 0
            return ""
        before, self.scale, self.good = self.scale, self.scale / 2, 0
        if self.scale < LEAST:
            raise RunError(
                f"the gradient overflows float16 even with a loss scale of {before:g} (loss {loss}); "
                "use precision: bf16, which has the range of float32, or fp32"
            )
        return f"the gradient overflowed, so nothing was updated; the loss scale is {self.scale:g} now"

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: 0-dim float64 and int64."""
        return {SCALE: torch.tensor(self.scale, dtype=torch.float64), GOOD: torch.tensor(self.good)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Set it to what ``state`` gave; other tensors are ignored."""
        self.scale, self.good = float(tensors[SCALE]), int(tensors[GOOD])


def described() -> Change:
    """What is done, in words."""
    return Change("loss scaling", f"from {START:g}: halved by an overflow, doubled after {GROWTH:,} steps without one")


class Together:
    """Several things that a checkpoint remembers, as one."""

    def __init__(self, *parts: Any) -> None:
        self._parts = parts

    def state(self) -> dict[str, Tensor]:
        """The tensors of all; their names differ."""
        return {name: tensor for part in self._parts for name, tensor in part.state().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Each takes what is its own."""
        for part in self._parts:
            part.restore(tensors)


def together(*parts: Any) -> Any:
    """Those that are there as one; None if there are none."""
    there = [part for part in parts if part is not None]
    return Together(*there) if len(there) > 1 else there[0] if there else None
