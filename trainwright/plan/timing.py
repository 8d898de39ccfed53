"""How long a step takes on a device, from its operators and messages, and which bound binds.

- An operator takes the longer of its computation and its memory traffic (Williams et al. 2009, "Roofline: An Insightful
  Visual Performance Model for Multicore Architectures").
- An accelerator computes products at ``Device.sustained`` of its dense peak, less what tiles and waves leave idle (NVIDIA,
  "Matrix Multiplication Background User's Guide", tile and wave quantization). Its host starts operators ahead of time, so
  a phase takes the longer of starting and running its operators.
- The CPU's rates are interpolated between measured sizes, and each call's overhead adds up.
- A message costs steps x latency + bytes / bandwidth (Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective
  Communication Operations in MPICH", sections 4 and 5; trees: Sanders, Speck and Traeff 2009).
- What overlaps hides behind forward and backward; only the rest is exposed.
- A pipeline waits (stages - 1) / (chunks x micro-batches) of its work (Narayanan et al. 2021, "Efficient Large-Scale
  Language Model Training on GPU Clusters Using Megatron-LM", section 2.2), and more where micro-batches are fewer than stages.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainwright.plan.devices import Curves, Device
from trainwright.plan.work import Message, Work

# Shares of the peak by the tile that a product is cut into; smaller ones reload operands more often.
TILES = ((256, 128, 1.0), (128, 128, 0.97), (128, 64, 0.85), (64, 64, 0.7), (32, 64, 0.45), (16, 64, 0.25))
LEAST_DEPTH = 512  # of the parts that a deep product with few tiles is split into
# Of what products sustain: FlashAttention-2 (Dao 2023, section 4) reaches 180 to 225 of an A100's 312 TFLOP/s, its backward
# 130 to 190.
ATTENTION, ATTENTION_BACKWARD = 0.8, 0.65
CONVOLUTION = 0.7  # of what products sustain: an assumption
MEMORY_SHARE = 0.8  # of the bandwidth that streams reach (BabelStream on A100 and H100: 0.85 to 0.9; training is less even)
LINK_SHARE = 0.8  # of a link's rate that large messages reach (nccl-tests on DGX A100 and H100: 0.77 to 0.85)
HIDING = ("forward", "backward", "loss")
WORDS = {"compute": "matrix products", "memory": "memory bandwidth", "launching": "launching operators", "links": "links"}


@dataclass(frozen=True)
class Timing:
    """Seconds of one optimizer step. ``seconds`` is the sum of ``phases``, ``exposed`` and ``bubble``.

    ``compute``, ``memory`` and ``launching`` say what the operators waited for; ``communication`` is all messages, ``exposed``
    those that don't hide behind computation.
    """

    seconds: float
    phases: dict[str, float]
    kinds: dict[str, float]
    compute: float
    memory: float
    launching: float
    communication: float
    exposed: float
    bubble: float
    flops: int
    sent: int  # bytes that this process sends
    bound: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Cost:
    """Of one call: seconds it runs, seconds it takes to start, and whether the first are of memory traffic."""

    running: float
    starting: float
    memory: bool


def estimate(
    works: Sequence[Work], messages: Sequence[Message], device: Device, processes: int = 1, bubble: float = 0.0
) -> Timing:
    """The time of a step of one process.

    Args:
        works: what this process computes.
        messages: what it sends and receives.
        device: where; a measured CPU is shared by all ``processes``.
        processes: of the whole run.
        bubble: the share of forward and backward that a pipeline waits (``idle_share``).
    """
    costs = [(work, cost(work, device, processes)) for work in works]
    phases = {phase: _phase([pair for pair in costs if pair[0].phase == phase], device) for phase in _phases(works)}
    waits = {name: sum(found[name] for found in phases.values()) for name in ("compute", "memory", "launching")}
    busy = {phase: sum(found.values()) for phase, found in phases.items()}
    hiding = sum(busy.get(phase, 0.0) for phase in HIDING)
    hidden = sum(_total(one, device) for one in messages if one.overlaps)
    open_ones = sum(_total(one, device) for one in messages if not one.overlaps)
    exposed = open_ones + max(0.0, hidden - hiding)
    # The messages between a pipeline's stages and inside of its micro-batches wait as its computation does.
    idle = bubble * (hiding + open_ones)
    bounds = {**waits, "links": exposed}
    return Timing(
        sum(busy.values()) + exposed + idle, busy, _kinds(costs, waits["launching"]), **waits, communication=hidden + open_ones,
        exposed=exposed, bubble=idle, flops=sum(work.flops * work.calls for work in works),
        sent=sum(round(one.calls * sent(one)) for one in messages), bound=WORDS[max(bounds, key=lambda name: bounds[name])],
    )  # fmt: skip


def idle_share(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """What a pipeline waits, as a share of its work.

    (p - 1) / (v m) for 1F1B and GPipe, with v chunks of each process when interleaved. With m < p a process also waits between
    its own chunks. It is b / (1 - b) of ``parallel.pipeline_split.bubble``, the share b of a whole step.
    """
    work = chunks * micro_batches
    return (chunks * max(micro_batches, stages) + min(micro_batches, stages) - 1) / work - 1


def _phases(works: Sequence[Work]) -> list[str]:
    return list(dict.fromkeys(work.phase for work in works))


def _phase(costs: Sequence[tuple[Work, Cost]], device: Device) -> dict[str, float]:
    """What a phase waits for. A CPU does one thing at a time; an accelerator runs while its host starts the next operators."""
    compute = sum(one.running * work.calls for work, one in costs if not one.memory)
    memory = sum(one.running * work.calls for work, one in costs if one.memory)
    starting = sum(one.starting * work.calls for work, one in costs)
    launching = starting if device.curves else max(0.0, starting - compute - memory)
    return {"compute": compute, "memory": memory, "launching": launching}


def _kinds(costs: Sequence[tuple[Work, Cost]], launching: float) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for work, one in costs:
        found[work.kind] += one.running * work.calls
    return {**found, "launching": launching}


# --- one operator -------------------------------------------------------------


def cost(work: Work, device: Device, share: int = 1) -> Cost:
    """Of one call; ``share`` processes divide a measured CPU."""
    if device.curves is not None:
        return _measured(work, device.curves, share)
    computing = work.flops / (_rate(work.dtype, device, work.kind) * _efficiency(work, device)) if work.flops else 0.0
    moving = work.bytes / (device.bandwidth * MEMORY_SHARE)
    return Cost(max(computing, moving), device.launch, moving >= computing)


def _rate(dtype: str, device: Device, kind: str) -> float:
    """The dense peak; of a dtype without hardware for products that of float32, of float64 half of it."""
    if dtype == "float32" and kind == "convolution" and "tf32" in device.flops:
        return device.flops["tf32"]  # torch.backends.cudnn.allow_tf32 is on by default
    name = "float8" if dtype.startswith("float8") else dtype
    return device.flops.get(name, device.flops["float32"] / (2 if dtype == "float64" else 1))


def _efficiency(work: Work, device: Device) -> float:
    """The share of the dense peak that an accelerator reaches."""
    if work.kind == "product" and len(work.shape) == 4:
        return device.sustained * tiling(*work.shape, device.units)
    if work.kind == "attention":
        return device.sustained * (ATTENTION_BACKWARD if work.phase == "backward" else ATTENTION)
    return device.sustained * (CONVOLUTION if work.kind == "convolution" else 1.0)


def tiling(batch: int, m: int, n: int, k: int, units: int) -> float:
    """The share of the sustained rate that a product's shape allows, of (batch, m, k) x (batch, k, n) on so many units.

    The last tile of each axis is computed whole, and the last wave of tiles takes as long as a full one.
    """
    best = 0.0
    for rows, columns, rate in (*TILES, *((c, r, rate) for r, c, rate in TILES)):
        tiles = batch * math.ceil(m / rows) * math.ceil(n / columns)
        filled = batch * m * n / (tiles * rows * columns)
        parts = _parts(tiles, k, units)
        waves = tiles * parts / (math.ceil(tiles * parts / units) * units)
        best = max(best, rate * filled * waves)
    return best


def _parts(tiles: int, k: int, units: int) -> int:
    """Into how many a deep product with few tiles is split (split-k), so that all units have work."""
    return max(1, min(units // tiles, k // LEAST_DEPTH))


def _measured(work: Work, curves: Curves, share: int) -> Cost:
    """On the calibrated CPU; the rates of products and attention hold their memory traffic."""
    one = _isolated(work, curves, share)
    together = curves.together.get(work.dtype, curves.together.get("float32", 1.0))
    return Cost(together * one.running, one.starting, one.memory)


def _isolated(work: Work, curves: Curves, share: int) -> Cost:
    """As it was measured: the same call again and again."""
    if work.kind == "product" and len(work.shape) == 4:
        return Cost(share * work.flops / _product_rate(work, curves), curves.overhead, False)
    if work.kind in ("convolution", "attention") and (rate := _heavy_rate(work, curves)):
        return Cost(share * work.flops / rate, curves.overhead, False)
    moving = share * work.bytes / _along(_curve(curves, _mover(work), work.dtype), work.bytes)
    return Cost(moving, curves.overhead, True)


def _mover(work: Work) -> str:
    """Which measured curve an operator without large products is like."""
    if "max_pool" in work.operator and "backward" not in work.operator:
        return "pool"
    return "copy" if work.kind == "copy" else "dear" if _dear(work.operator) else "elementwise"


def _dear(operator: str) -> bool:
    """Whether each element takes more than an addition."""
    name = operator.rpartition(".")[2]
    parts = ("softmax", "norm", "gelu", "silu", "sigmoid", "tanh", "dropout", "bernoulli", "rsqrt")
    return name.strip("_") in ("exp", "exp2", "log", "log2", "erf", "pow", "sin", "cos") or any(part in name for part in parts)


def _heavy_rate(work: Work, curves: Curves) -> float | None:
    phase = "backward" if work.phase == "backward" else "forward"
    kind = "packed" if work.operator.startswith("trainwright.packed_attention") else work.kind
    for name in dict.fromkeys((kind, work.kind)):
        for dtype in (work.dtype, "float32"):
            if (curve := curves.rates.get(f"{name}.{phase}.{dtype}")) is not None:
                return _along(curve, work.flops / max(1, work.bytes) if work.kind == "convolution" else work.flops)
    return None


def _curve(curves: Curves, name: str, dtype: str) -> tuple[list[float], list[float]]:
    return curves.rates.get(f"{name}.{dtype}") or curves.rates[f"{name}.float32"]


def _along(curve: tuple[list[float], list[float]], size: float) -> float:
    """The rate at a size, linear between the logarithms; beyond the ends it stays."""
    sizes, rates = curve
    return _blend(_place(sizes, size), sizes, lambda place: rates[place])


def _between(low: float, high: float, weight: float) -> float:
    return math.exp((1 - weight) * math.log(low) + weight * math.log(high))


def _place(sizes: Sequence[float], size: float) -> tuple[int, float]:
    """Which measured size is the last below, and how far it is to the next."""
    if size <= sizes[0] or len(sizes) == 1:
        return 0, 0.0
    place = bisect_right(sizes, size) - 1
    if place >= len(sizes) - 1:
        return len(sizes) - 1, 0.0
    return place, math.log(size / sizes[place]) / math.log(sizes[place + 1] / sizes[place])


def _product_rate(work: Work, curves: Curves) -> float:
    """Between the measured shapes, linear in the logarithms of m, n and k; a batch counts as further rows.

    What is thinner than the thinnest takes as long as that: vectors and tiles are filled up.
    """
    batch, m, n, k = work.shape
    sizes, rates = curves.products.get(work.dtype) or curves.products["float32"]
    rows, columns, depth = (_place(sizes, size) for size in (batch * m, n, k))
    filled = math.prod(min(1.0, size / sizes[0]) for size in (batch * m, n, k))

    def line(row: int, column: int) -> float:
        return _blend(depth, sizes, lambda place: rates[row][column][place])

    return filled * _blend(rows, sizes, lambda row: _blend(columns, sizes, lambda column: line(row, column)))


def _blend(place: tuple[int, float], sizes: Sequence[float], value: Callable[[int], float]) -> float:
    index, weight = place
    return _between(value(index), value(min(index + 1, len(sizes) - 1)), weight)


# --- one message --------------------------------------------------------------


def _total(message: Message, device: Device) -> float:
    return message.calls * message_time(message, device)


def sent(message: Message) -> float:
    """Bytes that one process sends for one call, by the ring."""
    p, n = message.size, message.bytes
    factors = {"all_reduce": 2 * (p - 1) / p, "broadcast": 1.0 if p > 1 else 0.0, "send": 1.0}
    return factors.get(message.kind, (p - 1) / p) * n


def message_time(message: Message, device: Device) -> float:
    """Of one call.

    A group that doesn't fit in a node goes through the links between nodes. Its members in one node share the links of all
    devices that lie between them (stride), as the rings of NCCL do.
    """
    if message.size < 2 and message.kind != "send":
        return 0.0
    inside = max(1, min(message.size, device.node_size // message.stride))  # members in one node
    across = math.ceil(message.size / inside) - 1 if message.kind != "send" else int(message.stride >= device.node_size)
    near = device.node_link * LINK_SHARE
    bandwidth = min(near, inside * device.link * LINK_SHARE) if across else near
    hops = message.size - 1 - across
    ring = across * device.latency + max(0, hops) * device.node_latency
    hop = device.latency if across else device.node_latency
    return _ALGORITHMS[message.kind](message.size, message.bytes / bandwidth, ring, hop)


def _all_reduce(p: int, transfer: float, ring: float, hop: float) -> float:
    """The better of a ring, 2 (p - 1) a + 2 (p - 1) / p n b, and a double binary tree, 2 log p a + 2 n b."""
    return min(2 * ring + 2 * (p - 1) / p * transfer, 2 * math.ceil(math.log2(p)) * hop + 2 * transfer)


def _ring(p: int, transfer: float, ring: float, hop: float) -> float:
    """(p - 1) a + (p - 1) / p n b: all-gather, reduce-scatter, pairwise all-to-all."""
    return ring + (p - 1) / p * transfer


def _broadcast(p: int, transfer: float, ring: float, hop: float) -> float:
    """A pipelined tree: log p a + n b."""
    return math.ceil(math.log2(p)) * hop + transfer


def _send(p: int, transfer: float, ring: float, hop: float) -> float:
    return hop + transfer


_ALGORITHMS: dict[str, Callable[[int, float, float, float], float]] = {
    "all_reduce": _all_reduce, "all_gather": _ring, "reduce_scatter": _ring, "all_to_all": _ring, "broadcast": _broadcast,
    "send": _send,
}  # fmt: skip
