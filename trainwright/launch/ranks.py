"""What a launcher and its ranks tell each other through files: logs, heartbeats, and why a rank failed.

RUN/ranks/rank-0.log           what it wrote to stdout and stderr
RUN/ranks/rank-0.alive         the step it is in; the file's time says since when
RUN/ranks/rank-0.error.json    why it failed, in the form of torch.distributed.elastic
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainwright.recipe import InputError, RunError

RANKS = "ranks"  # the folder's name
LAUNCHER, PLACE = "TRAINWRIGHT_LAUNCHER", "TRAINWRIGHT_RANKS"  # for workers: our launcher's process, and RUN/ranks
WRONG_INPUT, FAILED, INTERRUPTED = 2, 3, 130
_TIMEOUT = "TRAINWRIGHT_TIMEOUT"
_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
_DISCONNECTED = re.compile(r"(connection|socket) (was )?(closed|reset|refused)|broken pipe", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """Why a rank stopped, in its own words.

    code     the exit code it means
    message  one line for the user
    trace    where it happened, if that is of interest
    lost     it failed only because it lost another rank: that one's connection closed, or it gave no answer in time
    """

    code: int
    message: str
    trace: str = ""
    lost: Literal["", "connection", "timeout"] = ""
    time: float = 0.0


@dataclass(frozen=True)
class Beat:
    """A rank's heartbeat: the step it is in (None before the first), for how many seconds, and whether it is stopped."""

    step: int | None
    age: float
    stopped: bool = False


def timeout() -> float:
    """Seconds that ranks wait for each other.

    Raises:
        InputError: the environment's TRAINWRIGHT_TIMEOUT isn't a positive number.
    """
    text = os.environ.get(_TIMEOUT, "600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        raise InputError(f"{_TIMEOUT}={text} isn't a number of seconds; unset it (600), or set it to a positive number")
    return seconds


def log_of(folder: Path, rank: int) -> Path:
    """Where a rank's stdout and stderr go."""
    return folder / f"rank-{rank}.log"


def alive_of(folder: Path, rank: int) -> Path:
    """A rank's heartbeat."""
    return folder / f"rank-{rank}.alive"


def error_of(folder: Path, rank: int) -> Path:
    """Why a rank failed."""
    return folder / f"rank-{rank}.error.json"


def judge(error: BaseException) -> Failure:
    """What an exception that ends a rank means."""
    if isinstance(error, KeyboardInterrupt):
        return Failure(INTERRUPTED, str(error) or "interrupted")
    if isinstance(error, InputError):
        return Failure(WRONG_INPUT, str(error))
    if isinstance(error, RunError):
        return Failure(FAILED, str(error), lost=_lost(error))
    return Failure(FAILED, f"{type(error).__name__}: {error}", lost=_lost(error))


def _lost(error: BaseException | None) -> Literal["", "connection", "timeout"]:
    """NOTE: gloo and NCCL raise plain RuntimeErrors, so their words must do; whoever wraps one keeps it as the cause."""
    if error is None:
        return ""
    if isinstance(error, RuntimeError):
        if _DISCONNECTED.search(str(error)):
            return "connection"
        if _TIMED_OUT.search(str(error)):
            return "timeout"
    return _lost(error.__cause__ or error.__context__)


def write_failure(file: Path, failure: Failure) -> None:
    """At once, because elastic reads whatever is there when the process has gone."""
    now = time.time()
    inner = {
        "message": failure.message,
        "extraInfo": {"py_callstack": failure.trace or failure.message, "timestamp": str(int(now))},
    }
    ours = {"code": failure.code, "lost": failure.lost, "time": now, "trace": failure.trace}
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"message": inner, "trainwright": ours}), encoding="utf-8")
    os.replace(temporary, file)


def read_failure(file: Path) -> Failure | None:
    """What a rank wrote, or None if it could not."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return Failure(message=data["message"]["message"], **data["trainwright"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_beat(folder: Path, rank: int, now: float, started: float = 0.0, stopped: bool = False) -> Beat:
    """A rank's heartbeat; without a file it is as old as the process, which began at ``started``."""
    file = alive_of(folder, rank)
    try:
        return Beat(int(file.read_text() or 0), now - file.stat().st_mtime, stopped)
    except (OSError, ValueError):
        return Beat(None, now - started, stopped)


def holding_up(beats: Mapping[int, Beat], limit: float) -> dict[int, str]:
    """The ranks that all others wait for, with what is known of each; none as long as any rank moves.

    When one hangs, all stand still, because they wait for it in a collective. A stopped process is to blame at once; else
    those that are in an earlier step than others. All in the same step may be a long evaluation: then only the timeout of
    the collective can tell.
    """
    if not beats or min(beat.age for beat in beats.values()) < limit:
        return {}
    if stopped := {rank: _standing(beat) for rank, beat in beats.items() if beat.stopped}:
        return stopped
    steps = {rank: -1 if beat.step is None else beat.step for rank, beat in beats.items()}
    furthest = max(steps.values())
    return {rank: _standing(beats[rank]) for rank, step in steps.items() if step == min(steps.values()) < furthest}


def _standing(beat: Beat) -> str:
    where = "before its first step" if beat.step is None else f"in step {beat.step}"
    return f"hung {where} for {beat.age:.0f} s" + (", the process is stopped (SIGSTOP)" if beat.stopped else "")


def cause(exits: Mapping[int, int], told: Mapping[int, Failure | None], hung: Mapping[int, str]) -> tuple[int, Failure]:
    """The rank that failed first and why; the others failed, or were ended, because of it.

    Args:
        exits: exit codes (negative: a signal) in the order in which they were seen.
        told: what the ranks wrote before they ended, of all ranks of the job.
        hung: ranks that the launcher itself killed, and why.
    """
    for rank in hung:
        return rank, Failure(FAILED, hung[rank])
    for rank, code in exits.items():
        if code < 0 and code != -signal.SIGTERM and told.get(rank) is None:
            return rank, Failure(FAILED, _death(code))
    own = {rank: failure for rank, failure in told.items() if failure and not failure.lost and exits.get(rank, 0)}
    if own:
        rank = min(own, key=lambda r: own[r].time)
        return rank, own[rank]
    silent = [rank for rank in told if told[rank] is None]
    waited = [failure for failure in told.values() if failure and failure.lost == "timeout"]
    if waited and silent:
        return silent[0], Failure(FAILED, f"hung, the others waited in vain ({waited[0].message})")
    first = next((rank for rank in exits if told.get(rank) is None), next(iter(exits)))
    return first, told.get(first) or Failure(FAILED, _death(exits[first]))


def _death(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} and no word"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (" (the system does that when memory runs out)" if -code == signal.SIGKILL else "")
