"""Options of a recipe that change nothing in the combination at hand: told, because a reader would think otherwise."""

from __future__ import annotations

from trainwright.plan.rehearsal import Rehearsed
from trainwright.recipe import Recipe


def options(recipe: Recipe, found: Rehearsed) -> list[str]:
    """Each with the reason."""
    changes, training = dict(found.changes), recipe.training
    lines = []
    if recipe.run.compile == "on" and "not compiled" in changes.get("compile", ""):
        lines.append(f"run.compile: on; {changes['compile']}")
    if found.micro_batches == 1 and training.micro_batch_size:
        lines.append(f"training.micro_batch_size: {training.micro_batch_size}; it is the whole part of a process")
    return lines
