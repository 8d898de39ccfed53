"""Choices between memory, speed and accuracy: which of them no other beats in all three."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

# From the most faithful to the least: what a choice gives up of the plain training of all parameters.
ACCURACY = ("exact", "bf16", "quantized", "fewer trained parameters")


@dataclass(frozen=True)
class Choice:
    """One combination of settings, and what it takes on each device."""

    settings: dict[str, str]
    bytes: int  # at the peak
    seconds: float  # of an optimizer step
    units_per_second: float  # tokens or samples of the whole run
    accuracy: str  # of ACCURACY
    fits: bool | None  # within the budget; None: there is none
    note: str = ""

    def __post_init__(self) -> None:
        assert self.accuracy in ACCURACY, self.accuracy

    @property
    def name(self) -> str:
        """'checkpointing full, zero 3'."""
        return ", ".join(f"{key} {value}" for key, value in self.settings.items()) or "as it is"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def front(choices: Sequence[Choice]) -> list[Choice]:
    """Those that no other dominates, the smallest first.

    A choice dominates another if it takes no more memory, isn't slower and gives up no more accuracy, and is better in one of
    these. Of equal ones the first stays.
    """
    kept: list[Choice] = []
    # In this order nothing is dominated by what comes later.
    for choice in sorted(choices, key=lambda one: (one.bytes, -one.units_per_second, ACCURACY.index(one.accuracy))):
        if not any(_as_good(other, choice) for other in kept):
            kept.append(choice)
    return kept


def _as_good(one: Choice, other: Choice) -> bool:
    return (
        one.bytes <= other.bytes
        and one.units_per_second >= other.units_per_second
        and ACCURACY.index(one.accuracy) <= ACCURACY.index(other.accuracy)
    )
