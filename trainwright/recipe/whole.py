"""The whole recipe, and the rules that hold between its sections."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from trainwright.recipe.base import Section
from trainwright.recipe.data import Data, TextData
from trainwright.recipe.learning import AdamW, Cosine, CrossEntropy, Loss, Optimizer, Schedule
from trainwright.recipe.memory import Memory
from trainwright.recipe.model import Adapt, Full, Lora, Model
from trainwright.recipe.parallel import Parallel
from trainwright.recipe.running import Checkpoint, Evaluation, RunOptions, Tracking, Training

DECODER = "decoder"
SAMPLES = ("images", "table", "series", "arrays")  # kinds of data that are samples with targets


def _filled(given: dict[str, Any]) -> dict[str, Any]:
    """A recipe for samples with the defaults that differ: batches of 64, 10 epochs, a learning rate of 1e-3 for adamw."""
    training, optimizer = given.get("training", {}), given.get("optimizer", {})
    if isinstance(training, dict):
        length = {} if {"steps", "epochs"} & training.keys() else {"epochs": 10.0}
        given = {**given, "training": {"batch_size": 64, **length, **training}}
    if isinstance(optimizer, dict) and optimizer.get("name", "adamw") == "adamw":
        given = {**given, "optimizer": {"name": "adamw", "learning_rate": 1e-3, **optimizer}}
    return given


class Recipe(Section):
    """Everything about a run. One key, one place."""

    model: Model = Field(default_factory=Model)
    adapt: Adapt = Field(default_factory=Full)
    data: Data
    loss: Loss = Field(default_factory=CrossEntropy)
    metrics: list[str] | None = Field(
        None,
        description="measured on held-out data; null: what suits the task. accuracy, top_5, precision, recall, f1, ...",
    )
    optimizer: Optimizer = Field(default_factory=AdamW)
    schedule: Schedule = Field(default_factory=Cosine)
    precision: Literal["auto", "fp32", "bf16", "pure_bf16", "fp16", "fp64"] = Field(
        "auto",
        description="bf16: products in bf16, frozen weights stored in bf16, trained ones keep fp32 masters. pure_bf16: trained "
        "ones in bf16 as well. fp16: as bf16, with a scaled loss. fp64: slow; what other runs are measured by",
    )
    memory: Memory = Field(default_factory=Memory)
    parallel: Parallel = Field(default_factory=Parallel)
    training: Training = Field(default_factory=Training)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    tracking: Tracking = Field(default_factory=Tracking)
    run: RunOptions = Field(default_factory=RunOptions)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_samples(cls, given: Any) -> Any:
        """What is a good default for a language model isn't one for images and tables."""
        data = given.get("data") if isinstance(given, dict) else None
        kind = data.get("kind", "text") if isinstance(data, dict) else getattr(data, "kind", "text")
        return _filled(given) if kind in SAMPLES else given

    @model_validator(mode="after")
    def _everything_has_an_effect(self) -> Recipe:
        evaluation = self.evaluation
        if self.data.held_out is None and (evaluation.every or evaluation.best or evaluation.stop):
            raise ValueError("evaluation.every, best and stop need held-out data: set data.held_out")
        if (evaluation.stop or evaluation.best) and not evaluation.every:
            raise ValueError("evaluation.best and stop look at the evaluations on the way: set evaluation.every")
        return self

    @model_validator(mode="after")
    def _engine_has_the_precision(self) -> Recipe:
        if self.parallel.engine == "deepspeed" and self.precision in ("fp16", "pure_bf16"):
            raise ValueError(
                f"precision: {self.precision} isn't offered with parallel.engine: deepspeed, which would cast the model and "
                "scale the loss by its own rules; use bf16, or set parallel.engine: torch"
            )
        return self

    @model_validator(mode="after")
    def _an_overflow_can_be_left_out(self) -> Recipe:
        if self.precision == "fp16" and self.memory.optimizer_in_backward:
            raise ValueError(
                "memory.optimizer_in_backward: not with precision: fp16, where a step may only be taken once no gradient of it "
                "has overflowed; use bf16"
            )
        return self

    @model_validator(mode="after")
    def _frozen_weights_can_be_elsewhere(self) -> Recipe:
        packed = isinstance(self.adapt, Lora) and self.adapt.base == "4bit"
        streamed = self.memory.frozen == "stream"
        if packed and streamed:
            raise ValueError("memory.frozen: stream and adapt.base: 4bit exclude each other; stream takes the least memory")
        if not (packed or streamed):
            return self
        key = "adapt.base: 4bit" if packed else "memory.frozen: stream"
        section = self.parallel
        reasons = {
            "needs model.pretrained: there are no frozen weights otherwise": self.model.pretrained is None,
            "needs model.match: exact": self.model.match != "exact",
            "isn't offered with parallel.engine: deepspeed, which wants all weights as tensors": section.engine == "deepspeed",
            "isn't offered with parallel.zero: 3, which divides weights itself; set zero to 2 or less": section.zero == 3,
            "isn't offered with parallel.tensor, which cuts weights across blocks; set tensor to 1": section.tensor > 1,
        }
        for reason, given in reasons.items():
            if given:
                raise ValueError(f"{key} {reason}")
        return self

    @model_validator(mode="after")
    def _model_and_data_suit(self) -> Recipe:
        text = isinstance(self.data, TextData)
        if not text and self.model.architecture == DECODER:
            raise ValueError(f"model.architecture: a decoder reads text; data.kind is {self.data.kind}, so name another one")
        if text and (not isinstance(self.loss, CrossEntropy) or self.loss.weights or self.loss.ignore_index is not None):
            raise ValueError("loss: text is learned with cross_entropy, without weights and ignore_index")
        if text and self.metrics is not None:
            raise ValueError("metrics: text has loss and perplexity, always")
        if not text and self.evaluation.samples:
            raise ValueError("evaluation.samples: only language models answer prompts")
        if not text and self.model.tokenizer:
            raise ValueError(f"model.tokenizer has no effect: data.kind is {self.data.kind}")
        return self
