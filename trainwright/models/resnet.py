"""Residual networks (He et al. 2016): ResNet-18, 34 and 50 under torchvision's names, with stochastic depth."""

from __future__ import annotations

from itertools import islice
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import dropout, relu

from trainwright.recipe.base import Fraction, Positive, Section

SMALL = 64  # pixels: images up to this size aren't shrunk by the stem
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}


class ResnetOptions(Section):
    """``model.options`` of a resnet."""

    stem: Literal["imagenet", "small"] | None = Field(
        None,
        description="imagenet: 7x7 with stride 2 and a pooling. small: 3x3 with stride 1. null: small up to 64 pixels a side",
    )
    width: Positive = Field(64, description="channels of the first stage; each later one has twice those of the one before")
    stochastic_depth: Fraction = Field(
        0.0, description="probability that a sample skips the last block, growing linearly over the blocks (Huang et al. 2016)"
    )
    zero_init_residual: bool = Field(False, description="each block starts as the identity (Goyal et al. 2017, section 5.1)")
    dropout: Fraction = Field(0.0, description="before the head")


class StochasticDepth(nn.Module):
    """In training, a sample is zeroed with probability ``rate``, else scaled to keep the expectation (Huang et al. 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        return x * dropout(x.new_ones(len(x), *[1] * (x.ndim - 1)), self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut around them."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, rate: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)
        self.drop = StochasticDepth(rate)

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return relu(self.drop(out) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and the shortcut; the 3x3 one has the stride, as in torchvision."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, rate: float) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)
        self.drop = StochasticDepth(rate)

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        out = relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return relu(self.drop(out) + self.downsample(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _stage(kind: type[BasicBlock | Bottleneck], first: int, place: int, rates: list[float]) -> nn.Sequential:
    """A block for each rate; the stage at ``place`` (from 0) has ``first`` * 2^place channels (times the expansion)."""
    width = first * 2**place
    before = width // 2 * kind.expansion if place else first
    blocks: list[nn.Module] = [kind(before, width, 2 if place else 1, rates[0])]
    return nn.Sequential(*blocks, *(kind(width * kind.expansion, width, 1, rate) for rate in rates[1:]))


class ResNet(nn.Module):
    """(n, channels, height, width) -> (n, outputs), for images of any size.

    Args:
        name: resnet18, resnet34 or resnet50.
    """

    def __init__(self, options: ResnetOptions, inputs: tuple[int, ...], outputs: int, *, name: str) -> None:
        super().__init__()
        channels, *size = inputs
        stem = options.stem or ("small" if max(size) <= SMALL else "imagenet")
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(channels, options.width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(options.width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else nn.Identity()
        self.kind: type[BasicBlock | Bottleneck] = Bottleneck if name == "resnet50" else BasicBlock
        self.zero_init_residual = options.zero_init_residual
        total = sum(DEPTHS[name])
        rates = (options.stochastic_depth * place / total for place in range(1, total + 1))
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            _stage(self.kind, options.width, place, list(islice(rates, depth))) for place, depth in enumerate(DEPTHS[name])
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(options.dropout)
        self.fc = nn.Linear(8 * options.width * self.kind.expansion, outputs)

    def blocks(self) -> list[nn.Module]:
        """The residual blocks, in order."""
        return [*self.layer1, *self.layer2, *self.layer3, *self.layer4]

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))

    def published_start(self, name: str, layer: nn.Module) -> None:
        """torchvision's start: convolutions as He et al. 2015 (fan out); the last norm of a block zero, if so wished."""
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        last = "bn3" if self.kind is Bottleneck else "bn2"
        if self.zero_init_residual and isinstance(layer, nn.BatchNorm2d) and name.endswith(f".{last}"):
            nn.init.zeros_(layer.weight)
