"""Divides a model among the processes of a pipeline: each keeps its stages, the rest becomes ``Absent``; no name changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainwright.models.contract import Absent, Change
from trainwright.parallel.mesh import Axis
from trainwright.parallel.pipeline_split import split
from trainwright.pieces import local

Schedule = Literal["1f1b", "gpipe", "interleaved"]
CHUNKS = 2  # stages of a process where they are interleaved


@dataclass(frozen=True)
class Shared:
    """A parameter of this process that another stage has, too: head and embedding where they are tied.

    name       its name here
    canonical  its name in the whole model; the end that has another name is a copy
    peer       the index along the pipeline of the process with the other end
    """

    name: str
    canonical: str
    peer: int


@dataclass(frozen=True)
class Split:
    """A model divided among the processes of a pipeline.

    parts     of each stage, in order; stage s belongs to process s % processes
    mine      the stages of this process
    flows     for each stage whether its output has a gradient: whether anything learns up to there
    shared    parameters that live at two stages
    """

    change: Change
    parts: tuple[tuple[str, ...], ...]
    mine: tuple[int, ...]
    flows: tuple[bool, ...]
    shared: tuple[Shared, ...]
    schedule: Schedule

    @property
    def copies(self) -> dict[str, str]:
        """Local names to those of the whole model, of what the first stage has: it is neither saved nor counted in norms."""
        return {end.name: end.canonical for end in self.shared if end.name != end.canonical}

    @property
    def last(self) -> bool:
        """Whether this process has the last stage, and so outputs and losses."""
        return len(self.parts) - 1 in self.mine


def apply(model: nn.Module, axis: Axis, schedule: Schedule, *, virtual: int | None = None) -> Split:
    """Replace the parts of other processes by ``Absent``: on the meta device they were never there.

    Comes after what decides which parameters learn (adapt), and after their shapes are final (tensor parallelism).

    Args:
        virtual: stages of each process where the schedule is interleaved; by default ``CHUNKS``.

    Raises:
        InputError: the model can't be cut, or not into so many stages.
    """
    assert axis.size > 1
    each = (virtual or CHUNKS) if schedule == "interleaved" else 1
    stages = split(model, axis.size, each)
    mine = tuple(range(axis.index, len(stages), axis.size))
    flows, shared = _flows(model, stages), _shared(model, stages, axis)
    kept = {name for stage in mine for name in stages[stage]}
    for name, places in where(model, [name for stage in stages for name in stage]).items():
        if name not in kept:
            put(places, Absent())
    summary = _summary(stages, axis.size, schedule)
    change = Change("pipeline", summary, tuple(name for stage in stages for name in stage if name in kept))
    return Split(change, tuple(map(tuple, stages)), mine, flows, shared, schedule)


Place = tuple[nn.Module, str]  # a container, and the name in it


def where(model: nn.Module, names: Sequence[str]) -> dict[str, list[Place]]:
    """All places of the named modules: ``blocks()`` may group them again, outside of the tree of names."""
    blocks = model.blocks() if hasattr(model, "blocks") else []  # type: ignore[operator]
    containers = {id(each): each for root in (model, *blocks) for each in root.modules()}.values()
    places: dict[int, list[Place]] = {}
    for container in containers:
        for key, child in container.named_children():
            places.setdefault(id(child), []).append((container, key))
    return {name: places[id(model.get_submodule(name))] for name in names}


def put(places: Sequence[Place], module: nn.Module) -> None:
    """Set a module at all of its places."""
    for container, key in places:
        setattr(container, key, module)


@torch.no_grad()
def sum_ends_(split: Split, axis: Axis, tensors: Mapping[str, Tensor]) -> None:
    """Sum what belongs to both ends of shared parameters, in place; both ends then hold the same bits.

    Args:
        tensors: by the local names of the shared parameters; ends must agree on shape and dtype.
    """
    for end in split.shared:
        if end.name in tensors:
            mine = local(tensors[end.name])
            theirs = _exchange(mine, end.peer, axis)
            mine.add_(theirs)  # a + b is b + a in floating point, too


@torch.no_grad()
def align_copies_(split: Split, axis: Axis, model: nn.Module) -> None:
    """Give copies the values of the parameters they are copies of."""
    for end in split.shared:
        mine = local(model.get_parameter(end.name))
        theirs = _exchange(mine, end.peer, axis)
        if end.name in split.copies:
            mine.copy_(theirs)


def _exchange(mine: Tensor, peer: int, axis: Axis) -> Tensor:
    """What the other process has of the same kind."""
    mine = mine.contiguous()
    theirs = torch.empty_like(mine)
    if mine.numel():
        ends = ((dist.isend, mine), (dist.irecv, theirs))
        works = dist.batch_isend_irecv([dist.P2POp(do, what, group=axis.group, group_peer=peer) for do, what in ends])
        for work in works:
            work.wait()
    return theirs


def _stage_of(name: str, stages: Sequence[Sequence[str]]) -> int:
    """The stage that a parameter belongs to."""
    return next(stage for stage, parts in enumerate(stages) if any(name.startswith(f"{part}.") for part in parts))


def _flows(model: nn.Module, stages: Sequence[Sequence[str]]) -> tuple[bool, ...]:
    learning = [stage for stage, parts in enumerate(stages) if any(_learns(model.get_submodule(part)) for part in parts)]
    return tuple(any(first <= stage for first in learning) for stage in range(len(stages)))


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _shared(model: nn.Module, stages: Sequence[Sequence[str]], axis: Axis) -> tuple[Shared, ...]:
    """The parameters of this process that are at home in another one's stage as well."""
    return tuple(_ends(model, stages, axis))


def _ends(model: nn.Module, stages: Sequence[Sequence[str]], axis: Axis) -> Iterator[Shared]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for same in names.values():
        homes: dict[int, str] = {}
        for name in same:
            homes.setdefault(_stage_of(name, stages) % axis.size, name)
        others = [index for index in homes if index != axis.index]
        if axis.index in homes and others:
            assert len(others) == 1, f"{same} lives in three processes"
            yield Shared(homes[axis.index], same[0], others[0])


def _summary(stages: list[list[str]], size: int, schedule: str) -> str:
    shown = "; ".join(f"{place}: {parts[0]}" + f" to {parts[-1]}" * (len(parts) > 1) for place, parts in enumerate(stages))
    return f"{len(stages)} stages on {size} processes, schedule {schedule}; {shown}"
