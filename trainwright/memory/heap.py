"""Large CPU tensors from a heap that holds no more than they needed at once (``heap.cpp``), in this process from then on.

A C library keeps what is freed, in holes that the next tensors often do not fit: a training process may come to hold half as
much again as its tensors' peak. Values don't change.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from trainwright import native
from trainwright.models.contract import Change

SOURCE = Path(__file__).with_suffix(".cpp")


class Count(NamedTuple):
    """Bytes in blocks of this heap, whole pages of tensors of 256 KiB and more."""

    live: int
    waiting: int  # freed, for the next tensors
    peak: int  # the most that was live at once; live + waiting is never more
    taken: int  # pages that the system has given, all in all


def use(wished: Literal["auto", "system"], device: torch.device) -> Change | None:
    """Let PyTorch take the CPU's tensors from this heap, if the run is the CPU's and the heap can be built here."""
    if device.type != "cpu" or wished == "system":
        return None
    _, why = _begun()
    return Change("allocator", f"the system's: {why}" if why else "holds no more than the tensors' peak")


def count() -> Count:
    """What this heap has given out; nothing where it isn't in use."""
    library = _begun()[0] if _begun.cache_info().currsize else None
    found = (ctypes.c_uint64 * len(Count._fields))()
    if library:
        library.trainwright_heap_count(found)
    return Count(*found)


@functools.cache
def _begun() -> tuple[ctypes.CDLL | None, str]:
    """The library, whose heap is in use from now on, and ""; or None and why not."""
    if sys.platform != "linux":
        return None, "this one is for Linux"
    try:
        library = native.load(SOURCE)
    except native.Unavailable as error:
        return None, str(error)
    library.trainwright_heap_use()
    return library, ""
