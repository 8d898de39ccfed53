"""What a process does in a step: operators with their operations and bytes, and messages to other processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Calls of one operator with one shape.

    operator  such as aten.mm, aten.convolution, trainwright.packed_attention, or "fused" for what a compiler joins
    kind      product | convolution | attention | elementwise | copy | other
    dtype     of the inputs: bfloat16, float32, ...
    flops     of one call
    bytes     read and written by one call
    shape     (batch, m, n, k) of a product, else that of the largest tensor
    phase     forward | backward | optimizer | loss
    calls     of one optimizer step
    """

    operator: str
    kind: str
    dtype: str
    flops: int
    bytes: int
    shape: tuple[int, ...]
    phase: str
    calls: int


@dataclass(frozen=True)
class Message:
    """Calls of one collective.

    kind      all_reduce | all_gather | reduce_scatter | broadcast | send | all_to_all
    bytes     this process's input for a reduction, its output for a gathering
    size      processes of the group
    stride    distance between neighbours' ranks in the group
    calls     of one optimizer step
    overlaps  it may run beside computation
    """

    kind: str
    bytes: int
    size: int
    stride: int
    calls: int
    overlaps: bool
