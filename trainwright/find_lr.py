"""The learning-rate range test (Smith 2017, section 3.3): which rate makes the loss fall fastest, and which is too much."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from trainwright import build
from trainwright.loop import Run, seed
from trainwright.recipe import InputError, Parallel, Recipe, RunError
from trainwright.report import curves

SMOOTHING = 0.9  # a memory of about ten steps: more would move what is found towards higher rates
DIVERGED = 4.0  # times the best smoothed loss
FEWEST = 20


def find_lr(run: Run, *, start: float = 1e-7, end: float = 10.0, steps: int = 100) -> dict[str, Any]:
    """Train with a rate that grows exponentially from step to step, and look at the loss; the run is left as it was.

    The rate is that of the first parameter group; the others keep their proportion to it. The test ends early when the
    smoothed loss exceeds four times its best, or isn't finite. Smoothed is the moving average
    (1 - b) / (1 - b^n) * sum of b^(n - i) loss_i  with b = 0.9, corrected for its bias (Kingma and Ba 2015, section 3).

    Returns:
        suggestion         where the smoothed loss falls most steeply over the logarithm of the rate, before its lowest point
                           and after the ten steps that fill the average; None: it never fell
        at_minimum_tenth   a tenth of the rate with the lowest smoothed loss
        learning_rates, losses, smoothed    of the steps taken, without a last loss that isn't finite

    Raises:
        InputError: a range or a number of steps that tells nothing.
    """
    _check(run, start, end, steps)
    rates = np.geomspace(start, end, steps).tolist()
    with _kept(run):
        losses = _losses(run, rates)
    rates, smoothed = rates[: len(losses)], smooth(losses)
    return {
        "suggestion": suggest(rates, smoothed),
        "at_minimum_tenth": rates[int(np.argmin(smoothed))] / 10 if losses else None,
        "learning_rates": rates,
        "losses": losses,
        "smoothed": smoothed,
    }


def _check(run: Run, start: float, end: float, steps: int) -> None:
    if not 0 < start < end < math.inf:
        raise InputError(f"the range of learning rates must ascend from above 0: found start {start:g} and end {end:g}")
    if steps < FEWEST:
        raise InputError(f"steps: found {steps}; at least {FEWEST} are needed to tell the slope from noise")
    if run.optimizer.param_groups[0]["peak"] == 0:
        raise InputError("the first parameter group's learning rate is 0; set optimizer.learning_rate above 0")


def _losses(run: Run, rates: Sequence[float]) -> list[float]:
    """Of one step at each rate, until the loss goes astray."""
    base = run.optimizer.param_groups[0]["peak"]
    losses: list[float] = []
    run.model.train()
    for step, rate in enumerate(rates, start=run.step):
        loss = _step(run, step, rate / base)
        if not math.isfinite(loss):
            break
        losses.append(loss)
        if _diverged(smooth(losses)):
            break
    return losses


def _step(run: Run, step: int, factor: float) -> float:
    """One step as the loop takes it; gives its loss, NaN where the gradient isn't finite."""
    seed(run, step)
    for group in run.optimizer.param_groups:
        group["lr"], group["update"] = group["peak"] * factor, step
    loss = run.forward_backward(run.batch(step)).item()
    norm = run.clip().item()
    try:
        skipped = run.judge(loss, norm)
    except RunError:
        return math.nan
    if not skipped:
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return loss


def _diverged(smoothed: Sequence[float]) -> bool:
    best = min(smoothed)
    return smoothed[-1] > best + (DIVERGED - 1) * abs(best)  # some losses are below zero


def smooth(losses: Sequence[float]) -> list[float]:
    """The moving average of ``find_lr``, corrected for its bias."""
    smoothed, average = [], 0.0
    for count, loss in enumerate(losses, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING**count))
    return smoothed


def suggest(rates: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """The rate of steepest descent, None where the loss never fell."""
    skipped = round(1 / (1 - SMOOTHING))
    lowest = int(np.argmin(smoothed)) if smoothed else 0
    if lowest <= skipped:
        return None
    slopes = np.gradient(smoothed, np.log(rates))[skipped : lowest + 1]
    steepest = int(np.argmin(slopes))
    return rates[skipped + steepest] if slopes[steepest] < 0 else None


@contextmanager
def _kept(run: Run) -> Iterator[None]:
    """Afterwards model, optimizer and what goes along are as before, to the bit; frozen parameters don't change anyway."""
    learning = [p for p in run.model.parameters() if p.requires_grad]
    tensors = [t.detach() for t in (*learning, *run.model.buffers())]
    values = [t.clone() for t in tensors]
    updates: Any = run.optimizer  # one process alone has torch's own, or one that keeps its states elsewhere
    optimizer = copy.deepcopy(updates.state_dict())
    extra = {name: t.clone() for name, t in run.extra.state().items()} if run.extra else {}
    training = run.model.training
    try:
        yield
    finally:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
        run.optimizer.zero_grad(set_to_none=True)
        updates.load_state_dict(optimizer)
        if run.extra:
            run.extra.restore(extra)
        run.model.train(training)


def main(recipe: Recipe, *, start: float, end: float, steps: int, out: Path) -> dict[str, Any]:
    """The verb: the test on a recipe's run in one process, and its picture; gives what ``--json`` prints."""
    run = build.assemble(recipe.model_copy(update={"parallel": Parallel()}))
    result = find_lr(run, start=start, end=end, steps=steps)
    return {**result, "picture": str(curves.find_lr(result, out))}
