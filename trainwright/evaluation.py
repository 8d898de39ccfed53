"""The verb that measures a finished run's model and draws what can be drawn."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from trainwright import build, loop, runfolder
from trainwright.console import Display
from trainwright.loop import Run
from trainwright.recipe import InputError


def evaluate(folder: Path, split: str | None = None, *, quiet: bool = False) -> dict[str, Any]:
    """Measure a finished run's model, and draw what can be drawn; gives what ``--json`` prints.

    Args:
        split: held_out or test; by default test where there is one.

    Raises:
        InputError: the run has no such data.
    """
    from trainwright.report import curves  # NOTE: here, because training needn't wait for matplotlib

    recipe = runfolder.finished(folder)
    with Display(quiet) as display:
        started = time.perf_counter()
        with display.preparing() as progress:
            run = build.assemble(recipe, progress=progress)
        split = split or ("test" if "test" in run.splits else "held_out")
        if split not in run.splits:
            has = f"; it has {', '.join(run.splits)}" if run.splits else ""
            raise InputError(
                f"{folder}: its recipe has no {split} data (data.{split} is null){has}, so there is nothing to measure on"
            )
        if not runfolder.same_data(folder, run):
            display.say("NOTE: the data isn't what it was in training: samples of this split may have been trained on")
        values = loop.evaluate(run, split)
        rows = [[name, f"{value:.4f}"] for name, value in values.items()]
        display.table(f"{split.replace('_', '-')} data of {folder}", ["metric", "value"], rows)
        drawn = [
            *_draw(run, folder / "plots", split, values),
            curves.training(folder / "metrics.jsonl", folder / "plots/training.png"),
        ]
        for path in drawn:
            display.say(f"{'picture' if path.suffix == '.png' else 'file'}: {path}")
    return {
        "folder": str(folder),
        "split": split,
        split: values,
        "plots": [str(path) for path in drawn],
        "seconds": time.perf_counter() - started,
    }


@torch.no_grad()
def _draw(run: Run, folder: Path, split: str, values: dict[str, float]) -> list[Path]:
    """Pictures of a split, where the kind of data has any."""
    if run.pictures is None:
        return []
    run.model.eval()
    return run.pictures(folder, split, values)
