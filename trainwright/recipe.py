"""What the user says: typed sections. ``recipe_file`` reads and writes them.

Nothing heavy is imported here, so that ``trainwright --help`` and ``trainwright schema`` answer at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class InputError(ValueError):
    """The user's input is wrong; the message says what, where and how to mend it. Exit code 2."""


class RunError(RuntimeError):
    """The run itself failed and the message says why (a loss that isn't finite, ...). Exit code 3, no traceback."""


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' for the closest known name, or the empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""


class Section(BaseModel):
    """A part of the recipe: unknown keys are forbidden, values are checked, nothing changes after reading.

    NOTE: strict, because pydantic would otherwise take ``true`` for 1 and ``"8"`` for 8 without a word.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(gt=0)]


class Model(Section):
    """Which model, and which weights it starts from."""

    architecture: str = Field("decoder", description="decoder, or module:function that returns an nn.Module")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="keys of config.json (decoder) or arguments (module:function); they go over the pretrained ones",
    )
    pretrained: str | None = Field(
        None,
        description="weights to start from: smollm2-135m, a Hugging Face folder, a hub name, a .gguf file, "
        "or a run's model folder",
    )
    match: Literal["exact", "overlap"] = Field(
        "exact",
        description="exact: every name and shape must match. overlap: copy what matches, initialise the rest, report both",
    )
    tokenizer: str | None = Field(None, description="folder or hub name; by default the one beside the weights")


class Full(Section):
    """Train every parameter."""

    method: Literal["full"] = "full"


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
    alpha: Annotated[float, Field(gt=0)] = 32.0
    targets: str | list[str] = Field("all-linear", description="all-linear (without the head), or name patterns of modules")
    dropout: Fraction = 0.0
    scaling: Literal["standard", "rslora"] = Field("standard", description="alpha/rank, or alpha/sqrt(rank)")
    start: str | None = Field(None, description="folder with an adapter in PEFT's format to continue from")


Adapt = Annotated[Full | Partial | Lora, Field(discriminator="method")]


class Fields(Section):
    """Names of the columns; by default they are found."""

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    text: str | None = None


class TextData(Section):
    """Text for a language model."""

    kind: Literal["text"] = "text"
    source: str = Field(
        description="python-docstrings, or a .jsonl .json .csv .parquet .txt file, or a folder saved by Hugging Face datasets"
    )
    format: Literal["auto", "jsonl", "json", "csv", "parquet", "txt", "datasets"] = "auto"
    fields: Fields = Field(default_factory=Fields)
    supervise: Literal["completions", "all"] = Field(
        "completions", description="which tokens count in the loss; raw text is always supervised whole"
    )
    sequence_length: Positive = 512
    too_long: Literal["truncate", "drop", "split"] = "truncate"
    packing: bool = Field(True, description="several documents in a row; each attends to itself and restarts its positions")
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] | str | None = Field(
        0.05, description="fraction of the documents, or a file, that is never trained on"
    )
    limit: Positive | None = Field(None, description="use at most so many documents of each source")
    cache: str | None = Field(None, description="folder of tokenised data; default ~/.cache/trainwright")


class Loss(Section):
    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Fraction = 0.0
    z_loss: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of logsumexp squared (PaLM, section 5)")


class AdamW(Section):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019); none on norms and biases."""

    name: Literal["adamw"] = "adamw"
    learning_rate: Annotated[float, Field(ge=0)] = 2e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    # YAML has lists only, and a strict tuple would refuse them.
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8


class SGD(Section):
    """Stochastic gradient descent with momentum; weight decay not on norms and biases."""

    name: Literal["sgd"]
    learning_rate: Annotated[float, Field(ge=0)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Fraction = 0.9
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


Optimizer = Annotated[AdamW | SGD, Field(discriminator="name")]


class Schedule(Section):
    """The learning rate as a function of the step alone."""

    name: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0)] = Field(0.03, description="below 1 a fraction of all steps, else a number of steps")
    final: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="the last rate, as a fraction of the peak")


class Training(Section):
    """How long, and in which portions."""

    epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="passes over the data; 1 if steps isn't given either"
    )
    steps: Positive | None = Field(None, description="optimizer steps; or give epochs")
    batch_size: Positive = Field(8, description="rows a step, over all processes")
    micro_batch_size: Positive | None = Field(
        None, description="rows at once in a process; must divide the batch; default: fits"
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(1.0, description="largest global gradient norm; null: no clipping")

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}")
        return self


class Best(Section):
    """Which evaluated model is kept as the best one. Both keys are needed: a direction is never guessed."""

    metric: Literal["loss", "perplexity"]
    direction: Literal["minimize", "maximize"]


class Evaluation(Section):
    """Measures on the held-out data."""

    every: Positive | None = Field(None, description="steps between evaluations; null: only before and after")
    before: bool = True
    samples: Annotated[int, Field(ge=0)] = Field(0, description="answers to so many held-out prompts, shown before and after")
    best: Best | None = Field(None, description="keep the best evaluated weights and make them the final model")


class Checkpoint(Section):
    """What a killed run can go on from."""

    every: Positive | None = Field(100, description="steps between checkpoints; null: only at the end")
    keep: Positive = Field(2, description="how many of the last ones stay on disk")


class Tracking(Section):
    """Besides the console and metrics.jsonl."""

    tensorboard: bool = True


class RunOptions(Section):
    """Where and on what it runs."""

    folder: str | None = Field(None, description="default: runs/NAME-OF-THE-RECIPE")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile; auto: where a compiler is found")
    threads: Positive | None = Field(None, description="CPU threads; default: what torch finds")


class Recipe(Section):
    """Everything about a run. One key, one place."""

    model: Model = Field(default_factory=Model)
    adapt: Adapt = Field(default_factory=Full)
    data: TextData
    loss: Loss = Field(default_factory=Loss)
    optimizer: Optimizer = Field(default_factory=AdamW)
    schedule: Schedule = Field(default_factory=Schedule)
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16: products in bf16, frozen weights stored in bf16, trained ones keep fp32 masters"
    )
    training: Training = Field(default_factory=Training)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    tracking: Tracking = Field(default_factory=Tracking)
    run: RunOptions = Field(default_factory=RunOptions)

    @model_validator(mode="after")
    def _everything_has_an_effect(self) -> Recipe:
        if self.data.held_out is None and (self.evaluation.every or self.evaluation.best):
            raise ValueError("evaluation.every and evaluation.best need held-out data: set data.held_out")
        return self
