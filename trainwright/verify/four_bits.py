"""NF4 once more, in the words of its paper: the values that the plain run's base has where the recipe's is in 4 bits."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from trainwright.loop import Run
from trainwright.memory import supplied
from trainwright.memory.four_bit import GGUF_BYTES
from trainwright.models import pretrained
from trainwright.models.gguf import GGUFWeights

BLOCK = 64
OFFSET = 0.9677083  # the largest quantile that has a value


def values() -> Tensor:
    """(16,) float32, ascending: 8 quantiles of a normal distribution above zero, 7 below, and zero (appendix E)."""
    quantile = NormalDist().inv_cdf
    below = [-quantile(p) for p in torch.linspace(OFFSET, 0.5, 8)[:-1].tolist()]
    above = [quantile(p) for p in torch.linspace(OFFSET, 0.5, 9)[:-1].tolist()]
    found = torch.tensor(sorted([*below, 0.0, *above]))
    return found / found.max()


def rounded(weight: Tensor) -> Tensor:
    """Each number to the nearest of the values times the largest magnitude of its block of 64; float32."""
    blocks = weight.float().reshape(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / largest.clamp(min=1e-30))[..., None].sub(values()).abs().argmin(-1)
    return (values()[nearest] * largest).view(weight.shape)


@torch.no_grad()
def round_base(run: Run) -> None:
    """Give frozen linear layers of the blocks the file's values in NF4, but those whose blocks GGUF has in few bits anyway."""
    assert run.recipe.model.pretrained is not None
    file = pretrained.open_weights(pretrained.locate(run.recipe.model.pretrained))
    stored = set(file.names())
    for name, layer in supplied.layers(run.model, None, "adapt.base").items():
        key = f"{name}.weight"
        packed = isinstance(file, GGUFWeights) and key in stored and file.kind(key) in GGUF_BYTES
        if key in stored and not packed and not layer.weight.numel() % BLOCK:
            layer.weight.copy_(rounded(file.load(key)))
