"""Tensors' numbers to and from a file, whole: the system may write or read less than it is asked for."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from torch import Tensor


def raw(numbers: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, in its own memory."""
    return memoryview(cast(Any, numbers.view(torch.uint8).numpy()))


def write_at(file: int, numbers: Tensor, offset: int) -> None:
    """Put all of them there.

    Raises:
        OSError: the disk refuses.
    """
    data, done = raw(numbers), 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)


def read_at(file: int, numbers: Tensor, offset: int) -> None:
    """Fill them from there.

    Raises:
        OSError: the disk refuses.
        EOFError: the file ends before they are full.
    """
    data, done = raw(numbers), 0
    while done < len(data):
        got = os.preadv(file, [data[done:]], offset + done)
        if not got:
            raise EOFError(f"the file ends {len(data) - done} bytes too early")
        done += got
