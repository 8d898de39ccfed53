"""VGG-16 (Simonyan and Zisserman 2015, configuration D), without and with batch normalisation; torchvision's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from trainwright.models.contract import Stretch, TensorPlan
from trainwright.recipe import InputError
from trainwright.recipe.base import Fraction, Section

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
PUBLISHED, SMALLEST = 224, 2 ** len(STAGES)  # pixels a side
GRID, WIDE = 7, 4096


class VggOptions(Section):
    """``model.options`` of vgg16 and vgg16_bn."""

    input: Literal["fixed", "any"] = Field(
        "fixed", description="fixed: 224x224 pixels. any: averaged to 7x7 before the same classifier, from 32 pixels a side"
    )
    dropout: Fraction = Field(0.5, description="after both hidden layers of the classifier")


class Vgg16(nn.Module):
    """(n, channels, height, width) -> (n, outputs).

    ``features.N`` and ``classifier.N`` are numbered as in torchvision, so its weights fit, in either mode of ``input``.

    Raises:
        InputError: images of a size that it can't take.
    """

    def __init__(self, options: VggOptions, inputs: tuple[int, ...], outputs: int, *, norm: bool) -> None:
        super().__init__()
        channels, height, width = inputs
        _check_size(options, height, width)
        self.pixels = height * width
        stages = [list(_stage(before, sizes, norm)) for before, sizes in _plan(channels)]
        self.features = nn.Sequential(*(layer for stage in stages for layer in stage))
        # A plain list: registered, the stages would give each parameter a second name.
        self._stages = [nn.Sequential(*stage) for stage in stages]
        self.avgpool = nn.AdaptiveAvgPool2d(GRID) if options.input == "any" else nn.Identity()
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(STAGES[-1][-1] * GRID * GRID, WIDE),
            nn.ReLU(inplace=True),
            nn.Dropout(options.dropout),
            nn.Linear(WIDE, WIDE),
            nn.ReLU(inplace=True),
            nn.Dropout(options.dropout),
            nn.Linear(WIDE, outputs),
        )

    def blocks(self) -> list[nn.Module]:
        """The five stages of convolutions with their poolings, in order."""
        return list(self._stages)

    def parts(self) -> dict[str, int]:
        """What a pipeline cuts between, as ``contract.Chain`` has it."""
        named = {id(module): name for name, module in self.named_modules()}
        features = {named[id(layer)]: self.pixels >> 2 * place for place, stage in enumerate(self._stages) for layer in stage}
        return {**features, "avgpool": 1, "flatten": 1, **{f"classifier.{place}": 1 for place in range(len(self.classifier))}}

    def tensor_plan(self) -> TensorPlan:
        """The first two layers of the classifier, which hold nine parameters in ten; the rest is whole."""
        pair = Stretch(("classifier.0",), "classifier.3", between=("classifier.1", "classifier.2"))
        return TensorPlan({"the classifier's width": WIDE}, (pair,))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self._stages:
            x = stage(x)
        return self.classifier(self.flatten(self.avgpool(x)))

    @staticmethod
    def published_start(name: str, layer: nn.Module) -> None:
        """torchvision's start: convolutions as He et al. 2015 (fan out), linear layers normal(0, 0.01), biases zero."""
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0.0, 0.01)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert isinstance(layer.bias, Tensor)
            nn.init.zeros_(layer.bias)


def _plan(channels: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """For each stage the channels that come in, and those of its convolutions."""
    for sizes in STAGES:
        yield channels, sizes
        channels = sizes[-1]


def _stage(before: int, sizes: tuple[int, ...], norm: bool) -> Iterator[nn.Module]:
    for size in sizes:
        yield nn.Conv2d(before, size, 3, padding=1)
        if norm:
            yield nn.BatchNorm2d(size)
        yield nn.ReLU(inplace=True)
        before = size
    yield nn.MaxPool2d(2)


def _check_size(options: VggOptions, height: int, width: int) -> None:
    found = f"the images have {height}x{width}"
    if options.input == "fixed" and (height, width) != (PUBLISHED, PUBLISHED):
        raise InputError(
            f"model.options.input: fixed is the published head for {PUBLISHED}x{PUBLISHED} pixels, {found}; "
            f"say model.options: {{input: any}}, or data.size: {PUBLISHED}"
        )
    if min(height, width) < SMALLEST:
        raise InputError(
            f"model.options.input: any takes images from {SMALLEST} pixels a side, {found}; set data.size: {SMALLEST} or more"
        )
