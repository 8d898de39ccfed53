"""A user's own module, named as ``module:function``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainwright.models.catalogue import NAMES
from trainwright.recipe import InputError, nearest
from trainwright.recipe.imports import import_function


def make(
    name: str, options: dict[str, Any], seed: int, *, inputs: tuple[int, ...] | None = None, outputs: int | None = None
) -> nn.Module:
    """Call the user's ``module:function``; modules beside the recipe's working folder are found.

    Args:
        inputs: one sample's shape; like ``outputs`` passed on where the function has a parameter of this name, unless the
            options give it.
        outputs: how many numbers the model has to give for a sample, or for a pixel.

    Raises:
        InputError: there is no such function, the options don't suit it, or it returns no module.
    """
    if ":" not in name:
        raise InputError(
            f"model.architecture: {name!r} is unknown{nearest(name, ['decoder', *NAMES])}; "
            f"give decoder, {', '.join(NAMES)} or module:function"
        )
    function = import_function(name, "model.architecture")
    torch.manual_seed(seed)
    try:
        made = function(**(_wanted(function, {"inputs": inputs, "outputs": outputs}) | options))
    except TypeError as error:
        raise InputError(f"model.options don't fit {name}: {error}") from None
    if not isinstance(made, nn.Module):
        raise InputError(f"model.architecture: {name} returned {type(made).__name__}, not an nn.Module")
    return made


def _wanted(function: Callable[..., Any], known: dict[str, Any]) -> dict[str, Any]:
    """What is known and the function has a parameter for."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some functions written in C don't tell
        return {}
    return {name: value for name, value in known.items() if name in parameters and value is not None}
