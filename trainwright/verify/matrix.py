"""All pairs of techniques over several models: a few combinations in which every pair occurs are run, compared and told apart.

with one model:  each technique alone
                 combinations until every pair of levels has occurred in one that passes (``covering``)
                 what is refused or fails is made smaller until every level in it is needed: a cause
                 pairs that may be exact, and those that no combination can hold, alone
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from trainwright.recipe import InputError
from trainwright.verify import combinations, covering, facts, techniques, tracing
from trainwright.verify.combinations import MODELS, Factor
from trainwright.verify.covering import Levels
from trainwright.verify.job import Job
from trainwright.verify.proof import Prover, Verdict
from trainwright.verify.running import Broken, Runner
from trainwright.verify.store import Outcome, Store, versions
from trainwright.verify.tracing import Trace

Say = Callable[[str], None]
Row = Mapping[str, str]
Status = Literal["exact", "within_bound", "refused", "failed", "untested"]
COUNTED: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True)
class Cell:
    """What is known of a pair of levels, or of a technique alone.

    value   within_bound: the largest part of a bound that was used
    why     refused or failed
    """

    status: Status
    value: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Cause:
    """Levels that together are refused, or fail; without one of them they aren't, or don't."""

    levels: Levels
    outcome: Outcome


@dataclass(frozen=True)
class ModelResult:
    """Of a model: the cell of each pair with a technique in it, and that of each technique with all else plain."""

    model: str
    factors: dict[str, Factor]
    cells: dict[Levels, Cell]
    alone: dict[str, Cell]
    causes: list[Cause]
    combinations: int


@dataclass(frozen=True)
class Result:
    """The whole matrix."""

    models: list[ModelResult]
    seeds: tuple[int, ...]
    small: bool
    fresh: int
    seconds: float
    versions: dict[str, str]

    def counts(self) -> dict[str, int]:
        """How many pairs there are, and how they ended; verified are those that are exact or within their bounds."""
        found = [cell.status for model in self.models for cell in model.cells.values()]
        return {"pairs": len(found), **{status: found.count(status) for status in COUNTED}}

    @property
    def good(self) -> bool:
        """Whether nothing failed, and nothing was left out."""
        return not self.failed and not self.counts()["untested"]

    @property
    def failed(self) -> list[tuple[str, Cause]]:
        """Levels that fail, alone or together, with their model."""
        return [(one.model, cause) for one in self.models for cause in one.causes if cause.outcome.verdict == "failed"]


def run(
    folder: Path,
    *,
    small: bool = False,
    seeds: Sequence[int] = (0,),
    say: Say = lambda text: None,
    runner: Runner | None = None,
    models: Sequence[str] = tuple(MODELS),
) -> Result:
    """Prove all pairs of techniques for each model.

    Args:
        folder: where results are kept; what is there already isn't run again, unless it failed.
        small: only the most important levels, in as few combinations as hold all pairs.
        seeds: each combination is run with each of them, and must pass with all.
    """
    started = time.perf_counter()
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    combinations.write_data(folder)
    store = Store(folder)
    hints: list[frozenset[str]] = []
    with _warm() if runner is None else nullcontext(runner) as here:
        found = [_Model(model, tuple(seeds), small, here, store, say, hints).prove() for model in models]
    return Result(found, tuple(seeds), small, store.fresh, time.perf_counter() - started, versions())


def _warm() -> Runner:
    """One whose processes start while the first combinations run alone."""
    runner = Runner()
    for count in (2, combinations.MOST_PROCESSES):
        runner.warm(count)
    return runner


@dataclass
class _Model:
    """The proof of one model, as far as it is. ``hints``: factors whose levels were a cause, of this model or others."""

    name: str
    seeds: tuple[int, ...]
    small: bool
    runner: Runner
    store: Store
    say: Say
    hints: list[frozenset[str]]
    causes: list[Cause] = field(default_factory=list)
    passed: dict[frozenset[covering.Level], Outcome] = field(default_factory=dict)  # by whole rows
    alone: dict[Levels, Outcome] = field(default_factory=dict)  # by the levels of smallest combinations
    ran: set[str] = field(default_factory=set)  # keys of what was proved, now or in a run that was killed

    def __post_init__(self) -> None:
        self.factors = combinations.factors(self.name, small=self.small)
        self.levels = {name: [level.name for level in factor.levels] for name, factor in self.factors.items()}
        self.techniques = {(name, level) for name, factor in self.factors.items() for level in factor.techniques}
        self.too_many = combinations.too_many(self.factors)

    def prove(self) -> ModelResult:
        self._read()
        if not self.small:
            for technique in self._in_order(self.techniques):
                self._smallest(frozenset({technique}))
        self._cover()
        if not self.small:
            for pair in filter(self._tells_more, self._pairs()):
                self._smallest(pair)
        cells = {pair: self._cell(pair) for pair in self._pairs() if pair & self.techniques}
        alone = {level: self._cell(frozenset({(name, level)})) for name, level in self._in_order(self.techniques)}
        return ModelResult(self.name, self.factors, cells, alone, self.causes, len(self.ran))

    def _in_order(self, levels: set[covering.Level]) -> list[covering.Level]:
        return [(name, level) for name in self.levels for level in self.levels[name] if (name, level) in levels]

    def _pairs(self) -> list[Levels]:
        return covering.pairs(self.levels)

    def _caused(self, levels: Levels) -> Cause | None:
        return next((cause for cause in self.causes if cause.levels <= levels), None)

    def _forbidden(self) -> set[Levels]:
        return {cause.levels for cause in self.causes} | self.too_many

    def _read(self) -> None:
        """What a recipe refuses to say at all, found without running anything."""
        for levels in [*(frozenset({one}) for one in self._in_order(self.techniques)), *self._pairs()]:
            if self._caused(levels):
                continue
            try:
                combinations.job(self.name, combinations.completed(self.factors, dict(levels)), self.store.folder)
            except InputError as error:
                self.causes.append(Cause(levels, Outcome("refused", why=str(error))))

    def _cover(self) -> None:
        """Run combinations until every pair has occurred in one that passes, as far as any can hold it."""
        while row := covering.next_row(self.levels, self._uncovered(), self._forbidden()):
            outcome = self._outcome(row)
            if outcome.verdict == "passed":
                self.passed[frozenset(row.items())] = outcome
            else:
                self.causes.append(self._cause(row, outcome))

    def _uncovered(self) -> list[Levels]:
        covered: set[Levels] = set().union(*(covering.within(dict(row)) for row in self.passed))
        return [pair for pair in self._pairs() if pair not in covered and not self._caused(pair)]

    def _smallest(self, levels: Levels) -> None:
        """Run these levels with nothing else."""
        if levels in self.alone or self._caused(levels):
            return
        row = combinations.completed(self.factors, dict(levels))
        outcome = self._outcome(row)
        if outcome.verdict == "passed":
            self.alone[levels] = self.passed[frozenset(row.items())] = outcome
        else:
            self.causes.append(self._cause(dict(levels), outcome))

    def _cause(self, row: Row, outcome: Outcome) -> Cause:
        """The levels of a row without any of which it would end otherwise."""
        left, outcome = self._near(row, outcome)
        plain = [name for name in left if left[name] == self.levels[name][0]]
        for name in [*plain, *self._switched(left)]:
            fewer = {key: level for key, level in left.items() if key != name}
            again = self._outcome(combinations.completed(self.factors, fewer)) if fewer else None
            if again and again.verdict == outcome.verdict:
                left, outcome = fewer, again
        self.say(f"{self.name}: {outcome.verdict} because of {' + '.join(left.values())}: {outcome.why}")
        self.hints.append(frozenset(left))
        return Cause(frozenset(left.items()), outcome)

    def _near(self, row: Row, outcome: Outcome) -> tuple[dict[str, str], Outcome]:
        """What to begin with: a single level, or levels of factors that were a cause before, if they end like the row."""
        singles = [frozenset({name}) for name in self._switched(row)]
        for names in [*singles, *sorted(set(self.hints) - set(singles), key=sorted)]:
            if names < row.keys():
                near = {name: row[name] for name in row if name in names}
                again = self._outcome(combinations.completed(self.factors, near))
                if again.verdict == outcome.verdict:
                    return near, again
        return dict(row), outcome

    def _switched(self, row: Row) -> list[str]:
        """Factors whose level in a row isn't plain."""
        return [name for name, level in row.items() if level != self.levels[name][0]]

    def _tells_more(self, pair: Levels) -> bool:
        """Whether a pair should be run with nothing else: it may be exact, or has dropout whose masks can be compared."""
        mine = pair & self.techniques
        if ("dropout", "dropout") in pair:
            return bool(mine) and combinations.draws(combinations.completed(self.factors, dict(pair)))
        known = [self.alone.get(frozenset({one})) for one in mine]
        plain = any(level == self.levels[name][0] for name, level in pair) and not self._settings(pair)
        return bool(known) and not plain and all(outcome is not None and outcome.exact for outcome in known)

    def _settings(self, pair: Levels) -> bool:
        return any(self.factors[name].setting for name, _ in pair)

    def _cell(self, levels: Levels) -> Cell:
        if cause := self._caused(levels):
            return Cell("refused" if cause.outcome.verdict == "refused" else "failed", why=cause.outcome.why)
        holding = {row: outcome for row, outcome in self.passed.items() if levels <= row}
        if not holding:
            self._smallest(levels)
            return self._cell(levels) if self._caused(levels) or levels in self.alone else Cell("untested")
        smallest = frozenset(combinations.completed(self.factors, dict(levels)).items())
        alone = {smallest: holding[smallest]} if smallest in holding else holding
        if all(outcome.exact for outcome in alone.values()):
            return Cell("exact")
        counted = alone if len(levels) == 1 else holding
        return Cell("within_bound", max(outcome.worst for outcome in counted.values()))

    def _outcome(self, row: Row) -> Outcome:
        """Of all seeds together; the first that doesn't pass decides."""
        found: list[Outcome] = []
        for seed in self.seeds:
            found.append(self._once(row, seed))
            if found[-1].verdict != "passed":
                return found[-1]
        return replace(found[0], exact=all(one.exact for one in found), worst=max(one.worst for one in found))

    def _once(self, row: Row, seed: int) -> Outcome:
        try:
            job = combinations.job(self.name, row, self.store.folder, seed)
        except InputError as error:
            return Outcome("refused", why=str(error))
        fresh = self.store.fresh
        outcome = self.store.get(job, self.name, row, lambda: prove(job, self.runner))
        self.ran.add(self.store.key(job))
        if self.store.fresh > fresh:
            shown = " + ".join(row[name] for name in self._switched(row)) or "plain"
            more = f"worst {outcome.worst:.2f}" if outcome.verdict == "passed" else outcome.why
            self.say(f"{self.name}, {shown}: {outcome.verdict}, {'exact' if outcome.exact else more} ({outcome.seconds:.1f} s)")
        return outcome


