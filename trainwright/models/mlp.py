"""A multilayer perceptron on samples of any shape, flattened."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from trainwright.models.contract import Stretch, TensorPlan, present
from trainwright.recipe.base import Fraction, Positive, Section

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU,
}
NORMS: dict[str, type[nn.Module]] = {"none": nn.Identity, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class MlpOptions(Section):
    """``model.options`` of an mlp."""

    hidden: list[Positive] = Field([512, 512], description="units of each hidden layer; []: a linear model")
    activation: Literal["relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu"] = "relu"
    dropout: Fraction = Field(0.0, description="after each hidden layer")
    norm: Literal["none", "batch", "layer"] = Field("none", description="before each activation")


class Mlp(nn.Module):
    """(n, *inputs) -> (n, outputs): linear, norm, activation and dropout for each hidden layer, then a linear head."""

    def __init__(self, options: MlpOptions, inputs: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        sizes = [math.prod(inputs), *options.hidden]
        self.options = options
        self.layers = nn.Sequential(*(_layer(options, *pair) for pair in pairwise(sizes)))
        self.head = nn.Linear(sizes[-1], outputs)

    def blocks(self) -> list[nn.Module]:
        """The hidden layers, in order."""
        return present(self.layers)

    def parts(self) -> dict[str, int]:
        """What a pipeline cuts between, as ``contract.Chain`` has it."""
        return {**{f"layers.{place}": 1 for place in range(len(self.layers))}, "head": 1}

    def tensor_plan(self) -> TensorPlan:
        """The linear layers in pairs, an odd last one whole; none where a LayerNorm between them needs all features."""
        hidden = self.options.hidden if self.options.norm != "layer" else []
        linears = [*(f"layers.{place}.0" for place in range(len(hidden))), "head"]
        firsts = range(0, len(linears) - 1, 2)
        between = [tuple(f"layers.{place}.{step}" for step in (1, 2, 3)) for place in firsts]
        stretches = [
            Stretch((linears[place],), linears[place + 1], between=steps) for place, steps in zip(firsts, between, strict=True)
        ]
        return TensorPlan({f"model.options.hidden[{place}]": hidden[place] for place in firsts}, tuple(stretches))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x.flatten(1)))


def _layer(options: MlpOptions, inputs: int, outputs: int) -> nn.Module:
    norm = NORMS[options.norm](outputs)
    return nn.Sequential(nn.Linear(inputs, outputs), norm, ACTIVATIONS[options.activation](), nn.Dropout(options.dropout))
