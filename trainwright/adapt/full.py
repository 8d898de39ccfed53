"""Full fine-tuning: every parameter learns."""

from __future__ import annotations

from torch import nn

from trainwright.models.contract import Change
from trainwright.recipe import Full


def apply(model: nn.Module, section: Full) -> Change:
    """Make every parameter trainable."""
    model.requires_grad_(True)
    count = sum(p.numel() for p in model.parameters())
    return Change(section.method, f"all {count:,} parameters learn")
