"""Which tensors' memory is live at each moment of a program, fake or real: every storage from its first operator to its end."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Event:
    """A change of a storage's size in bytes; ``moment`` is what ``Ledger`` was told to ask for."""

    storage: int
    change: int
    moment: tuple[str, str]


@dataclass(frozen=True)
class Peak:
    """The most that was live at once: all bytes, those of each storage, and the moment."""

    total: int
    live: dict[int, int]
    moment: tuple[str, str]
    index: int


class Held(Protocol):
    """Memory without a tensor."""

    device: torch.device

    def nbytes(self) -> int:
        """Its size."""


class Ledger:
    """Notes storages as they come and go.

    Args:
        device: whose memory counts.
        moment: gives the phase and the module that the program is in.
    """

    def __init__(self, device: torch.device, moment: Callable[[], tuple[str, str]]) -> None:
        self.events: list[Event] = []
        self._device, self._moment = device, moment
        self._numbers: dict[int, int] = {}  # address of a live storage to its number
        self._sizes: dict[int, int] = {}
        self._watches: dict[int, weakref.ref[Any]] = {}
        self._next = 0

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU's memory is what counts."""
        return self._device.type == "cpu"

    def see(self, values: Any) -> None:
        """Note whatever tensors are among these."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                self.number(value)

    def hold(self, memory: Held) -> None:
        """Note memory that no tensor looks into; it ends with this object."""
        if memory.device.type == self._device.type:
            self._begin(memory, id(memory))

    def number(self, tensor: Tensor) -> int | None:
        """Of a tensor's storage, which is noted if it is new; None where it is elsewhere."""
        if tensor.device.type != self._device.type:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            self._begin(storage, key)
        return self._numbers[key]

    def _begin(self, storage: torch.UntypedStorage | Held, key: int) -> None:
        number, self._next = self._next, self._next + 1
        self._numbers[key] = number
        self._watches[number] = weakref.ref(storage, lambda _: self._end(key, number))
        self._change(number, storage.nbytes())

    def _end(self, key: int, number: int) -> None:
        if self._numbers.get(key) == number:
            del self._numbers[key]
        del self._watches[number]
        self._change(number, -self._sizes.pop(number))

    def _change(self, number: int, change: int) -> None:
        self._sizes[number] = self._sizes.get(number, 0) + change
        if change:
            self.events.append(Event(number, change, self._moment()))

    def pass_by(self, size: int) -> None:
        """Memory that is taken and given back within an operator."""
        if size:
            number, self._next = self._next, self._next + 1
            self.events += [Event(number, size, self._moment()), Event(number, -size, self._moment())]

    def repeat(self, events: range) -> None:
        """The same once more, now: of what came and went within these events."""
        before = [self.events[number] for number in events]
        left: Counter[int] = Counter()
        for event in before:
            left[event.storage] += event.change
        passing = sorted(storage for storage, size in left.items() if not size)
        fresh = {storage: self._next + place for place, storage in enumerate(passing)}
        self._next += len(fresh)
        moment = self._moment()
        self.events += [Event(fresh[e.storage], e.change, moment) for e in before if e.storage in fresh]

    @contextmanager
    def resizing(self) -> Iterator[None]:
        """While storages are given and deprived of their memory without an operator, as FSDP2 does it."""
        plain = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            before = storage.nbytes()
            result = plain(storage, size)
            number = self._numbers.get(storage._cdata)
            if number is not None:
                self._change(number, size - before)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]

    def peak(self, since: int = 0) -> Peak:
        """The largest total after event number ``since``; of equals the first."""
        total, best, at = 0, -1, 0
        for index, event in enumerate(self.events):
            total += event.change
            if index >= since and total > best:
                best, at = total, index
        return Peak(max(best, 0), self._live(at), self.events[at].moment if self.events else ("", ""), at)

    def _live(self, last: int) -> dict[int, int]:
        live: Counter[int] = Counter()
        for event in self.events[: last + 1]:
            live[event.storage] += event.change
        return {storage: size for storage, size in live.items() if size}

    def timeline(self, since: int = 0, points: int = 120) -> list[tuple[str, int]]:
        """Phase and the largest total of so many equal parts of the program since an event."""
        totals, total = [], 0
        for event in self.events:
            total += event.change
            totals.append((event.moment[0], total))
        rest = totals[since:]
        step = max(1, -(-len(rest) // points))
        return [max(rest[start : start + step], key=lambda pair: pair[1]) for start in range(0, len(rest), step)]


def numbers(ledger: Ledger, tensors: Iterable[Tensor | None]) -> set[int]:
    """Of the storages of these."""
    found = (ledger.number(tensor) for tensor in tensors if tensor is not None)
    return {number for number in found if number is not None}
