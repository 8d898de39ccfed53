"""Real processes for tests of anything distributed: started once for a session of tests, and reused.

``ranks.run(2, function, *args)`` calls the module-level ``function(*args)`` in two processes of one gloo group and gives what
each returned. Each number of processes has a pool of its own. An exception in a process is raised here with its traceback.

They are forks of a server that has imported what most jobs need, for seconds of imports would be most of a test's time.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from trainwright.launch.pool import Pool, RankError, _Rank

TIMEOUT = 120
ROOT = Path(__file__).parents[1]
IMPORTED = ["pytest", "torch.distributed.fsdp", "trainwright.build", "trainwright.verify.tracing", "tests.tiny", "tests.small"]
_pools: dict[int, Pool] = {}
_server = forkserver.ForkServer()  # our own: that of the process is for the product's workers, which must not know torch
_server.set_forkserver_preload(IMPORTED)


class ForkedPool(Pool):
    """A pool whose processes are there at once, and begin anew at once. tests/test_pool.py is about those of the product."""

    def _started(self) -> list[_Rank]:
        forked = multiprocessing.get_context("forkserver")
        with contextlib.chdir(ROOT):  # the server looks for modules there, whatever folder the first test is in
            _server.ensure_running()
        with (
            mock.patch.object(multiprocessing, "get_context", return_value=forked),
            mock.patch.object(forkserver, "connect_to_new_process", _server.connect_to_new_process),
        ):
            return super()._started()


def run(count: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """What ``function(*args)`` gives in each of ``count`` processes, in the order of their ranks."""
    pool = _pools.get(count) or _pools.setdefault(count, ForkedPool(count, prepare=_strictly))
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
