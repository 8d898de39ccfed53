"""Frozen weights that stay in their safetensors file: each is read when a product needs it, the one after it meanwhile.

NOTE: read rather than mapped: mapped pages that were touched count as the process's memory.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from math import prod
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from trainwright.memory.files import read_at
from trainwright.recipe import RunError

TICKET = "ticket"  # a layer's parameter: which weight is its own
ALONE = 32_767  # numbers that torch copies in the thread that asks; for more it takes all cores, where a product is under way
_numbers = count()


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight in a file: where its numbers begin, and what they are.

    number   by which an operator finds it
    """

    path: Path
    offset: int
    shape: tuple[int, int]
    dtype: torch.dtype
    reader: Reader
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def nbytes(self) -> int:
        """In the file."""
        return prod(self.shape) * self.dtype.itemsize

    def ticket(self) -> Tensor:
        """What a layer holds: 0-dim int64. The weight can be found as long as somebody holds ``self``."""
        _STORED[self.number] = self
        return torch.tensor(self.number)


_STORED: weakref.WeakValueDictionary[int, Stored] = weakref.WeakValueDictionary()


def weight(held: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of a ticket, in ``dtype`` and on its device; its memory is used again by the next but one."""
    [ticket] = held
    stored = _STORED[int(ticket)]
    assert stored.shape == shape
    return stored.reader.fetch(stored, dtype).to(ticket.device)


class Reader:
    """Reads the weights of one model. Two are in memory at most: the one in use, and the one that is probably next.

    That is what came after the same two the last time: forwards, backwards and what is computed again repeat themselves.
    """

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._largest = 0
        self._raw = torch.empty(0, dtype=torch.uint8)
        self._room = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._current: tuple[Stored, torch.dtype] | None = None
        self._slot = 0
        self._value = torch.empty(0)
        self._ahead: tuple[Stored, torch.dtype, Future[Tensor]] | None = None
        self._before: int | None = None
        self._last: int | None = None
        self._after: dict[tuple[int | None, int | None], Stored] = {}
        self._pool = ThreadPoolExecutor(1, "weights")
        self._lock = Lock()
        self.reads = self.guessed = 0

    def add(self, path: Path, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> Stored:
        """A weight that will be asked for."""
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._files[path])
        stored = Stored(path, offset, shape, dtype, self)
        self._largest = max(self._largest, prod(shape))
        return stored

    def fetch(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        """The weight, until the next but one is asked for."""
        with self._lock:
            if self._current != (stored, dtype):
                self._value = self._get(stored, dtype)
                self._current = stored, dtype
            self._guess(stored, dtype)
            return self._value

    def _get(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        """Into the place that isn't in use."""
        self._slot = 1 - self._slot
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            value = ahead[2].result()
            if ahead[:2] == (stored, dtype):
                self.guessed += 1
                return value
        return self._read(stored, dtype, self._slot)

    def _guess(self, stored: Stored, dtype: torch.dtype) -> None:
        """Note what came after what, and begin to read what will probably be next."""
        self._after[self._before, self._last] = stored
        self._before, self._last = self._last, stored.number
        following = self._after.get((self._before, self._last))
        if following is not None and following is not stored and self._ahead is None:
            self._ahead = following, dtype, self._pool.submit(self._read, following, dtype, 1 - self._slot)

    def _read(self, stored: Stored, dtype: torch.dtype, slot: int) -> Tensor:
        self.reads += 1
        target = self._place(slot, dtype)[: prod(stored.shape)]
        if dtype == stored.dtype:
            _fill(self._files[stored.path], stored, target)
        else:
            if len(self._raw) < self._largest * stored.dtype.itemsize:
                self._raw = torch.empty(self._largest * stored.dtype.itemsize, dtype=torch.uint8)
            raw = self._raw[: stored.nbytes]
            _fill(self._files[stored.path], stored, raw)
            for part, numbers in zip(target.split(ALONE), raw.view(stored.dtype).split(ALONE), strict=True):
                part.copy_(numbers)
        return target.view(stored.shape)

    def _place(self, slot: int, dtype: torch.dtype) -> Tensor:
        size = self._largest * dtype.itemsize
        if len(self._room[slot]) < size:
            self._room[slot] = torch.empty(size, dtype=torch.uint8)
        return self._room[slot][:size].view(dtype)


def _fill(file: int, stored: Stored, numbers: Tensor) -> None:
    """Read a weight's bytes.

    Raises:
        RunError: the file has become shorter, or can't be read any more.
    """
    try:
        read_at(file, numbers, stored.offset)
    except EOFError:
        raise RunError(f"memory.frozen: {stored.path} has become shorter while the run reads its weights from it") from None
    except OSError as error:
        raise RunError(f"memory.frozen: {stored.path} can't be read any more ({error.strerror})") from None
