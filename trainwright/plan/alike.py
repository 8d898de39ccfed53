"""Portions of an optimizer's update that are alike: one is rehearsed, and counts for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from trainwright.memory.portions import Slice
from trainwright.memory.rounding import LANES
from trainwright.memory.updates import Updater
from trainwright.plan.counting import Counts
from trainwright.plan.ledger import Ledger
from trainwright.plan.work import Work


@dataclass(frozen=True)
class Seen:
    """Where a portion's events are, what it computed, and the kind of the numbers that it left with each finished parameter."""

    events: range
    works: dict[Work, float]
    numbers: list[dict[str, tuple[torch.Size, torch.dtype]]]


@contextmanager
def portions_once(ledger: Ledger, counts: Counts, phase: Callable[[], str]) -> Iterator[None]:
    """While an update takes portions that are as an earlier one was from what is known of that."""
    seen: dict[Any, Seen] = {}
    plain = Updater._update_portion

    def update(updater: Updater, portion: list[Slice]) -> None:
        key = (id(updater), phase(), *map(_kind, portion))
        if key in seen:
            _again(seen[key], portion, ledger, counts)
            return
        since, before = len(ledger.events), counts.works.copy()
        plain(updater, portion)
        works = {work: count - before[work] for work, count in counts.works.items() if count != before[work]}
        finished = [
            {name: (value.shape, value.dtype) for name, value in piece.entry.numbers.items()} for piece in portion if piece.last
        ]
        seen[key] = Seen(range(since, len(ledger.events)), works, finished)

    with mock.patch.object(Updater, "_update_portion", update):
        yield


def _kind(piece: Slice) -> Any:
    """All that the operators of its update, and the memory of these, depend on."""
    entry = piece.entry
    p, grad = entry.parameter, entry.parameter.grad
    assert grad is not None
    inside = piece.count, piece.start % LANES, piece.last, entry.begun
    return (*inside, p.shape, p.stride(), p.dtype, grad.stride(), grad.dtype, entry.group, entry.wide, str(entry.place.piece),
            *(type(state) for state in entry.states.values()))  # fmt: skip


def _again(one: Seen, portion: Sequence[Slice], ledger: Ledger, counts: Counts) -> None:
    ledger.repeat(one.events)
    for work, count in one.works.items():
        counts.works[work] += count
    for piece, numbers in zip([piece for piece in portion if piece.last], one.numbers, strict=True):
        device = piece.entry.parameter.device
        piece.entry.numbers = {key: torch.empty(shape, dtype=dtype, device=device) for key, (shape, dtype) in numbers.items()}
        piece.entry.begun = True
