"""Weights in a few bits, and back: NF4 (Dettmers et al. 2023, QLoRA), and the blocks of GGUF files as they are stored.

    nf4    64 numbers: the nearest of 16 quantiles of a normal distribution, times a float32 scale: 4.5 bits a number
    Q4_0   32 numbers: d (q - 8), q in 4 bits, d float16
    Q4_1   32 numbers: d q + m, the same and m float16
    Q8_0   32 numbers: d q, q in 8 bits, signed

Blocks run along the rows of a weight, one row after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

BLOCK = 64
# The paper's table (appendix E): quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
GGUF_BLOCK = 32
GGUF_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
KINDS = ("nf4", *GGUF_BYTES)
CHUNK = 1 << 20  # numbers that are float32 at one time
HELD = {"nf4": ("packed", "scales"), **dict.fromkeys(GGUF_BYTES, ("packed",))}


def sizes(kind: str, count: int) -> dict[str, tuple[int, torch.dtype]]:
    """Of the tensors (1-dim) that hold so many numbers: length and dtype."""
    if kind == "nf4":
        return {"packed": (count // 2, torch.uint8), "scales": (count // BLOCK, torch.float32)}
    return {"packed": (count // GGUF_BLOCK * GGUF_BYTES[kind], torch.uint8)}


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of a weight whose size is a multiple of 64: two numbers a byte, the first in the upper half; a scale for each block."""
    flat = weight.reshape(-1, BLOCK)
    code = torch.tensor(CODE, device=weight.device)
    edges = (code[1:] + code[:-1]) / 2
    packed = torch.empty(weight.numel() // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(flat), device=weight.device)
    for start in range(0, len(flat), CHUNK // BLOCK):
        part = flat[start : start + CHUNK // BLOCK].float()
        largest = part.abs().amax(1)
        scales[start : start + len(part)] = largest
        index = torch.bucketize(part / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None], edges)
        pairs = index.view(-1, 2).to(torch.uint8)
        packed[start * BLOCK // 2 :][: len(pairs)] = pairs[:, 0] * 16 + pairs[:, 1]
    return packed, scales


def dequantize(kind: str, held: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight; computed in float32, a part at a time."""
    packed, *scales = held
    out = torch.empty(prod(shape), dtype=dtype, device=packed.device)
    size, width = (BLOCK, BLOCK // 2) if kind == "nf4" else (GGUF_BLOCK, GGUF_BYTES[kind])
    blocks, rows, step = packed.view(-1, width), out.view(-1, size), CHUNK // size
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        rows[part] = _nf4(blocks[part], scales[0][part]) if kind == "nf4" else _gguf(kind, blocks[part])
    return out.view(shape)


def errors(weight: Tensor, held: Sequence[Tensor]) -> tuple[float, float]:
    """Of an NF4 weight the sums of squares: of its error, and of itself."""
    flat, (packed, scales), error, square = weight.reshape(-1), held, 0.0, 0.0
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK].float()
        own = packed[start // 2 :][: part.numel() // 2], scales[start // BLOCK :][: part.numel() // BLOCK]
        error += float((dequantize("nf4", own, tuple(part.shape), torch.float32) - part).square().sum(dtype=torch.float64))
        square += float(part.square().sum(dtype=torch.float64))
    return error, square


def maker(kind: str) -> Callable[[Sequence[Tensor], tuple[int, int], torch.dtype], Tensor]:
    """``dequantize`` of a kind."""
    return lambda held, shape, dtype: dequantize(kind, held, shape, dtype)


def _nf4(packed: Tensor, scales: Tensor) -> Tensor:
    code = torch.tensor(CODE, device=packed.device)
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], 1)  # what each byte means
    return pairs.index_select(0, packed.flatten().int()).view(len(packed), -1) * scales[:, None]


def _gguf(kind: str, blocks: Tensor) -> Tensor:
    first = _halves(blocks, 0)
    if kind == "Q8_0":
        return first * blocks[:, 2:].view(torch.int8).float()
    packed = blocks[:, 2:] if kind == "Q4_0" else blocks[:, 4:]
    numbers = torch.cat([packed & 15, packed >> 4], 1).float()
    return first * (numbers - 8) if kind == "Q4_0" else first * numbers + _halves(blocks, 2)


def _halves(blocks: Tensor, place: int) -> Tensor:
    """The float16 that begins at a byte of each block, (n, 1) float32."""
    return blocks[:, place : place + 2].contiguous().view(torch.float16).float()
