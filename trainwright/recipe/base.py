"""What all sections of a recipe share, and the two errors that speak to users."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class InputError(ValueError):
    """The user's input is wrong; the message says what, where and how to mend it. Exit code 2."""


class RunError(RuntimeError):
    """The run itself failed and the message says why (a loss that isn't finite, ...). Exit code 3, no traceback."""


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' for the closest known name, or the empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""


class Section(BaseModel):
    """A part of the recipe: unknown keys are forbidden, values are checked, nothing changes after reading.

    NOTE: strict, because pydantic would otherwise take ``true`` for 1 and ``"8"`` for 8 without a word.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(gt=0)]
AtLeastZero = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
