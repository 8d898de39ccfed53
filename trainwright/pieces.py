"""Parts of tensors: which box of a whole tensor a process holds. What shards, saves and loads speaks in these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Piece:
    """The box that begins at ``start`` and has ``size`` in a tensor of ``shape``; empty where a size is 0."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    @staticmethod
    def all_of(shape: tuple[int, ...]) -> Piece:
        """The whole tensor."""
        return Piece(tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def whole(self) -> bool:
        """Whether it is everything."""
        return self.size == self.shape

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return prod(self.size)

    def slices(self) -> tuple[slice, ...]:
        """What picks it from the whole tensor."""
        return tuple(slice(first, first + count) for first, count in zip(self.start, self.size, strict=True))

    def of(self, tensor: Tensor) -> Tensor:
        """Its view of the whole tensor."""
        assert tuple(tensor.shape) == self.shape, (tensor.shape, self.shape)
        return tensor[self.slices()]

    def narrow(self, dim: int, first: int, count: int) -> Piece:
        """The part of it from ``first``, counted inside of it, along a dimension."""
        assert 0 <= first <= first + count <= self.size[dim]
        start, size = list(self.start), list(self.size)
        start[dim], size[dim] = start[dim] + first, count
        return Piece(self.shape, tuple(start), tuple(size))

    def chunk(self, parts: int, index: int, dim: int = 0) -> Piece:
        """Part ``index`` as ``torch.chunk`` cuts it: the last ones may be shorter, or empty."""
        rows = self.size[dim]
        each = -(-rows // parts)
        first = min(index * each, rows)
        return self.narrow(dim, first, min(each, rows - first))

    def overlap(self, other: Piece) -> Piece | None:
        """What two pieces of the same tensor share; None where that is nothing."""
        assert self.shape == other.shape
        start = tuple(map(max, self.start, other.start))
        ends = [min(a + m, b + n) for a, m, b, n in zip(self.start, self.size, other.start, other.size, strict=True)]
        size = tuple(end - first for first, end in zip(start, ends, strict=True))
        return Piece(self.shape, start, size) if all(count > 0 for count in size) else None

    def inside(self, outer: Piece) -> Piece:
        """The same box, as a piece of ``outer``, which contains it."""
        start = tuple(mine - its for mine, its in zip(self.start, outer.start, strict=True))
        return Piece(outer.size, start, self.size)


def box_of(pieces: Mapping[str, Piece], name: str, tensor: Tensor) -> Piece:
    """Which box of the whole a named tensor is: what is said of it, else all."""
    return pieces.get(name) or Piece.all_of(tuple(tensor.shape))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory; a plain tensor is itself."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Later:
    """A tensor that is made when it is asked for, each time anew; shape and dtype are known before."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Held:
    """What a process holds of a tensor: the values of ``piece``, on any device.

    ``speaks``: of the processes that hold the same values, this one saves them, sends them, and counts them in sums.
    """

    values: Tensor | Later
    piece: Piece
    speaks: bool = True

    @property
    def tensor(self) -> Tensor:
        """The values; those of a ``Later`` are made for each call, so that they needn't be there all at once."""
        return self.values.make() if isinstance(self.values, Later) else self.values

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return tuple(self.values.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    def of(self, tensor: Tensor) -> Held:
        """The same place with other values."""
        return Held(tensor, self.piece, self.speaks)
