"""Where optimizer states are kept: in the memory of the device, in the CPU's, or in a file."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from trainwright.memory.files import read_at, write_at
from trainwright.recipe import InputError

GIB = 2**30


class Array(Protocol):
    """Numbers in a row that are kept somewhere."""

    def read(self, start: int, count: int) -> Tensor:
        """Some of them, (count,), on the device that computes; perhaps the memory itself, so to be used once."""

    def write(self, start: int, values: Tensor) -> None:
        """Put some there; what ``read`` gave last may be given back changed."""

    def tensors(self) -> list[Tensor]:
        """What is in memory."""

    def hint(self, start: int, count: int) -> None:
        """These numbers will be read next."""


Make = Callable[[int, torch.dtype], Array]


class InMemory:
    """On ``home``; pinned if that is the CPU and CUDA computes.

    All copies are made on the stream that computes, so that each has its numbers before they change.
    """

    def __init__(self, count: int, dtype: torch.dtype, home: torch.device, device: torch.device) -> None:
        self._pinned = home.type == "cpu" and device.type == "cuda"
        self._numbers = torch.empty(count, dtype=dtype, device=home, pin_memory=self._pinned)
        self._device = device
        self._lent: Tensor | None = None

    def read(self, start: int, count: int) -> Tensor:
        part = self._numbers[start : start + count]
        self._lent = part.to(self._device, non_blocking=self._pinned)
        return self._lent

    def write(self, start: int, values: Tensor) -> None:
        if values is self._lent and self._numbers.device == self._device:
            return  # changed in its place
        self._numbers[start : start + values.numel()].copy_(values, non_blocking=self._pinned)

    def tensors(self) -> list[Tensor]:
        return [self._numbers]

    def hint(self, start: int, count: int) -> None:
        """It is there."""


def in_memory(home: torch.device, device: torch.device) -> Make:
    """Arrays on ``home`` for what ``device`` computes."""
    return lambda count, dtype: InMemory(count, dtype, home, device)


class File:
    """A file without a name, which is gone when the process is; its room is reserved at once.

    NOTE: written and read rather than mapped: mapped pages count as the process's memory, and a full disk would end it by a
    signal instead of an error.

    Args:
        size: bytes.
        real: False for tensors without values; then nothing is reserved.

    Raises:
        InputError: there can't be such a file.
    """

    def __init__(self, folder: str | None, size: int, device: torch.device, *, real: bool = True) -> None:
        place = Path(folder or tempfile.gettempdir())
        self._device, self._size, self._end = device, size, 0
        try:
            with tempfile.TemporaryFile(prefix="trainwright-", dir=place) as opened:
                self.number = os.dup(opened.fileno())
            weakref.finalize(self, os.close, self.number)
            if size and real:
                os.posix_fallocate(self.number, 0, size)
        except OSError as error:
            raise InputError(_refused(place, size, error)) from None

    def make(self, count: int, dtype: torch.dtype) -> Array:
        """The next numbers of it."""
        start, self._end = self._end, self._end + count * dtype.itemsize
        assert self._end <= self._size, "more than was reserved"
        return OnDisk(self, start, dtype, self._device)


def _refused(place: Path, size: int, error: OSError) -> str:
    if not place.is_dir():
        return f"memory.folder: {place} is no folder; name one that can be written to"
    free = shutil.disk_usage(place).free
    if free >= size:
        return f"memory.folder: {place}: {error.strerror}; name a folder that can be written to"
    return (
        f"memory.folder: {place} has no room for the optimizer's states: they take {size / GIB:.3g} GiB, {free / GIB:.3g} GiB "
        "are free; name another folder, or make them smaller by memory.optimizer_states: 8bit"
    )


class OnDisk:
    """A part of a file from byte ``offset`` on."""

    def __init__(self, file: File, offset: int, dtype: torch.dtype, device: torch.device) -> None:
        self._file, self._offset, self._dtype, self._device = file, offset, dtype, device

    def read(self, start: int, count: int) -> Tensor:
        numbers = torch.empty(count, dtype=self._dtype)
        if isinstance(numbers, FakeTensor):
            return numbers.to(self._device)
        read_at(self._file.number, numbers, self._place(start))
        return numbers.to(self._device)

    def write(self, start: int, values: Tensor) -> None:
        if isinstance(values, FakeTensor):
            return
        write_at(self._file.number, values.detach().to("cpu", self._dtype).contiguous(), self._place(start))

    def tensors(self) -> list[Tensor]:
        return []

    def hint(self, start: int, count: int) -> None:
        if hasattr(os, "posix_fadvise"):
            size = count * self._dtype.itemsize
            os.posix_fadvise(self._file.number, self._place(start), size, os.POSIX_FADV_WILLNEED)

    def _place(self, start: int) -> int:
        return self._offset + start * self._dtype.itemsize
