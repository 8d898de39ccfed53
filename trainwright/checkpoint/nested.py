"""Nested states, such as an optimizer's, as tensors by name and a skeleton for JSON; and back, exactly."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_MARKS = {"tensor", "float", "tuple", "items"}  # keys that mean something in a skeleton


def flatten(state: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Split a nested state into its tensors by name and a JSON-able skeleton; ``unflatten`` is the exact inverse.

    state    dicts, lists and tuples of tensors, numbers, strings, bools and None, such as ``optimizer.state_dict()`` or
             ``torch.get_rng_state()``; keys may be any of the immutable ones; subclasses come back as the plain type
    prefix   begins the names: ``flatten(sgd.state_dict(), "optimizer")`` gives ``optimizer.state.0.momentum_buffer``

    The tensors are those of the state, not copies; one that occurs twice (the learning rate of several groups) has one
    name. TypeError with the path of a value of any other type.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _encode(state, prefix, tensors, {})


def unflatten(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Put the tensors back into the skeleton; others are ignored. KeyError if one is missing."""
    match skeleton:
        case list():
            return [unflatten(tensors, item) for item in skeleton]
        case {"tensor": name}:
            return tensors[name]
        case {"float": bits}:
            return struct.unpack(">d", bytes.fromhex(bits))[0]
        case {"tuple": items}:
            return tuple(unflatten(tensors, items))
        case {"items": pairs}:
            return {unflatten(tensors, key): unflatten(tensors, value) for key, value in pairs}
        case dict():
            return {key: unflatten(tensors, value) for key, value in skeleton.items()}
    return skeleton


def _encode(value: Any, path: str, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    """The skeleton of one value; its tensors go to ``tensors`` under their paths, which ``names`` keeps by their id."""
    match value:
        case Tensor():
            while path in tensors or not path:  # paths can read alike: those of keys 0 and "0" do
                path += "'" if path else "tensor"
            name = names.setdefault(id(value), path)
            tensors[name] = value
            return {"tensor": name}
        case float() if not math.isfinite(value):
            return {"float": struct.pack(">d", value).hex()}  # JSON has none, and a NaN has a sign and a payload
        case None | bool() | int() | float() | str():
            return value
        case dict():
            return _encode_dict(value, path, tensors, names)
        case list() | tuple():
            items = [_encode(item, f"{path}.{index}".lstrip("."), tensors, names) for index, item in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(f"{path or 'the state'} is a {type(value).__name__}, neither a tensor nor a plain value")


def _encode_dict(value: dict[Any, Any], path: str, tensors: dict[str, Tensor], names: dict[int, str]) -> dict[str, Any]:
    """A plain JSON object where that is exact; pairs where keys aren't strings or would read as one of our marks."""
    encoded = [(key, _encode(item, f"{path}.{key}".lstrip("."), tensors, names)) for key, item in value.items()]
    if all(isinstance(key, str) and key not in _MARKS for key in value):
        return dict(encoded)
    return {"items": [[_encode(key, path, tensors, names), item] for key, item in encoded]}
