"""What passes between processes where they share a matrix product: collectives that are each other's derivatives.

The f and g of Megatron-LM (Shoeybi et al. 2019, section 3), and with the length divided too, those of Korthikanti et al. (2022,
section 4.2.2). All run in the dtype of what they are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from trainwright.parallel.mesh import Axis

LENGTH = 1  # of (rows, length, features)


@dataclass
class Stream:
    """How activations enter layers that processes share, and leave them.

    Outside of these layers every process has the whole activations; with ``sequence`` a part of the length, alike in all rows.
    """

    axis: Axis
    sequence: bool

    def __deepcopy__(self, memo: object) -> Stream:
        """A copied layer speaks to the same processes, whose group can't be copied."""
        return self

    def enter(self, x: Tensor) -> Tensor:
        """To what every process multiplies by its part of a matrix; backward, their gradients are summed."""
        return _Gather.apply(x, self.axis) if self.sequence else _Copy.apply(x, self.axis)

    def leave(self, x: Tensor) -> Tensor:
        """The sum of what the processes made."""
        return _Scatter.apply(x, self.axis) if self.sequence else _Reduce.apply(x, self.axis)

    def join(self, x: Tensor, whole: int) -> Tensor:
        """Parts of the last dimension, as ``torch.chunk`` cuts it, to the whole, with which all processes do the same."""
        return _Join.apply(x, self.axis, whole)


def summed(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the processes; x stays."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=axis.group)
    return out


def gathered(x: Tensor, axis: Axis) -> Tensor:
    """The parts (rows, length / size, features) of all processes: (rows, length, features)."""
    parts = x.new_empty(axis.size, *x.shape)
    dist.all_gather_single(parts.flatten(0, 1), x.contiguous(), group=axis.group)
    return parts.movedim(0, LENGTH).flatten(LENGTH, LENGTH + 1)


def scattered(x: Tensor, axis: Axis) -> Tensor:
    """This process's part of the length of the sum over the processes."""
    assert x.shape[LENGTH] % axis.size == 0, f"a length of {x.shape[LENGTH]} for {axis.size} processes"
    parts = x.unflatten(LENGTH, (axis.size, -1)).movedim(LENGTH, 0).contiguous()
    if dist.get_backend(axis.group) == "gloo":  # its reduce-scatter is an all-reduce, which sends twice as much
        terms = torch.empty_like(parts)
        dist.all_to_all_single(terms.flatten(0, 1), parts.flatten(0, 1), group=axis.group)
        return terms.sum(0)
    out = torch.empty_like(parts[0])
    dist.reduce_scatter_single(out, parts.flatten(0, 1), group=axis.group)
    return out


class _Copy(torch.autograd.Function):
    """f: nothing; backward the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return summed(grads[0], ctx.axis), None


class _Reduce(torch.autograd.Function):
    """g: the sum; backward nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return summed(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    """f of a divided length: the whole; backward a part of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return gathered(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return scattered(grads[0], ctx.axis), None


class _Scatter(torch.autograd.Function):
    """g to a divided length: a part of the sum; backward the whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return scattered(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gathered(grads[0], ctx.axis), None


class _Join(torch.autograd.Function):
    """Parts of the last dimension to the whole; backward, where every process has the same gradient, its own part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, whole: int) -> Tensor:
        each = -(-whole // axis.size)
        ctx.first, ctx.count = axis.index * each, x.shape[-1]
        padded = pad(x, (0, each - x.shape[-1])).flatten(0, -2)
        parts = x.new_empty(axis.size, *padded.shape)
        dist.all_gather_single(parts.flatten(0, 1), padded.contiguous(), group=axis.group)
        return parts.movedim(0, -2).flatten(-2).narrow(-1, 0, whole).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].narrow(-1, ctx.first, ctx.count), None, None
