"""Bugs of what takes less memory: rounding, 8-bit states, 4-bit and streamed weights, states elsewhere, early updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from trainwright.memory import eight_bit, four_bit, rounding, scaling, stores, streaming, supplied
from trainwright.memory.updates import Updater

Context = Any


def always_down() -> Context:
    """Stochastic rounding that knows one chance."""
    down = lambda key, like, piece, start, count: torch.full((count,), -(2**15), dtype=torch.int16)  # noqa: E731
    return patch.object(rounding, "bits_of", down)


def to_the_nearest() -> Context:
    """Rounding that loses what is small."""

    def round_(out: Tensor, values: Tensor, bits: Tensor) -> None:
        out.copy_(values)

    return patch.object(rounding, "round_", round_)


def scale_of_the_neighbour() -> Context:
    """8-bit states whose blocks are read with the scale of the block before."""
    true = eight_bit.dequantize
    return patch.object(eight_bit, "dequantize", lambda codes, scales, code: true(codes, scales.roll(1), code))


def previous_layer_in_the_backward() -> Context:
    """A streamed layer whose backward has the weight that was read before, of another layer of this shape."""
    true, last = streaming.weight, dict[tuple[int, int], list[Tensor]]()

    def weight(held: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        before = last.get(shape, [held[0]])
        last[shape] = list(held)
        backward = torch._C._current_graph_task_id() != -1
        return true(before if backward else held, shape, dtype)

    return patch.dict(supplied.MAKERS, {"stream": weight})


def two_codes_exchanged() -> Context:
    """NF4's third and fourth values, when numbers are unpacked."""
    true, wrong = four_bit._nf4, list(four_bit.CODE)
    wrong[2], wrong[3] = wrong[3], wrong[2]

    def unpacked(packed: Tensor, scales: Tensor) -> Tensor:
        with patch.object(four_bit, "CODE", tuple(wrong)):
            return true(packed, scales)

    return patch.object(four_bit, "_nf4", unpacked)


def clipped_before_unscaled() -> Context:
    """float16's gradients are still scaled when they are clipped."""

    def forward_backward(self: scaling.Scaler, inner: Callable[[Any], Tensor], trained: Any) -> Callable[[Any], Tensor]:
        return lambda batches: inner(batches) / self.scale

    return patch.object(scaling.Scaler, "forward_backward", forward_backward)


def rate_of_the_step_before() -> Context:
    """Updates in the backward, made before the rate is set."""
    true, known = Updater._update_portion, dict[tuple[int, int], float]()

    def update(self: Updater, portion: Any) -> None:
        number = portion[0].entry.group
        group = self.param_groups[number]
        now = group["lr"]
        known[number, group["update"]] = now
        if self._order:
            group["lr"] = known.get((number, group["update"] - 1), now)
        true(self, portion)
        group["lr"] = now

    return patch.object(Updater, "_update_portion", update)


def stale_by_a_step() -> Context:
    """States in a file, as they were before the last write of them."""
    true, written = stores.OnDisk.write, dict[tuple[int, int, int], list[Tensor]]()

    def write(self: stores.OnDisk, start: int, values: Tensor) -> None:
        found = written.setdefault((self._file.number, self._offset, start), [])
        found.append(values.detach().clone())
        true(self, start, found[-2] if len(found) > 1 else values)

    return patch.object(stores.OnDisk, "write", write)
