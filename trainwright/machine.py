"""The machine: the rate of its matrix products, the yardstick for the share of the peak."""

from __future__ import annotations

import statistics
import time
from functools import cache

import torch

SMALLEST, LARGEST = 256, 2048  # rows and columns
ENOUGH = 5e-3  # seconds of a product


@cache
def matrix_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of square matrices in ``dtype``: the median of ten, after a warm-up.

    They have 2,048 rows, or fewer where such products would take long.
    """
    size = SMALLEST
    while size < LARGEST and _seconds(size, device, dtype, 3) < ENOUGH:
        size *= 2
    return 2 * size**3 / _seconds(size, device, dtype, 10)


def _seconds(size: int, device: torch.device, dtype: torch.dtype, count: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return statistics.median([_timed(a, b, device) for _ in range(count + 3)][3:])


def _timed(a: torch.Tensor, b: torch.Tensor, device: torch.device) -> float:
    started = time.perf_counter()
    torch.mm(a, b)
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started
