"""The machine: the rate of its matrix products, the yardstick for the share of the peak, and its heap."""

from __future__ import annotations

import ctypes
import statistics
import sys
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


@cache
def keep_freed_memory() -> bool:
    """Let the C heap keep what tensors free, for the whole process; True where that could be said (glibc).

    glibc gives large blocks back at once, and the kernel zeroes their pages anew at the next step: measured at a fifth of the
    time of a step on the CPU. The price is that the process stays at its peak.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_threshold, largest = -1, -3, 2**31 - 1
    return mallopt is not None and all(mallopt(option, largest) == 1 for option in (mmap_threshold, trim_threshold))
