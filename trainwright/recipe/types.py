"""The types of ``recipe`` as a person speaks of them: what a key accepts, what was found, which keys there are."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic.fields import FieldInfo

from trainwright.recipe import Recipe, Section, nearest

SCALARS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
BOUNDS = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}


def unwrap(hint: Any) -> tuple[Any, FieldInfo | None]:
    """A type without its ``Annotated``, and what pydantic knows about it."""
    if typing.get_origin(hint) is not Annotated:
        return hint, None
    plain, *notes = typing.get_args(hint)
    return plain, next((note for note in notes if isinstance(note, FieldInfo)), None)


def is_section(hint: Any) -> bool:
    """Whether a type is one of the recipe's sections."""
    return isinstance(hint, type) and issubclass(hint, Section)


def is_union(hint: Any) -> bool:
    """Whether a type is ``A | B``."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def without_none(hint: Any) -> Any:
    """A for ``A | None``, which pydantic's locations don't mention; any other type as it is."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] if is_union(hint) else []
    return kinds[0] if len(kinds) == 1 else hint


def tag_key(field: FieldInfo | None) -> str:
    """The key that says which kind of section it is (``adapt.method``), or the empty string."""
    return str(field.discriminator) if field is not None and field.discriminator else ""


def variants(field: FieldInfo) -> dict[str, type[Section]]:
    """The sections that a tagged section can be, by tag."""
    sections: tuple[type[Section], ...] = typing.get_args(field.annotation)
    key = tag_key(field)
    return {tag: kind for kind in sections for tag in typing.get_args(kind.model_fields[key].annotation)}


def default_tag(field: FieldInfo) -> str | None:
    """The kind of a tagged section that doesn't say: the one whose tag has a default."""
    found = [tag for tag, kind in variants(field).items() if not kind.model_fields[tag_key(field)].is_required()]
    return found[0] if found else None


def inside(hint: Any, part: int | str) -> Any:
    """The type of a key of a section, or of an item."""
    if is_section(hint):
        field = hint.model_fields.get(part)
        return Annotated[field.annotation, field] if field is not None else Any
    arguments = typing.get_args(hint)
    return arguments[-1] if arguments else Any


def join(path: str, key: object) -> str:
    """The path of a key as the user writes it; a key that couldn't be written without quotes keeps them."""
    name = key if isinstance(key, str) and key.replace("-", "_").isidentifier() else repr(key)
    return f"{path}.{name}" if path else name


@cache
def known_paths() -> tuple[str, ...]:
    """Every key of the recipe as an override names it: ``optimizer.learning_rate``."""
    return tuple(dict.fromkeys(_paths(Recipe, "")))


def _paths(hint: Any, prefix: str) -> Iterator[str]:
    plain, _ = unwrap(hint)
    for kind in typing.get_args(plain) if is_union(plain) else (plain,):
        for name in kind.model_fields if is_section(kind) else ():
            yield join(prefix, name)
            yield from _paths(inside(kind, name), join(prefix, name))


def allowed(hint: Any) -> str:
    """What a type accepts: 'a whole number of at least 1 or null'."""
    plain, field = unwrap(hint)
    origin, arguments = typing.get_origin(plain), typing.get_args(plain)
    if tag_key(field):
        return f"a section with {tag_key(field)}: {either(map(repr, variants(typing.cast(FieldInfo, field))))}"
    if is_section(plain):
        return f"a section with the keys {', '.join(plain.model_fields)}"
    if is_union(plain):
        return either(allowed(argument) for argument in arguments)
    if origin is Literal:
        return either(map(repr, arguments))
    if origin in (list, tuple):
        return _sequence(arguments, field)
    return "a section of keys and values" if origin is dict else f"{SCALARS.get(plain, 'a value')}{_range(plain, field)}"


def choice(options: Iterable[object], found: object) -> str:
    """The options, with the one that was probably meant."""
    known = list(options)
    names = [option for option in known if isinstance(option, str)]
    return either(map(repr, known)) + (nearest(found.lower(), names) if isinstance(found, str) else "")


def either(options: Iterable[str]) -> str:
    """'a, b or c'."""
    *others, last = options
    return f"{', '.join(others)} or {last}" if others else last


def shown(value: object) -> str:
    """What was found, in the recipe's own spelling, shortened."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    kind = "the text " if isinstance(value, str) else "a section " if isinstance(value, Mapping) else ""
    text = repr(value)
    return kind + (text if len(text) <= 60 else f"{text[:57]}...")


def _sequence(items: tuple[Any, ...], field: FieldInfo | None) -> str:
    """In words, a list of any length (one type) or of a fixed one."""
    if len(items) > 1:
        return f"a list of {len(items)}, each {allowed(items[0])}"
    return f"a list {'of' if items[0] is str else 'with each item'} {allowed(items[0])}" + (
        ", and not empty" if _limit(field, "min_length") else ""
    )


def _range(kind: Any, field: FieldInfo | None) -> str:
    """' of at least 0 and below 1'."""
    limits = {name: limit for name in BOUNDS if (limit := _limit(field, name)) is not None}
    if kind is int:  # above 0 reads better as: of at least 1
        limits = {{"gt": "ge", "lt": "le"}.get(n, n): v + {"gt": 1, "lt": -1}.get(n, 0) for n, v in limits.items()}
    if {"ge", "le"} <= limits.keys():
        return f" from {limits['ge']:g} to {limits['le']:g}" if kind is float else f" from {limits['ge']} to {limits['le']}"
    words = [f"{BOUNDS[name]} {limit:g}" for name, limit in limits.items()]
    return " " + " and ".join(words) if words else ""


def _limit(field: FieldInfo | None, name: str) -> Any:
    notes = field.metadata if field is not None else []
    return next((getattr(note, name) for note in notes if hasattr(note, name)), None)
