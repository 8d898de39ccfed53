"""Runs jobs: one process's in this one, those of several in processes that stay for the next job. Equal jobs run once."""

from __future__ import annotations

import tempfile
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
        self._known: dict[str, Trace | Exception] = {}
        self._scratch = tempfile.TemporaryDirectory(prefix="trainwright-verify-")

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *error: object) -> None:
        for pool in self._pools.values():
            pool.stop()
        self._scratch.cleanup()

    def warm(self, count: int) -> None:
        """Start so many processes now, in the background."""
        if count > 1 and count not in self._pools:
            self._pools[count] = Pool(count)

    def run(self, job: Job) -> Trace:
        """What a job does.

        Raises:
            InputError: the recipe is refused. Broken: the run ended with an error.
        """
        key = repr((job, job.recipe.model_dump_json()))
        if key not in self._known:
            try:
                self._known[key] = self._fresh(job)
            except (InputError, Broken) as error:
                self._known[key] = error
        known = self._known[key]
        if isinstance(known, Exception):
            raise known
        return known

    def _fresh(self, job: Job) -> Trace:
        folder = Path(self._scratch.name) / f"run-{len(self._known)}"
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


def _short(text: str) -> str:
    return " ".join(text.split())[:400]
