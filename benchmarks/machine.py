"""What this process takes and what this machine can do: resident memory, and the rate of matrix products."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainwright.memory.precision import multiplies_bfloat16

# Outputs x inputs of the seven linear layers of one SmolLM2-135M block (q, k, v, o, gate, up, down), and of its head.
BLOCK_SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
BLOCKS = 30
HEAD_SHAPE = (49152, 576)
SQUARE_SIZES = (1024, 2048, 3072)
FAST = torch.bfloat16 if multiplies_bfloat16() else torch.float32  # the dtype that whoever wants speed takes here
aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)
HALVES = (torch.bfloat16, torch.float16)
IN_PLACE = {aten.addmm_.default: aten.addmm.default, aten.baddbmm_.default: aten.baddbmm.default}


def _status_bytes(field: str) -> int:
    """A `kB` line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: resident memory can be read on Linux only")


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Highest resident memory of this process since it started, in bytes.

    NOTE: not `ru_maxrss`, which a process inherits from the one that started it.
    """
    return _status_bytes("VmHWM")


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of `work()` in seconds, after one call that isn't counted."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def square_product_rate(dtype: torch.dtype, size: int, repeats: int = 15) -> float:
    """FLOP/s of a (size, size) by (size, size) product."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / median_seconds(lambda: a @ b, repeats)


def model_product_rate(dtype: torch.dtype, tokens: int = 1024, repeats: int = 9) -> float:
    """FLOP/s of all linear layers of SmolLM2-135M, each with weights of its own, in one forward pass of `tokens`."""
    shapes = BLOCK_SHAPES * BLOCKS + [HEAD_SHAPE]
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    inputs = {width: torch.randn(tokens, width).to(dtype) for width in {shape[1] for shape in shapes}}

    def forward() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    return sum(2 * tokens * weight.numel() for weight in weights) / median_seconds(forward, repeats)


@torch.no_grad()
def matrix_product_rate(dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of forward products in `dtype`: the median of `square` ones, and the `model_shapes` of SmolLM2-135M."""
    return {
        "square": statistics.median(square_product_rate(dtype, size) for size in SQUARE_SIZES),
        "model_shapes": model_product_rate(dtype),
    }


class WideProducts(TorchDispatchMode):
    """Products of 16-bit numbers as processors with instructions for them make them: summed up in float32 and rounded once.

    For accuracy where there are none; what takes long there is the product itself. Not under ``torch.compile``.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        known = func in IN_PLACE or func.overloadpacket in PRODUCTS
        if not known or args[-1].dtype not in HALVES:
            return func(*args, **kwargs)
        into = args[0] if func in IN_PLACE else kwargs.pop("out", None)
        wide = [one.float() if isinstance(one, Tensor) else one for one in args]
        result = IN_PLACE.get(func, func.overloadpacket.default)(*wide, **kwargs).to(args[-1].dtype)
        return result if into is None else into.copy_(result)


if __name__ == "__main__":
    print(json.dumps({"dtype": str(FAST), **matrix_product_rate(FAST)}))
