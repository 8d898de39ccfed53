"""Dropout under proof: it draws other masks where a batch is divided otherwise, so both sides do without it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

KEYS = ("dropout", "dropout_p", "lora_dropout")
KEYS_OF_DROPPING_LAYERS = (*KEYS, "p", "rate", "drop_prob")


def off(model: nn.Module) -> None:
    """No layer drops anything from now on."""
    for module, key in _places(model):
        setattr(module, key, 0.0)


def layers(model: nn.Module) -> list[str]:
    """The layers that drop."""
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module, key in _places(model) if getattr(module, key)]


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Each layer that may drop, and the attribute that says how much: torch's, recurrent ones, attention, LoRA's."""
    for module in model.modules():
        drops = "drop" in type(module).__name__.lower()
        for key in KEYS_OF_DROPPING_LAYERS if drops else KEYS:
            if isinstance(getattr(module, key, None), float):
                yield module, key
