"""Memory layout: channels last for convolutions, which their fast kernels want on CPUs and on tensor cores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainwright.models.contract import Change


def apply(model: nn.Module) -> Change:
    """Store the weights of convolutions channels last; values, shapes and names stay.

    Only the order of sums within a convolution changes.
    """
    if not has_convolutions(model):
        return Change("layout", "contiguous: there are no convolutions")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return Change("layout", "convolutions in channels-last order")


def has_convolutions(model: nn.Module) -> bool:
    """Whether any layer convolves images."""
    return any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules())


def of_inputs(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What puts a batch (n, channels, height, width) into the layout that the model computes in."""
    if has_convolutions(model):
        return lambda inputs: inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs
    return lambda inputs: inputs
