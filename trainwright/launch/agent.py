"""torch's elastic agent with our logs, one message for a failure, and an eye on ranks that hang."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

from trainwright.launch import ranks
from trainwright.launch.ranks import INTERRUPTED, WRONG_INPUT, Beat, Failure

_LOOK = 1.0  # seconds between two looks at the heartbeats


@dataclass(frozen=True)
class Job:
    """What to start: ``python -m module arguments``, so many times, on this machine.

    folder   RUN/ranks, which exists
    extra    of the environment, for each worker
    say      tells the user
    """

    module: str
    arguments: Sequence[str]
    nproc: int
    max_restarts: int
    folder: Path
    timeout: float
    extra: Mapping[str, str]
    say: Callable[[str], None]


@dataclass
class Ended:
    """How a job ended: nothing failed, or a signal stopped it, or a rank failed."""

    signal: int | None = None
    rank: int = 0
    failure: Failure | None = None
    told: dict[int, Failure | None] = field(default_factory=dict)


def run(job: Job) -> Ended:
    """Start the workers, watch them to their end, and start all again after a failure as often as the job allows."""
    parameters = RendezvousParameters(
        backend="c10d", endpoint="localhost:0", run_id=uuid.uuid4().hex, min_nodes=1, max_nodes=1, local_addr="127.0.0.1"
    )
    spec = WorkerSpec(
        role="rank",
        local_world_size=job.nproc,
        entrypoint=sys.executable,
        # NOTE: elastic takes each argument for a template.
        args=tuple(text.replace("$", "$$") for text in ("-m", job.module, *job.arguments)),
        rdzv_handler=registry.get_rendezvous_handler(parameters),
        max_restarts=job.max_restarts,
        monitor_interval=0.1,
        local_addr="127.0.0.1",
    )
    logs = _Logs(job)
    agent = _Agent(spec, logs, job)
    with _elastic_logs(job.folder / "launcher.log"), _signals_restored():
        try:
            result = agent.run()
        except SignalException as stop:
            return Ended(signal=stop.sigval, told=logs.told())
        finally:
            logs.close()
            spec.rdzv_handler.shutdown()
    if not result.is_failed():
        return Ended()
    rank, failure = agent.cause(result.failures)
    return Ended(rank=rank, failure=failure, told=logs.told())


class _Agent(LocalElasticAgent):
    def __init__(self, spec: WorkerSpec, logs: _Logs, job: Job) -> None:
        super().__init__(spec, logs, shutdown_timeout=max(1, int(job.timeout)))
        self.job, self.logs = job, logs
        self.hung: dict[int, str] = {}
        self.looked = 0.0

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.hung.clear()
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if time.monotonic() - self.looked > _LOOK:
            self.looked = time.monotonic()
            self._end_hung(worker_group)
        result = super()._monitor_workers(worker_group)
        if result.is_failed() and self._remaining_restarts > 0:
            self._again(result)
        return result

    def _end_hung(self, worker_group: WorkerGroup) -> None:
        """Kill the ranks that hold up the others: the rest of elastic's work then goes as for any killed rank."""
        beats: dict[int, Beat] = {}
        with suppress(psutil.NoSuchProcess):  # it has just ended, which is noted elsewhere
            processes = {worker.global_rank: psutil.Process(worker.id) for worker in worker_group.workers}
            beats = {rank: self._beat(rank, process) for rank, process in processes.items()}
            for rank, why in ranks.holding_up(beats, self.job.timeout).items():
                self.hung[rank] = why
                processes[rank].kill()

    def _beat(self, rank: int, process: psutil.Process) -> Beat:
        stopped = process.status() == psutil.STATUS_STOPPED
        return ranks.read_beat(self.job.folder, rank, time.time(), process.create_time(), stopped)

    def cause(self, failures: Mapping[int, ProcessFailure]) -> tuple[int, Failure]:
        """The rank that failed first, and why."""
        return ranks.cause({rank: failure.exitcode for rank, failure in failures.items()}, self.logs.told(), self.hung)

    def _again(self, result: RunResult) -> None:
        """Say why all is started again; what would fail in the same way is not."""
        rank, failure = self.cause(result.failures)
        if failure.code in (WRONG_INPUT, INTERRUPTED):
            self._remaining_restarts = 0
            return
        number = self.job.max_restarts - self._remaining_restarts + 1
        log = ranks.log_of(self.job.folder, rank)
        self.job.say(f"rank {rank} failed: {failure.message}; its log: {log}")
        self.job.say(f"starting again ({number} of {self.job.max_restarts})")


