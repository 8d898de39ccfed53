"""How much longer operators take in a step than each by itself, again and again: a small training step beside their sum."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from trainwright.plan.counting import Counts
from trainwright.plan.devices import Device
from trainwright.plan.timing import estimate

ROWS, WIDTH, INNER, BLOCKS = 1024, 384, 1024, 3  # some 20 GFLOP
REPEATS, PATIENCE = 9, 0.2  # at most, and seconds


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.counts.count(func, args, kwargs or {}, result, "forward")
        return result


def longer(step: Callable[[], None], seconds: float, device: Device) -> float:
    """The time of a step, which isn't its first, through that of its operators by the device's curves."""
    with _Counting() as counting:
        step()
    return seconds / estimate(counting.counts.all_works(), [], device).seconds


def small_step(dtype: torch.dtype) -> Callable[[], None]:
    """Forward, backward and update of gated perceptrons with norms around which the stream goes on, as in a Llama."""
    blocks = [[torch.randn(shape).to(dtype).mul_(0.02) for shape in _SHAPES] for _ in range(BLOCKS)]
    weights = [weight.requires_grad_() for block in blocks for weight in block]
    optimizer = torch.optim.AdamW(weights, fused=True)
    rows = torch.randn(ROWS, WIDTH).to(dtype)

    def step() -> None:
        stream = rows
        for block in blocks:
            stream = _block(stream, *block)
        stream.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


_SHAPES = ((WIDTH,), (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER))


def _block(stream: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    inner = functional.layer_norm(stream, (WIDTH,), norm)
    return stream + functional.linear(functional.silu(functional.linear(inner, gate)) * functional.linear(inner, up), down)


def fastest(step: Callable[[], None]) -> float:
    """Seconds of the fastest of some: others' work only ever adds time."""
    found: list[float] = []
    while len(found) < REPEATS and sum(found) < PATIENCE:
        started = time.perf_counter()
        step()
        found.append(time.perf_counter() - started)
    return min(found)
