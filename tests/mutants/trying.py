"""Tries mutants: the healthy recipe must pass, and with the bug in every process ``verify`` must fail and name it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.mutants import recipes
from tests.mutants.mutant import Mutant
from tests.mutants.mutated import bug, mutated_trace
from trainwright.launch.pool import Pool
from trainwright.recipe import InputError
from trainwright.verify import facts, proof, techniques
from trainwright.verify.job import Job
from trainwright.verify.judging import Line
from trainwright.verify.running import TIMEOUT, Broken, Runner
from trainwright.verify.techniques import Technique


@dataclass(frozen=True)
class Result:
    """What became of a mutant.

    healthy  whether the recipe without it passes
    line     the first that failed, or the one that is expected; where is what it says
    lines    all that failed
    found    the techniques that bisect named; rightly says whether these are the culprits
    """

    name: str
    pitfall: int
    healthy: bool
    caught: bool
    line: str
    where: str
    lines: tuple[str, ...]
    found: tuple[str, ...]
    rightly: bool
    seconds: float

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class MutantRunner(Runner):
    """Runs jobs with a bug, in processes that are shared with other runners."""

    def __init__(self, name: str, pools: dict[int, Pool]) -> None:
        super().__init__()
        self._name, self._pools = name, pools

    def __exit__(self, *error: object) -> None:
        self.leave()

    def alone(self, job: Job, folder: Path) -> None:
        with bug(self._name):
            super().alone(job, folder)

    def together(self, pool: Pool, job: Job, folder: Path) -> None:
        pool.run(mutated_trace, self._name, job, folder, timeout=TIMEOUT)


class Trials:
    """Where mutants are tried. Use it as a context: at its end the processes are gone, but those that were given.

    Args:
        pools: processes that are there already, by their number.
    """

    def __init__(self, folder: Path, pools: dict[int, Pool] | None = None) -> None:
        recipes.prepare(folder)
        self._folder = folder
        self._given = dict(pools or {})
        self._pools = dict(self._given)
        self._healthy: dict[str, proof.Verdict] = {}

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *error: object) -> None:
        for count, pool in self._pools.items():
            if count not in self._given:
                pool.stop()

    def all(self, mutants: Iterable[Mutant]) -> Iterator[Result]:
        """One after the other."""
        for mutant in mutants:
            started = time.perf_counter()
            healthy = self.healthy(self._job(mutant))
            yield self._tried(mutant, healthy, started)

    def healthy(self, job: Job) -> proof.Verdict:
        """The verdict of a job without bugs."""
        key = repr((job, job.recipe.model_dump_json()))
        if key not in self._healthy:
            known = facts.look(job)
            with MutantRunner("", self._pools) as runner:
                self._healthy[key] = proof.Prover(runner, known).compare(techniques.conditioned(job, known))
        return self._healthy[key]

    def _job(self, mutant: Mutant) -> Job:
        recipe = recipes.make(mutant.base, self._folder, mutant.keys)
        return Job(recipe, steps=mutant.steps, resume=mutant.resume, dropout=mutant.dropout)

    def _tried(self, mutant: Mutant, healthy: proof.Verdict, started: float) -> Result:
        job = self._job(mutant)
        with mutant.patch():
            known = facts.look(job)
        job = techniques.conditioned(job, known)
        with MutantRunner(mutant.name, self._pools) as runner:
            prover = proof.Prover(runner, known)
            try:
                verdict = prover.compare(job)
            except (InputError, Broken) as error:
                verdict = proof.Verdict((Line(type(error).__name__, "failed", why=str(error)),))
                return _result(mutant, healthy.good, verdict, (), started)
            blame = None if verdict.good else proof.bisect(prover, job, verdict)
        return _result(mutant, healthy.good, verdict, blame.techniques if blame else (), started)


def _result(mutant: Mutant, healthy: bool, verdict: proof.Verdict, named: tuple[Technique, ...], started: float) -> Result:
    failed, found = verdict.failed, tuple(one.name for one in named)
    first = next((line for line in failed if mutant.line in line.what), failed[0] if failed else None)
    return Result(
        name=mutant.name,
        pitfall=mutant.pitfall,
        healthy=healthy,
        caught=first is not None,
        line=first.what if first else "",
        where=first.why if first else "",
        lines=tuple(line.what for line in failed),
        found=found,
        rightly=first is not None and sorted(found) == sorted(mutant.blamed) and mutant.line in first.what,
        seconds=round(time.perf_counter() - started, 1),
    )