class _Logs(LogsSpecs):
    """Both streams of a rank go into one log, which restarts go on with, and those of rank 0 to our own streams too."""

    def __init__(self, job: Job) -> None:
        super().__init__(str(job.folder))
        self.job = job
        self.noted = False
        self.copies: list[threading.Thread] = []
        self.ends: list[int] = []  # of pipes, which hold them open until ``close``

    @property
    def root_log_dir(self) -> str:
        return str(self.job.folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Called before each start of the workers."""
        self.close()
        self.noted = False
        over, end = os.pipe()
        self.ends.append(end)
        destination = LogsDest()
        for local, env in envs.items():
            rank = int(env["RANK"])
            ranks.alive_of(self.job.folder, rank).unlink(missing_ok=True)
            ranks.error_of(self.job.folder, rank).unlink(missing_ok=True)
            env["TORCHELASTIC_ERROR_FILE"] = destination.error_files[local] = str(ranks.error_of(self.job.folder, rank))
            env |= self.job.extra
            log = ranks.log_of(self.job.folder, rank)
            destination.stdouts[local] = self._copied(log, 1 if rank == 0 else None, over)
            destination.stderrs[local] = self._copied(log, 2 if rank == 0 else None, over)
        os.close(over)
        return destination

    def _copied(self, log: Path, console: int | None, over: int) -> str:
        """The name of a new pipe whose other end is copied."""
        # NOTE: elastic opens each destination with mode "w": as a file, stdout and stderr would overwrite each other.
        source, end = os.pipe()
        self.ends.append(end)
        self.copies.append(threading.Thread(target=_copy, args=(source, log, console, os.dup(over)), daemon=True))
        self.copies[-1].start()
        return f"/dev/fd/{end}"

    def close(self) -> None:
        """Copy what the workers, who have ended, left in the pipes."""
        while self.ends:
            os.close(self.ends.pop())
        while self.copies:
            self.copies.pop().join(timeout=5)  # a grandchild that lives on may write for ever

    def told(self) -> dict[int, Failure | None]:
        """What each rank says about its failure.

        Rank 0 prints nothing of its own, because its words come to the console too: its log gets them here.
        """
        told = {rank: ranks.read_failure(ranks.error_of(self.job.folder, rank)) for rank in range(self.job.nproc)}
        if (own := told.get(0)) and not self.noted:
            self.noted = True
            with ranks.log_of(self.job.folder, 0).open("a", encoding="utf-8") as log:
                log.write(f"{own.trace}trainwright: {own.message}\n")
        return told


def _copy(source: int, log: Path, console: int | None, over: int) -> None:
    """Until the source ends, or has nothing left when ``over`` has ended.

    NOTE: elastic holds the workers' end of the source open for as long as it knows of them.
    """
    ready = select.poll()
    ready.register(source, select.POLLIN)
    ready.register(over, select.POLLIN)
    with os.fdopen(source, "rb", buffering=0) as pipe, os.fdopen(over), log.open("ab", buffering=0) as file:
        while source in dict(ready.poll()) and (data := pipe.read(65536)):
            with suppress(OSError):  # a full disk must not stop the worker
                file.write(data)
            if console is not None and not _write(console, data):
                console = None


def _write(console: int, data: bytes) -> bool:
    """Whether somebody still reads it."""
    try:
        while data:
            data = data[os.write(console, data) :]
    except OSError:
        return False
    return True


@contextmanager
def _elastic_logs(file: Path) -> Iterator[None]:
    """What elastic and the rendezvous tell is kept, off the console."""
    logger, handler = logging.getLogger("torch.distributed"), logging.FileHandler(file, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before
        handler.close()


@contextmanager
def _signals_restored() -> Iterator[None]:
    """Elastic takes over the signals that end a process, and keeps them."""
    taken = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in taken}
    try:
        yield
    finally:
        with suppress(ValueError):  # not in the main thread, where elastic took none either
            for number, handler in before.items():
                signal.signal(number, handler)
