"""A measurement in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def result_of(module: str, *arguments: str) -> dict[str, Any]:
    """The JSON in the last line that a module of the benchmarks prints; the end of its complaint ends this process, too."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
