"""``memory.budget``: ``trainwright plan --choose`` decides in a process of its own, whose memory is gone when a run begins."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainwright.recipe import InputError, Recipe, RunError
from trainwright.recipe.file import changed, dump


def within(recipe: Recipe, count: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The keys that make a run of ``count`` processes fit; nothing without a budget.

    Raises:
        InputError: nothing fits; the message says what the least is. RunError: planning failed.
    """
    budget = recipe.memory.budget
    if budget is None:
        return {}
    with tempfile.TemporaryDirectory(prefix="trainwright-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(dump(changed(recipe, {"memory.budget": None})), encoding="utf-8")
        command = ["plan", str(file), "--choose", "--budget", str(budget), "--count", str(count), "--json"]
        done = subprocess.run([sys.executable, "-m", "trainwright", *command], capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        raise RunError(f"memory.budget: planning ended with exit code {done.returncode}: {done.stderr[-400:]}") from None
    if "error" in found:
        kind = InputError if done.returncode == 2 else RunError
        raise kind(f"memory.budget: {found['error']}")
    if not found["fits"]:
        raise InputError(f"memory.budget: {budget} isn't enough; {found['reason']}")
    say(f"budget: {found['reason']}")
    keys: dict[str, Any] = found["keys"]
    return keys
