"""What a mutant is: a bug that is put in at run time, and where it should show."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

Patch = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Mutant:
    """One bug.

    pitfall  its number in PITFALLS; 0: of no number there
    patch    a function of a module that gives the context in which the bug is there
    base     the recipe that it is tried on, by its name in ``recipes.BASES``
    keys     more of the recipe, with __ for the dot
    blamed   the techniques that bisect must name, by ``techniques.Technique.name``; none: the bug needs no technique
    line     a part of the name of the line that must fail, where a certain one is expected
    resume   whether the job takes its last step again from a checkpoint
    dropout  whether layers drop in the job
    steps    that are taken
    """

    name: str
    pitfall: int
    patch: Patch
    base: str
    keys: dict[str, Any] = field(default_factory=dict)
    blamed: tuple[str, ...] = ()
    line: str = ""
    resume: bool = False
    dropout: bool = False
    steps: int = 3
