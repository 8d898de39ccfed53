"""Functions of the user's own, named as ``module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from trainwright.recipe.base import InputError, nearest


def import_function(path: str, key: str) -> Callable[..., Any]:
    """The function that ``path`` names; modules in the working folder are found.

    Raises:
        InputError: not of the form ``module:function``, or there is no such module or function; ``key`` is the recipe's key.
    """
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name:
        raise InputError(f"{key}: found {path!r}; give 'module:function'")
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"{key}: {error}; start in the folder that holds {module_name}.py, or install it") from None
    finally:
        sys.path.remove(folder)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"{key}: {module_name} has no function {function_name!r}{nearest(function_name, dir(module))}")
    return function
