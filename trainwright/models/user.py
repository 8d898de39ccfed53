"""A user's own module, named as ``module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import torch
from torch import nn

from trainwright.recipe import InputError, nearest


def make(name: str, options: dict[str, Any], seed: int) -> nn.Module:
    """Call the user's ``module:function``; modules beside the recipe's working folder are found."""
    if ":" not in name:
        raise InputError(
            f"model.architecture: {name!r} is unknown{nearest(name, ['decoder'])}; give 'decoder' or 'module:function'"
        )
    module_name, function_name = name.split(":", 1)
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"model.architecture: {error}; start in the folder that holds {module_name}.py, or install it"
        ) from None
    finally:
        sys.path.pop(0)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(
            f"model.architecture: {module_name} has no function {function_name!r}{nearest(function_name, dir(module))}"
        )
    torch.manual_seed(seed)
    try:
        made = function(**options)
    except TypeError as error:
        raise InputError(f"model.options don't fit {name}: {error}") from None
    if not isinstance(made, nn.Module):
        raise InputError(f"model.architecture: {name} returned {type(made).__name__}, not an nn.Module")
    return made
