"""The section ``parallel``: how many processes share the work, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainwright.recipe.base import Positive, Section


class Parallel(Section):
    """How the processes of a run share the model and the batch. data * tensor * pipeline is their number."""

    data: Positive | Literal["auto"] = Field("auto", description="copies that share each batch; auto: what the others leave")
    zero: Literal[0, 1, 2, 3] = Field(
        0, description="what the copies divide among them: 1 optimizer states, 2 gradients too, 3 parameters too"
    )
    tensor: Positive = Field(1, description="processes that share each matrix product")
    pipeline: Positive = Field(1, description="processes that hold successive layers")
    schedule: Literal["1f1b", "gpipe", "interleaved"] = Field("1f1b", description="the order of a pipeline's micro-batches")
    engine: Literal["torch", "deepspeed"] = "torch"
    offload_optimizer: bool = Field(False, description="deepspeed only: optimizer states in CPU memory")

    @model_validator(mode="after")
    def _consistent(self) -> Parallel:
        if self.pipeline == 1 and "schedule" in self.model_fields_set and self.schedule != "1f1b":
            raise ValueError(f"schedule {self.schedule} has no effect: pipeline is 1")
        if self.engine == "deepspeed" and (self.tensor > 1 or self.pipeline > 1):
            raise ValueError("engine deepspeed shares data only: set tensor and pipeline to 1, or engine to torch")
        if self.offload_optimizer and self.engine != "deepspeed":
            raise ValueError("offload_optimizer needs engine deepspeed")
        if self.offload_optimizer and not self.zero:
            raise ValueError("offload_optimizer needs zero 1, 2 or 3")
        return self

    @property
    def alone(self) -> bool:
        """Whether the section asks for nothing."""
        return self == Parallel()
