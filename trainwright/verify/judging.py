"""Whether a run computes what the plain run computes.

Three runs are compared: the truth, plain in float64; the plain run in the recipe's own precision; and the recipe's run.
However a sum is ordered, the recipe's run can't be expected nearer to the truth than the plain run is, which rounds as often.
So for each tensor the bound is a multiple of the plain run's own distance from the truth, of its median distance over all
tensors, or of a few roundings of the tensor's size, whichever is most. Distances are 2-norms relative to that of the truth;
those of weights are relative to how far the steps moved them.

A run in float64 needs no such care: every distance must be a rounding.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trainwright.verify import telling
from trainwright.verify.tracing import AVERAGE, BEGIN, END, FIRST, LAST, SAVED, STATE, Trace, same_bits

Verdict = Literal["exact", "within", "failed", "skipped"]
FACTOR = {"fp32": 8.0, "bf16": 4.0, "pure_bf16": 4.0, "fp16": 4.0, "fp64": 1.0}
# The least bounds, relative: so many roundings are to be expected whatever the plain run's luck.
FLOOR = {"fp32": 4e-6, "bf16": 1.5e-2, "pure_bf16": 1.5e-2, "fp16": 3e-3, "fp64": 1e-9}
WORDS = {"fp32": "float32", "bf16": "bfloat16", "pure_bf16": "pure bfloat16", "fp16": "float16", "fp64": "float64"}
SLIGHT = 1e-3  # of the usual size: states below it are those of gradients that are zero but for roundings
CERTAIN = 30.0  # roundings by chance of which one must have moved a weight
SHOWN = 4  # tensors that a line names


@dataclass(frozen=True)
class Line:
    """A comparison: what, and how it ended.

    value, bound  the distance from the truth where it is largest by its bound, and that bound
    where         the tensor or step that this is
    why           what the bound is, or what is wrong
    tensors       names of all that failed
    """

    what: str
    verdict: Verdict
    value: float | None = None
    bound: float | None = None
    where: str = ""
    why: str = ""
    tensors: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Rule:
    """How far a run in some precision may be from the truth."""

    precision: str

    def bound(self, plain: float) -> float:
        """Where the plain run is so far from it."""
        return FACTOR[self.precision] * max(plain, FLOOR[self.precision])

    @property
    def why(self) -> str:
        """What the bound is."""
        if self.precision == "fp64":
            return "in float64 nothing but rounding may differ"
        times = f"{FACTOR[self.precision]:g} x the plain {WORDS[self.precision]} run's distance from float64"
        return f"{times}, at least {FACTOR[self.precision] * FLOOR[self.precision]:.0e}"


def judge(run: Trace, plain: Trace, truth: Trace, precision: str, *, compiled: bool = False) -> list[Line]:
    """Every comparison of a run with the plain one, in the order in which a step computes.

    Args:
        compiled: a compiler may make other code after a restart, so that a resumed run rounds otherwise.
    """
    rule = Rule(precision)
    return [
        *_comparable(truth),
        *_same_data(run, plain, truth),
        _start(run, plain, truth, rule),
        _numbers("loss of step 1", run.losses[:1], plain.losses[:1], truth.losses[:1], rule),
        _gradients("gradients of step 1", FIRST, run, plain, truth, rule),
        _numbers("gradient norm", run.norms, plain.norms, truth.norms, rule),
        _exact_numbers("learning rate", run.rates, truth.rates),
        _numbers("loss of later steps", run.losses[1:], plain.losses[1:], truth.losses[1:], rule, first=2),
        _gradients(f"gradients of step {len(truth.losses)}", LAST, run, plain, truth, rule),
        _frozen(run),
        _weights(run, plain, truth, rule),
        *_states(run, plain, truth, rule),
        *_averages(run, plain, truth, rule),
        _saved(run, plain, truth, rule),
        *_held_out(run, plain, truth, rule),
        *_resumed(run, rule if compiled else None),
        *_legs(run, truth, precision),
    ]


PROBES = {
    "again": "two passes over the same batch give other losses: something in the model or the loss isn't deterministic",
    "draws": "the model draws random numbers in its forward that trainwright doesn't know of, so its loss depends on how many "
    "processes share a batch; drop with nn.Dropout, which is turned off for a proof, or draw outside of the model",
    "order": "a row's output depends on its place in the batch, so the loss changes with the order of rows; "
    "let the module treat every row alike",
    "companions": "a row's output depends on the other rows of its micro-batch, so accumulation and data parallelism change "
    "the loss; let the module treat every row alone, or use BatchNorm, whose statistics trainwright takes over all ranks",
}
ALIKE = 1e-9  # relative, in float64


def _comparable(truth: Trace) -> Iterator[Line]:
    """What no technique is to blame for. The first that fails explains those after it."""
    for name, off in truth.probes.items():
        if not off <= ALIKE:
            yield Line("module", "failed", off, ALIKE, name, PROBES[name])
            return
    if truth.probes:
        yield Line("module", "exact", why="the same batch gives the same loss, however its rows are ordered and divided")


def different_bits(run: Trace, plain: Trace) -> list[str]:
    """What isn't the same to the bit: numbers, then tensors from the first gradient to the last weight."""
    numbers = [name for name in ("losses", "norms") if getattr(run, name) != getattr(plain, name)]
    for kind in (FIRST, LAST, END, STATE):
        mine, theirs = run.tensors(kind), plain.tensors(kind)
        numbers += [f"{kind} of {n}" for n in theirs if n not in mine or not same_bits(mine[n], theirs[n])]
    return numbers


