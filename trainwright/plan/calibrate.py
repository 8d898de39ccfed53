"""How fast this machine's CPU is: five seconds of measuring."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil
import torch
from torch import Tensor

from trainwright.plan import composed
from trainwright.plan.devices import Curves, Device

logger = logging.getLogger(__name__)

SIZES = {"float32": [16, 128, 512, 1536], "bfloat16": [16, 128, 512, 1536], "float16": [32, 256]}
DTYPES = ("float32", "bfloat16")  # of all that isn't a product
BYTES = [2**16, 2**20, 2**23, 2**26]  # in the inner caches, the outer ones, and out of them
PROBE = 128  # of each axis
LENGTHS = [128, 512, 1536]
CONVOLUTIONS = ((64, 32), (512, 2), (512, 4), (256, 8), (128, 32))  # channels and pixels along a side
HEADS, HEAD_SIZE = 8, 64
CHAIN = 50
PATIENCE = 0.002  # seconds for one size in a round
MOST = 40  # calls
LASTING = 0.02  # seconds: what comes only with a product's first call, of a millisecond or so, is lost in these
SLOW = 4  # times as long as in float32: bfloat16 where the processor has no instructions for it
BRIEF = 0.01  # seconds: what takes longer in such a dtype isn't measured but taken to be as fast as a smaller one
LONG = 0.3  # the same in any other: on a busy machine all takes long
ALIGNED = 32  # numbers between which a tensor starts: 64 bytes and more
COLD = 2**24  # bytes of a product's operands that are gone through in turn
COLDER = 2**26  # the same of elementwise work, which waits for memory
# gloo over loopback, for want of a measurement with several processes.
LOOPBACK, LOOPBACK_LATENCY = 1.5e9, 60e-6


def as_device(curves: Curves) -> Device:
    """This machine's CPU, with the threads that torch has now, at these speeds."""
    best = {
        dtype: max(rate for plane in rates for line in plane for rate in line) for dtype, (_, rates) in curves.products.items()
    }
    return Device(
        "cpu", (), psutil.virtual_memory().total, best, max(curves.rates["elementwise.float32"][1]), torch.get_num_threads(),
        os.cpu_count() or 1, LOOPBACK, LOOPBACK, "measured on this machine", 1.0, curves.overhead, LOOPBACK_LATENCY,
        LOOPBACK_LATENCY, curves,
    )  # fmt: skip


def measure() -> Curves:
    """Rates over sizes of products, convolutions, attention and elementwise work, the overhead of a call, and all together."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        seconds = {name: _soonest(getattr(torch, name)) for name in SIZES}
        quick = [name for name in SIZES if seconds[name] < seconds["float32"] * SLOW]
        steps = {name: composed.small_step(getattr(torch, name)) for name in DTYPES if name in quick}
        first, took = _once({name: LONG if name in quick else BRIEF for name in SIZES}), _each(steps)
        curves, took = _faster(first, _once(dict.fromkeys(quick, LONG))), list(map(min, took, _each(steps)))
        _kept.clear()
        device = as_device(curves)
        together = {name: composed.longer(steps[name], seconds, device) for name, seconds in zip(steps, took, strict=True)}
        return dataclasses.replace(curves, together=together)


def _soonest(dtype: torch.dtype) -> float:
    """Seconds of the quickest of some products: one that isn't disturbed tells whether there are instructions for a dtype."""
    one = torch.full((PROBE, PROBE), 0.5, dtype=dtype)
    return min(_timed(lambda _: torch.mm(one, one), turn) for turn in range(10))


def _each(steps: Mapping[str, Callable[[], None]]) -> list[float]:
    return [composed.fastest(step) for step in steps.values()]


def _once(longest: Mapping[str, float]) -> Curves:
    """Of the dtypes in ``longest``; a call that would take more than its seconds there isn't measured."""
    products = {name: (SIZES[name], _products(getattr(torch, name), SIZES[name], most)) for name, most in longest.items()}
    rates = dict([*_elementwise(), *_pools(), *_convolutions(longest), *_attention(longest), *_packed(longest)])
    return Curves(products, rates, _overhead())


