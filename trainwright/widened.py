"""Products with a matrix that is stored in fewer bits than what it is multiplied by, and is widened a few rows at a time.

So no copy of the whole matrix is made. Widening is exact, but a sum over parts may differ from the whole's in its last digits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 512  # that are widened at once: 4 MiB of Llama-3.2-1B's in float32; with more, caches lose them before the product


def narrower(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether numbers take fewer bytes."""
    return dtype.itemsize < other.itemsize


def scores(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix.T`` in x's dtype: (n, size) and (rows, size) to (n, rows)."""
    if not narrower(matrix.dtype, x.dtype):
        return x @ matrix.T
    out = x.new_empty(len(x), len(matrix))
    for rows in _parts(matrix):
        out[:, rows] = x @ matrix[rows].to(x.dtype).T
    return out


def mixture(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix`` in x's dtype: (n, rows) and (rows, size) to (n, size)."""
    if not narrower(matrix.dtype, x.dtype):
        return x @ matrix
    out = x.new_zeros(len(x), matrix.shape[1])
    for rows in _parts(matrix):
        out.addmm_(x[:, rows], matrix[rows].to(x.dtype))
    return out


def total(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the rows, (size,)."""
    if not narrower(matrix.dtype, dtype):
        return matrix.to(dtype).sum(0)
    out = matrix.new_zeros(matrix.shape[1], dtype=dtype)
    for rows in _parts(matrix):
        out += matrix[rows].to(dtype).sum(0)
    return out


def _parts(matrix: Tensor) -> Iterator[slice]:
    return (slice(start, start + ROWS) for start in range(0, len(matrix), ROWS))
