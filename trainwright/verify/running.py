"""Runs jobs: one process's in this one, those of several in processes that stay for the next job. Equal jobs run once.

Those of several processes can begin before they are asked for, and go on while this process runs others.
"""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path

import torch

from trainwright.launch.pool import Pool, RankError
from trainwright.recipe import InputError, RunError
from trainwright.verify import tracing
from trainwright.verify.job import Job
from trainwright.verify.tracing import Trace

TIMEOUT = 600.0  # seconds that a job of several processes may take


class Broken(RunError):
    """A job's run ended with an error."""


class Runner:
    """Where jobs run. Use it as a context: at its end the processes and files are gone."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}
        self._known: dict[str, Future[Trace]] = {}
        self._numbers = count()
        self._background = ThreadPoolExecutor(1)
        self._scratch = tempfile.TemporaryDirectory(prefix="trainwright-verify-")

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *error: object) -> None:
        for pool in self._pools.values():
            pool.kill()
        self.leave()
        for pool in self._pools.values():
            pool.stop()

    def leave(self) -> None:
        """Wait for the job that runs in the background, and remove all files."""
        self._background.shutdown(cancel_futures=True)
        self._scratch.cleanup()

    def warm(self, processes: int) -> None:
        """Start so many processes now, in the background."""
        if processes > 1 and processes not in self._pools:
            self._pools[processes] = Pool(processes, prepare=_stand_back)

    def begin(self, job: Job) -> None:
        """Start a job of several processes, which ``run`` will be asked for; no other is begun."""
        if job.processes > 1 and _key(job) not in self._known:
            self._known[_key(job)] = self._background.submit(self._fresh, job)

    def run(self, job: Job) -> Trace:
        """What a job does.

        Raises:
            InputError: the recipe is refused. Broken: the run ended with an error.
        """
        self.begin(job)
        known = self._known.setdefault(_key(job), Future())
        if job.processes == 1 and not known.done():
            try:
                known.set_result(self._fresh(job))
            except (InputError, Broken) as error:
                known.set_exception(error)
        return known.result()

    def _fresh(self, job: Job) -> Trace:
        folder = Path(self._scratch.name) / f"run-{next(self._numbers)}"
        folder.mkdir()
        try:
            if job.processes == 1:
                self.alone(job, folder)
            else:
                self.warm(job.processes)
                self.together(self._pools[job.processes], job, folder)
        except InputError:
            raise
        except RankError as error:
            if error.kind == "InputError":
                raise InputError(error.message) from None
            raise Broken(f"rank {error.rank} ended with {error.kind}: {_short(error.message)}") from error
        except Exception as error:
            raise Broken(f"the run ended with {type(error).__name__}: {_short(str(error))}") from error
        return tracing.load(folder)

    def alone(self, job: Job, folder: Path) -> None:
        """In this process, with one thread as the others have: sums are made in the same order."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            tracing.trace(job, folder)
        finally:
            torch.set_num_threads(threads)

    def together(self, pool: Pool, job: Job, folder: Path) -> None:
        """In the processes of a pool."""
        pool.run(tracing.trace, job, folder, timeout=TIMEOUT)


def _stand_back() -> None:
    """Leave the cores to the process that asks: the twins, which it runs alone one after the other, take longest."""
    if hasattr(os, "nice"):
        os.nice(5)


def _key(job: Job) -> str:
    return repr((job, job.recipe.model_dump_json()))


def _short(text: str) -> str:
    return " ".join(text.split())[:400]
