"""Whether this machine and these versions still give the numbers of a finished run: its first steps, taken once more."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch

from trainwright import build, checkpoint, loop, runfolder, tracking
from trainwright.launch.pool import Pool, RankError
from trainwright.memory.precision import DTYPES
from trainwright.recipe import InputError, Recipe, RunError
from trainwright.verify.job import changed
from trainwright.verify.judging import WORDS, Line, Rule
from trainwright.verify.proof import Verdict

TIMEOUT = 1800.0  # seconds without an answer
RATE_BOUND = 1e-12  # relative: the same formula under another libm
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
UNTOLD = ("memory_bytes",)  # of the environment; no number depends on it
Steps = dict[int, dict[str, Any]]


def again(folder: Path, steps: int = 3, processes: int | None = None) -> Verdict:
    """Take the first steps of the run in ``folder`` again, on as many processes and threads as then.

    The folder is only read. A line is *exact* where every bit is the same, *within* where the difference is one of the
    precision's roundings; else it fails, and says at which step.

    Args:
        steps: how many, at most as many as the run took.
        processes: how many took part in the run, where its folder doesn't tell.

    Raises:
        InputError: no run, none that took a step, or one whose number of processes can't be told. RunError: it fails today.
    """
    if steps < 1:
        raise InputError(f"steps: found {steps}; give 1 or more")
    recipe = runfolder.read_recipe(folder)
    then = recorded(folder, steps)
    count = processes or process_count(folder, recipe)
    environment = _environment(folder)
    with tempfile.TemporaryDirectory(prefix="trainwright-again-") as scratch:
        others = recipe.parallel.tensor * recipe.parallel.pipeline
        if count % others:
            raise InputError(f"processes: {count} isn't a multiple of parallel.tensor x pipeline = {others}")
        keys = {"run.folder": str(Path(scratch) / "run"), "parallel.data": count // others}
        try:
            now = _taken(changed(recipe, keys), len(then), count, environment.get("threads"))
        except InputError as error:
            where = "relative paths of the recipe hold from the folder in which the run was started"
            raise InputError(f"{folder}: its recipe can't be run here and now: {error} ({where})") from None
    rule = Rule(now["precision"])
    return Verdict(
        (
            _data(folder, now["fingerprint"]),
            *(_numbers(what, then, now["steps"], rule) for what in ("loss", "grad_norm")),
            _rates(then, now["steps"]),
            _counts(now["unit"], then, now["steps"]),
            _changes(environment, now["environment"]),
        )
    )


def recorded(folder: Path, steps: int) -> Steps:
    """What metrics.jsonl says of the first steps.

    Raises:
        InputError: it isn't there, or lacks step 1.
    """
    path = folder / METRICS
    if not path.is_file():
        raise InputError(f"{folder}: no {METRICS}, so the run took no step; start it with: trainwright train RECIPE")
    lines = {line["step"]: line for line in tracking.read_metrics(path) if "split" not in line}
    if 1 not in lines:
        first = f"begins with step {min(lines)}" if lines else "has no step"
        raise InputError(f"{path} {first}; the first steps of the run are needed, from step 1 on")
    unbroken = takewhile(lines.__contains__, range(1, steps + 1))
    return {step: lines[step] for step in unbroken}


def process_count(folder: Path, recipe: Recipe) -> int:
    """How many processes took part: by the recipe, else by what they left in the folder.

    Raises:
        InputError: its traces don't agree.
    """
    section = recipe.parallel
    if section.data != "auto":
        return section.data * section.tensor * section.pipeline
    found = {"logs in ranks/": _ranks(folder), "writers of the newest checkpoint": _parts(folder)}
    told = {what: count for what, count in found.items() if count}
    if len(set(told.values())) > 1:
        words = ", ".join(f"{count} {what}" for what, count in told.items())
        raise InputError(
            f"{folder}: parallel.data is auto, and {words} don't agree; say how many processes there were: --nproc N"
        )
    return next(iter(told.values()), section.tensor * section.pipeline)


def _ranks(folder: Path) -> int:
    """By their logs and heartbeats; 0: there are none, as of one process alone."""
    files = (folder / runfolder.RANKS).glob("rank-*")
    numbers = [file.name.removeprefix("rank-").partition(".")[0] for file in files]
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def _parts(folder: Path) -> int:
    """How many processes wrote the newest checkpoint, by the names of its tensors' files; 0: there is none."""
    newest = checkpoint.latest(folder)
    names = [file.stem for file in newest.glob("tensors*.safetensors")] if newest else []
    return max((int(name.rpartition("-of-")[2]) if "-of-" in name else 1 for name in names), default=0)


