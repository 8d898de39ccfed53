"""What building a model gives, before data and optimizer join it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainwright.memory.precision import Precision
from trainwright.models.contract import Change
from trainwright.models.pretrained import Source


@dataclass(frozen=True)
class Built:
    """A model with its techniques applied, and where it came from."""

    model: nn.Module
    changes: list[Change]
    config: dict[str, Any]
    source: Source | None
    precision: Precision
    device: torch.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """What products are made in."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32
