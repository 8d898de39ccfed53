"""When a metric has become better, and when to stop because it no longer does; pure functions of a state that JSON keeps."""

from __future__ import annotations

import math
from typing import Any

from trainwright.recipe import EarlyStop
from trainwright.recipe.running import Direction


def better(direction: Direction, new: float, old: float | None, min_delta: float = 0.0) -> bool:
    """Whether ``new`` improves on ``old`` by more than ``min_delta``.

    A value that isn't finite is never an improvement; a finite one always is where there was none (None, or not finite).
    """
    if not math.isfinite(new):
        return False
    if old is None or not math.isfinite(old):
        return True
    return new < old - min_delta if direction == "minimize" else new > old + min_delta


def observe(section: EarlyStop, state: dict[str, Any], value: float) -> tuple[dict[str, Any], bool]:
    """Take in the value of one evaluation.

    Args:
        state: what the last call gave, ``{}`` at first: ``best``, the value that the next one must beat (None: none yet),
            and ``waited``, the evaluations since then.

    Returns:
        The new state, and whether to stop: ``patience`` evaluations in a row were no improvement.
    """
    best, waited = state.get("best"), state.get("waited", 0)
    if better(section.direction, value, best, section.min_delta):
        return {"best": value, "waited": 0}, False
    return {"best": best, "waited": waited + 1}, waited + 1 >= section.patience
