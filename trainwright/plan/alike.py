"""Portions of an optimizer's update that are alike, and slices within them: one is rehearsed, and counts for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    numbers: list[dict[str, tuple[torch.Size, torch.dtype]]] = field(default_factory=list)


@contextmanager
def portions_once(ledger: Ledger, counts: Counts, phase: Callable[[], str]) -> Iterator[None]:
    """While an update takes portions that are as an earlier one was from what is known of that."""
    seen: dict[Any, Seen] = {}
    update_plainly, take_back_plainly = Updater._update_portion, Updater._take_back

    def repeated(key: Any) -> bool:
        if key not in seen:
            return False
        ledger.repeat(seen[key].events)
        for work, count in seen[key].works.items():
            counts.works[work] += count
        return True

    @contextmanager
    def noted(key: Any) -> Iterator[None]:
        since, before = len(ledger.events), counts.works.copy()
        yield
        works = {work: count - before[work] for work, count in counts.works.items() if count != before[work]}
        seen[key] = Seen(range(since, len(ledger.events)), works)

    def update(updater: Updater, portion: list[Slice]) -> None:
        key = (id(updater), phase(), *map(_kind, portion))
        if repeated(key):
            _finish(portion, seen[key])
            return
        with noted(key):
            update_plainly(updater, portion)
        for piece in _last(portion):
            seen[key].numbers.append({name: (value.shape, value.dtype) for name, value in piece.entry.numbers.items()})

    def take_back(updater: Updater, piece: Slice, *args: Any) -> None:
        key = (id(updater), phase(), "back", _kind(piece))
        if not repeated(key):
            with noted(key):
                take_back_plainly(updater, piece, *args)

    with mock.patch.multiple(Updater, _update_portion=update, _take_back=take_back):
        yield


def _kind(piece: Slice) -> Any:
    """All that the operators of its update, and the memory of these, depend on."""
    entry = piece.entry
    p, grad = entry.parameter, entry.parameter.grad
    assert grad is not None
    inside = piece.count, piece.start % LANES, piece.last, entry.begun
    return (*inside, p.shape, p.stride(), p.dtype, grad.stride(), grad.dtype, entry.group, entry.wide, str(entry.place.piece),
            *(type(state) for state in entry.states.values()))  # fmt: skip


def _last(portion: Sequence[Slice]) -> list[Slice]:
    return [piece for piece in portion if piece.last]


def _finish(portion: Sequence[Slice], one: Seen) -> None:
    for piece, numbers in zip(_last(portion), one.numbers, strict=True):
        device = piece.entry.parameter.device
        piece.entry.numbers = {key: torch.empty(shape, dtype=dtype, device=device) for key, (shape, dtype) in numbers.items()}
        piece.entry.begun = True
