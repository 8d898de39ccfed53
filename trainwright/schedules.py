"""Learning-rate schedules as pure functions of the step: nothing depends on ranks, or on the order of calls.

Warmup rises linearly and reaches the peak at its last step, so that no step is wasted on a rate of zero. transformers begins
its warmup with a rate of zero: there, step s of the warmup has the rate that step s + 1 has in ``transformers.get_scheduler``.
From the end of the warmup both agree at the same step; the fall begins there with the peak once more, and would reach its end
at step ``steps``, the first one that isn't taken. ``one_cycle`` counts as torch's OneCycleLR does, and reaches its end at the
last step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate, pairwise, repeat
from typing import assert_never

from trainwright.recipe import (
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    InputError,
    InverseSqrt,
    Linear,
    OneCycle,
    Schedule,
    StepDecay,
)

Factor = Callable[[int], float]
TIMESCALE = 10_000  # of inverse_sqrt without warmup, as in transformers


def factor(section: Schedule, steps: int) -> Factor:
    """The learning rate of step 0 .. steps - 1 as a multiple of the peak, from 0 to 1.

    Raises:
        InputError: a warmup that never ends; milestones that aren't ascending or lie outside; cycles shorter than a step.
    """
    assert steps > 0, steps
    warmup = _warmup(section, steps)
    fall = _fall(section, warmup, steps)
    if isinstance(section, OneCycle):
        return fall  # its warmup is a part of its shape
    return lambda step: (step + 1) / warmup if step < warmup else fall(step)


def _warmup(section: Schedule, steps: int) -> int:
    """The steps of the warmup."""
    warmup = round(section.warmup * steps) if section.warmup < 1 else int(section.warmup)
    if warmup >= steps and warmup > 0:
        raise InputError(f"schedule.warmup: {warmup} warmup steps, but the run has only {steps}; make it less")
    return warmup


def _fall(section: Schedule, warmup: int, steps: int) -> Factor:
    """What follows the warmup."""

    def progress(step: int) -> float:
        return min(1.0, (step - warmup) / (steps - warmup))

    match section:
        case Constant():
            return lambda step: 1.0
        case Linear(final=final):
            return lambda step: final + (1 - final) * (1 - progress(step))
        case Cosine(final=final):
            return lambda step: _cosine(1.0, final, progress(step))
        case Exponential(final=final):
            return lambda step: final ** progress(step)
        case InverseSqrt():
            timescale = warmup or TIMESCALE
            return lambda step: math.sqrt(timescale / (step - warmup + timescale))
        case CosineRestarts():
            return _restarts(section, warmup, steps)
        case StepDecay():
            return _step_decay(section, warmup, steps)
        case OneCycle():
            return _one_cycle(section, steps)
        case _:
            assert_never(section)


def _cosine(start: float, end: float, progress: float) -> float:
    """From ``start`` to ``end`` by half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _restarts(section: CosineRestarts, warmup: int, steps: int) -> Factor:
    """Cosines from the peak to ``final``, each longer by ``growth`` (Loshchilov and Hutter 2017, section 3)."""
    length = steps - warmup
    # Lazy, since sums of a large growth leave the range of floats: more than ``length`` of the first cycle is too much.
    powers = accumulate(repeat(section.growth, section.cycles - 1), lambda a, b: a * b, initial=1.0)
    sums = [0.0]
    for power in powers:
        sums.append(sums[-1] + power)
        if sums[-1] > length:
            raise InputError(
                f"schedule.cycles: the first of {section.cycles} cycles would be shorter than a step, since {length} steps "
                f"follow the warmup and growth is {section.growth:g}; lower cycles or growth"
            )
    # NOTE: a product before the quotient, so that a cycle that ends with a step ends there without rounding.
    edges = [warmup + length * part / sums[-1] for part in sums]

    def rate(step: int) -> float:
        cycle = min(bisect_right(edges, step), section.cycles) - 1
        start, end = edges[cycle : cycle + 2]
        return _cosine(1.0, section.final, min(1.0, (step - start) / (end - start)))

    return rate


def _step_decay(section: StepDecay, warmup: int, steps: int) -> Factor:
    """Times ``factor`` from each milestone on."""
    places = [place * steps if place < 1 else place for place in section.milestones]
    if any(after <= before for before, after in pairwise(places)):
        raise InputError(f"schedule.milestones: {_listed(section)} of {steps} steps are not in ascending order")
    if places[-1] >= steps:
        raise InputError(
            f"schedule.milestones: {section.milestones[-1]:g} is never reached, since the run has only {steps} steps; "
            "make it less, or a fraction of all steps"
        )
    milestones = [max(1, round(place)) for place in places]  # at 0 no step would have the peak
    if milestones[0] < warmup:
        raise InputError(
            f"schedule.milestones: {section.milestones[0]:g} lies in the warmup, which has {warmup} of the {steps} steps"
        )
    return lambda step: section.factor ** bisect_right(milestones, step)


def _listed(section: StepDecay) -> str:
    return ", ".join(f"{place:g}" for place in section.milestones)


def _one_cycle(section: OneCycle, steps: int) -> Factor:
    """From ``start`` to the peak and on to ``final`` (Smith 2018); the momentum stays as it is.

    A rise that is a fraction of all steps isn't rounded: the peak may lie between two steps, as in torch's OneCycleLR.
    """
    rise = section.warmup * steps if section.warmup < 1 else int(section.warmup)
    top, last = max(0.0, rise - 1), steps - 1

    def rate(step: int) -> float:
        if step < top:
            return _cosine(section.start, 1.0, step / top)
        return _cosine(1.0, section.final, min(1.0, (step - top) / (last - top))) if last > top else 1.0

    return rate
