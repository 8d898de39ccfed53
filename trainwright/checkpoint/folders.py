"""The folders of a run's checkpoints: their names, their order, and how they come and go at once."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from trainwright.recipe import RunError

WRITING, DELETING, TEAM = ".writing-", ".deleting-", ".team-"
_NAME = re.compile(r"step-\d{8,}")


class CheckpointError(RunError):
    """A checkpoint can't be written or is damaged; the message names the folder, the file and the reason."""


def path_of(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_folder / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name; ValueError if it isn't the name of a checkpoint."""
    return int(folder.name.removeprefix("step-"))


def whole(run_folder: Path) -> list[Path]:
    """The folders named like checkpoints, oldest step first; by number, for steps may outgrow their eight digits."""
    entries = (run_folder / "checkpoints").glob("step-*")
    return sorted((entry for entry in entries if _NAME.fullmatch(entry.name) and entry.is_dir()), key=step_of)


def latest(run_folder: Path) -> Path | None:
    """The checkpoint with the highest step, judged by names alone; None if there is none."""
    return next(reversed(whole(run_folder)), None)


def prune(run_folder: Path, keep: int, protect: Collection[int] = ()) -> None:
    """Delete all but the newest ``keep`` checkpoints, and besides them spare those of the steps in ``protect``.

    For one process of a job alone, while no ``Writer`` writes: that sweeps what is half deleted.
    """
    assert keep >= 1, keep
    for folder in whole(run_folder)[:-keep]:
        if step_of(folder) not in protect:
            shutil.rmtree(set_aside(folder))


def prepare(home: Path, spared: str) -> None:
    """Make the folder of the checkpoints, and sweep what killed writes and deletions left in it.

    Args:
        spared: how the names begin that the running job uses.
    """
    home.mkdir(parents=True, exist_ok=True)
    sync(home.parent)  # else a power cut could lose the entry of the new folder, and every checkpoint with it
    for entry in home.iterdir():
        if entry.name.startswith((WRITING, DELETING, TEAM)) and not entry.name.startswith(spared):
            shutil.rmtree(entry)


def publish(temporary: Path, final: Path) -> None:
    """Rename into place. A kill between the two renames costs the old checkpoint of this same step, no other one."""
    replaced = set_aside(final) if final.exists() else None
    os.rename(temporary, final)
    sync(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)  # the next write sweeps what remains


def set_aside(folder: Path) -> Path:
    """Rename to a hidden name, so that a folder that is half deleted is never taken for a checkpoint."""
    doomed = folder.with_name(DELETING + folder.name)
    os.rename(folder, doomed)
    sync(folder.parent)
    return doomed


def sync(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
