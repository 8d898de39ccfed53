"""Memory that operators take on a CPU beside their results, while they run: oneDNN's reordered and padded copies.

oneDNN packs the weights of a convolution, and in the backward makes their gradient in its own layout before it is copied out;
images that aren't channels last it reorders as well. In bfloat16 sums are kept in float32 with channels padded to 16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
PADDED = 16  # channels


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
    if operator is aten.mkldnn_rnn_layer_backward.default:
        return 4 * _bytes(args[2])
    return 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _summed(weight: Tensor) -> int:
    """Float32 sums of a weight's gradient, with one bfloat16 copy."""
    outputs, inputs = weight.shape[:2]
    return 6 * outputs * -(-inputs // PADDED) * PADDED * (weight.numel() // max(1, outputs * inputs))
