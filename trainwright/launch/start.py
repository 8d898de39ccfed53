"""The launcher: starts the processes of a run, and tells the user how they ended."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainwright.launch import ranks
from trainwright.launch.ranks import FAILED, INTERRUPTED, LAUNCHER, PLACE, RANKS
from trainwright.recipe import InputError

if TYPE_CHECKING:
    from trainwright.launch.agent import Ended

_OURS = {"--nproc": 1, "--max-restarts": 1}  # options that the workers don't get, and how many values each has


def run(
    arguments: Sequence[str],
    nproc: int,
    *,
    max_restarts: int = 0,
    folder: Path | None = None,
    module: str = "trainwright",
) -> int:
    """Run ``python -m module arguments`` in ``nproc`` processes that know each other, to their end.

    Each rank writes to FOLDER/ranks/rank-N.log, rank 0 to our stdout and stderr too. A failure is told here, once, and with
    ``--json`` as a document on stdout; the workers keep quiet about it.

    Args:
        arguments: of the command line; ``--nproc`` and ``--max-restarts`` are left out.
        max_restarts: how often all are started again after a failure that isn't the input's.
        folder: of the run; made if needed, and taken away again where the workers refuse their input. None: a temporary one.

    Returns:
        The workers' own exit code: 0, 2 wrong input, 3 the run failed, 130 interrupted, 128 + n stopped by signal n.

    Raises:
        InputError: it can't be started like this.
    """
    if nproc < 1 or max_restarts < 0:
        raise InputError(f"--nproc {nproc} --max-restarts {max_restarts}: at least 1 process and 0 restarts, please")
    limit = ranks.timeout()
    made, place = _make(folder)
    from trainwright.launch import agent

    ended = agent.run(
        agent.Job(module, _without_ours(arguments), nproc, max_restarts, place, limit, _environment(nproc, place), _say)
    )
    code, message = _outcome(ended, place)
    if code == ranks.WRONG_INPUT:
        _unmake(place, made)
    if code:
        _say(message)
        if "--json" in arguments:
            print(json.dumps({"error": message.removeprefix("error: ")}, indent=2), flush=True)
    return code


def threads(nproc: int) -> int:
    """Of each process, if ``nproc`` of them share this machine's cores; at least 1."""
    import psutil

    usable = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or usable, usable) // nproc)


def _environment(nproc: int, place: Path) -> dict[str, str]:
    mine = {LAUNCHER: str(os.getpid()), PLACE: str(place.absolute()), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    return mine | ({} if os.environ.get("OMP_NUM_THREADS") else {"OMP_NUM_THREADS": str(threads(nproc))})


def _without_ours(arguments: Sequence[str]) -> list[str]:
    kept, skip = [], 0
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip:
            skip -= 1
        elif name in _OURS:
            skip = 0 if equals else _OURS[name]
        else:
            kept.append(argument)
    return kept


def _make(folder: Path | None) -> tuple[list[Path], Path]:
    """RUN/ranks, and which folders didn't exist before."""
    if folder is None:
        return [], Path(tempfile.mkdtemp(prefix="trainwright-"))
    place = folder / RANKS
    made = [path for path in (place, *place.parents) if not path.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{place} can't be made ({error.strerror}); set run.folder to another place") from None
    return made, place


def _unmake(place: Path, made: Sequence[Path]) -> None:
    """Leave no trace of a run that never was."""
    if place in made:
        for file in (*place.glob("rank-*"), *place.glob("launcher.log")):
            file.unlink()
    for path in made:
        try:
            path.rmdir()
        except OSError:
            return


def _outcome(ended: Ended, place: Path) -> tuple[int, str]:
    """The exit code, and what to tell."""
    if ended.signal is not None:
        if ended.signal != signal.SIGINT:
            return 128 + ended.signal, f"stopped by {signal.Signals(ended.signal).name}"
        words = [told.message for told in ended.told.values() if told and told.code == INTERRUPTED]
        return INTERRUPTED, max(words, key=len, default="interrupted")
    if ended.failure is None:
        return 0, ""
    failure = ended.failure
    if failure.code == INTERRUPTED:
        return INTERRUPTED, failure.message
    if failure.code == ranks.WRONG_INPUT:
        return failure.code, f"error: {failure.message}"
    return FAILED, f"error: rank {ended.rank} failed: {failure.message}; its log: {ranks.log_of(place, ended.rank)}"


def _say(message: str) -> None:
    print(f"trainwright: {message}", file=sys.stderr, flush=True)
