"""Processes of one run: the launcher that starts them, and what each of them calls to take its place among the others."""

from __future__ import annotations

import faulthandler
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from trainwright.launch import ranks
from trainwright.launch.ranks import FAILED, LAUNCHER, PLACE, RANKS, Failure
from trainwright.launch.start import run
from trainwright.recipe import InputError, RunError

if TYPE_CHECKING:
    import torch

__all__ = ["alive", "disagreement", "joined", "log_to", "processes", "rank", "restarted", "restarts", "run", "tell"]

_JOINED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LINGER = 3.0  # seconds that a rank which lost another waits, so that the other one's failure is seen first
_HARD_EXIT = 10.0  # seconds after a failure until the process ends whatever holds it up


def joined() -> bool:
    """Whether this process is one of a job's: our launcher, torchrun and accelerate launch leave that in the environment."""
    return all(os.environ.get(name) for name in _JOINED)


def rank() -> int:
    """This process among all; 0 where it is alone."""
    return _number("RANK") if joined() else 0


def restarts() -> int:
    """How often this process's launcher has started it again; see ``restarted`` for jobs on several machines."""
    return _number("TORCHELASTIC_RESTART_COUNT", "0")


_again: bool | None = None  # what the ranks found


def restarted(folder: Path) -> bool:
    """Whether this job was started again after a failure, so that it must go on from the newest checkpoint of ``folder``.

    All ranks give the same, so all must ask, inside of ``processes``. The count that torchrun keeps isn't enough: a machine
    that was lost and came back knows of no restart, and the others don't count its return as one. But their torchrun is the
    same process that has worked for this folder before (``log_to`` leaves a mark).
    """
    global _again
    if not joined():
        return False
    if _again is None:
        import torch
        import torch.distributed as dist

        mine = restarts() > 0 or _mark(folder / RANKS).exists()
        votes = torch.tensor([int(mine)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        _again = bool(votes.item())
        _leave_mark()
    return _again


def _leave_mark() -> None:
    """Only when all ranks have looked for it: those of one machine share it."""
    place = os.environ.get(PLACE)
    if _again is not None and place and not os.environ.get(LAUNCHER):
        _mark(Path(place)).touch()


def _mark(place: Path) -> Path:
    """A file that only the ranks of one launcher have in common."""
    import psutil

    parent = psutil.Process(os.getppid())
    return place / re.sub(r"[^\w.-]", "-", f"agent-{socket.gethostname()}-{parent.pid}-{parent.create_time():.2f}")


def _number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise InputError(f"the environment's {name}={text} isn't a number; torchrun sets it, or unset it to train alone")
    return int(text)


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Be one of the job's processes; alone, nothing happens.

    A process that fails in here notes why for the launcher, and then waits for nobody.

    Raises:
        InputError: the port is in use, there are fewer GPUs than processes, or the environment makes no sense.
        RunError: the first process can't be reached.
    """
    if not joined():
        yield
        return
    import torch.distributed as dist

    _follow_launcher()
    try:
        _initialise(device)
        yield
    except BaseException as error:
        _fail(error)
        raise
    dist.destroy_process_group()


def _initialise(device: torch.device) -> None:
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=ranks.timeout())
    if _number("RANK") >= _number("WORLD_SIZE"):
        raise InputError(f"the environment's RANK={rank()} must be below WORLD_SIZE={os.environ['WORLD_SIZE']}")
    if device.type == "cuda":
        local, count = _number("LOCAL_RANK", "0"), torch.cuda.device_count()
        if local >= count:
            raise InputError(f"process {local} of this machine has no GPU of its own, there are {count}: --nproc {count}")
        torch.cuda.set_device(local)
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        _join("nccl" if device.type == "cuda" else "gloo", limit)
    except dist.DistError as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise InputError(
                f"port {os.environ['MASTER_PORT']} is in use, perhaps by another job; give this one another "
                f"(--master-port of torchrun, or MASTER_PORT)"
            ) from None
        words = str(error).splitlines()[0]
        raise RunError(f"the first process can't be reached at {where} within {limit.seconds} s: {words}") from None


def _join(backend: str, limit: timedelta) -> None:
    """NOTE: elastic's store lives through restarts, and a rank must not meet the addresses of those that died.

    One launcher counts its restarts alike for all of its ranks; several don't count alike, but publish a new store each time
    if the environment has TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (docs/launching.md).
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, number, size = next(rendezvous("env://", timeout=limit))
    store.set_timeout(limit)
    attempt = restarts() if os.environ.get("GROUP_WORLD_SIZE") == "1" else 0
    store = PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=limit)


def _follow_launcher() -> None:
    """End with the launcher: a killed one can't end its workers."""
    launcher = os.environ.get(LAUNCHER)
    if not launcher:
        return

    def follow() -> None:
        while os.getppid() == int(launcher):
            time.sleep(1)
        os._exit(FAILED)

    threading.Thread(target=follow, daemon=True).start()


def _fail(error: BaseException) -> None:
    """Note why, and see to it that the process ends.

    NOTE: the process group is not destroyed here: with an operation under way gloo would wait for the other ranks until its
    timeout. Threads and exit hooks of others may wait as well, so the process is bound to end whatever they do.
    """
    failure = ranks.judge(error)
    if not isinstance(error, InputError | RunError | KeyboardInterrupt):
        failure = replace(failure, trace=traceback.format_exc())
    _write(failure)
    if failure.lost:
        time.sleep(_LINGER)
    # Not a thread of Python's, which stands still while the interpreter exits. Closed by the end of the process.
    faulthandler.dump_traceback_later(_HARD_EXIT, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115


def _write(failure: Failure) -> None:
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and ranks.read_failure(Path(file)) is None:
        ranks.write_failure(Path(file), failure)


def tell(code: int, message: str) -> bool:
    """Tell the launcher why this process ends; what was noted before it stays.

    Returns:
        Whether this process shall keep quiet, because the launcher tells the user.
    """
    if not joined():
        return False
    _write(Failure(code, message))
    first = os.environ["RANK"] == "0"
    if os.environ.get(LAUNCHER):
        return first  # the others speak to their logs only
    return not first and bool(os.environ.get("TORCHELASTIC_ERROR_FILE"))


_beat: int | None = None


def alive(step: int) -> None:
    """Leave a sign that this rank has come to ``step``. It costs microseconds: call it at each step and long loop."""
    global _beat
    if _beat is None:
        place = os.environ.get(PLACE)
        if not place or not joined():
            return
        _beat = os.open(ranks.alive_of(Path(place), rank()), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.pwrite(_beat, b"%12d\n" % step, 0)


def log_to(folder: Path) -> None:
    """From now on, ranks but the first write to RUN/ranks/rank-N.log, and all leave their heartbeats there.

    For jobs that torchrun or accelerate started; our own launcher has seen to it already. The folder must be shared by
    the machines, as the run's folder is anyway.
    """
    if not joined() or os.environ.get(LAUNCHER):
        return
    place = folder / RANKS
    place.mkdir(parents=True, exist_ok=True)
    os.environ[PLACE] = str(place.absolute())
    _leave_mark()
    if rank() > 0:
        sys.stdout.flush(), sys.stderr.flush()
        log = os.open(ranks.log_of(place, rank()), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1), os.dup2(log, 2)
        os.close(log)


def disagreement(all_values: Sequence[Mapping[str, str]]) -> str | None:
    """What ranks that must agree don't agree on; None where they do.

    Args:
        all_values: of each rank, what (``recipe``, ``data``) -> its hash.
    """
    for name in dict.fromkeys(name for values in all_values for name in values):
        seen = [values.get(name, "nothing") for values in all_values]
        usual = max(dict.fromkeys(seen), key=seen.count)
        others = [number for number, value in enumerate(seen) if value != usual]
        if others:
            agreeing = [number for number, value in enumerate(seen) if value == usual]
            differ = f"{_named(others)} differ{'s' * (len(others) == 1)} from {_named(agreeing)}"
            return f"the ranks don't agree on the {name}: {differ}; give all of them the same files and arguments"
    return None


def _named(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank{'s' * (len(numbers) > 1)} {shown}"
