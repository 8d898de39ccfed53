"""The caller of the loop that the command line uses: it reports, evaluates, checkpoints and saves around the steps."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from trainwright import budget, build, checkpoint, launch, loop, runfolder, stopping
from trainwright.console import Display
from trainwright.loop import Run, StepResult
from trainwright.machine import matrix_product_rate
from trainwright.parallel import collectives
from trainwright.recipe import InputError, Recipe
from trainwright.tracking import Silence, Tracker

HELD_OUT = "held_out"


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; its message says where the checkpoint lies and how to go on."""


@dataclass
class _Session:
    """One call of ``train``: what goes along with the steps."""

    recipe: Recipe
    folder: Path
    run: Run
    display: Display
    tracker: Tracker | Silence
    peak: float | None
    writer: checkpoint.Writer
    state: dict[str, Any] = field(default_factory=dict)  # what a checkpoint remembers besides the run: the best so far
    recent: deque[StepResult] = field(default_factory=lambda: deque(maxlen=20))


def train(recipe: Recipe, *, resume: bool = False, quiet: bool = False, rank: int = 0) -> dict[str, Any]:
    """Run a recipe to its end and save the model; gives what ``--json`` prints.

    Args:
        rank: this process among those that run the recipe together; only the first speaks and keeps the books.

    Raises:
        InputError: something the user can mend. RunError, CheckpointError: the run failed.
        Interrupted: after Ctrl-C, when the checkpoint is written.
    """
    folder = runfolder.check(recipe, resume)
    first = rank == 0
    device = build.choose_device(recipe.run.device)
    _check_agreement("recipe", _essence(recipe), partial(collectives.gather_json, device=device))
    books = Tracker(folder, recipe.tracking.tensorboard) if first else Silence()
    with Display(quiet or not first) as display, books as tracker, budget.explaining(recipe):
        recipe = budget.settled(recipe, device, display.say)
        with display.preparing() as progress:
            run = build.assemble(recipe, progress=progress)
        _check_agreement("data", run.fingerprint, run.share)
        if first:
            runfolder.begin(folder, recipe)
        session = _Session(recipe, folder, run, display, tracker, _peak(run), checkpoint.Writer(_team(run)))
        session.state = runfolder.restore(folder, run, display.say) if resume else {}
        _check_best(session)
        session.state.setdefault("evaluations", {})
        tracker.truncate_after(run.step or -1)
        _announce(session)
        _steps(session)
        return _finish(session)


def _check_agreement(what: str, mine: str, share: Callable[[Any], list[Any]]) -> None:
    """Raises InputError where the processes of a run were given different things."""
    if fault := launch.disagreement(share({what: mine})):
        raise InputError(fault)


