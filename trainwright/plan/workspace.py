"""Memory that operators take on a CPU beside their results, while they run: oneDNN's reordered and padded copies.

oneDNN packs the weights of a convolution, and in the backward makes their gradient in its own layout before it is copied out;
images that aren't channels last it reorders as well. In bfloat16 sums are kept in float32 with channels padded to 16. The
backward of pooling copies where its gradient and its images are laid out differently (ATen/native/cpu/MaxPoolKernel.cpp).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
PADDED = 16  # channels
PORTION = 2**20  # numbers of a weight that are unpacked at once, in float32
POOLS = (
    aten.max_pool2d_with_indices_backward, aten.avg_pool2d_backward, aten._adaptive_avg_pool2d_backward,
    aten.adaptive_max_pool2d_backward,
)  # fmt: skip


def workspace(operator: Any, args: Any, result: Any) -> int:
    """Bytes; 0 where an operator is known to need none, or isn't known."""
    if operator is aten.convolution.default:
        x, weight = args[0], args[1]
        reordered = 0 if _last(x) else max(_bytes(x), _bytes(result))
        return _bytes(weight) + reordered
    if operator is aten.convolution_backward.default:
        grad, x, weight = args[:3]
        packed = 2 * _bytes(weight) if weight.dtype == torch.float32 else _summed(weight)
        return max(packed, 0 if _last(x) else _bytes(x) + _bytes(grad))
    if operator.overloadpacket in POOLS and _last(args[0]) != _last(args[1]):
        indices = sum(_bytes(x) for x in args[2:] if isinstance(x, Tensor))
        return _bytes(result) + indices
    if operator._schema.name.startswith("trainwright::supplied_linear"):
        x = args[0]
        return x.shape[-1] * result.shape[-1] * x.element_size() + 4 * PORTION
    if operator is aten.mkldnn_rnn_layer_backward.default:
        return _recurrent(args[0], args[1:5], args[7], args[10])
    return 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _summed(weight: Tensor) -> int:
    """Float32 sums of a weight's gradient, with one bfloat16 copy."""
    outputs, inputs = weight.shape[:2]
    return 6 * outputs * -(-inputs // PADDED) * PADDED * (weight.numel() // max(1, outputs * inputs))


def _recurrent(x: Tensor, weights: list[Tensor], out: Tensor, grad: Tensor | None) -> int:
    """oneDNN's backward of an LSTM layer keeps the four gates' gradients of all steps; in bfloat16 float32 copies instead."""
    packed = 2 * sum(map(_bytes, weights))
    if x.dtype != torch.float32:
        return _bytes(x) + 2 * _bytes(out) + 2 * packed
    whole = grad is not None and grad.is_contiguous()  # else it is made so, of zeros where only the last step has one
    return 4 * _bytes(out) + packed + (0 if whole else _bytes(out))
