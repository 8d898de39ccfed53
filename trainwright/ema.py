"""An exponential moving average of the weights, which is evaluated and saved in their stead (Polyak and Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.pieces import local
from trainwright.recipe import Ema, InputError

UPDATES = "updates"


class Average:
    """The average over the trainable parameters of a model, tied ones once; it begins with their values of now.

    After each update  average = decay * average + (1 - decay) * parameter, in float32 or the parameter's dtype if that is
    wider: in bfloat16 the small differences would round away.

    Buffers are used as the model has them. BatchNorm's are moving averages already, and counters and masks have no mean.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, section: Ema) -> None:
        named = {name: local(p) for name, p in model.named_parameters() if p.requires_grad}
        if UPDATES in named:
            raise InputError("training.ema: the model has a parameter 'updates', a name that the average uses; rename it")
        self._section = section
        self._parameters = list(named.values())
        self._averages = [p.detach().to(_wide(p), copy=True) for p in named.values()]
        self._names = list(named)
        self._updates = 0

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
        """Take in the parameters of now; for ``optimizer.register_step_post_hook``."""
        current = [p.detach().to(average.dtype) for p, average in zip(self._parameters, self._averages, strict=True)]
        torch._foreach_lerp_(self._averages, current, 1 - self._decay())
        self._updates += 1

    def _decay(self) -> float:
        """Of the next update; short at first, so that the initial weights are soon forgotten."""
        n = self._updates
        return min(self._section.decay, (1 + n) / (10 + n)) if self._section.warmup else self._section.decay

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model holds the averages inside, and afterwards its own weights again, to the bit.

        The weights are set aside meanwhile: as much memory as the gradients, which are gone between two steps.
        """
        own = [p.detach().clone() for p in self._parameters]
        try:
            _set(self._parameters, self._averages)
            yield
        finally:
            _set(self._parameters, own)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs: averages by their parameters' names, not copies, and the count ``updates``, 0-dim int64."""
        return {**dict(zip(self._names, self._averages, strict=True)), UPDATES: torch.tensor(self._updates)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Set it to what ``state`` gave; other tensors are ignored. KeyError if one is missing."""
        _set(self._averages, [tensors[name] for name in self._names])
        self._updates = int(tensors[UPDATES])


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


@torch.no_grad()
def _set(targets: list[Any], values: list[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
