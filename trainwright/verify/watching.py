"""How large what each module gives is, and its gradient: which differs first tells where a fault lies.

Mean squares are taken over all micro-batches and processes, so that they don't depend on who computes which part of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trainwright.loop import Run

Sums = dict[str, list[float]]  # name -> [sum of squares, how many numbers]


@dataclass
class Watch:
    """What was seen so far in this process, in the order of the forward."""

    outputs: Sums = field(default_factory=dict)
    inner: Sums = field(default_factory=dict)
    hooks: list[Callable[[], None]] = field(default_factory=list)

    def stop(self) -> None:
        """See no more."""
        for remove in self.hooks:
            remove()
        self.hooks.clear()


def watch(model: nn.Module) -> Watch:
    """Look at the outputs of all modules from now on."""
    found = Watch()
    for name, module in model.named_modules():
        if name:
            found.hooks.append(module.register_forward_hook(_hook(found, name)).remove)
    return found


def _hook(found: Watch, name: str) -> Callable[[nn.Module, object, object], None]:
    def note(module: nn.Module, inputs: object, output: object) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        _add(found.outputs, name, output)
        if output.requires_grad:
            output.register_hook(lambda gradient: _add(found.inner, name, gradient))

    return note


@torch.no_grad()
def _add(sums: Sums, name: str, tensor: Tensor) -> None:
    known = sums.setdefault(name, [0.0, 0.0])
    known[0] += float(tensor.detach().double().square().sum())
    known[1] += tensor.numel()


def gathered(run: Run, sums: Sums) -> dict[str, float]:
    """Mean squares over all processes."""
    whole: Sums = {}
    for one in run.share(sums):
        for name, (squares, count) in one.items():
            known = whole.setdefault(name, [0.0, 0.0])
            known[0], known[1] = known[0] + squares, known[1] + count
    return {name: squares / count if count else 0.0 for name, (squares, count) in whole.items()}
