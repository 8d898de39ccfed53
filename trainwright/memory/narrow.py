"""A frozen table (an embedding, a head) kept in the fewer bits of its file: its numbers are widened where they are used.

A layer becomes one by a change of class, so names stay.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainwright import widened


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


def become(layers: list[nn.Module], dtype: torch.dtype) -> bool:
    """Keep the one weight that these layers share in ``dtype``, where nothing of them learns and it takes fewer bytes.

    Returns:
        Whether they do. Layers that something else has changed stay as they are.
    """
    plain = all(type(layer) in (nn.Embedding, nn.Linear) for layer in layers)
    learns = any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    weight = layers[0].weight
    assert isinstance(weight, nn.Parameter)
    wide = weight.dtype
    if not plain or learns or not widened.narrower(dtype, wide):
        return False
    for layer in layers:
        if isinstance(layer, nn.Embedding):
            layer.__class__ = NarrowEmbedding
            assert isinstance(layer, NarrowEmbedding)
            layer.wide = wide
        else:
            layer.__class__ = NarrowLinear
    weight.data = weight.data.to(dtype)
    return True
