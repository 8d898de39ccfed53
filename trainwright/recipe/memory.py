"""The section ``memory``: what is given up so that a run takes less of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from trainwright.recipe.base import Positive, Section
from trainwright.recipe.sizes import bytes_of


class Memory(Section):
    """What the backward needs of the forward: kept, computed again, or put elsewhere; and the same for optimizer states."""

    checkpointing: Literal["none", "full", "selective", "offload"] = Field(
        "none",
        description="of each block the backward keeps... none: everything. full: its inputs; the rest is computed again. "
        "selective: what is dear to compute again. offload: full, and the inputs wait outside of the device's memory",
    )
    every: Positive = Field(1, description="so many neighbouring blocks are computed again at once; full and offload")
    blocks: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="name patterns of the modules that are blocks; null: those of the model, or its repeated parts"
    )
    optimizer_states: Literal["plain", "8bit"] = Field(
        "plain", description="8bit: one byte a number for matrices, in blocks of 256 with a scale; plain: float32"
    )
    optimizer_offload: Literal["none", "cpu", "disk"] = Field(
        "none", description="where optimizer states are between steps. cpu: in its memory. disk: in a file"
    )
    optimizer_in_backward: bool = Field(
        False, description="update and free each gradient as it arrives; needs one micro-batch, one process, no clipping"
    )
    frozen: Literal["resident", "stream"] = Field(
        "resident",
        description="stream: frozen matrices of the blocks stay in their safetensors file and are read for each product",
    )
    folder: str | None = Field(
        None,
        description="where files are while it runs, of checkpointing: offload on a CPU, and of optimizer_offload: disk; "
        "null: the system's folder for temporary files",
    )

    budget: str | int | None = Field(
        None,
        description="such as 3GiB: what one device may hold; on a CPU what the process may grow by. The fastest of what "
        "computes the same and fits is chosen: checkpointing, micro-batch, offload, streaming",
    )

    @field_validator("budget")
    @classmethod
    def _a_size(cls, given: str | int | None) -> str | int | None:
        if given is not None:
            bytes_of(given)
        return given

    @model_validator(mode="after")
    def _everything_has_an_effect(self) -> Memory:
        mode = self.checkpointing
        if self.every > 1 and mode in ("none", "selective"):
            raise ValueError(f"every has no effect: checkpointing is {mode}; it is for full and offload")
        if self.blocks is not None and mode == "none":
            raise ValueError("blocks has no effect: checkpointing is none")
        if self.folder is not None and mode != "offload" and self.optimizer_offload != "disk":
            raise ValueError(f"folder has no effect: checkpointing is {mode}, not offload, and optimizer_offload isn't disk")
        return self
