"""A recipe against what others wrote: Hugging Face Trainer with PEFT, or a plain PyTorch loop.

The recipe's run, on as many processes as it says, is one side. The other side runs twice: in float64 it is the truth, and in
the recipe's precision it tells how far rounding alone leads away from that. So no number of ours decides what is right, nor how
far from right is near enough. (transformers computes norms in float32 even of a float64 model; that is a rounding, too.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from trainwright.models.decoder import Decoder
from trainwright.recipe import InputError, TextData
from trainwright.verify import hugging_face, plain_loop, techniques, works
from trainwright.verify.facts import Facts
from trainwright.verify.job import Job
from trainwright.verify.judging import Line, Rule, judge
from trainwright.verify.proof import Verdict
from trainwright.verify.running import Broken, Runner
from trainwright.verify.tracing import AVERAGE, BEGIN, END, SAVED, Trace

Kind = Literal["hf", "torch"]
NAMES = {"hf": "Hugging Face Trainer", "torch": "the plain PyTorch loop"}
RATE_BOUND = 1e-12  # the same formula, written otherwise
LUCK = 0.1  # a distance below it may come from a rounding that decided something, such as the side of 0 of a ReLU's input


def compare(job: Job, facts: Facts, runner: Runner, kind: Kind) -> Verdict:
    """Run a job and its twin of another make, and judge.

    Raises:
        InputError: the recipe is refused, or has no such twin.
    """
    job = job.but(resume=False, dropout=False, probe=False, watch=False)
    if kind == "hf":
        hugging_face.check(job.recipe, facts)
    _check_rounding(job, facts, kind)
    plain_loop.rates(job.recipe, 1)
    try:
        run = runner.run(job)
    except Broken as error:
        return Verdict((Line("run", "failed", why=str(error)),))
    with tempfile.TemporaryDirectory(prefix="trainwright-against-") as scratch:
        twin = Twin(job, facts, run, kind, Path(scratch))
        return _judged(twin, runner)


def _check_rounding(job: Job, facts: Facts, kind: Kind) -> None:
    """Raises InputError where updates are rounded in a way that the twin doesn't know."""
    rounds = {
        "memory.optimizer_states: 8bit": (job.recipe.memory.optimizer_states == "8bit", "plain"),
        "precision: pure_bf16": (facts.precision(job) == "pure_bf16", "bf16"),
    }
    for key, (on, other) in rounds.items():
        if on:
            raise InputError(
                f"{key} rounds updates in its own way, and {NAMES[kind]} doesn't; verify it without --against, or with {other}"
            )


@dataclass(frozen=True)
class Twin:
    """The other side of a job whose run is known."""

    job: Job
    facts: Facts
    run: Trace
    kind: Kind
    scratch: Path

    def trace(self, precision: str) -> Trace:
        """What it does in a precision.

        Raises:
            InputError: the twin can't do what the recipe says.
        """
        recipe, steps, folder = self.job.recipe, len(self.run.losses), self.scratch / precision
        if not isinstance(recipe.data, TextData):
            return plain_loop.train(works.samples(self.job, self.facts, self.run, precision), recipe, steps, folder)
        documents, work = works.text(self.job, self.facts, self.run, precision)
        if self.kind == "torch":
            return plain_loop.train(work, recipe, steps, folder)
        trace, _ = hugging_face.train(work, documents, recipe, steps, folder, bf16=precision in works.AUTOCAST)
        return trace


def _judged(twin: Twin, runner: Runner) -> Verdict:
    job, run = twin.job, twin.run
    truth, precision = twin.trace("fp64"), twin.facts.precision(job)
    text_twin = isinstance(job.recipe.data, TextData) and isinstance(twin.facts.built.model, Decoder)
    if precision == "fp64":
        lines = judge(run, truth, truth, "fp32" if text_twin else "fp64")
    else:
        lines = judge(run, twin.trace(precision), truth, precision)
    if _lucky(lines) and precision != "fp64" and not text_twin:
        wide = judge(runner.run(job.with_keys({"precision": "fp64"})), truth, truth, "fp64")
        if all(line.verdict != "failed" for line in _told(twin, wide, truth)):
            why = "a rounding decided something in float32; the lines are those of the same run in float64"
            lines = [*wide, Line("precision", "within", why=why)]
    return Verdict((*_told(twin, lines, truth), *_notes(twin, truth), *_loaded(twin)))


