"""BatchNorm that doesn't learn: a frozen one keeps its statistics too, and normalises by them."""

from __future__ import annotations

from typing import Self

from torch import nn

from trainwright.models.contract import Change


class _Held(nn.Module):
    """Before a BatchNorm class: it stays in evaluation mode whatever mode the model is in."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


class HeldBatchNorm1d(_Held, nn.BatchNorm1d):
    """Of (n, channels) or (n, channels, length)."""


class HeldBatchNorm2d(_Held, nn.BatchNorm2d):
    """Of images."""


class HeldBatchNorm3d(_Held, nn.BatchNorm3d):
    """Of volumes."""


HELD: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: HeldBatchNorm1d,
    nn.BatchNorm2d: HeldBatchNorm2d,
    nn.BatchNorm3d: HeldBatchNorm3d,
}


def hold_frozen(model: nn.Module) -> Change | None:
    """Keep the running statistics of every BatchNorm that has parameters, none of which learn; None if there is none.

    Else they would go on following the new data while the weights around them, made for the old ones, stand still.
    The class of a layer is changed, as LoRA does it, so that names stay.
    """
    held = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if type(module) in HELD and own and not any(p.requires_grad for p in own):
            module.__class__ = HELD[type(module)]
            module.train(False)
            held.append(name)
    if not held:
        return None
    return Change("frozen norms", f"{len(held)} BatchNorm layers keep their statistics", tuple(held))
