"""The learning rate over the steps of a recipe, as a picture; nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainwright import schedules
from trainwright.recipe import InputError, Recipe
from trainwright.report import curves

POINTS = 1000


def plot_schedule(recipe: Recipe, steps: int | None, out: Path) -> dict[str, Any]:
    """Draw the learning rate of ``optimizer.learning_rate``; groups with another one follow the same shape.

    Args:
        steps: the length of the run; by default the recipe's, for which its data is read where it gives epochs.
        out: the picture, a .png.

    Returns:
        picture, steps, peak, and rates: the learning rate of every step, or of 1000 evenly spread ones with the first and last.

    Raises:
        InputError: the schedule doesn't suit the number of steps, or ``out`` can't be written.
    """
    total = recipe.training.steps or steps
    if total is None:
        from trainwright import build  # NOTE: here, because a schedule of known length needs no torch

        total = build.assemble(recipe).steps
    if total < 1:
        raise InputError(f"--steps: found {total}; must be at least 1")
    factor, peak = schedules.factor(recipe.schedule, total), recipe.optimizer.learning_rate
    shown = _spread(total)
    rates = [peak * factor(step) for step in shown]
    title = f"{recipe.schedule.name}: peak {peak:g}, {total:,} steps"
    picture = curves.schedule([step + 1 for step in shown], rates, title, out)
    return {"picture": str(picture), "steps": total, "peak": peak, "rates": rates}


def _spread(total: int) -> list[int]:
    count = min(total, POINTS)
    return [index * (total - 1) // max(1, count - 1) for index in range(count)]