def _same_data(run: Trace, plain: Trace, truth: Trace) -> Iterator[Line]:
    if plain.rows != truth.rows:
        why = "two runs of the plain recipe read other rows: its data isn't a function of the seed and the step"
        yield Line("rows of the data", "failed", where="plain run", why=why)
        return
    different = [f"step {n}" for n, (a, b) in enumerate(zip(run.rows, truth.rows, strict=True), 1) if a != b]
    if different:
        why = "the steps don't train on the rows that the plain run trains on"
        yield Line("rows of the data", "failed", where=", ".join(different[:SHOWN]), why=why, tensors=tuple(different))
    else:
        yield Line("rows of the data", "exact", why="every step trains on the same rows")
    counts = [f"step {n}" for n, (a, b) in enumerate(zip(run.supervised, truth.supervised, strict=True), 1) if a != b]
    if counts:
        yield Line("counted targets", "failed", where=", ".join(counts[:SHOWN]), why="what losses are divided by differs")


def _numbers(what: str, run: list[float], plain: list[float], truth: list[float], rule: Rule, first: int = 1) -> Line:
    rows = {
        f"step {n}": (abs(a - t) / max(abs(t), 1e-12), abs(p - t) / max(abs(t), 1e-12))
        for n, (a, p, t) in enumerate(zip(run, plain, truth, strict=True), first)
    }
    failed = {f"step {n}": f"{a:.6g} instead of {t:.6g}" for n, (a, t) in enumerate(zip(run, truth, strict=True), first)}
    worst = max(p for _, p in rows.values())  # a number may be right by chance
    return _line(what, {name: (mine, worst) for name, (mine, _) in rows.items()}, rule, failed)


def _exact_numbers(what: str, run: list[float], truth: list[float]) -> Line:
    wrong = {f"step {n}": f"{a:.6g} instead of {t:.6g}" for n, (a, t) in enumerate(zip(run, truth, strict=True), 1) if a != t}
    if not wrong:
        return Line(what, "exact", why="a function of the step alone")
    first = next(iter(wrong))
    return Line(what, "failed", where=first, why=wrong[first], tensors=tuple(wrong))


def _tensors(what: str, runs: Mapping[str, Tensor], plains: Mapping[str, Tensor], truths: Mapping[str, Tensor], rule: Rule,
             scales: Mapping[str, float] | None = None) -> Line:  # fmt: skip
    """Compare by names; what only one side has is a failure."""
    whole = {name: value for name, value in truths.items() if name in runs and runs[name].shape == value.shape}
    rows = {name: (math.inf, 0.0) for name in dict.fromkeys([*truths, *runs]) if name not in whole}
    failed = {name: telling.missing(runs.get(name), truths.get(name)) for name in rows}
    for name, value in whole.items():
        scale = scales[name] if scales else float(value.double().norm())
        plain = plains.get(name, value)
        rows[name] = _distance(runs[name], value, scale), _distance(plain, value, scale)
    usual = statistics.median(plain for _, plain in rows.values()) if rows else 0.0  # to be near in one tensor is luck, too
    rows = {name: (mine, max(plain, usual)) for name, (mine, plain) in rows.items()}
    wrong = [name for name in whole if not rows[name][0] <= rule.bound(rows[name][1])]
    failed |= {name: telling.difference(runs[name].double(), whole[name].double()) for name in wrong}
    return _line(what, rows, rule, failed)


