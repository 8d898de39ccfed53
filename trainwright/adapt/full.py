"""Full fine-tuning: every parameter learns, but those that are frozen by name."""

from __future__ import annotations

from torch import nn

from trainwright.models.contract import Change, match
from trainwright.recipe import Full


def apply(model: nn.Module, section: Full) -> Change:
    """Make every parameter trainable that ``section.freeze`` doesn't name.

    Raises:
        InputError: a pattern that matches no parameter.
    """
    model.requires_grad_(True)
    frozen = match(section.freeze, (name for name, _ in model.named_parameters()), "adapt.freeze")
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = f"; {len(frozen)} tensors are frozen" if frozen else ""
    return Change(section.method, f"{'all ' * (not frozen)}{count:,} parameters learn{kept}", tuple(frozen))
