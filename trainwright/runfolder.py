"""The folder of a run: recipe.yaml, environment.json, metrics.jsonl, checkpoints/, model/, tensorboard/."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainwright import checkpoint, tracking
from trainwright.loop import Run
from trainwright.recipe import DECODER, Init, InputError, Parallel, Recipe
from trainwright.recipe.file import dump, load

MODEL = "model"
FREE = (  # what may change when resuming
    "training.steps", "training.epochs", "training.micro_batch_size", "memory.checkpointing", "memory.every", "memory.frozen",
    "memory.optimizer_states", "memory.optimizer_offload", "memory.optimizer_in_backward", "memory.folder", "memory.budget",
)  # fmt: skip
RANKS = "ranks"  # logs of the processes, which a launcher makes


def check(recipe: Recipe, resume: bool) -> Path:
    """The run's folder, if this recipe may use it. Nothing is written yet: what follows may still refuse the recipe.

    Raises:
        InputError: it can't be written, holds another recipe's run, or holds this one's and ``resume`` wasn't asked for.
    """
    folder = Path(recipe.run.folder or "runs/run")
    file = folder / "recipe.yaml"
    if file.is_file():
        _same_recipe(load(file), recipe, folder)
        if not resume and (checkpoint.latest(folder) or (folder / MODEL).exists()):
            raise InputError(
                f"{folder} already holds this recipe's run; add --resume to go on, or set run.folder to another place"
            )
    elif folder.is_dir() and any(entry.name != RANKS for entry in folder.iterdir()):
        raise InputError(f"{folder} isn't empty and holds no run; set run.folder to another place")
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise _unwritable(folder, f"{place} is {'not yours to write' if place.is_dir() else 'a file'}")
    return folder


def begin(folder: Path, recipe: Recipe) -> None:
    """Make the folder, with the recipe and the environment in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", dump(recipe))
        write_text(folder / "environment.json", json.dumps(tracking.environment(), indent=2) + "\n")
    except OSError as error:
        raise _unwritable(folder, str(error.strerror)) from None


def _unwritable(folder: Path, why: str) -> InputError:
    return InputError(f"run.folder: {folder} can't be written ({why}); set run.folder to another place")


def _same_recipe(stored: Recipe, recipe: Recipe, folder: Path) -> None:
    """How long to train may change when resuming, and how many processes share the work; nothing else may."""
    old, new = (r.model_dump(mode="json") for r in (stored, recipe))
    for section in ("run", "checkpoint", "tracking", "parallel"):
        old.pop(section), new.pop(section)
    old["seed"], new["seed"] = stored.run.seed, recipe.run.seed
    if different := [path for path in _differences(old, new, "") if path not in FREE]:
        shown = ", ".join(different[:4])
        raise InputError(f"{folder} holds the run of another recipe (different: {shown}); set run.folder to another place")


def _differences(old: Any, new: Any, path: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if old == new else [path]


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a finished or interrupted run.

    Raises:
        InputError: the folder holds no run.
    """
    if not (folder / "recipe.yaml").is_file():
        raise InputError(f"{folder} is no run folder: it has no recipe.yaml")
    return load(folder / "recipe.yaml")


def finished(folder: Path) -> Recipe:
    """The recipe that builds a run's final model in one process: the same, starting from what was saved.

    Raises:
        InputError: the run hasn't finished.
    """
    recipe = read_recipe(folder).model_copy(update={"parallel": Parallel()})
    model = model_of(folder)
    if not model.is_dir():
        raise InputError(
            f"{folder} has no final model yet; finish it with: trainwright train {folder / 'recipe.yaml'} --resume"
        )
    if recipe.adapt.method == "full":
        started = recipe.model.model_copy(update={"pretrained": str(model), "options": {}, "match": "exact"})
        if recipe.model.architecture != DECODER:
            started = started.model_copy(update={"options": recipe.model.options, "init": Init()})
        return recipe.model_copy(update={"model": started})
    return recipe.model_copy(update={"adapt": recipe.adapt.model_copy(update={"start": str(model)})})


def model_of(folder: Path) -> Path:
    """The folder of a run's final model; a model that was saved by itself, with its recipe, is its own."""
    return folder if (folder / "config.json").is_file() else folder / MODEL


def write_text(path: Path, text: str) -> None:
    """Replace a file at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def state_of(run: Run, extra: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds besides tensors."""
    return {"step": run.step, "extra": extra, "data": run.fingerprint}


def restore(folder: Path, run: Run, warn: Callable[[str], None]) -> dict[str, Any]:
    """Set the run to its newest whole checkpoint; gives what the caller had stored with it, empty if there is none."""
    reader = checkpoint.newest_reader(folder, warn, run.rank, run.share)
    if reader is None:
        return {}
    if reader.state["data"] != run.fingerprint:
        raise InputError(f"{folder}: its data isn't what it was when {reader.folder.name} was written; start a new run")
    run.recall(reader, True)
    run.step = reader.state["step"]
    extra: dict[str, Any] = reader.state["extra"]
    return extra


def same_data(folder: Path, run: Run) -> bool:
    """Whether the run's newest checkpoint was written with the data that there is now."""
    newest = checkpoint.latest(folder)
    state = json.loads((newest / checkpoint.STATE).read_text(encoding="utf-8")) if newest else {}
    return bool(state.get("data", run.fingerprint) == run.fingerprint)
