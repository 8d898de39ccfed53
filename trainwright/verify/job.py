"""What is run for a proof: a recipe with what is held alike in all runs, and changes of recipes by dotted keys."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from trainwright.recipe import Recipe
from trainwright.recipe.file import changed as changed


@dataclass(frozen=True)
class Job:
    """A few steps of a recipe.

    separate  each packed document in a row of its own
    rounded   a frozen base has the values that it has in 4 bits, kept plainly
    dropout   whether layers drop; random masks depend on how a batch is divided
    resume    also write a checkpoint before the last step, and take that step from it once more
    probe     also look whether the model can be compared at all
    watch     look at what each module gives in the first step
    prepare   module:function that is called with the built Run in each process, before the first step
    """

    recipe: Recipe
    steps: int = 3
    separate: bool = False
    rounded: bool = False
    dropout: bool = False
    resume: bool = False
    probe: bool = False
    watch: bool = False
    prepare: str | None = None

    def but(self, **changes: Any) -> Job:
        """The same with other fields."""
        return dataclasses.replace(self, **changes)

    def with_keys(self, keys: dict[str, Any]) -> Job:
        """The same with other values of the recipe's keys, such as parallel.zero."""
        return self.but(recipe=changed(self.recipe, keys))

    @property
    def processes(self) -> int:
        """How many run it."""
        section = self.recipe.parallel
        assert section.data != "auto", "the number of data ranks must be settled first"
        return section.data * section.tensor * section.pipeline
