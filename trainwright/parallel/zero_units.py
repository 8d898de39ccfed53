"""Parameters that travel together: their gradients as one buffer, a row for each process, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from trainwright.parallel.mesh import Axis
from trainwright.parallel.zero_collectives import Landing, start_all_gather, start_all_reduce, start_reduce_scatter
from trainwright.pieces import Piece


class Member:
    """A parameter and what the optimizer gets of it: its own rows as ``torch.chunk`` cuts them, or all of it.

    NOTE: fused optimizers walk through memory, so a gradient has the order of its parameter (channels last, say).
    """

    def __init__(self, index: int, parameter: nn.Parameter, axis: Axis, split: bool) -> None:
        self.index, self.parameter = index, parameter
        self.parts, self.part = (axis.size, axis.index) if split else (1, 0)
        self._order = _memory_order(parameter)
        rows = self.dense(parameter).shape[0]
        self.each = -(-rows // self.parts)
        self.width = parameter.numel() // rows if rows else 0
        self.trained = nn.Parameter(self.rows(self.part)) if split else parameter

    @property
    def room(self) -> int:
        """Numbers of it in a row of the buffer."""
        return self.each * self.width

    def dense(self, tensor: Tensor) -> Tensor:
        """One of the parameter's shape with its dimensions in the parameter's order in memory; a 0-dim one as a row."""
        return tensor.permute(self._order) if tensor.ndim else tensor.reshape(1)

    def rows(self, part: int) -> Tensor:
        """The parameter's rows of a process, a view."""
        data = self.parameter.detach()
        if self.parts == 1:
            return data
        box = Piece.all_of(tuple(data.shape)).chunk(self.parts, part)
        return data.narrow(0, box.start[0], box.size[0])

    def zeros(self) -> Tensor:
        """In the place of a gradient that isn't there."""
        return self.parameter.new_zeros(()).expand(self.parameter.shape)

    def shaped(self, flat: Tensor, like: Tensor) -> Tensor:
        """What a buffer holds for ``like``, which are rows of the parameter, in their shape and order in memory."""
        found = flat[: like.numel()].view(self.dense(like).shape)
        if not like.ndim:
            return found.view(())
        inverse = sorted(range(like.ndim), key=self._order.__getitem__)
        return found.permute(inverse)


def _memory_order(parameter: nn.Parameter) -> list[int]:
    """Its dimensions, the outermost in memory first, which must be dimension 0."""
    order = sorted(range(parameter.ndim), key=parameter.stride, reverse=True)
    plain = list(range(parameter.ndim))
    if not parameter.is_contiguous() and order[0] == 0 and parameter.permute(order).is_contiguous():
        return order
    parameter.data = parameter.data.contiguous()
    return plain


class Unit:
    """Parameters of one dtype whose gradients are summed by one collective."""

    def __init__(self, axis: Axis, members: Sequence[Member]) -> None:
        assert axis.group is not None
        self.members, self._index, self._group = members, axis.index, axis.group
        self.parts = members[0].parts
        assert all(member.parts == self.parts for member in members)
        self._rooms = [member.room for member in members]
        self.arrived: set[int] = set()
        self.started = False
        self._landing: Landing | None = None
        self._sum: Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether every gradient is there since the last start."""
        return len(self.arrived) == len(self.members)

    @torch.no_grad()
    def start(self) -> None:
        """Take the gradients from the parameters and begin to sum them; what isn't there is zero."""
        self.land()
        buffer = self._pack()
        self.arrived.clear()
        self.started = True
        self._landing = (start_reduce_scatter if self.parts > 1 else start_all_reduce)(buffer, self._group)

    def _pack(self) -> Tensor:
        """(parts, numbers of a row), and the parameters' gradients are gone."""
        buffer = self.members[0].parameter.new_empty(self.parts, sum(self._rooms))
        gradients = [m.zeros() if m.parameter.grad is None else m.parameter.grad for m in self.members]
        dense = [m.dense(gradient) for m, gradient in zip(self.members, gradients, strict=True)]
        torch._chunk_cat(dense, 0, self.parts, out=buffer)
        for member in self.members:
            member.parameter.grad = None
        return buffer

    def land(self) -> None:
        """Wait for the sum that was begun, and add it to those of earlier portions."""
        if self._landing is None:
            return
        landed, self._landing = self._landing().view(-1), None
        self._sum = landed if self._sum is None else self._sum.add_(landed)

    def hand_over(self, used: Sequence[bool]) -> None:
        """Give the sums to what the optimizer gets, where ``used``."""
        self.land()
        assert self._sum is not None
        for member, flat in zip(self.members, self._sum.split(self._rooms), strict=True):
            assert member.parameter.grad is None, "a backward after the last one of the step"
            member.trained.grad = member.shaped(flat, member.trained) if used[member.index] else None
        self._sum, self.started = None, False

    def start_gather(self) -> Callable[[], None]:
        """Begin to get the rows that other processes have updated; gives what waits for them and puts them in place."""
        buffer = self.members[0].parameter.new_empty(self.parts, sum(self._rooms))
        self._copy([(buffer[self._index], self._index)], inwards=True)
        landing = start_all_gather(buffer, self._index, self._group)
        others = [part for part in range(self.parts) if part != self._index]
        return lambda: self._copy([(landing()[part], part) for part in others], inwards=False)

    def _copy(self, parts: Sequence[tuple[Tensor, int]], *, inwards: bool) -> None:
        """Between rows of a buffer and the parameters."""
        ours, theirs = [], []
        for row, part in parts:
            for member, flat in zip(self.members, row.split(self._rooms), strict=True):
                rows = member.rows(part)
                if rows.numel():
                    ours.append(rows)
                    theirs.append(member.shaped(flat, rows))
        if ours:
            torch._foreach_copy_(*((theirs, ours) if inwards else (ours, theirs)))


@torch.no_grad()
def gather_all(units: Sequence[Unit]) -> None:
    """Everyone's updated rows to everyone; at most two units are under way at once."""
    waits: list[Callable[[], None]] = []
    for unit in units:
        waits.append(unit.start_gather())
        if len(waits) == 2:
            waits.pop(0)()
    for wait in waits:
        wait()
