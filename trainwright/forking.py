"""Processes that are there at once: forks of one that has imported what they need, and has no threads that could hold locks.

Where the system can't fork, each imports for itself. And how many there may be.
"""

from __future__ import annotations

import multiprocessing
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

_modules: list[str] = []


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def context(*modules: str) -> ForkServerContext | SpawnContext:
    """What starts such processes. Modules that are named after the first process began are imported in each process."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    _modules.extend(module for module in modules if module not in _modules)
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_modules)
    return found


def begin(*modules: str) -> None:
    """Start to import now, while this process does something else."""
    if context(*modules).get_start_method() == "forkserver":
        from multiprocessing import forkserver

        forkserver.ensure_running()
