"""What the verb ``verify`` does with a recipe: settle, reduce, compare, and find who is to blame."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainwright.recipe import Recipe
from trainwright.verify import facts as looking
from trainwright.verify import forward, judging, proof, reduce, seeing, techniques
from trainwright.verify.facts import Facts
from trainwright.verify.job import Job
from trainwright.verify.proof import Blame, Prover, Verdict
from trainwright.verify.running import Runner

Say = Callable[[str], None]
TWINS = {None: "the plain run", "hf": "Hugging Face's Trainer", "torch": "a plain PyTorch loop"}


@dataclass(frozen=True)
class Options:
    """What the command line says.

    nproc    processes; needed only where parallel.data is auto, else the recipe tells
    against  hf or torch: an external twin instead of our own
    """

    nproc: int | None = None
    steps: int = 3
    layers: int | None = None
    width: int | None = None
    reduce: bool = True
    against: Literal["hf", "torch"] | None = None
    prepare: str | None = None


@dataclass(frozen=True)
class Report:
    """How a proof ended."""

    verdict: Verdict
    techniques: tuple[str, ...]
    reduced: str
    apart: tuple[str, ...]
    blame: Blame | None
    first: str
    seconds: float
    twin: str

    def plain(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "verified": self.verdict.good,
            "sentence": self.sentence(),
            "compared": f"{self.subject} with {self.twin}",
            "techniques": list(self.techniques),
            "reduced": self.reduced,
            "notes": list(self.apart),
            "lines": [line.plain() for line in self.verdict.lines],
            "culprit": self.blame.plain() if self.blame else None,
            "first_difference": self.first,
            "seconds": round(self.seconds, 1),
        }

    @property
    def subject(self) -> str:
        """What was run."""
        return ", ".join(self.techniques) or "the recipe, which has no technique switched on,"

    def sentence(self) -> str:
        """The verdict."""
        took = f"({self.seconds:.0f} s)"
        if self.verdict.good:
            kind = "to the bit" if self.verdict.exact else "within the bounds of its precision"
            return f"verified: the recipe computes what {self.twin} computes, {kind} {took}"
        blamed = self.blame.techniques if self.blame else ()
        fault = self.blame.verdict.failed[0] if self.blame else self.verdict.failed[0]
        names = " x ".join(one.name for one in blamed)
        more = f"; {self.first}" if self.first else ""
        return f"failed: {names + ': ' if names else ''}{fault.what}: {fault.why}{more} {took}"


def verify(recipe: Recipe, options: Options | None = None, say: Say = lambda text: None) -> Report:
    """Prove that a recipe computes what its plain twin computes, or name the culprit.

    Raises:
        InputError: the recipe is refused, or can't be reduced. Broken: the plain run itself fails.
    """
    started, asked = time.perf_counter(), options or Options()
    job = settled(recipe, asked)
    with Runner() as runner, tempfile.TemporaryDirectory(prefix="trainwright-reduced-") as scratch:
        runner.warm(job.processes)
        known = looking.look(job)
        words = ""
        if asked.reduce:
            smaller = reduce.reduce(job, known, asked.layers, asked.width, Path(scratch))
            job, words = smaller.job, smaller.words
            known = looking.look(job)
        else:
            reduce.check_room(job, known)
        job = techniques.conditioned(job, known)
        prover = Prover(runner, known, say)
        verdict = _compared(prover, job, asked)
        blame = None if verdict.good or asked.against else _blamed(prover, job, verdict)
        first = forward.first_difference(prover, blame, job) if blame and blame.techniques else ""
    shown = tuple(techniques.described(one, job) for one in techniques.of(job, known))
    return Report(verdict, shown, words, apart(job, known), blame, first, time.perf_counter() - started, TWINS[asked.against])


def settled(recipe: Recipe, options: Options) -> Job:
    """The job of a recipe, with the number of data ranks."""
    section = recipe.parallel
    others = section.tensor * section.pipeline
    data = section.data
    if data == "auto":
        least = 2 if section.zero or section.engine == "deepspeed" else 1
        data = max(1, options.nproc // others) if options.nproc else least
    keys = {"parallel.data": data, "evaluation.samples": 0}
    return Job(recipe, options.steps, resume=True, prepare=options.prepare).with_keys(keys)


def again(folder: Path, steps: int, nproc: int | None = None) -> dict[str, Any]:
    """Take a run's first steps once more; what ``show`` prints."""
    from trainwright.verify import finished

    started = time.perf_counter()
    verdict = finished.again(folder, steps, nproc)
    kind = "the same bits" if verdict.exact else "the same numbers, but for roundings"
    bad = verdict.failed
    words = f"failed: {bad[0].what}: {bad[0].why}" if bad else f"verified: the run's first steps give {kind} here and now"
    return {
        "verified": verdict.good,
        "sentence": f"{words} ({time.perf_counter() - started:.0f} s)",
        "compared": f"{folder}, its first steps, with the same taken now",
        "lines": [line.plain() for line in verdict.lines],
    }


def _compared(prover: Prover, job: Job, options: Options) -> Verdict:
    if options.against is None:
        return prover.compare(job)
    from trainwright.verify import against

    return against.compare(job, prover.facts, prover.runner, options.against)


def _blamed(prover: Prover, job: Job, verdict: Verdict) -> Blame:
    prover.say("it fails: techniques are taken away to find the culprit")
    return proof.bisect(prover, job, verdict)


def apart(job: Job, facts: Facts) -> tuple[str, ...]:
    """What was held alike in all runs, so that they can be compared, in words."""
    found = []
    if facts.drops:
        shown = ", ".join(facts.drops[:2]) + (f" and {len(facts.drops) - 2} more" if len(facts.drops) > 2 else "")
        found.append(f"dropout ({shown}) is off in all runs: its masks depend on how a batch is divided")
    if facts.batch_norm and techniques.divides(job, facts):
        found.append("accumulation stays in the plain run: BatchNorm takes its statistics from one micro-batch of all ranks")
    if facts.precision(job) == "fp16":
        found.append(f"the loss scale begins at {seeing.CALM:g}, so that no step is left out")
    if getattr(job.recipe.adapt, "base", "") == "4bit":
        found.append("the plain runs have the values of the 4-bit base, kept plainly: what rounding to them costs isn't judged")
    if eps := getattr(job.recipe.optimizer, "eps", None):
        found.append(f"optimizer.eps is {eps:.1e} in all runs, so that no step is the sign of a rounding error")
    return (*found, f"bound: {judging.Rule(facts.precision(job)).why}")
