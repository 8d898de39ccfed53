"""Real processes for tests of anything distributed: started once for a session of tests, and reused.

``ranks.run(2, function, *args)`` calls the module-level ``function(*args)`` in two processes of one gloo group and gives what
each returned. Each number of processes has a pool of its own. An exception in a process is raised here with its traceback.

What tests need besides what the product's jobs do is imported by the same server.
"""

from __future__ import annotations

import atexit
import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainwright import forking
from trainwright.launch.pool import IMPORTED, Pool, RankError

TIMEOUT = 120
ROOT = Path(__file__).parents[1]
_pools: dict[int, Pool] = {}


def run(count: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """What ``function(*args)`` gives in each of ``count`` processes, in the order of their ranks."""
    if count not in _pools:
        with contextlib.chdir(ROOT):  # the server looks for modules there, whatever folder the first test is in
            forking.begin(*IMPORTED, "pytest", "trainwright.verify.tracing", "tests.tiny", "tests.small")
        _pools[count] = Pool(count, prepare=_strictly)
    pool = _pools[count]
    try:
        return pool.run(function, *args, timeout=timeout)
    except RankError as error:
        raise AssertionError(f"rank {error.rank}:\n{error.trace}") from None


def _strictly() -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")


def stop() -> None:
    """End all pools."""
    for pool in _pools.values():
        pool.stop()
    _pools.clear()


atexit.register(stop)
