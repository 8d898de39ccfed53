"""Stochastic rounding to bfloat16: up or down by chance, so that the mean of many roundings is the number itself.

An update of a bfloat16 weight that is smaller than half of its last place is lost when rounded to the nearest; rounded by
chance it happens with the probability that it is worth (Gupta et al. 2015; Zamirai et al. 2020, section 4). The chance is a
function of (seed, step, name, position in the whole parameter), as a counter-based generator gives it: so it is the same
after resuming, and on any number of processes.
"""

from __future__ import annotations

import hashlib
from math import prod

import torch
from torch import Tensor

from trainwright.pieces import Piece

LANES = 4  # numbers of 16 bits in a word of the generator
# SplitMix64 (Steele et al. 2014, figure 17), as signed numbers.
STEP, FIRST, SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def round_(out: Tensor, values: Tensor, bits: Tensor) -> None:
    """Write ``values``, (n,) float32, to ``out``, (n,) bfloat16, rounded away from zero where ``bits`` are high enough.

    Args:
        bits: (n,) int16, evenly distributed. What bfloat16 represents exactly doesn't move.
    """
    # The upper half of a float32 is a bfloat16. The bits are from -2^15 on, so that their sum with 2^15 is from 0 on.
    wide = values.view(torch.int32) + bits
    out.view(torch.int16).copy_(wide.add_(2**15).bitwise_right_shift_(16))


def key_of(seed: int, step: int, name: str) -> int:
    """What makes the chance of a parameter in a step, 64 bits with a sign."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def bits_of(key: int, like: Tensor, piece: Piece, start: int, count: int) -> Tensor:
    """(count,) int16: the chance of the numbers from ``start`` on of a part of a parameter, in their order in memory.

    Args:
        like: the part, whose order of dimensions in memory the whole has, too.
        piece: where it lies in the whole.
    """
    order = sorted(range(like.ndim), key=like.stride, reverse=True)
    shape, first, size = ([box[dim] for dim in order] for box in (piece.shape, piece.start, piece.size))
    if size[1:] == shape[1:]:
        begin = (first[0] * prod(shape[1:]) if shape else 0) + start
        return _in_a_row(key, begin, count, like.device)
    return _anywhere(key, _positions(torch.arange(start, start + count, device=like.device), shape, first, size))


def _in_a_row(key: int, first: int, count: int, device: torch.device) -> Tensor:
    begin, end = first // LANES, -(-(first + count) // LANES)
    words = _words(key, torch.arange(begin, end, device=device))
    return words.view(torch.int16)[first - LANES * begin :][:count]


def _anywhere(key: int, positions: Tensor) -> Tensor:
    lanes = positions.remainder(LANES).mul_(16)
    return _words(key, positions.bitwise_right_shift_(2)).bitwise_right_shift_(lanes).to(torch.int16)


def _words(key: int, counters: Tensor) -> Tensor:
    """SplitMix64 of counters, int64, in their place."""
    z = counters.mul_(STEP).add_(key)
    _shifted_in(z, 30).mul_(FIRST)
    _shifted_in(z, 27).mul_(SECOND)
    return _shifted_in(z, 31)


def _shifted_in(z: Tensor, count: int) -> Tensor:
    """z ^= z >> count, without a sign: torch's shift would repeat it, and the highest bit would always be 0."""
    return z.bitwise_xor_((z >> count).bitwise_and_(2 ** (64 - count) - 1))


def _positions(inside: Tensor, shape: list[int], first: list[int], size: list[int]) -> Tensor:
    """Where numbers of a box lie in the whole, both counted along the dimensions' order."""
    found, stride = torch.zeros_like(inside), 1
    for whole, begin, extent in reversed(list(zip(shape, first, size, strict=True))):
        found.add_(inside.remainder(extent).add_(begin), alpha=stride)
        inside, stride = inside.div(extent, rounding_mode="floor"), stride * whole
    return found