def _essence(recipe: Recipe) -> str:
    return hashlib.sha256(json.dumps(recipe.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def _check_best(session: _Session) -> None:
    """After a fall back to an older checkpoint, the best one that it remembers may be gone."""
    best = session.state.get("best")
    if best and not checkpoint.path_of(session.folder, best["step"]).is_dir():
        session.display.say(f"the best weights (step {best['step']}) are gone; the best is looked for anew")
        del session.state["best"]


def _peak(run: Run) -> float | None:
    """FLOP/s of the machine, where the share of it can be told."""
    if run.flops is None:
        return None
    return matrix_product_rate(run.device, run.compute_dtype)


def _announce(session: _Session) -> None:
    run, display = session.run, session.display
    for change in run.changes:
        display.say(f"{change.technique}: {change.summary}")
    for line in run.notes:
        display.say(line)
    display.say(f"run: {run.steps} steps, {run.steps_per_epoch} an epoch, in {session.folder}")
    if run.step:
        display.say(f"resumed after step {run.step}")


def _steps(session: _Session) -> None:
    run, recipe = session.run, session.recipe
    if run.step == 0 and recipe.evaluation.before:
        _evaluate(session)
        session.state["samples"] = _samples(session)
    session.display.start(run.steps, run.step)
    with _stoppable() as stop:
        for result in [] if session.state.get("stopped") else loop.train(run):
            _report(session, result)
            if run.step == run.steps:
                break
            best = _due(run, recipe.evaluation.every) and _evaluate(session)
            if session.state.get("stopped"):
                break
            leave = run.agree(bool(stop))
            path = _checkpoint(session) if best or leave or _due(run, recipe.checkpoint.every) else None
            if leave:
                session.writer.wait()
                raise Interrupted(
                    f"stopped after step {run.step}, saved in {path}; to go on: "
                    f"trainwright train {session.folder / 'recipe.yaml'} --resume"
                )
    session.display.stop()


def _due(run: Run, every: int | str | None) -> bool:
    interval = run.steps_per_epoch if every == "epoch" else every
    return isinstance(interval, int) and run.step % interval == 0


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """A list that the first Ctrl-C fills, so that the step in hand is finished; the second one stops at once."""
    stop: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not in the main thread: whoever runs us there stops us in their own way
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _report(session: _Session, result: StepResult) -> None:
    run = session.run
    launch.alive(run.step)
    session.recent.append(result)
    if len(session.recent) == 2 and session.recent[0].step == 1:
        session.recent.popleft()  # the first step compiles
    seconds = sum(r.seconds for r in session.recent)
    rate = sum(r.size for r in session.recent) / seconds
    share = sum(r.flops for r in session.recent) / seconds / session.peak if session.peak else None
    if result.skipped:
        session.display.say(f"step {result.step}: {result.skipped}")
    session.display.step(result, run.unit, rate, share, run.steps)
    session.tracker.log(
        result.step,
        {
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            run.unit: result.size,
            f"{run.unit}_per_second": result.size / result.seconds,
            "peak_memory_bytes": result.peak_memory_bytes,
            "seconds": result.seconds,
        },
    )


def _evaluate(session: _Session) -> bool:
    """Measure, tell and remember; True where these are the best weights so far."""
    run = session.run
    if HELD_OUT not in run.splits:
        return False
    values = loop.evaluate(run)
    session.tracker.log(run.step, values, split=HELD_OUT)
    session.state["evaluations"][str(run.step)] = values
    shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
    session.display.say(f"held-out after step {run.step}: {shown}")
    _watch(session, values)
    return _is_best(session, values)


def _watch(session: _Session, values: dict[str, float]) -> None:
    """Note whether it is time to stop early."""
    section = session.recipe.evaluation.stop
    if section is None or session.run.step == 0:
        return
    session.state["patience"], stop = stopping.observe(section, session.state.get("patience", {}), values[section.metric])
    if stop:
        session.state["stopped"] = True
        times = f"{section.patience} evaluation{'s' * (section.patience > 1)}"
        session.display.say(f"stopped early after step {session.run.step}: {section.metric} wasn't better for {times}")


def _samples(session: _Session) -> list[dict[str, str]]:
    count, run = session.recipe.evaluation.samples, session.run
    if not count or run.samples is None:
        return []
    with session.display.working("sampling"):
        return [asdict(sample) for sample in run.samples(count)]


def _is_best(session: _Session, values: dict[str, float]) -> bool:
    """Compare in the direction that the recipe states; a metric that isn't finite is never the best."""
    best, known = session.recipe.evaluation.best, session.state.get("best")
    if best is None or session.run.step == 0 or not math.isfinite(values[best.metric]):
        return False
    value = values[best.metric]
    better = stopping.better(best.direction, value, known["value"] if known else None)
    if better:
        session.state["best"] = {"step": session.run.step, "value": value, "metric": best.metric}
    return better


def _checkpoint(session: _Session) -> Path:
    """Write the run as it stands. Several processes go on meanwhile; one alone needn't keep a copy of everything."""
    run, folder, writer = session.run, session.folder, session.writer
    session.tracker.flush()
    state = runfolder.state_of(run, session.state)
    if writer.team.size == 1:
        checkpoint.write_held(folder, run.step, run.remember(), state)
    _prune(session)
    if writer.team.size > 1:
        writer.begin(folder, run.step, run.remember(), state)
    return checkpoint.path_of(folder, run.step)


def _prune(session: _Session) -> None:
    session.writer.wait()
    if session.run.rank == 0:
        best = session.state.get("best")
        checkpoint.prune(session.folder, session.recipe.checkpoint.keep, {best["step"]} if best else set())


def _team(run: Run) -> checkpoint.Team:
    """The processes of this run, which write checkpoints together."""
    tokens = run.share(uuid.uuid4().hex)
    return checkpoint.Team(run.rank, len(tokens), tokens[0] if len(tokens) > 1 else "")


def _finish(session: _Session) -> dict[str, Any]:
    run, folder = session.run, session.folder
    if str(run.step) not in session.state["evaluations"]:
        _evaluate(session)
    _checkpoint(session)
    _prune(session)
    best = session.state.get("best")
    if best and best["step"] != run.step:
        run.recall(checkpoint.Reader(checkpoint.path_of(folder, best["step"])), False)
        session.display.say(f"the final model is the best one: step {best['step']}, {best['metric']} {best['value']:.4f}")
    with run.averaged():
        run.save(folder / runfolder.MODEL)
    samples = _compared(session)
    evaluations = session.state["evaluations"]
    session.display.say(f"model: {folder / runfolder.MODEL}")
    session.display.say(f"next:  {_next_command(session)}")
    return {
        "folder": str(folder),
        "model": str(folder / runfolder.MODEL),
        "steps": run.step,
        "held_out": {"before": evaluations.get("0"), "after": evaluations.get(str(best["step"] if best else run.step))},
        "best": best,
        "samples": samples,
        "changes": {change.technique: change.summary for change in run.changes},
    }


def _next_command(session: _Session) -> str:
    """What a person would type now."""
    if session.run.samples is not None or session.run.unit == "tokens":
        return f"trainwright generate {session.folder} --chat"
    return f"trainwright evaluate {session.folder}" if session.run.splits else f"trainwright predict {session.folder} INPUT"


def _compared(session: _Session) -> list[dict[str, str]]:
    """The answers before and after training side by side, shown and given."""
    before = session.state.get("samples", [])
    pairs = [
        {"prompt": old["prompt"], "expected": old["expected"], "before": old["answer"], "after": new["answer"]}
        for old, new in zip(before, _samples(session) if before else [], strict=True)
    ]
    for pair in pairs:
        session.display.sample(pair)
    return pairs
