"""What processes run: a trace with a bug. Apart from the rest, so that they start without what only makes recipes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from tests.mutants import catalogue
from trainwright.verify import tracing
from trainwright.verify.job import Job


def mutated_trace(name: str, job: Job, folder: Path) -> None:
    """``tracing.trace`` with a bug."""
    with bug(name):
        tracing.trace(job, folder)


def bug(name: str) -> AbstractContextManager[Any]:
    """The context of a mutant; "" is none."""
    return catalogue.named(name).patch() if name else nullcontext()