def _distance(one: Tensor, truth: Tensor, scale: float) -> float:
    """Of two tensors, relative to ``scale``; 0 where one can't be compared."""
    return _relative(float((one.double() - truth.double()).norm()), scale) if one.shape == truth.shape else 0.0


def _relative(distance: float, scale: float) -> float:
    if math.isnan(distance):
        return math.inf
    return distance / scale if scale else math.inf if distance else 0.0


def _line(what: str, rows: Mapping[str, tuple[float, float]], rule: Rule, failed: Mapping[str, str]) -> Line:
    """Of all (distance, plain run's distance) the one that is worst by its bound."""
    if not rows:
        return Line(what, "skipped", why="there are none")
    bad = [name for name, (mine, plain) in rows.items() if not mine <= rule.bound(plain)]
    worst = max(rows, key=lambda name: rows[name][0] / rule.bound(rows[name][1]))
    where = next(iter(bad), worst)
    value, bound = rows[where][0], rule.bound(rows[where][1])
    if bad:
        more = f"; so do {len(bad) - 1} others" if len(bad) > 1 else ""
        return Line(what, "failed", value, bound, where, f"{where} {failed.get(where, 'differs')}{more}", tuple(bad))
    return Line(what, "within" if value else "exact", value, bound, where)


def _start(run: Trace, plain: Trace, truth: Trace, rule: Rule) -> Line:
    return _tensors("weights before step 1", run.tensors(BEGIN), plain.tensors(BEGIN), truth.tensors(BEGIN), rule)


def _gradients(what: str, kind: str, run: Trace, plain: Trace, truth: Trace, rule: Rule) -> Line:
    """In the order of the backward: from the end of the model to its beginning."""
    mine, plains, truths = (dict(reversed(trace.tensors(kind).items())) for trace in (run, plain, truth))
    return _tensors(what, mine, plains, truths, rule)


def _weights(run: Trace, plain: Trace, truth: Trace, rule: Rule) -> Line:
    """Of what learns and of buffers, relative to how far the steps moved them."""
    what = f"weights after step {len(truth.losses)}"
    start = truth.tensors(BEGIN)
    frozen = _frozen_names(truth)
    ends = [{name: value for name, value in trace.tensors(END).items() if name not in frozen} for trace in (run, plain, truth)]
    scales = {name: float((value.double() - start[name].double()).norm()) for name, value in ends[2].items() if name in start}
    # A float32 weight can't say less than a rounding of itself.
    least = {name: float(value.double().norm()) * 2.0**-24 for name, value in ends[2].items()}
    scales = {name: max(scale, least[name]) for name, scale in scales.items()}
    return _tensors(what, ends[0], ends[1], ends[2], rule, scales)


def _states(run: Trace, plain: Trace, truth: Trace, rule: Rule) -> Iterator[Line]:
    """Of the optimizer, relative to their size, or to a small part of what those of other tensors usually are."""
    found, truths = run.tensors(STATE), truth.tensors(STATE)
    if not found or not truths:
        return
    usual = {name: float(value.double().norm()) / max(1, value.numel()) ** 0.5 for name, value in truths.items()}
    largest = {key: max(usual[name] for name in truths if _key(name) == key) for key in map(_key, truths)}
    scales = {
        name: max(usual[name], SLIGHT * largest[_key(name)]) * max(1, value.numel()) ** 0.5 for name, value in truths.items()
    }
    yield _tensors("optimizer's states", found, plain.tensors(STATE), truths, rule, scales)


def _key(name: str) -> str:
    return name.rpartition(".")[2]


