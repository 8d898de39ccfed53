"""Memory layout: channels last for convolutions, which their fast kernels want on CPUs and on tensor cores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainwright.models.contract import Change

# Below so many input channels oneDNN makes a wrong gradient for a strided 1x1 convolution's weights where its input is channels
# last, and writes beyond its workspace: uxlfoundation/oneDNN#6035. A block has 8 channels with AVX2, 16 with AVX-512.
SAFE_CHANNELS = 16


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


class Thinned(nn.Conv2d):
    """A strided 1x1 convolution as one of stride 1 over the pixels that it reads; the same sums."""

    def forward(self, input: Tensor) -> Tensor:
        down, right = self.stride
        return nn.functional.conv2d(input[..., ::down, ::right], self.weight, self.bias, groups=self.groups)


def thin(model: nn.Module) -> None:
    """Keep narrow strided 1x1 convolutions from a kernel that is wrong on CPUs (``SAFE_CHANNELS``)."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_unsafe(module):
            module.__class__ = Thinned


def _is_unsafe(layer: nn.Conv2d) -> bool:
    pixel = set(layer.kernel_size) == {1} and layer.padding in ("valid", (0, 0))
    return pixel and set(layer.stride) != {1} and layer.in_channels // layer.groups < SAFE_CHANNELS


def has_convolutions(model: nn.Module) -> bool:
    """Whether any layer convolves images."""
    return any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules())


def of_inputs(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What puts a batch (n, channels, height, width) into the layout that the model computes in."""
    if has_convolutions(model):
        return lambda inputs: inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs
    return lambda inputs: inputs
