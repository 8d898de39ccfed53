"""A recipe against its plain twin: the three runs, the comparison, and who is to blame where it fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trainwright.recipe import InputError
from trainwright.verify import judging, sane, structure, techniques
from trainwright.verify.facts import Facts
from trainwright.verify.job import Job
from trainwright.verify.judging import Line
from trainwright.verify.running import Broken, Runner
from trainwright.verify.techniques import Technique
from trainwright.verify.tracing import Trace

Say = Callable[[str], None]
ROUNDING = 0.1  # a distance below it may come from a rounding that decided something; float64 tells
SHARP = {"precision": "fp32", "run.compile": "off"}


@dataclass(frozen=True)
class Verdict:
    """How a comparison ended."""

    lines: tuple[Line, ...]

    @property
    def good(self) -> bool:
        """Whether nothing failed."""
        return not self.failed

    @property
    def failed(self) -> list[Line]:
        return [line for line in self.lines if line.verdict == "failed"]

    @property
    def exact(self) -> bool:
        """Whether nothing differed in any bit."""
        return all(line.verdict in ("exact", "skipped") for line in self.lines)

    @property
    def worst(self) -> float:
        """The largest part of a bound that is used."""
        return max((line.value / line.bound for line in self.lines if line.value is not None and line.bound), default=0.0)


@dataclass(frozen=True)
class Prover:
    """Compares runs of one recipe's model and data."""

    runner: Runner
    facts: Facts
    say: Say = field(default=lambda text: None)

    def plain(self, job: Job) -> Job:
        """The twin: one process, the recipe's own precision, no technique."""
        kept = [one for one in techniques.of(job, self.facts) if one.kind != "precision"]
        return techniques.without(job, self.facts, kept).but(resume=False)

    def truth(self, job: Job) -> Job:
        """The same in float64."""
        plain = techniques.without(job, self.facts, techniques.TECHNIQUES).but(resume=False, probe=not job.dropout)
        return plain.with_keys({"precision": "fp64"})

    def compare(self, job: Job) -> Verdict:
        """Run a job and its twins, and judge.

        A job in low precision has wide bounds, in which a fault can hide, so it is compared in float32, too.

        Raises:
            InputError: the recipe is refused, or the plain run is no measure. Broken: the plain run ended with an error.
        """
        sharp = job.with_keys(SHARP).but(resume=False) if self.facts.precision(job) in techniques.LOW else None
        for one in (job, sharp):
            if one is not None:
                self.runner.begin(one)  # while this process runs the twins
        verdict = self._compare(job)
        if not verdict.good:
            return verdict
        more = list(self._bits(job))
        if sharp is not None:
            more += _in_short(self._compare(sharp))
        return Verdict((*verdict.lines, *more))

    def _bits(self, job: Job) -> Iterator[Line]:
        """Techniques that leave every operation as it is must leave every bit; dropout, whose masks they must replay, is on."""
        exact = techniques.exact(job, self.facts)
        if not exact:
            return
        alone = restricted(self.facts, job, exact).but(resume=False, dropout=True)
        names = ", ".join(one.name for one in exact)
        mine, plain = self._run(alone, f"{names} alone"), self._run(self.plain(alone), "the plain run with dropout")
        what = f"bits of {names}" + " with dropout" * bool(self.facts.drops)
        different = judging.different_bits(mine, plain)
        if different:
            why = f"{different[0]} isn't the same to the bit, though {names} must not change any operation"
            yield Line(what, "failed", where=different[0], why=why, tensors=tuple(different))
        else:
            yield Line(what, "exact", why="every loss, gradient and weight has the plain run's bits")

    def _compare(self, job: Job) -> Verdict:
        precision = self.facts.precision(job)
        truth = self._run(self.truth(job), "the plain run in float64")
        plain = self._run(self.plain(job), f"the plain run in {judging.WORDS[precision]}")
        try:
            run = self._run(job, "the recipe's run")
        except Broken as error:
            return Verdict((Line("run", "failed", why=str(error)),))
        compared = judging.judge(run, plain, truth, precision, compiled=self.facts.compiles(job))
        alone = structure.check(job, self.facts.built, run)
        rounded = sane.unbiased(run, truth) if precision == "pure_bf16" else ()
        measure = sane.check(plain, truth, precision, eight_bits=job.recipe.memory.optimizer_states == "8bit")
        verdict = Verdict((*measure, *compared, *alone, *rounded))
        return verdict if verdict.good else self._reconsidered(job, verdict, truth)

    def _run(self, job: Job, what: str) -> Trace:
        started = time.perf_counter()
        self.say(f"{what} ({job.processes} process{'es' * (job.processes > 1)})")
        trace = self.runner.run(job)
        self.say(f"{what}: {time.perf_counter() - started:.1f} s")
        return trace

    def _reconsidered(self, job: Job, verdict: Verdict, truth: Trace) -> Verdict:
        """Small differences can come from a rounding that decided something, such as on which side of 0 a ReLU's input is.

        In float64 such luck is gone, and what stays is a fault.
        """
        if any(line.value is None or line.bound is None or line.value > ROUNDING for line in verdict.failed):
            return verdict
        if any(one.name == "own kernels" for one in techniques.of(job, self.facts)):
            return verdict  # they know no float64: what they do wrong would be gone with them, and decoders have no kinks
        try:
            wide = self._run(job.with_keys({"precision": "fp64"}).but(resume=False), "the recipe's run in float64")
        except (InputError, Broken):
            return verdict
        again = {line.what: line for line in judging.judge(wide, truth, truth, "fp64")}
        if any(line.verdict == "failed" for line in again.values()):
            return verdict
        return Verdict(tuple(_excused(line, again.get(line.what)) for line in verdict.lines))


