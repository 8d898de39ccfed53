"""Stages 0 to 2: gradients are summed over processes a unit at a time, while the backward still runs.

Not ``DistributedDataParallel``, which must own the module's forward: pipeline stages call parts of it, and a loss may use the
head's weight outside of it. Stages 1 and 2 give the optimizer views of the parameters' own rows, so the update is in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn

from trainwright.parallel.mesh import Axis
from trainwright.parallel.sharing import Arrivals, Named, Sharing, alone, trainable
from trainwright.parallel.zero_units import Member, Unit, gather_all
from trainwright.pieces import Piece


def share(model: nn.Module, axis: Axis, stage: int, units: Sequence[nn.Module]) -> Sharing:
    """Let the processes of an axis train one model, each with its part of the batch.

    Args:
        model: with its values, the same at every process.
        stage: of ZeRO: 0 all have everything; 1 each updates its rows and holds the optimizer's states of those alone; 2 the
            gradients of other rows aren't kept either: they are summed and dropped in each portion.
        units: parts of the model whose gradients travel together, in the order of the forward; what they lack is added.
    """
    assert stage in (0, 1, 2)
    return alone(model) if axis.group is None else _Shared(model, axis, stage, units)


class _Shared:
    """Units are started in one fixed order, whichever is ready first: collectives must match at all processes."""

    shards_parameters = False

    def __init__(self, model: nn.Module, axis: Axis, stage: int, modules: Sequence[nn.Module]) -> None:
        whole = trainable(model)
        assert whole, "nothing to train"
        self._axis, self._stage = axis, stage
        self._units = [
            Unit(axis, [Member(index, p, axis, split=stage > 0 and p.ndim > 0) for index, p in group])
            for group in _groups(whole, modules)
        ]
        members = {member.index: member for unit in self._units for member in unit.members}
        self.named: Named = [(name, members[index].trained) for index, (name, _) in enumerate(whole)]
        self._split = {name for index, (name, _) in enumerate(whole) if members[index].parts > 1}
        self._arrivals = Arrivals(len(whole), axis, whole[0][1].device)
        self._queue: list[Unit] = []  # what this portion may start, in the order of starting
        self._next = self._starts = 0
        self._flying: list[Unit] = []
        for unit in self._units:
            for member in unit.members:
                member.parameter.register_post_accumulate_grad_hook(partial(self._arrived, unit, member.index))

    @contextmanager
    def portion(self, last: bool) -> Iterator[None]:
        self._queue = [unit for unit in self._units if last or (self._stage == 2 and unit.parts > 1)]
        self._next = self._starts = 0
        for unit in self._units:
            unit.arrived.clear()
        yield
        if self._stage == 2:
            self._end_round()
        self._queue = []

    def _arrived(self, unit: Unit, index: int, parameter: nn.Parameter) -> None:
        """A parameter has the gradient of this backward."""
        self._arrivals.note(index)
        unit.arrived.add(index)
        while self._next < len(self._queue) and self._queue[self._next].complete:
            self._start(self._queue[self._next])
            self._next += 1
            if self._next == len(self._queue) and self._stage == 2:
                self._next = 0  # of another backward in the same portion

    def _start(self, unit: Unit) -> None:
        while self._stage and len(self._flying) > 1:  # NOTE: each holds a copy of its gradients until it has landed
            self._flying.pop(0).land()
        unit.start()
        self._flying.append(unit)
        self._starts += 1

    def _end_round(self) -> None:
        """What this portion hasn't summed: for some parameters there was no gradient here, but maybe elsewhere."""
        begun = self._next or any(unit.arrived for unit in self._queue) or not self._starts
        for unit in self._queue[self._next :] if begun else []:
            self._start(unit)
        while self._flying:
            self._flying.pop(0).land()

    def finish(self) -> None:
        for unit in self._units:
            if not unit.started:
                self._start(unit)
        used = self._arrivals.settle()
        for unit in self._units:
            unit.hand_over(used)
        self._flying.clear()

    def updated(self) -> None:
        gather_all([unit for unit in self._units if unit.parts > 1])

    def splits(self, name: str) -> bool:
        return name in self._split

    def piece(self, name: str, outer: Piece) -> Piece:
        return outer.chunk(self._axis.size, self._axis.index) if name in self._split else outer

    def rest(self) -> None:
        """Nothing is gathered."""


def _groups(whole: Named, modules: Sequence[nn.Module]) -> list[list[tuple[int, nn.Parameter]]]:
    """The parameters with their indices by unit and dtype, as a backward reaches them: what follows the first module first."""
    owner = {id(p): number for number, module in enumerate(modules) for p in module.parameters()}
    first = next((index for index, (_, p) in enumerate(whole) if id(p) in owner), 0)
    groups: dict[tuple[int, object, bool], list[tuple[int, nn.Parameter]]] = {}
    for index, (_, p) in enumerate(whole):
        outside = len(modules) if index > first else -1
        key = (owner.get(id(p), outside), p.dtype, p.ndim == 0)
        groups.setdefault(key, []).append((index, p))
    return [groups[key] for key in sorted(groups, key=lambda key: -key[0])]
