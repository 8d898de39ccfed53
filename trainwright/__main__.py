"""``python -m trainwright`` and the command ``trainwright``: the only place that exits, or prints a traceback."""

from __future__ import annotations

import json
import math
import os
import select
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

import typer

from trainwright import launch
from trainwright.cli import Job, app

# 1 is for verbs whose answer can be no.
DONE, WRONG_INPUT, FAILED, INTERRUPTED, NO_READER = 0, 2, 3, 130, 141


def main() -> None:
    """Do what the command line says, and exit with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Do what the command line says; gives the exit code."""
    try:
        return _attempt(arguments)
    except BrokenPipeError:
        # Nobody reads stdout any more (| head), and the interpreter flushes it once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return NO_READER


def _attempt(arguments: Sequence[str]) -> int:
    as_json = "--json" in arguments  # looked up here, because a usage error leaves nothing parsed
    try:
        job = _parse(arguments)
        return _do(job) if isinstance(job, Job) else job
    except typer.TyperException as error:
        place = getattr(getattr(error, "ctx", None), "command_path", "trainwright")
        message = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
        return _fail(WRONG_INPUT, f"{message}; see {place} --help", as_json)
    except KeyboardInterrupt as error:
        return _fail(INTERRUPTED, str(error) or "interrupted", as_json)
    except Exception as error:
        return _explain(error, as_json)


def _parse(arguments: Sequence[str]) -> Job | int:
    """What is asked for, or the exit code where it is done already (``--help``, ``--version``)."""
    command = typer.main.get_command(app)
    try:
        job = command.main(list(arguments) or ["--help"], prog_name="trainwright", standalone_mode=False)
    except SystemExit:  # so typer takes it when nobody reads its help
        return NO_READER
    return job if isinstance(job, Job) else DONE


def _do(job: Job) -> int:
    with _stdout_to_stderr() if job.as_json else nullcontext():
        result = job.work()
    if isinstance(result, int):
        return result
    if job.as_json:
        _print_json(result)
    else:
        job.show(result)
    sys.stdout.flush()
    return job.code(result)


def _explain(error: Exception, as_json: bool) -> int:
    """Report an exception that reached the top."""
    from trainwright.recipe import InputError, RunError

    if isinstance(error, BrokenPipeError) and _reader_gone():
        raise error
    if isinstance(error, InputError):
        return _fail(WRONG_INPUT, str(error), as_json)
    if isinstance(error, RunError):
        return _fail(FAILED, str(error), as_json)
    traceback.print_exception(error)
    return _fail(FAILED, f"{type(error).__name__}: {error}", as_json)


def _fail(code: int, message: str, as_json: bool) -> int:
    if launch.tell(code, message):
        return code
    print(f"trainwright: {'' if code == INTERRUPTED else 'error: '}{message}", file=sys.stderr)
    if as_json:
        _print_json({"error": message})
    return code


def _reader_gone() -> bool:
    """Whether it is our own stdout that is broken, and not a pipe between processes of the run."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Whatever is printed goes to stderr, also by C libraries and child processes."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _print_json(value: Mapping[str, Any]) -> None:
    print(json.dumps(_plain(value), indent=2, allow_nan=False), flush=True)


def _plain(value: Any) -> Any:
    """What JSON can hold: paths as text, and null for numbers that aren't finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return os.fspath(value) if isinstance(value, os.PathLike) else value


if __name__ == "__main__":
    main()