def _in_short(verdict: Verdict) -> list[Line]:
    """Of the comparison in float32 what failed, else one line."""
    if not verdict.good:
        return [replace(line, what=f"in float32: {line.what}") for line in verdict.failed]
    measured = [line for line in verdict.lines if line.value is not None and line.bound]
    worst = max(measured, key=lambda line: (line.value or 0) / (line.bound or 1))
    return [replace(worst, what="all of it in float32", where=f"{worst.what}: {worst.where}")]


def _excused(line: Line, wide: Line | None) -> Line:
    if line.verdict != "failed" or wide is None:
        return line
    why = f"a rounding decided something: {line.value:.1e} here, but the same run in float64 differs by {wide.value or 0:.1e}"
    return Line(line.what, "within", wide.value, wide.bound, line.where, why)


@dataclass(frozen=True)
class Blame:
    """The smallest set of techniques found that fails together, the job that has these only, and its verdict.

    No techniques: the plain recipe fails by itself.
    """

    techniques: tuple[Technique, ...]
    job: Job
    verdict: Verdict

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        first = self.verdict.failed[0]
        return {"techniques": [one.name for one in self.techniques], "what": first.what, "why": first.why}


def bisect(prover: Prover, job: Job, verdict: Verdict) -> Blame:
    """The smallest set that still fails: none, a single technique, or what stays when each that isn't needed is gone."""
    found = techniques.of(job, prover.facts)
    found = sorted(found, key=lambda one: len(_needs({one.name})))  # what others build on comes first
    sets: list[list[Technique]] = [[], *([one] for one in found)]
    for wanted in sets:
        fewer = restricted(prover.facts, job, wanted)
        if (failed := _failing(prover, fewer)) is not None:
            return Blame(tuple(wanted), fewer, failed)
    left, current, smallest = list(found), verdict, job
    for one in found:
        wanted = [other for other in left if other is not one]
        fewer = restricted(prover.facts, job, wanted)
        if (failed := _failing(prover, fewer)) is not None:
            left, current, smallest = wanted, failed, fewer
    return Blame(tuple(left), smallest, current)


def restricted(facts: Facts, job: Job, wanted: Sequence[Technique]) -> Job:
    """The job with some of its techniques only, and what they build on."""
    names = _needs({one.name for one in wanted})
    return techniques.without(job, facts, [one for one in techniques.TECHNIQUES if one.name not in names])


def _needs(names: set[str]) -> set[str]:
    """These, and what they build on."""
    if names & {"ZeRO", "DeepSpeed", "offload to the CPU"}:
        names = names | {"data parallel"}
    if "offload to the CPU" in names:
        names = names | {"DeepSpeed", "ZeRO"}
    return names


def _failing(prover: Prover, job: Job) -> Verdict | None:
    """The verdict of a job that fails; None where it doesn't, or can't be run like this."""
    try:
        verdict = prover.compare(job)
    except (InputError, Broken):
        return None
    return None if verdict.good else verdict
