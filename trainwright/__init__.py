"""trainwright from Python: ``assemble`` a run, drive its steps with ``train``, measure it, save it, use it again.

    run = trainwright.assemble(model={"architecture": "mlp"}, data={"kind": "images", "source": "digits"})
    for step in trainwright.train(run):
        print(step.step, step.loss)
    print(trainwright.evaluate(run))

NOTE: everything is imported inside the functions, so that ``trainwright --help`` needn't wait for torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainwright.loop import Run, StepResult
    from trainwright.predictor import Predictor
    from trainwright.recipe import Recipe

__all__ = ["assemble", "evaluate", "load", "save", "train"]


def assemble(recipe: Recipe | Mapping[str, Any] | str | Path | None = None, /, **sections: Mapping[str, Any] | Any) -> Run:
    """A run, ready to be trained; nothing is written anywhere.

    Args:
        recipe: a Recipe, a mapping like one, or the file of one.
        sections: its keys by name; over those of ``recipe`` where both are given (not with a Recipe).

    Raises:
        InputError: anything wrong in it, all faults at once.
    """
    from trainwright import build
    from trainwright.recipe import Recipe
    from trainwright.recipe.file import parse, read

    if isinstance(recipe, Recipe):
        if sections:
            raise TypeError("give a Recipe, or sections; a Recipe can't be changed")
        return build.assemble(recipe)
    mapping = read(Path(recipe)) if isinstance(recipe, str | Path) else dict(recipe or {})
    return build.assemble(parse({**mapping, **sections}))


def train(run: Run) -> Iterator[StepResult]:
    """Take the steps that are left, giving each one's result when it is done."""
    from trainwright import loop

    return loop.train(run)


def evaluate(run: Run, split: str = "held_out") -> dict[str, float]:
    """The run's metrics over its held-out (or test) data."""
    from trainwright import loop

    return loop.evaluate(run, split)


def save(run: Run, folder: str | Path) -> None:
    """Write the model as it stands, in the format of its method."""
    with run.averaged():
        run.save(Path(folder))


def load(folder: str | Path) -> Predictor:
    """A finished run's model, ready for new samples (images, tables, series, arrays)."""
    from trainwright import build

    return build.load_predictor(Path(folder))
