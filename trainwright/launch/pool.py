"""Processes that are started once and asked again and again: for short jobs of several ranks, one after the other.

    with Pool(4) as pool:
        answers = pool.run(function, *arguments)      # what function gave in each of the 4 processes of one gloo group

``function`` is one that a module holds; it and its arguments are pickled from process to process. When a rank fails, or gives
no answer in time, the others may wait for it for ever, so all are begun anew with the next job.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from trainwright import forking
from trainwright.recipe import RunError

DEEPSPEED = ("deepspeed.utils.groups", "deepspeed.comm.comm")
TIMEOUT = 120.0  # seconds that a job may take
GROUP_TIMEOUT = 600.0  # seconds that ranks wait for each other; long, because a failing rank ends the job at once
REFUSAL = "InputError"
TOGETHER = 2.0  # seconds between refusals by all ranks
GRACE = 0.5  # seconds until a process's end is known
IMPORTED = (  # by most jobs
    "trainwright.build",
    "torch.distributed.fsdp",
    "torch._inductor.compile_fx",
    "transformers.modeling_gguf_pytorch_utils",
)
Prepare = Callable[[], object]


class RankError(RunError):
    """What went wrong in a rank: the name of the exception, its message, and where it was."""

    def __init__(self, rank: int, kind: str, message: str, trace: str) -> None:
        super().__init__(f"rank {rank}: {kind}: {message}")
        self.rank, self.kind, self.message, self.trace = rank, kind, message, trace


def warm() -> None:
    """Begin to import what jobs need, in the process whose forks the pools will be."""
    forking.begin(*IMPORTED)


class AllRefused(Exception):
    """All ranks refused their input alike, so that none waits for another."""

    def __init__(self, first: RankError) -> None:
        self.first = first


@dataclass(frozen=True)
class _Rank:
    process: BaseProcess
    pipe: Connection


class Pool:
    """So many processes of one gloo group, a thread each. They start in the background; ``run`` waits for them.

    Args:
        prepare: called first in each process.
    """

    def __init__(self, count: int, *, prepare: Prepare | None = None) -> None:
        self.count = count
        self._prepare = prepare
        self._ranks = self._started()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _started(self) -> list[_Rank]:
        context, port = forking.context(*IMPORTED), _free_port()
        found = []
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, self.count, port, self._prepare, dict(os.environ))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            found.append(_Rank(process, ours))
        return found

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
        """What ``function(*arguments)`` gives in each process, in the order of their ranks.

        Raises:
            RankError: it raised in one of them.
            TimeoutError: some gave no answer within ``timeout`` seconds of each other.
        """
        self._ranks = self._ranks or self._started()
        try:
            return self._run(function, arguments, timeout)
        except AllRefused as error:
            raise error.first from None
        except RankError as error:
            gone = self._gone()
            self.stop()
            raise (error if gone is None else RankError(gone, "Killed", "the process is gone", "")) from None
        except BaseException:
            self.stop()
            raise

    def _gone(self) -> int | None:
        """A rank whose process ended by itself: others fail because of it, and perhaps tell so first."""
        sentinels = [rank.process.sentinel for rank in self._ranks]
        ended = wait(sentinels, GRACE)
        return next((index for index, sentinel in enumerate(sentinels) if sentinel in ended), None)

    def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float) -> list[Any]:
        pipes = [rank.pipe for rank in self._ranks]
        for pipe in pipes:
            pipe.send((function, arguments))
        answers: dict[int, Any] = {}
        refused: dict[int, RankError] = {}
        while len(answers) + len(refused) < len(pipes):
            waiting = [index for index in range(len(pipes)) if index not in answers and index not in refused]
            ready = wait([pipes[index] for index in waiting], TOGETHER if refused else timeout)
            if not ready:
                words = f"rank{'s' * (len(waiting) > 1)} {waiting} gave no answer in {timeout:.0f} s"
                raise next(iter(refused.values()), None) or TimeoutError(words)
            for index in (index for index in waiting if pipes[index] in ready):
                try:
                    answers[index] = _answer(index, pipes[index])
                except RankError as error:
                    if error.kind != REFUSAL:
                        raise
                    refused[index] = error
        if refused:
            first = next(iter(refused.values()))
            raise first if answers else AllRefused(first)
        return [answers[index] for index in range(len(pipes))]

    def kill(self) -> None:
        """End the processes; what runs in them, for another thread perhaps, fails."""
        for rank in self._ranks:
            rank.process.kill()

    def stop(self) -> None:
        """End the processes and forget them; the next ``run`` starts others."""
        self.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.pipe.close()
        self._ranks = []


def _answer(index: int, pipe: Connection) -> Any:
    try:
        good, value = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise RankError(index, "Killed", "the process is gone", "") from None  # by the system, for lack of memory perhaps
    if not good:
        raise RankError(index, *value)
    return value


def _serve(pipe: Connection, rank: int, count: int, port: int, prepare: Prepare | None, environment: dict[str, str]) -> None:
    """What a process does: answer until nobody asks any more."""
    _end_with_parent()
    os.environ |= environment  # a fork has that of the time when the first one was asked for
    os.environ.setdefault("TORCH_WARM_POOL", "0")  # else each process starts others to compile in, which import torch, too
    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is the system's, which a process that is killed would leave behind
    if prepare is not None:
        prepare()
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=GROUP_TIMEOUT))
    gc.freeze()  # what was imported stays, and needn't be looked through after each job
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        _forget_groups()
        try:
            answer = (True, function(*arguments))
        except BaseException as error:
            answer = (False, (type(error).__name__, str(error), traceback.format_exc()))
        pipe.send(answer)


def _forget_groups() -> None:
    """Close what the job before this one opened, of which all ranks have answered: each group of gloo's has threads that wake.

    NOTE: DeepSpeed keeps groups for the next job in variables of its modules.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _world

    kept = {id(group) for name in DEEPSPEED for group in _groups_in(vars(sys.modules[name]) if name in sys.modules else {})}
    over = [group for group in _world.pg_map if group is not dist.group.WORLD and id(group) not in kept]
    for group in over:
        dist.destroy_process_group(group)
    if over:
        over.clear()
        gc.collect()  # models that share parameters refer to themselves, and to a group, whose threads go on as long


def _groups_in(value: Any, depth: int = 3) -> Iterator[Any]:
    """The process groups that a module's variables, and what they hold, refer to."""
    import torch.distributed as dist

    if isinstance(value, dist.ProcessGroup):
        yield value
    elif depth:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        if type(value).__module__.startswith("deepspeed"):
            inner = vars(value).values() if hasattr(value, "__dict__") else ()
        for one in list(inner):
            yield from _groups_in(one, depth - 1)


def _end_with_parent() -> None:
    """A killed parent can't end the processes that it started."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
