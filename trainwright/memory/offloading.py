"""Tensors that wait for the backward elsewhere: in CPU memory, or in a file if the CPU's memory is what they would take."""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from trainwright.memory.files import read_at, write_at
from trainwright.recipe import InputError

GIB = 2**30
Identity = tuple[int, int, tuple[int, ...], tuple[int, ...]]


class Place(Protocol):
    """Where the numbers of a dense tensor, one behind the other, can be put; ``Any`` stands for what finds them again."""

    def write(self, numbers: Tensor) -> Any:
        """Put them there; ``numbers`` may change afterwards."""

    def hint(self, token: Any) -> None:
        """They will be read soon."""

    def read(self, token: Any, like: Tensor) -> Tensor:
        """A new tensor with the shape and strides of ``like``, which is on the meta device."""

    def forget(self, token: Any) -> None:
        """They aren't needed any more."""


class Away:
    """A tensor that is elsewhere; the place is free again when nothing refers to this."""

    def __init__(self, tensor: Tensor, place: Place, before: weakref.ref[Away] | None) -> None:
        self.like = torch.empty_like(tensor, device="meta")
        dense = tensor.detach()
        if self.like.stride() != tensor.stride():  # it has gaps or overlaps
            dense = torch.empty_like(tensor).copy_(dense)
        self.place, self.before = place, before
        self.token = place.write(dense.as_strided((dense.numel(),), (1,)))

    def fetch(self) -> Tensor:
        """The tensor, bit by bit; the one that left before it, which is needed next, is on its way."""
        tensor = self.place.read(self.token, self.like)
        before = self.before() if self.before else None
        if before is not None:
            self.place.hint(before.token)
        return tensor

    def __del__(self) -> None:
        if hasattr(self, "token"):
            self.place.forget(self.token)


class Store:
    """Sends tensors to a place, and has them back."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._last: weakref.ref[Away] | None = None

    def keep(self, tensor: Tensor) -> Away:
        """Send one."""
        away = Away(tensor, self._place, self._last)
        self._last = weakref.ref(away)
        return away

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def instead_of(self, tensors: Iterable[object]) -> AbstractContextManager[object]:
        """A context in which autograd doesn't keep these tensors, where they are the results of earlier blocks.

        Others, such as tables and masks that all blocks read, are there once and stay.
        """
        chosen = {_identity(x) for x in tensors if worth(x)}
        return saved_tensors_hooks(partial(self._pack, chosen), _unpack)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _pack(self, chosen: set[Identity], tensor: Tensor) -> Tensor | Away:
        return self.keep(tensor) if _identity(tensor) in chosen else tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _unpack(packed: Tensor | Away) -> Tensor:
    return packed.fetch() if isinstance(packed, Away) else packed


def worth(value: object) -> bool:
    """Whether a block's argument is the result of an earlier block."""
    return isinstance(value, Tensor) and value.grad_fn is not None and value.numel() > 0


def _identity(tensor: Any) -> Identity:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def store_for(device: torch.device, folder: str | None, values: bool = True) -> Store:
    """CPU memory for what is on an accelerator, else a file in ``folder``; without values nothing is put anywhere.

    Raises:
        InputError: there can't be a file.
    """
    if device.type != "cpu":
        if folder is not None:
            raise InputError(f"memory.folder has no effect: what is on {device} goes to CPU memory; leave it out")
        return Store(Host(device))
    return Store(Disk(Path(folder or tempfile.gettempdir())) if values else Nowhere(device))


class Nowhere:
    """For tensors without values."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def write(self, numbers: Tensor) -> None:
        """There is nothing to put anywhere."""

    def hint(self, token: None) -> None:
        """Nothing will be read."""

    def read(self, token: None, like: Tensor) -> Tensor:
        return torch.empty(like.numel(), dtype=like.dtype, device=self._device).as_strided(like.shape, like.stride())

    def forget(self, token: None) -> None:
        """Nothing was kept."""


class Host:
    """The CPU's memory, pinned where that speeds up copies.

    All copies are made on the stream that computes, so that each has its numbers before they change.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._ahead: dict[int, Tensor] = {}

    def write(self, numbers: Tensor) -> Tensor:
        copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=self._pinned)
        return copy.copy_(numbers, non_blocking=self._pinned)

    def hint(self, token: Tensor) -> None:
        self._ahead[id(token)] = token.to(self._device, non_blocking=self._pinned)

    def read(self, token: Tensor, like: Tensor) -> Tensor:
        numbers = self._ahead.pop(id(token), None)
        numbers = token.to(self._device, non_blocking=self._pinned) if numbers is None else numbers
        return numbers.as_strided(like.shape, like.stride())

    def forget(self, token: Tensor) -> None:
        self._ahead.pop(id(token), None)


class Disk:
    """A file without a name, which is gone when the process is.

    NOTE: written and read rather than mapped: mapped pages count as the process's memory, and a full disk would end it by a
    signal instead of an error.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._file, name = tempfile.mkstemp(prefix="trainwright-", dir=folder)
            os.unlink(name)
        except OSError as error:
            raise InputError(f"memory.folder: {folder}: {error.strerror}; name a folder that can be written to") from None
        weakref.finalize(self, os.close, self._file)
        self._end = 0
        self._free: dict[int, list[int]] = defaultdict(list)

    def write(self, numbers: Tensor) -> tuple[int, int]:
        start = self._room(numbers.nbytes)
        write_at(self._file, numbers, start)
        return start, numbers.nbytes

    def hint(self, token: tuple[int, int]) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, *token, os.POSIX_FADV_WILLNEED)

    def read(self, token: tuple[int, int], like: Tensor) -> Tensor:
        numbers = torch.empty(like.numel(), dtype=like.dtype)
        read_at(self._file, numbers, token[0])
        return numbers.as_strided(like.shape, like.stride())

    def forget(self, token: tuple[int, int]) -> None:
        start, size = token
        self._free[size].append(start)

    def _room(self, size: int) -> int:
        """Where so many bytes may be written: reserved, so that a disk without room is noticed in the first forward."""
        if self._free[size]:
            return self._free[size].pop()
        try:
            os.posix_fallocate(self._file, self._end, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            raise InputError(
                f"memory.folder: {self._folder} has no room: {self._end / GIB:.2f} GiB of block inputs are there, the next one "
                f"needs {size / 2**20:.1f} MiB more; name another folder, or make training.micro_batch_size smaller"
            ) from None
        self._end += size
        return self._end - size
