"""Where a pipeline cuts a model: runs of parts whose largest work is least, and how long its processes idle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from torch import nn

from trainwright.recipe import InputError


def split(model: nn.Module, processes: int, virtual: int = 1) -> list[list[str]]:
    """The names of each stage's parts, so that the stage with the most work has as little as can be.

    The work of a part is the size of its matrices times how often they are applied; a head counts though it may be tied to the
    embedding, whose lookup costs nothing. A part without work stays with the one before it.

    Args:
        virtual: stages of each process.

    Raises:
        InputError: the model can't be cut, or not into so many stages.
    """
    costs, stages = part_costs(model), processes * virtual
    names = list(costs)
    heavy = [place for place, name in enumerate(names) if costs[name]]
    if len(heavy) < stages:
        each = f" with {virtual} stages each (schedule interleaved)" if virtual > 1 else ""
        raise InputError(
            f"parallel.pipeline: {processes} processes{each} need {stages} parts with work to do, this model has "
            f"{len(heavy)}; set parallel.pipeline to at most {len(heavy) // virtual}"
        )
    starts = [0, *heavy[1:], len(names)]
    ends = cut([costs[names[place]] for place in heavy], stages)
    return [names[starts[first] : starts[end]] for first, end in zip([0, *ends], ends, strict=False)]


def part_costs(model: nn.Module) -> dict[str, int]:
    """The work of each part for one token or sample, in multiplications.

    Raises:
        InputError: the model can't be cut.
    """
    return {name: times * _matrices(model.get_submodule(name)) for name, times in _chain(model).items()}


def cut(costs: Sequence[int], stages: int) -> list[int]:
    """The end of each run, where ``costs`` are cut into so many runs of at least one that the largest sum is least.

    Exact, by dynamic programming over (runs, costs covered); of equally good beginnings it takes that with the lesser sum of
    squares.
    """
    assert 1 <= stages <= len(costs)
    total = [0, *accumulate(costs)]
    best: list[tuple[int, int, list[int]]] = [(total[end], total[end] ** 2, [end]) for end in range(len(total))]
    for runs in range(2, stages + 1):
        better = [(0, 0, [0])] * len(total)
        for end in range(runs, len(total)):
            better[end] = min(_longer(best[first], total[end] - total[first], end) for first in range(runs - 1, end))
        best = better
    return best[-1][2]


def bubble(processes: int, micro_batches: int, virtual: int = 1) -> float:
    """The fraction of a step in which a process waits, where all stages take equally long.

    (p - 1) / (v m + p - 1) of Narayanan et al. 2021, section 2.2, for m micro-batches, p processes and v stages of each; with
    m < p a process also waits between its own stages.
    """
    work = virtual * micro_batches
    return 1 - work / (virtual * max(micro_batches, processes) + min(micro_batches, processes) - 1)


def _longer(before: tuple[int, int, list[int]], cost: int, end: int) -> tuple[int, int, list[int]]:
    largest, squares, ends = before
    return max(largest, cost), squares + cost**2, [*ends, end]


def _chain(model: nn.Module) -> Mapping[str, int]:
    """Its parts, and how often each is applied."""
    kind = type(model).__name__
    if norms := [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]:
        raise InputError(
            f"parallel.pipeline: {kind} has batch normalisation ({norms[0]} and {len(norms) - 1} more), whose statistics would "
            "be those of a micro-batch; set pipeline: 1 and share the data instead (parallel.data), or take a model without it"
        )
    if not hasattr(model, "parts"):
        raise InputError(
            f"parallel.pipeline: {kind} is no chain of parts that could be cut; set pipeline: 1 and share the data instead "
            "(parallel.data, parallel.zero)"
        )
    parts: Mapping[str, int] = model.parts()  # type: ignore[operator]
    loose = [name for name, _ in model.named_parameters() if not any(name.startswith(f"{part}.") for part in parts)]
    assert not loose, f"{kind}.parts() leaves out {loose}"
    return parts


def _matrices(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters() if parameter.ndim > 1)
