"""Asks ``trainwright plan``, in a process that is gone when a run begins: what fits into a budget, and what was lacking."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainwright.parallel import collectives
from trainwright.recipe import InputError, Recipe, RunError
from trainwright.recipe.file import changed, dump


def settled(recipe: Recipe, device: torch.device, say: Callable[[str], None]) -> Recipe:
    """The recipe with what its budget of memory asks for; the first process chooses for all.

    Raises:
        InputError: nothing fits; the message says what the least is.
    """
    if recipe.memory.budget is None:
        return recipe
    say(f"budget: looking for what fits into {recipe.memory.budget}")
    found: dict[str, Any] = {}
    if not dist.is_initialized() or dist.get_rank() == 0:
        found, _ = _asked(recipe, ["--choose", "--budget", str(recipe.memory.budget)])
    found = collectives.gather_json(found, device)[0]
    if "error" in found:
        raise InputError(f"memory.budget: {found['error']}")
    if not found["fits"]:
        raise InputError(f"memory.budget: {recipe.memory.budget} isn't enough; {found['reason']}")
    say(f"budget: {found['reason']}")
    return changed(recipe, found["keys"])


@contextmanager
def explaining(recipe: Recipe) -> Iterator[None]:
    """Out of memory, a run ends with where it went by the plan, and with what to do.

    Raises:
        RunError: it was so.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_lack(error):
            raise
        found, _ = _asked(recipe, [])
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(f"out of memory ({first}). {_where(found)}") from None


def _is_lack(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _where(found: dict[str, Any]) -> str:
    todo = "Set a budget (--budget SIZE), or a smaller training.micro_batch_size; see trainwright plan"
    if "memory" not in found:
        return todo
    memory = found["memory"]
    parts = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in memory["parts"].items() if size)
    return (
        f"By the plan the peak is {memory['peak'] / 2**20:,.0f} MiB in {memory['module']} ({memory['moment']}): {parts}. {todo}"
    )


def _asked(recipe: Recipe, options: list[str]) -> tuple[dict[str, Any], int]:
    """What ``trainwright plan`` says of a recipe, and its exit code."""
    with tempfile.TemporaryDirectory(prefix="trainwright-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(dump(changed(recipe, {"memory.budget": None})), encoding="utf-8")
        count = ["--count", str(dist.get_world_size())] if dist.is_initialized() else []
        command = [sys.executable, "-m", "trainwright", "plan", str(file), *options, *count, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=_alone())
    try:
        return json.loads(done.stdout), done.returncode
    except ValueError:
        return {"error": f"planning ended with exit code {done.returncode}: {done.stderr[-400:]}"}, done.returncode


def _alone() -> dict[str, str]:
    """The environment without what makes a process one of several."""
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
