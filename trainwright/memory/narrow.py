"""A frozen table (an embedding, a head) kept in the fewer bits of its file: its numbers are widened where they are used.

A layer becomes one by a change of class, so names stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainwright import widened

HALVES = (torch.bfloat16, torch.float16)


class NarrowEmbedding(nn.Embedding):
    """Looks up, then widens."""

    wide: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(self.wide)


class NarrowLinear(nn.Linear):
    """A product that widens a few rows of its weight at a time; for use without a gradient of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        flat = widened.scores(input.flatten(0, -2), self.weight)
        return (flat if self.bias is None else flat + self.bias).view(*input.shape[:-1], self.out_features)


def possible(layers: Sequence[nn.Module], dtype: torch.dtype) -> bool:
    """Whether the weight that these layers share can be kept in ``dtype``.

    It must take fewer bytes, nothing may learn, and nothing else may have changed the layers.
    """
    plain = all(type(layer) in (nn.Embedding, nn.Linear) for layer in layers)
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    wider = all(widened.narrower(dtype, parameter.dtype) for parameter in parameters)
    return plain and wider and dtype in HALVES and not any(parameter.requires_grad for parameter in parameters)


def become(layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
    """Keep the one weight that these layers share in ``dtype``."""
    weight = layers[0].weight
    assert isinstance(weight, nn.Parameter)
    for layer in layers:
        if isinstance(layer, nn.Embedding):
            layer.__class__ = NarrowEmbedding
            assert isinstance(layer, NarrowEmbedding)
            layer.wide = weight.dtype
        else:
            layer.__class__ = NarrowLinear
    weight.data = weight.data.to(dtype)