def _environment(folder: Path) -> dict[str, Any]:
    path = folder / ENVIRONMENT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _taken(recipe: Recipe, steps: int, count: int, threads: int | None) -> dict[str, Any]:
    """The steps, in this process or in others."""
    if count == 1:
        before = torch.get_num_threads()
        try:
            return take(recipe, steps, threads)
        finally:
            torch.set_num_threads(before)
    with Pool(count) as pool:
        try:
            found: dict[str, Any] = pool.run(take, recipe, steps, threads, timeout=TIMEOUT)[0]
        except RankError as error:
            raise (InputError if error.kind == "InputError" else RunError)(error.message) from None
    return found


def take(recipe: Recipe, steps: int, threads: int | None) -> dict[str, Any]:
    """The first steps of a recipe in this process, which may be one of several; what there is to compare."""
    if threads:
        torch.set_num_threads(threads)  # sums are made in another order by more or fewer
    run = build.assemble(recipe)
    results = [asdict(result) for result in islice(loop.train(run), steps)]
    return {
        "steps": {result["step"]: {**result, run.unit: result["size"]} for result in results},
        "unit": run.unit,
        "fingerprint": run.fingerprint,
        "precision": next(name for name, dtype in DTYPES.items() if dtype == run.compute_dtype),
        "environment": tracking.environment(),
    }


def _data(folder: Path, fingerprint: str) -> Line:
    """The same documents or samples as then, as far as a checkpoint tells."""
    newest = checkpoint.latest(folder)
    if newest is None:
        return Line("data", "skipped", why="no checkpoint tells what the data was")
    stored = checkpoint.Reader(newest).state.get("data")
    if stored == fingerprint:
        return Line("data", "exact", why="the fingerprint is that of the newest checkpoint")
    why = f"the data isn't what it was when {newest.name} was written; nothing below can be the same"
    return Line("data", "failed", where=newest.name, why=why)


def _numbers(what: str, then: Steps, now: Steps, rule: Rule) -> Line:
    """A number of each step; what wasn't finite then (null) must not be now."""
    off = {step: _distance(now[step][what], line.get(what)) for step, line in then.items() if step in now}
    missing = [step for step in then if step not in now]
    if missing:
        return Line(what, "failed", where=f"step {missing[0]}", why=f"the run ends before step {missing[0]} now")
    bound = rule.bound(0.0)
    first = next((step for step, value in off.items() if not value <= bound), None)
    if first is not None:
        why = f"step {first}: {now[first][what]!r} now, {then[first].get(what)!r} then"
        return Line(what, "failed", off[first], bound, f"step {first}", why)
    worst = max(off, key=lambda step: off[step])
    if not off[worst]:
        return Line(what, "exact", 0.0, bound, why=f"the same bits in {len(off)} steps")
    words = WORDS[rule.precision]
    return Line(what, "within", off[worst], bound, f"step {worst}", f"other bits, but no more than {words} rounds")


def _distance(now: float, then: float | None) -> float:
    """Relative."""
    if then is None:
        return math.inf if math.isfinite(now) else 0.0
    return 0.0 if now == then else abs(now - then) / max(abs(then), 1e-12)


def _rates(then: Steps, now: Steps) -> Line:
    what = "learning_rate"
    for step, line in then.items():
        if _distance(now[step][what], line.get(what)) > RATE_BOUND:
            why = f"step {step}: {now[step][what]!r} now, {line.get(what)!r} then; a run that was resumed with another length "
            return Line(what, "failed", where=f"step {step}", why=why + "began with other rates than its recipe gives now")
    return Line(what, "exact", why="a function of the step alone")


def _counts(unit: str, then: Steps, now: Steps) -> Line:
    for step, line in then.items():
        if line.get(unit) != now[step][unit]:
            why = f"step {step}: {now[step][unit]} now, {line.get(unit)} then; the steps don't train on the same rows"
            return Line(unit, "failed", where=f"step {step}", why=why)
    return Line(unit, "exact", why="every step has as many")


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Line:
    """What of the machine and the versions is another; that alone is no fault."""
    if not then:
        return Line("environment", "skipped", why=f"the run has no readable {ENVIRONMENT}, so nothing is known of where it ran")
    other = [f"{key}: {then[key]} then, {now.get(key)} now" for key in then if key not in UNTOLD and then[key] != now.get(key)]
    if other:
        return Line("environment", "skipped", where=other[0].partition(":")[0], why="; ".join(other))
    return Line("environment", "exact", why="versions, processor and threads are the same")