def _lucky(lines: Iterable[Line]) -> bool:
    """Whether all that failed did so by little."""
    failed = [line for line in lines if line.verdict == "failed" and line.what not in ("learning rate", "saved model")]
    return bool(failed) and all(line.value is not None and line.value <= LUCK for line in failed)


def _told(twin: Twin, lines: Iterable[Line], truth: Trace) -> list[Line]:
    """The lines, with those in their own words that the twin can't give, or can't give to the last bit."""
    other = {"learning rate": _rates(twin.run, truth)}
    if not truth.names(SAVED):
        other["saved model"] = Line("saved model", "skipped", why=f"{NAMES[twin.kind]} writes no such files")
    if twin.kind == "hf" and twin.job.recipe.training.ema:
        other["averaged weights"] = Line("averaged weights", "skipped", why="Trainer keeps no moving average of the weights")
        other["saved model"] = Line("saved model", "skipped", why="ours is the moving average, of which Trainer has none")
    elif twin.kind == "hf" and twin.job.recipe.adapt.method == "partial":
        other["saved model"] = Line("saved model", "skipped", why="ours is a delta, a format of our own")
    return [_evaluated(other.get(line.what, line)) for line in lines]


def _evaluated(line: Line) -> Line:
    """Held-out losses are sums in float32 whatever the precision."""
    bound = Rule("fp32").bound(0.0)
    if line.what != "held-out loss" or line.verdict != "failed" or line.value is None or line.value > bound:
        return line
    return Line(line.what, "within", line.value, bound, line.where, "evaluation sums in float32 at best")


def _rates(run: Trace, truth: Trace) -> Line:
    """Equal but for the rounding of a formula that is written otherwise."""
    what = "learning rate"
    off = [abs(a - t) / max(abs(t), 1e-30) if a != t else 0.0 for a, t in zip(run.rates, truth.rates, strict=True)]
    worst = max(range(len(off)), key=lambda step: off[step])
    where, value = f"step {worst + 1}", off[worst]
    if value > RATE_BOUND:
        why = f"{run.rates[worst]:.6g} instead of {truth.rates[worst]:.6g}"
        return Line(what, "failed", value, RATE_BOUND, where, why, (where,))
    return Line(what, "within" if value else "exact", value, RATE_BOUND, where, "a function of the step alone")


def _notes(twin: Twin, truth: Trace) -> list[Line]:
    """What of the twin isn't its own."""
    notes = list(truth.notes)
    recipe, source = twin.job.recipe, twin.facts.built.source
    if source is None or not isinstance(twin.facts.built.model, Decoder) or not hugging_face.reads_itself(recipe, twin.facts):
        notes.append("the twin starts from our run's first weights, so these are compared with nothing else")
    if twin.run.notes and twin.kind == "hf" and "held_out" in twin.run.held_out:
        notes.append("held-out data: Trainer's mean is one of batches' means")
    return [Line("twin", "skipped", why=note) for note in notes]


def _loaded(twin: Twin) -> list[Line]:
    """Our saved files, read by transformers and PEFT, against our own run's last weights."""
    recipe, built, run = twin.job.recipe, twin.facts.built, twin.run
    if twin.kind != "hf" or recipe.adapt.method == "partial":
        return []
    document = works.documents_of(recipe, works.splits_of(recipe, twin.facts).train)(0)[0][0]
    theirs = hugging_face.logits_of_saved(recipe, twin.facts, run.folder / "model", run.tensors(BEGIN), document).double()
    model = works.plain_module(twin.job, twin.facts, {**run.tensors(END), **run.tensors(AVERAGE)}, adapt=True)
    assert isinstance(model, Decoder)
    with torch.no_grad():
        ends = torch.tensor([0, len(document)], dtype=torch.int32)
        ours = model.logits(model(document[None], torch.arange(len(document))[None], ends))[0].double()
    precision = built.precision if built.precision in techniques.LOW else "fp32"  # what is stored, or made, in few digits
    value, bound = float((theirs - ours).norm() / ours.norm()), Rule(precision).bound(0.0)
    what, why = "saved model, read by transformers", f"logits of a document of {len(document)} tokens"
    if value <= bound:
        return [Line(what, "within", value, bound, "logits", why)]
    told = f"the saved model, read by transformers, gives logits that differ by {value:.1%}"
    return [Line(what, "failed", value, bound, "logits", told, ("logits",))]
