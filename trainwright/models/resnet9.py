"""A short residual network that learns small images fast, in the manner of ResNet-9 (Page 2018, "How to train your ResNet")."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from trainwright.models.cnn import check_halvings, convolution
from trainwright.recipe.base import AboveZero, Positive, Section


class Resnet9Options(Section):
    """``model.options`` of a resnet9."""

    stem: Positive = Field(16, description="channels of the first convolution, at full size")
    channels: Annotated[list[Positive], Field(min_length=1)] = Field(
        [32, 64, 128], description="of each stage, which halves the image"
    )
    scale: AboveZero = Field(0.125, description="of the logits")


class Stage(nn.Module):
    """Convolution, pooling, norm and ReLU, then two more convolutions around which the input is added.

    NOTE: pooling comes before the norm, so that norm and ReLU have a quarter of the pixels to go through.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        first, norm, activation = convolution(inputs, outputs, 3, "batch")
        self.down = nn.Sequential(first, nn.MaxPool2d(2), norm, activation)
        self.residual = nn.Sequential(*convolution(outputs, outputs, 3, "batch"), *convolution(outputs, outputs, 3, "batch"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return x + self.residual(x)


class Resnet9(nn.Module):
    """(n, channels, height, width) -> (n, outputs): stem, stages, the largest value of each channel, a scaled linear head.

    Raises:
        InputError: the image is too small for so many stages.
    """

    def __init__(self, options: Resnet9Options, inputs: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        channels, height, width = inputs
        check_halvings(len(options.channels), height, width)
        self.stem = nn.Sequential(*convolution(channels, options.stem, 3, "batch"))
        sizes = [options.stem, *options.channels]
        self.stages = nn.Sequential(*(Stage(*pair) for pair in pairwise(sizes)))
        self.head = nn.Linear(sizes[-1], outputs, bias=False)
        self.scale = options.scale

    def blocks(self) -> list[nn.Module]:
        """The stages, in order."""
        return list(self.stages)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stages(self.stem(x)).amax((2, 3))
        return self.scale * self.head(features)
