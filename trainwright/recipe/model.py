"""The sections ``model`` and ``adapt``: which model, its first weights, and what of it learns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from trainwright.recipe.base import AboveZero, Fraction, Positive, Section

Scheme = Literal["default", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "orthogonal"]


class Init(Section):
    """How new weight matrices are drawn; biases and norms keep the model's own start. Pretrained weights stay."""

    scheme: Scheme = Field("default", description="for every type of layer below that doesn't say; default: the model's own")
    linear: Scheme | None = None
    conv: Scheme | None = None
    recurrent: Scheme | None = None
    embedding: Scheme | None = None
    nonlinearity: Literal["linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu"] = Field(
        "relu", description="what follows the layer: gives the gain (He et al. 2015, Glorot and Bengio 2010)"
    )


class Model(Section):
    """Which model, and which weights it starts from."""

    architecture: str = Field(
        "decoder",
        description="decoder, mlp, cnn, vgg16, vgg16_bn, resnet9, resnet18, resnet34, resnet50, rnn, lstm, gru, unet, "
        "or module:function that returns an nn.Module",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="keys of config.json (decoder; they go over the pretrained ones), or the architecture's arguments",
    )
    pretrained: str | None = Field(
        None,
        description="weights to start from: smollm2-135m, a Hugging Face folder, a hub name, a .gguf .safetensors .pth file, "
        "or a run's model folder",
    )
    match: Literal["exact", "overlap"] = Field(
        "exact",
        description="exact: every name and shape must match. overlap: copy what matches, initialise the rest, report both",
    )
    tokenizer: str | None = Field(None, description="folder or hub name; by default the one beside the weights")
    init: Init = Field(default_factory=Init)


class Full(Section):
    """Train every parameter, but those that are frozen by name."""

    method: Literal["full"] = "full"
    freeze: list[str] = Field(default_factory=list, description="name patterns of parameters that stay as they are")


class Partial(Section):
    """Train the parameters whose names match; only those are saved."""

    method: Literal["partial"]
    train: Annotated[list[str], Field(min_length=1)] = Field(
        description="name patterns such as model.layers.29.* or *norm*; * matches anything"
    )
    start: str | None = Field(None, description="folder with a delta.safetensors to continue from")


class Lora(Section):
    """Low-rank adaptation (Hu et al. 2021): the base is frozen, W + scale * B A is used."""

    method: Literal["lora"]
    rank: Positive = 16
    alpha: AboveZero = 32.0
    targets: str | list[str] = Field("all-linear", description="all-linear (without the head), or name patterns of modules")
    dropout: Fraction = 0.0
    base: Literal["plain", "4bit"] = Field(
        "plain",
        description="4bit: frozen matrices of the blocks in NF4 (QLoRA), or in the blocks of a quantised GGUF file as they are",
    )
    scaling: Literal["standard", "rslora"] = Field("standard", description="alpha/rank, or alpha/sqrt(rank)")
    start: str | None = Field(None, description="folder with an adapter in PEFT's format to continue from")


Adapt = Annotated[Full | Partial | Lora, Field(discriminator="method")]
