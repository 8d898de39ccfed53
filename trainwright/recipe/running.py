"""The sections ``training``, ``evaluation``, ``checkpoint``, ``tracking`` and ``run``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainwright.recipe.base import AboveZero, AtLeastZero, Positive, Section

Direction = Literal["minimize", "maximize"]
Every = Positive | Literal["epoch"] | None


class Ema(Section):
    """An exponential moving average of the weights, which is evaluated and saved in their stead."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    warmup: bool = Field(True, description="begin with a shorter memory: decay is at most (1 + n) / (10 + n) after n updates")


class Training(Section):
    """How long, and in which portions."""

    epochs: AboveZero | None = Field(None, description="passes over the data; 1 if steps isn't given either")
    steps: Positive | None = Field(None, description="optimizer steps; or give epochs")
    batch_size: Positive = Field(8, description="rows a step, over all processes")
    micro_batch_size: Positive | None = Field(
        None, description="rows at once in a process; must divide the batch; default: fits"
    )
    clip_norm: AboveZero | None = Field(1.0, description="largest global gradient norm; null: no clipping")
    ema: Ema | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}")
        return self


class Best(Section):
    """Which evaluated model is kept as the best one. Both keys are needed: a direction is never guessed."""

    metric: str
    direction: Direction


class EarlyStop(Section):
    """End the training when a metric has not become better for a while. The direction is never guessed."""

    metric: str
    direction: Direction
    patience: Positive = Field(3, description="evaluations without improvement")
    min_delta: AtLeastZero = Field(0.0, description="only what is more counts as improvement")


class Evaluation(Section):
    """Measures on the held-out data."""

    every: Every = Field(None, description="steps between evaluations, or epoch; null: only before and after")
    before: bool = True
    samples: Annotated[int, Field(ge=0)] = Field(0, description="answers to so many held-out prompts, shown before and after")
    best: Best | None = Field(None, description="keep the best evaluated weights and make them the final model")
    stop: EarlyStop | None = None


class Checkpoint(Section):
    """What a killed run can go on from."""

    every: Every = Field(100, description="steps between checkpoints, or epoch; null: only at the end")
    keep: Positive = Field(2, description="how many of the last ones stay on disk")


class Tracking(Section):
    """Besides the console and metrics.jsonl."""

    tensorboard: bool = True


class RunOptions(Section):
    """Where and on what it runs."""

    folder: str | None = Field(None, description="default: runs/NAME-OF-THE-RECIPE")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile; auto: language models, where a compiler is found"
    )
    kernels: Literal["auto", "off"] = Field(
        "auto", description="faster ways of our own to compute attention and the loss; off: PyTorch's plain operations"
    )
    allocator: Literal["auto", "system"] = Field(
        "auto", description="on a CPU. auto: one that holds no more than the tensors' peak; system: the C library's"
    )
    threads: Positive | None = Field(None, description="CPU threads; default: what torch finds")
