"""Optimizer states in 8 bits: blocks of 256 numbers with a scale each, in the dynamic map of Dettmers et al. 2022.

Three things differ from the paper. A block is divided by its number of largest magnitude, with its sign, so that this number
is kept exactly, and what was read is stored again with the same bits. A second moment is never rounded to zero: the first
moment divided by its root would be boundless. Blocks below 2^-100 are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainwright.memory.stores import Array, Make

BLOCK = 256
UPPER = 18  # bits of a float32 that decide on its code: sign, exponent and the first 9 of the others
SMALLEST = 4096  # numbers of a parameter whose states are worth it, as there
LEAST = 2.0**-100  # of a scale: its smallest multiple is still a normal float32
SIGNED = {"exp_avg", "momentum_buffer", "grad_avg"}
UNSIGNED = {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum", "acc_delta"}


def dynamic_map(signed: bool) -> Tensor:
    """(256,) float32, ascending: what the codes stand for, up to 1 (Dettmers et al. 2022, section 1.3).

    Seven decades, each with twice as many values as the one below; unsigned ones have twice as many as signed.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        found += means.tolist() + (-means).tolist() * signed
    return torch.tensor(sorted(found), dtype=torch.float64).float()


@dataclass(frozen=True)
class Code:
    """A map, and how to find a number's code in it.

    values   (256,) float32
    nearest  (2^UPPER,) uint8: for the upper bits of a float32, the code nearest to the middle of all that begin with them
    """

    signed: bool
    values: Tensor
    nearest: Tensor


def code(signed: bool, device: torch.device) -> Code:
    """The dynamic map."""
    values = dynamic_map(signed)
    upper = torch.arange(-(2 ** (UPPER - 1)), 2 ** (UPPER - 1), dtype=torch.int32)
    middle = (upper * 2 ** (32 - UPPER) + 2 ** (31 - UPPER)).view(torch.float32).nan_to_num(1.0)
    nearest = torch.bucketize(middle, (values[1:] + values[:-1]) / 2)
    if not signed:
        nearest = nearest.clamp(min=(upper > 0).long())
    return Code(signed, values.to(device), nearest.to(device, torch.uint8))


def quantize(values: Tensor, code: Code) -> tuple[Tensor, Tensor]:
    """(n,) float32 to codes, (n,) uint8, and scales, (blocks,) float32; finite values."""
    count = values.numel()
    rest = -count % BLOCK
    blocks = (torch.nn.functional.pad(values, (0, rest)) if rest else values).view(-1, BLOCK)
    scales = blocks.amax(1)
    if code.signed:
        low = blocks.amin(1)
        scales = torch.where(scales >= -low, scales, low)
    scales = scales * (scales.abs() >= LEAST)
    parts = blocks / torch.where(scales == 0, torch.inf, scales)[:, None]
    places = (parts.view(torch.int32) >> (32 - UPPER)).add_(2 ** (UPPER - 1)).view(-1)  # far finer than codes are apart
    return code.nearest.index_select(0, places)[:count], scales


def dequantize(codes: Tensor, scales: Tensor, code: Code) -> Tensor:
    """What ``quantize`` gave, as (n,) float32."""
    values = code.values.index_select(0, codes.int())
    count = values.numel()
    full = count // BLOCK * BLOCK
    values[:full].view(-1, BLOCK).mul_(scales[: full // BLOCK, None])
    if full < count:
        values[full:].mul_(scales[-1])
    return values


class EightBit:
    """A state of a parameter of ``count`` numbers."""

    def __init__(self, count: int, code: Code, make: Make) -> None:
        self._count, self._code = count, code
        self._codes: Array = make(count, torch.uint8)
        self._scales: Array = make(-(-count // BLOCK), torch.float32)

    def read(self, start: int, count: int) -> Tensor:
        """(count,) float32; ``start`` is where a block begins."""
        codes = self._codes.read(start, count)
        return dequantize(codes, self._scales.read(start // BLOCK, -(-count // BLOCK)), self._code)

    def write(self, start: int, values: Tensor) -> None:
        """Whole blocks, or up to the end."""
        assert start % BLOCK == 0
        assert values.numel() % BLOCK == 0 or start + values.numel() == self._count
        codes, scales = quantize(values.float(), self._code)
        self._codes.write(start, codes)
        self._scales.write(start // BLOCK, scales)

    def tensors(self) -> list[Tensor]:
        """What of it is in memory."""
        return [*self._codes.tensors(), *self._scales.tensors()]

    def hint(self, start: int, count: int) -> None:
        """These numbers will be read next."""
        self._codes.hint(start, count)
        self._scales.hint(start // BLOCK, -(-count // BLOCK))


def room(count: int) -> int:
    """Bytes for so many numbers."""
    return count + 4 * -(-count // BLOCK)
