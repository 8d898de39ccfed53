"""One function for many jobs, by as many processes as there are cores; what a process makes first, all of its jobs share."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from trainwright import forking
from trainwright.recipe import RunError

Make = Callable[..., AbstractContextManager[Any]]
Run = Callable[[Callable[[Any, Any], Any], Sequence[Any]], Iterator[Any]]
FEW = 8  # jobs that aren't worth the start of processes
_open = ExitStack()  # in a worker: the context of what it made, open until the process ends
_made: list[Any] = []


@contextmanager
def crew(make: Make, arguments: Sequence[Any], count: int) -> Iterator[Run]:
    """What calls ``function(made, job)`` for each job and gives the answers in the order of the jobs.

    Args:
        make: called with ``arguments``, gives the context whose value is ``made``; once in each process.
        count: processes; 1 is this one.

    Raises:
        RunError: a process was ended from outside.
    """
    if count == 1:
        with make(*arguments) as made:
            yield lambda function, jobs: (function(made, job) for job in jobs)
        return
    context = forking.context("trainwright.build")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, context, _begin, (make, arguments))
    try:
        yield lambda function, jobs: pool.map(partial(_call, function), jobs)
    except BrokenProcessPool:
        raise RunError("plan: a worker process was ended from outside; perhaps memory ran out") from None
    except BaseException:  # Ctrl-C too: nobody waits for what is under way
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(make: Make, arguments: Sequence[Any]) -> None:
    import torch  # NOTE: here, so that a process begins to listen to its starter first

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starter hears of it, and ends this process
    torch.set_num_threads(1)
    _made.append(_open.enter_context(make(*arguments)))


def _call(function: Callable[[Any, Any], Any], job: Any) -> Any:
    return function(_made[0], job)
