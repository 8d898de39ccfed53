"""The machine: the rate of its matrix products, the yardstick for the share of the peak."""

from __future__ import annotations

import statistics
import time
from functools import cache

import torch


@cache
def matrix_product_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a (size, size) x (size, size) product in ``dtype``: the median of ten, after a warm-up."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = [_timed(a, b, device) for _ in range(13)][3:]
    return 2 * size**3 / statistics.median(seconds)


def _timed(a: torch.Tensor, b: torch.Tensor, device: torch.device) -> float:
    started = time.perf_counter()
    torch.mm(a, b)
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started