def _faster(one: Curves, other: Curves) -> Curves:
    """The better of each figure, measured some seconds apart: another's work seldom lasts. The other one may lack some."""
    products = {
        name: (sizes, _larger(found, other.products.get(name, (0, found))[1])) for name, (sizes, found) in one.products.items()
    }
    rates = {name: (sizes, _larger(found, other.rates.get(name, (0, found))[1])) for name, (sizes, found) in one.rates.items()}
    return Curves(products, rates, min(one.overhead, other.overhead))


def _larger(one: Any, other: Any) -> Any:
    """Of each two numbers in nested lists."""
    return list(map(_larger, one, other)) if isinstance(one, list) else max(one, other)


def _seconds(call: Callable[[int], object], lasting: float = LASTING, least: int = 1) -> float:
    """The lower quartile of some calls after one to warm up, or, if that was ``lasting``, its own; ``call`` gets their numbers.

    Others' work only ever adds time, and with several threads a call may wait a whole time slice for one of them.
    """
    first = _timed(call, 0)
    if first > lasting:
        return first
    least = 3 if first < PATIENCE else least
    found: list[float] = []
    ends = time.perf_counter() + PATIENCE
    while len(found) < MOST and (len(found) < least or time.perf_counter() < ends):
        found.append(_timed(call, len(found) + 1))
    return sorted(found)[len(found) // 4]


def _timed(call: Callable[[int], object], turn: int) -> float:
    started = time.perf_counter()
    call(turn)
    return time.perf_counter() - started


def _copies(use: str, shape: tuple[int, ...], dtype: torch.dtype, bytes_of_all: int, cold: int) -> list[Tensor]:
    """Several tensors to take in turn: what a step works on was last touched long ago, and isn't in the innermost cache.

    Those of one ``use`` share their memory from call to call: to get new pages would take longer than what is measured.
    """
    size = math.prod(shape)
    apart = -(-size // ALIGNED) * ALIGNED
    copies = max(1, min(64, cold // bytes_of_all))
    flat = _memory(use, (copies * apart * dtype.itemsize + 3) // 4).view(dtype)
    return [flat[turn * apart :][:size].view(shape) for turn in range(copies)]


_kept: dict[str, Tensor] = {}


def _memory(use: str, count: int) -> Tensor:
    """At least ``count`` numbers 0.5 of 4 bytes (in 2 bytes: small numbers and 0), which only results overwrite."""
    if use not in _kept or len(_kept[use]) < count:
        _kept[use] = torch.full((max(count, COLDER // 4),), 0.5)
    return _kept[use]


def _products(dtype: torch.dtype, sizes: list[int], longest: float) -> list[list[list[float]]]:
    """By the places of m, n and k in ``sizes``; a product that would take long is as fast as the smaller ones before it."""
    found: dict[tuple[int, int, int], float] = {}
    for m, n, k in itertools.product(range(len(sizes)), repeat=3):
        before = [found[smaller] for smaller in ((m - 1, n, k), (m, n - 1, k), (m, n, k - 1)) if smaller in found]
        flops = 3 * 2 * sizes[m] * sizes[n] * sizes[k]
        slow = before and flops / max(before) > longest
        found[m, n, k] = max(before) if slow else flops / _product(dtype, sizes[m], sizes[n], sizes[k])
    return [[[found[m, n, k] for k in range(len(sizes))] for n in range(len(sizes))] for m in range(len(sizes))]


def _product(dtype: torch.dtype, m: int, n: int, k: int) -> float:
    """Seconds of (m, k) with (k, n) in each of the layouts of a linear layer's three products.

    Forward: the right one is a transposed weight; gradient of the input: neither is; of the weight: the left one is.
    """
    size = dtype.itemsize * (m * k + n * k + m * n)
    left, right = _copies("left", (m, k), dtype, size, COLD), _copies("right", (k, n), dtype, size, COLD)
    out = torch.empty(m, n, dtype=dtype)

    def three(turn: int) -> None:
        one, two = left[turn % len(left)], right[turn % len(right)]
        torch.mm(one, two.view(n, k).t(), out=out)
        torch.mm(one, two, out=out)
        torch.mm(one.view(k, m).t(), two, out=out)

    return _seconds(three)


def _elementwise() -> Iterator[tuple[str, tuple[list[float], list[float]]]]:
    """Bytes a second: of sums (2 read, 1 written), of an exponential (1, 1), of a change of dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        other = torch.bfloat16 if dtype is torch.float32 else torch.float32
        kinds = {"elementwise": (3, dtype), "dear": (2, dtype), "copy": (2, other)}
        for kind, (tensors, to) in kinds.items():
            moved = (tensors - 1) * dtype.itemsize + to.itemsize
            rates = [_bandwidth(kind, dtype, to, max(1, size // moved), moved) for size in BYTES]
            yield f"{kind}.{str(dtype).removeprefix('torch.')}", (list(map(float, BYTES)), rates)


def _bandwidth(kind: str, dtype: torch.dtype, to: torch.dtype, count: int, moved: int) -> float:
    ones, outs = (_copies(use, (count,), one, count * moved, COLDER) for use, one in (("left", dtype), ("out", to)))

    def call(turn: int) -> None:
        one, other, out = ones[turn % len(ones)], ones[(turn + 1) % len(ones)], outs[turn % len(outs)]
        if kind == "elementwise":
            torch.add(one, other, out=out)
        elif kind == "dear":
            torch.sigmoid(one, out=out)
        else:
            out.copy_(one)

    return count * moved / _seconds(call)


def _pools() -> Iterator[tuple[str, tuple[list[float], list[float]]]]:
    """Bytes a second of taking the largest of 2 x 2, with its place, by the bytes of a call."""
    for dtype in (torch.float32, torch.bfloat16):
        images = [torch.rand(8, channels, 32, 32).to(dtype) for channels in (16, 128)]
        moved = [image.numel() * (dtype.itemsize + (dtype.itemsize + 8) / 4) for image in images]
        calls = [functools.partial(torch.nn.functional.max_pool2d, image, 2, return_indices=True) for image in images]
        rates = [size / _seconds(lambda _, call=call: call()) for size, call in zip(moved, calls, strict=True)]  # type: ignore[misc]
        yield f"pool.{str(dtype).removeprefix('torch.')}", (moved, rates)


def _convolutions(longest: Mapping[str, float]) -> Iterator[tuple[str, tuple[list[float], list[float]]]]:
    """3 x 3, channels x channels, forward and backward, in FLOP/s over the FLOP for each byte of a call."""
    for dtype, most in _measured(longest):
        points: dict[str, list[tuple[float, float]]] = {"forward": [], "backward": []}
        for channels, side in CONVOLUTIONS:
            image = torch.randn(8, channels, side, side).to(dtype).requires_grad_()
            weight = torch.randn(channels, channels, 3, 3).to(dtype).requires_grad_()
            flops = 2.0 * 8 * channels**2 * 9 * side**2
            moved = dtype.itemsize * (2 * image.numel() + weight.numel())
            call = functools.partial(torch.conv2d, image, weight, padding=1)
            # The first call makes the kernel, which may take a second: it only counts where all take longer.
            lasting = most if most == BRIEF else math.inf
            forward, backward = _as_before(points, flops, 2 * flops, most) or _both(call, (image, weight), lasting, least=2)
            points["forward"].append((flops / moved, flops / forward))
            points["backward"].append(
                (2 * flops / (moved + dtype.itemsize * (image.numel() + weight.numel())), 2 * flops / backward)
            )
        yield from _named("convolution", dtype, points)


def _measured(longest: Mapping[str, float]) -> list[tuple[torch.dtype, float]]:
    """Those of ``DTYPES``."""
    return [(getattr(torch, name), longest[name]) for name in DTYPES if name in longest]


def _as_before(
    points: dict[str, list[tuple[float, float]]], forward: float, backward: float, longest: float
) -> tuple[float, float] | None:
    """Seconds of so many FLOP at the rates of the size before, where these are so low that it would take longer."""
    if not points["forward"]:
        return None
    seconds = forward / points["forward"][-1][1], backward / points["backward"][-1][1]
    return seconds if max(seconds) > longest else None


def _attention(longest: Mapping[str, float]) -> Iterator[tuple[str, tuple[list[float], list[float]]]]:
    """PyTorch's causal attention; 4 FLOP forward and 10 backward a head, dimension and pair that is attended to."""
    for dtype, most in _measured(longest):
        points: dict[str, list[tuple[float, float]]] = {"forward": [], "backward": []}
        for length in LENGTHS:
            shape = (1, HEADS, length, HEAD_SIZE)
            q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))
            call = functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True)
            flops = 4 * _pairs(length)
            _add(points, length, *(_as_before(points, flops, 2.5 * flops, most) or _both(call, (q, k, v))))
        yield from _named("attention", dtype, points)


def _packed(longest: Mapping[str, float]) -> Iterator[tuple[str, tuple[list[float], list[float]]]]:
    """The same by ``trainwright.packed_attention``, where something has loaded it."""
    if not hasattr(torch.ops.trainwright, "packed_attention"):
        return
    for dtype, most in _measured(longest):
        points: dict[str, list[tuple[float, float]]] = {"forward": [], "backward": []}
        for length in LENGTHS:
            q = torch.randn(1, HEADS // 2, length, 2, HEAD_SIZE).to(dtype).requires_grad_()
            k, v = (torch.randn(1, HEADS // 2, length, HEAD_SIZE).to(dtype).requires_grad_() for _ in range(2))
            documents = torch.tensor([0, length], dtype=torch.int32)
            flops = 4 * _pairs(length)
            try:
                call = functools.partial(_packed_call, q, k, v, documents)
                _add(points, length, *(_as_before(points, flops, 2.5 * flops, most) or _both(call, (q, k, v))))
            except RuntimeError as error:  # there is no compiler to build it with
                logger.info("packed attention isn't measured: %s", error)
                return
        yield from _named("packed", dtype, points)


def _packed_call(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    return torch.ops.trainwright.packed_attention(q, k, v, documents)[0]


def _add(points: dict[str, list[tuple[float, float]]], length: int, forward: float, backward: float) -> None:
    pairs = _pairs(length)
    points["forward"].append((4 * pairs, 4 * pairs / forward))
    points["backward"].append((10 * pairs, 10 * pairs / backward))


def _pairs(length: int) -> float:
    """That causal attention looks at, times heads and their size."""
    return HEADS * HEAD_SIZE * length * (length + 1) / 2


def _both(
    call: Callable[[], Tensor], inputs: tuple[Tensor, ...], lasting: float = LASTING, least: int = 1
) -> tuple[float, float]:
    """Seconds forward and backward, as ``_seconds``."""
    out: list[Tensor] = []
    forward = _seconds(lambda _: out.__setitem__(slice(None), [call()]), lasting, least)
    grad = torch.ones_like(out[0])
    return forward, _seconds(lambda _: torch.autograd.grad(out[0], inputs, grad, retain_graph=True), lasting, least)


def _named(
    kind: str, dtype: torch.dtype, points: dict[str, list[tuple[float, float]]]
) -> Iterator[tuple[str, tuple[list[float], list[float]]]]:
    name = str(dtype).removeprefix("torch.")
    for phase, found in points.items():
        yield f"{kind}.{phase}.{name}", ([size for size, _ in sorted(found)], [rate for _, rate in sorted(found)])


def _overhead() -> float:
    """Seconds that an operator costs whatever its size: the mean over a chain of tiny layers, forward and backward."""
    one = torch.ones(1, 1)
    chain = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(CHAIN)))
    # A layer is five operators: a product forward, two and a sum backward, and the gradient's way into ``grad``.
    return _seconds(lambda _: chain(one).backward()) / (5 * CHAIN)
