"""A small U-Net (Ronneberger et al. 2015): an answer for each pixel, at full resolution."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainwright.models.cnn import convolution
from trainwright.recipe.base import Positive, Section


class UnetOptions(Section):
    """``model.options`` of a unet."""

    channels: Annotated[list[Positive], Field(min_length=1)] = Field(
        [16, 32, 64], description="at each resolution, from the full one down; each is half the one before"
    )
    norm: Literal["batch", "none"] = "batch"


class Down(nn.Sequential):
    """Halve the resolution (not at the first), then two convolutions."""

    def __init__(self, inputs: int, outputs: int, norm: Literal["batch", "none"], *, first: bool) -> None:
        pool: list[nn.Module] = [] if first else [nn.MaxPool2d(2)]
        super().__init__(*pool, *convolution(inputs, outputs, 3, norm), *convolution(outputs, outputs, 3, norm))


class Up(nn.Module):
    """Double the resolution, put what the way down saw at it beside, then two convolutions."""

    def __init__(self, inputs: int, outputs: int, norm: Literal["batch", "none"]) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
        self.merge = nn.Sequential(*convolution(2 * outputs, outputs, 3, norm), *convolution(outputs, outputs, 3, norm))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        return self.merge(torch.cat([seen, self.up(x)], dim=1))


class Unet(nn.Module):
    """(n, channels, height, width) -> (n, outputs, height, width), for images of any size.

    Convolutions are padded, unlike the paper's, so that the output is as large as the input; where a side can't be halved
    often enough, zeros below and to the right make up for it inside.
    """

    def __init__(self, options: UnetOptions, inputs: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        sizes = [inputs[0], *options.channels]
        pairs = list(pairwise(sizes))
        self.down = nn.ModuleList(Down(*pair, options.norm, first=not place) for place, pair in enumerate(pairs))
        self.up = nn.ModuleList(Up(big, small, options.norm) for small, big in reversed(pairs[1:]))
        self.head = nn.Conv2d(options.channels[0], outputs, 1)

    def blocks(self) -> list[nn.Module]:
        """The stages on the way down, then those on the way up."""
        return [*self.down, *self.up]

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        unit = 2 ** len(self.up)
        x = nn.functional.pad(x, (0, -width % unit, 0, -height % unit))
        seen = []
        for stage in self.down:
            x = stage(x)
            seen.append(x)
        for stage, skip in zip(self.up, reversed(seen[:-1]), strict=True):
            x = stage(x, skip)
        return self.head(x)[..., :height, :width]