def _frozen_names(trace: Trace) -> set[str]:
    """Parameters that don't learn; what isn't a floating-point number, or changes with the forward, is a buffer."""
    begin, end = trace.tensors(BEGIN), trace.tensors(END)
    return {name for name in begin if name not in trace.learning and name in end and bool((begin[name] == end[name]).all())}


def _frozen(run: Trace) -> Line:
    begin, end = run.tensors(BEGIN), run.tensors(END)
    frozen = [name for name in begin if name not in run.learning and name not in run.buffers]
    moved = [name for name in frozen if name not in end or not bool((begin[name] == end[name]).all())]
    what = "frozen weights"
    if moved:
        return Line(what, "failed", where=moved[0], why=f"{moved[0]} is frozen, but changed", tensors=tuple(moved))
    return Line(what, "exact", why=f"{len(frozen)} are what they were") if frozen else Line(what, "skipped", why="none")


def _averages(run: Trace, plain: Trace, truth: Trace, rule: Rule) -> Iterator[Line]:
    if truth.names(AVERAGE) or run.names(AVERAGE):
        yield _tensors("averaged weights", run.tensors(AVERAGE), plain.tensors(AVERAGE), truth.tensors(AVERAGE), rule)


def _saved(run: Trace, plain: Trace, truth: Trace, rule: Rule) -> Line:
    return _tensors("saved model", run.tensors(SAVED), plain.tensors(SAVED), truth.tensors(SAVED), rule)


def _held_out(run: Trace, plain: Trace, truth: Trace, rule: Rule) -> Iterator[Line]:
    """The loss; other metrics count or rank, and one sample on the edge moves them."""
    if "loss" in truth.held_out:
        mine, plains, truths = ([trace.held_out.get("loss", math.nan)] for trace in (run, plain, truth))
        yield _numbers("held-out loss", mine, plains, truths, rule)


def _resumed(run: Trace, rule: Rule | None) -> Iterator[Line]:
    if run.resumed is None:
        return
    if run.resumed:
        first, worst = next(iter(run.resumed)), max(run.resumed.values())
        bound = rule.bound(0.0) if rule else 0.0
        why = f"{first} is another after reading the checkpoint and taking the last step again"
        verdict: Verdict = "within" if worst <= bound else "failed"
        yield Line("resume", verdict, worst, bound, first, why if verdict == "failed" else "", tuple(run.resumed))
    else:
        yield Line("resume", "exact", why="the last step, taken again from a checkpoint, gives the same bits")


def _may_stay(start: Tensor, begin: Tensor, end: Tensor) -> bool:
    """Whether a bfloat16 tensor's updates are so small that chance may round all of them away."""
    if start.dtype != torch.bfloat16:
        return False
    moved = (end.double() - begin.double()).abs() / (start.double().abs().clamp(min=1e-30) * 2.0**-8)
    return float(moved.sum()) < CERTAIN


def _legs(run: Trace, truth: Trace, precision: str) -> Iterator[Line]:
    """A check passes only if there is something to check: what learns must have gradients and move.

    Only weights without masters, rounded by chance, may stay where they are by a step's smallness.
    """
    first, last, begin, end = (run.tensors(kind) for kind in (FIRST, LAST, BEGIN, END))
    dead = [name for name in run.learning if not any(name in found and bool(found[name].any()) for found in (first, last))]
    still = [name for name in run.learning if name in begin and name in end and bool((begin[name] == end[name]).all())]
    starts, ends = truth.tensors(BEGIN), truth.tensors(END)
    if precision == "pure_bf16":
        still = [name for name in still if name not in ends or not _may_stay(begin[name], starts[name], ends[name])]
    if dead:
        why = f"{dead[0]} learns by the recipe, but its gradient is zero or missing in the first and last step"
        yield Line("living gradients", "failed", where=dead[0], why=why, tensors=tuple(dead))
    elif still:
        why = f"{still[0]} has a gradient, but no step changes it"
        yield Line("living gradients", "failed", where=still[0], why=why, tensors=tuple(still))
    elif len(run.losses) > 1 and len(set(run.losses)) == 1:
        yield Line("living gradients", "failed", why=f"the loss is {run.losses[0]:.6g} in every step")
    else:
        why = f"all {len(run.learning)} tensors that learn have gradients and move, and the loss moves"
        yield Line("living gradients", "exact", why=why)
