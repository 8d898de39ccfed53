"""Whether rounding is as it should be, by numbers of its own: the plain run rounds as the recipe does, so it can't tell."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from trainwright.verify.judging import WORDS, Line
from trainwright.verify.tracing import BEGIN, END, FIRST, LAST, STATE, Trace

# A plain run further than that from float64 is no measure: its losses; its norms and most of its gradients so many times that.
LOSS = {"fp32": 1e-3, "bf16": 0.1, "pure_bf16": 0.1, "fp16": 0.1}
TIMES = 5.0
COARSE = 0.02  # a loss after updates from states in 8 bits
STATES = 0.06  # of states in 8 bits, of all numbers together, from what they would be in float64
SPREAD = 2.0  # as much more as the gradients are off; squared, they are off by twice that
# Stochastic rounding: its mean error, in units of a last place for each update, or of the update; and in standard deviations.
BIAS, LOST, SIGMAS = 0.12, 0.3, 6.0
SMALL = 0.25  # units: an update that rounding to the nearest would lose, in two steps as well
FAR = 4.0  # units of a last place; what is further comes from something else than a rounding


def check(plain: Trace, truth: Trace, precision: str, *, eight_bits: bool) -> list[Line]:
    """The lines of what makes a plain run no measure.

    Args:
        eight_bits: whether the optimizer keeps its states in 8 bits.
    """
    if precision == "fp64":
        return []
    lines = [*_left_out(plain), *_numbers(plain, truth, precision, eight_bits), *_gradients(plain, truth, precision)]
    return [*lines, *(_states(plain, truth) if eight_bits else ())]


def _left_out(plain: Trace) -> Iterator[Line]:
    for step, why in enumerate(plain.skipped, 1):
        if why:
            yield Line(
                "plain run", "failed", where=f"step {step}", why=f"step {step} was left out ({why}); take precision: bf16"
            )
            return


def _numbers(plain: Trace, truth: Trace, precision: str, eight_bits: bool) -> Iterator[Line]:
    limit = max(LOSS[precision], COARSE if eight_bits else 0.0)
    for what, mine, theirs, most in (
        ("loss", plain.losses, truth.losses, limit), ("gradient norm", plain.norms, truth.norms, TIMES * limit)
    ):  # fmt: skip
        off = max(_apart(a, t) for a, t in zip(mine, theirs, strict=True))
        if off > most:
            yield _insane(precision, what, off, most)


def _apart(one: float, true: float) -> float:
    return abs(one - true) / max(abs(true), 1e-12) if math.isfinite(one) else math.inf


def _gradients(plain: Trace, truth: Trace, precision: str) -> Iterator[Line]:
    """The median, since one that is zero but for roundings may be anything."""
    mine, theirs = plain.tensors(FIRST), truth.tensors(FIRST)
    off = [_distance(mine[name], true) for name, true in theirs.items() if name in mine and bool(true.any())]
    most = TIMES * LOSS[precision]
    if off and statistics.median(off) > most:
        yield _insane(precision, "gradients", statistics.median(off), most)


def _distance(one: Tensor, true: Tensor) -> float:
    return float((one.double() - true.double()).norm() / true.double().norm())


def _insane(precision: str, what: str, off: float, most: float) -> Line:
    why = f"the plain {WORDS[precision]} run's {what} is {off:.1%} from float64's: the model is too ill-conditioned"
    return Line("plain run", "failed", off, most, what, why)


def _states(plain: Trace, truth: Trace) -> Iterator[Line]:
    """States in 8 bits against those in float64, all of a kind together."""
    mine, theirs = plain.tensors(STATE), truth.tensors(STATE)
    off = {}
    for key in sorted({name.rpartition(".")[2] for name, true in theirs.items() if true.ndim and name in mine}):
        names = [name for name in theirs if name.endswith(f".{key}") and name in mine]
        off[key] = _distance(_row(mine, names), _row(theirs, names))
    worst = max(off, key=lambda key: off[key], default="")
    most = STATES + SPREAD * max(_all_apart(plain, truth, prefix) for prefix in (FIRST, LAST))
    if worst and off[worst] <= most:
        yield Line("states in 8 bits", "within", off[worst], most, worst, "of their size, from float64's")
    elif worst:
        why = f"{worst} is {off[worst]:.1%} from float64's, more than rounding to 8 bits and its gradients make"
        yield Line("states in 8 bits", "failed", off[worst], most, worst, why, (worst,))


def _all_apart(plain: Trace, truth: Trace, prefix: str) -> float:
    """All gradients of a step together: what states are made from."""
    mine, theirs = plain.tensors(prefix), truth.tensors(prefix)
    names = [name for name in theirs if name in mine]
    return _distance(_row(mine, names), _row(theirs, names)) if names else 0.0


def _row(tensors: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in names])


def unbiased(run: Trace, truth: Trace) -> Iterator[Line]:
    """Of weights rounded by chance: on average no number is rounded up, away from zero, or back to what it was.

    The mean error of many numbers is held against its own standard deviation.
    """
    error, weight, moved = _errors(run, truth)
    if not len(error):
        return
    steps = len(truth.losses)
    sides: list[tuple[str, Callable[[], Tensor], float]] = [
        ("up or down", lambda: torch.ones_like(error), BIAS * steps),
        ("away from or towards zero", lambda: weight.sign(), BIAS * steps),
        ("along or against the update", lambda: moved * (moved.abs() < SMALL), LOST),
    ]
    for words, direction, most in sides:
        along = direction()
        square = along.square().sum().clamp(min=1e-30)
        mean = float((error * along).sum() / square)
        deviation = float((error * along).square().sum().sqrt() / square)
        if abs(mean) > most and abs(mean) > SIGMAS * deviation:
            why = f"weights are rounded {words}: by {mean:+.2f} on average, {abs(mean) / deviation:.0f} standard deviations"
            yield Line("stochastic rounding", "failed", abs(mean), most, words, why, (words,))
            return
    yield Line("stochastic rounding", "exact", why=f"{len(error):,} weights are rounded without a bias")


def _errors(run: Trace, truth: Trace) -> tuple[Tensor, Tensor, Tensor]:
    """Of bfloat16 weights that learn: how far the steps went too far, and how far they should go, in units of a last place."""
    begin, end, starts, ends = run.tensors(BEGIN), run.tensors(END), truth.tensors(BEGIN), truth.tensors(END)
    names = [name for name in run.learning if end[name].dtype == torch.bfloat16 and name in ends]
    if not names:
        return torch.empty(0), torch.empty(0), torch.empty(0)
    weight = _row(begin, names)
    moved = _row(ends, names) - _row(starts, names)
    unit = 2.0 ** (torch.frexp(torch.maximum(weight.abs(), (weight + moved).abs()).clamp(min=1e-30))[1] - 8)
    error = ((_row(end, names) - weight - moved) / unit).clamp(-FAR, FAR)
    return error, weight, (moved / unit).clamp(-FAR, FAR)