def prove(job: Job, runner: Runner) -> Outcome:
    """Compare one job with its twins."""
    started = time.perf_counter()
    try:
        known = facts.look(job)
        prover = Prover(runner, known)
        job = techniques.conditioned(job, known)
        outcome = _judged(prover, job, prover.compare(job))
    except InputError as error:
        outcome = Outcome("refused", why=str(error))
    except Broken as error:
        outcome = Outcome("failed", why=f"the plain run: {error}")
    return replace(outcome, seconds=round(time.perf_counter() - started, 2))


def _judged(prover: Prover, job: Job, verdict: Verdict) -> Outcome:
    if verdict.good:
        exact = _compares_bits(prover, job) and identical(prover.runner.run(job), prover.runner.run(prover.plain(job)))
        return Outcome("passed", exact, 0.0 if exact else verdict.worst)
    first = verdict.failed[0]
    return Outcome("failed", why=f"{first.what}: {first.why}")


def _compares_bits(prover: Prover, job: Job) -> bool:
    """Whether the plain run lacks something; lower precision it has as well, and BatchNorm's accumulation."""
    rounds = any(one.kind == "precision" for one in techniques.of(job, prover.facts))
    return not rounds and prover.plain(job) != job


def identical(run: Trace, plain: Trace) -> bool:
    """Whether two runs have the same bits, in every number and tensor."""
    if any(getattr(run, name) != getattr(plain, name) for name in ("losses", "norms", "rates", "supervised", "held_out")):
        return False
    kinds = (tracing.BEGIN, tracing.FIRST, tracing.LAST, tracing.END, tracing.AVERAGE, tracing.SAVED, tracing.STATE)
    return all(_same(run, plain, kind) for kind in kinds)


def _same(run: Trace, plain: Trace, kind: str) -> bool:
    mine, theirs = run.tensors(kind), plain.tensors(kind)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
