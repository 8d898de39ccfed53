"""A plain convolutional network for small images."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from torch import Tensor, nn

from trainwright.models.contract import present
from trainwright.recipe import InputError
from trainwright.recipe.base import Fraction, Positive, Section


def _odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError(f"{kernel} is even; an odd number of pixels has a centre, so that images keep their size")
    return kernel


class CnnOptions(Section):
    """``model.options`` of a cnn."""

    channels: Annotated[list[Positive], Field(min_length=1)] = Field(
        [32, 64], description="of each stage, which halves the image"
    )
    repeat: Positive = Field(1, description="convolutions in a stage")
    kernel: Annotated[Positive, AfterValidator(_odd)] = Field(3, description="pixels a side, odd")
    pooling: Literal["max", "avg"] = "max"
    norm: Literal["batch", "none"] = "batch"
    hidden: Positive = Field(128, description="units of the layer before the head")
    dropout: Fraction = Field(0.0, description="before the head")


class Cnn(nn.Module):
    """(n, channels, height, width) -> (n, outputs): stages that halve the image, one hidden layer, a linear head.

    Raises:
        InputError: the image is too small for so many poolings.
    """

    def __init__(self, options: CnnOptions, inputs: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        channels, height, width = inputs
        self.pixels = height * width
        count = len(options.channels)
        check_halvings(count, height, width)
        sizes = [channels, *options.channels]
        self.stages = nn.Sequential(*(_stage(options, *pair) for pair in pairwise(sizes)))
        self.flatten = nn.Flatten()
        self.hidden = nn.Linear(sizes[-1] * (height >> count) * (width >> count), options.hidden)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Linear(options.hidden, outputs)

    def blocks(self) -> list[nn.Module]:
        """The stages of convolutions, in order."""
        return present(self.stages)

    def parts(self) -> dict[str, int]:
        """What a pipeline cuts between, as ``contract.Chain`` has it."""
        stages = {f"stages.{place}": self.pixels >> 2 * place for place in range(len(self.stages))}
        return {**stages, "flatten": 1, "hidden": 1, "activation": 1, "dropout": 1, "head": 1}

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.hidden(self.flatten(self.stages(x))))
        return self.head(self.dropout(hidden))


def _stage(options: CnnOptions, inputs: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for place in range(options.repeat):
        layers += convolution(outputs if place else inputs, outputs, options.kernel, options.norm)
    pool = nn.MaxPool2d(2) if options.pooling == "max" else nn.AvgPool2d(2)
    return nn.Sequential(*layers, pool)


def check_halvings(count: int, height: int, width: int) -> None:
    """That an image survives so many poolings by two.

    Raises:
        InputError: it doesn't, with the most that it does.
    """
    if min(height, width) >> count == 0:
        raise InputError(
            f"model.options.channels: {count} stages halve the image {count} times, which takes {2**count} pixels a side; "
            f"these have {height}x{width}: give at most {min(height, width).bit_length() - 1} stages, or set data.size"
        )


def convolution(inputs: int, outputs: int, kernel: int, norm: Literal["batch", "none"]) -> list[nn.Module]:
    """Convolution that keeps the size, norm, ReLU; a bias only where no norm takes it away again."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=norm == "none")]
    return [*layers, *([nn.BatchNorm2d(outputs)] if norm == "batch" else []), nn.ReLU()]
