"""What is wrong with a recipe, in the words of somebody who wants to help: every fault, one line each.

pydantic finds the faults; what is said about them comes from the types in ``recipe``.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from trainwright.recipe import Recipe, Section
from trainwright.recipe.names import advice
from trainwright.recipe.types import (
    allowed,
    choice,
    default_tag,
    either,
    inside,
    is_section,
    join,
    shown,
    tag_key,
    unwrap,
    variants,
    without_none,
)

NOTHING = object()


class Place(typing.NamedTuple):
    """Where a fault is: the path as the user writes it, the type there, and what the recipe holds there."""

    path: str
    hint: Any
    value: Any


def complete(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """``mapping`` with an empty section where a required one is missing, and the default tag where a section has none.

    Faults then name the key inside (``data.source``), and ``optimizer: {learning_rate: 1e-4}`` is the default one.
    """
    filled = dict(mapping)
    for name, field in Recipe.model_fields.items():
        if field.is_required():
            filled.setdefault(name, {})
        if tag_key(field) and isinstance(filled.get(name), Mapping):
            filled[name] = {tag_key(field): default_tag(field), **filled[name]}
    return filled


def explain(error: ValidationError, mapping: Mapping[str, Any]) -> list[str]:
    """A line for each faulty key of ``mapping``, the recipe as the user gave it."""
    lines: dict[str, str] = {}
    for fault in error.errors(include_url=False):
        place = locate(fault["loc"], mapping)
        # Each branch of a union complains about the same key; one line tells of all branches.
        lines.setdefault(place.path, _line(fault, place, mapping))
    return list(lines.values())


def locate(loc: Iterable[int | str], mapping: Mapping[str, Any]) -> Place:
    """Follow pydantic's location through the types, leaving out what users don't write: tags and branches of unions."""
    path, hint, value = "", typing.cast(Any, Recipe), mapping
    for part in loc:
        plain, field = unwrap(hint)
        if field is not None and tag_key(field):
            hint = variants(field)[str(part)]
            continue
        plain = unwrap(without_none(plain))[0]
        if typing.get_origin(plain) in (list, tuple):
            path = f"{path}[{part}]"
        elif is_section(plain) or typing.get_origin(plain) is dict:
            path = join(path, part)
        else:
            break
        hint, value = inside(plain, part), _get(value, part)
    return Place(path, hint, value)


def _get(value: Any, part: int | str) -> Any:
    """What is under a key or at a position, or ``NOTHING``."""
    try:
        return value[part]
    except (KeyError, IndexError, TypeError):
        return NOTHING


def _line(fault: ErrorDetails, place: Place, mapping: Mapping[str, Any]) -> str:
    """The line that tells of one fault."""
    kind, path, value = fault["type"], place.path, place.value
    if kind == "extra_forbidden":
        return f"{path}: {_unknown(fault['loc'], mapping)}"
    if kind == "invalid_key" or fault["loc"][-1:] == ("[key]",):
        return f"{path}: a key must be text: put it in quotes"
    if kind == "value_error":  # a rule of ours, which says all there is to say
        return ": ".join(filter(None, [path, str(fault["ctx"]["error"])]))
    plain, field = unwrap(place.hint)
    if kind == "union_tag_invalid" and field is not None:
        tag = _get(value, tag_key(field))
        return f"{join(path, tag_key(field))}: found {shown(tag)}; must be {choice(variants(field), tag)}"
    if value is NOTHING:
        return f"{path}: missing; give {allowed(place.hint)}{_described(field)}"
    literal = typing.get_origin(plain) is Literal
    wanted = choice(typing.get_args(plain), value) if literal else allowed(place.hint)
    return f"{path}: found {shown(value)}; must be {wanted}"


def _described(field: Any) -> str:
    """': ' and the description of a key that has one."""
    return f": {field.description}" if field is not None and field.description else ""


def _unknown(loc: tuple[int | str, ...], mapping: Mapping[str, Any]) -> str:
    """What an unknown key should have been."""
    key, parent = str(loc[-1]), locate(loc[:-1], mapping)
    section = unwrap(without_none(unwrap(parent.hint)[0]))[0]
    assert is_section(section), "only sections forbid keys"
    return _of_another_kind(key, section, parent) or f"unknown key{advice(key, section, parent.path)}"


def _of_another_kind(key: str, section: type[Section], parent: Place) -> str:
    """'needs adapt.method ...' where the key is one of another kind of its tagged section."""
    field = Recipe.model_fields.get(parent.path)
    if field is None or not tag_key(field):
        return ""
    kinds = [tag for tag, kind in variants(field).items() if key in kind.model_fields]
    if not kinds:
        return ""
    given = _get(parent.value, tag_key(field))
    found = f"it is {default_tag(field)!r} unless you say so" if given is NOTHING else f"found {given!r}"
    return f"needs {join(parent.path, tag_key(field))}: {either(kinds)} ({found})"
