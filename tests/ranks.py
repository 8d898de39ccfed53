"""Real processes for tests of anything distributed: started once for a session of tests, and reused.

``ranks.run(2, function, *args)`` calls the module-level ``function(*args)`` in two processes of one gloo group and gives what
each returned. Each number of processes has a pool of its own. An exception in a process is raised here with its traceback,
and the pool is begun anew, because the others may wait for ever.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT = 120
_pools: dict[int, _Pool] = {}


def run(count: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """What ``function(*args)`` gives in each of ``count`` processes, in the order of their ranks."""
    pool = _pools.get(count) or _pools.setdefault(count, _Pool(count))
    try:
        return pool.run(function, args, timeout)
    except BaseException:
        _pools.pop(count).stop()
        raise


def stop() -> None:
    """End all pools."""
    for pool in _pools.values():
        pool.stop()
    _pools.clear()


class _Pool:
    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, count, port), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        results: dict[Connection, Any] = {}
        while len(results) < len(self.pipes):
            ready = wait([pipe for pipe in self.pipes if pipe not in results], timeout)
            if not ready:
                waiting = [rank for rank, pipe in enumerate(self.pipes) if pipe not in results]
                raise TimeoutError(f"ranks {waiting} gave no answer in {timeout} s")
            for pipe in ready:
                good, value = pipe.recv()  # type: ignore[union-attr]
                if not good:
                    raise RankError(f"rank {self.pipes.index(pipe)}:\n{value}")  # type: ignore[arg-type]
                results[pipe] = value  # type: ignore[index]
        return [results[pipe] for pipe in self.pipes]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


class RankError(AssertionError):
    """What went wrong in a process."""


def _serve(pipe: Connection, rank: int, count: int, port: int) -> None:
    import torch
    import torch.distributed as dist

    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    while True:
        function, args = pipe.recv()
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


atexit.register(stop)
