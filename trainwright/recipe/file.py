"""Recipes in and out: YAML files, overrides from the command line, and the JSON Schema for editors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainwright.recipe import InputError, Recipe, nearest
from trainwright.recipe import yaml as recipe_yaml
from trainwright.recipe.faults import complete, explain
from trainwright.recipe.types import shown

KEY = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*")
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with ``key.sub=value`` overrides on top and the run folder settled.

    Raises:
        InputError: no such file, not YAML, or all faults of its keys, values and overrides at once.
    """
    path = Path(path)
    mapping = read(path)
    faults = [fault for override in overrides if (fault := _override(mapping, override))]
    recipe, more = _check(mapping)
    _refuse([*faults, *more], f"{path} with overrides" if overrides else str(path))
    assert recipe is not None, "no faults, so there is a recipe"
    if recipe.run.folder is not None:
        return recipe
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"folder": f"runs/{path.stem}"})})


def parse(mapping: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """The recipe that ``mapping`` describes; ``where`` names it in the message.

    Raises:
        InputError: all faults at once, a line each: path of the key, what was found, what is allowed, the nearest name.
    """
    recipe, faults = _check(mapping)
    _refuse(faults, where)
    assert recipe is not None, "no faults, so there is a recipe"
    return recipe


def changed(recipe: Recipe, keys: dict[str, Any]) -> Recipe:
    """A recipe with other values at dotted keys.

    Raises:
        InputError: they don't suit the rest.
    """
    mapping = recipe.model_dump(mode="json")
    for key, value in keys.items():
        *path, last = key.split(".")
        section = mapping
        for name in path:
            section = section[name]
        section[last] = value
    return parse(mapping)


def dump(recipe: Recipe) -> str:
    """YAML with every key, defaults included, in the order of ``Recipe``; ``parse`` gives the same recipe again."""
    return recipe_yaml.write(recipe.model_dump())


def schema() -> dict[str, Any]:
    """JSON Schema with which editors complete and check a recipe while it is written."""
    return {"$schema": DIALECT, **Recipe.model_json_schema(), "title": "trainwright recipe"}


def _check(mapping: Mapping[str, Any]) -> tuple[Recipe | None, list[str]]:
    """The recipe, or its faults.

    NOTE: rules that tie keys together (epochs or steps, not both) are looked at when each of them is right by itself.
    """
    try:
        return Recipe.model_validate(complete(mapping)), []
    except ValidationError as error:
        return None, explain(error, mapping)


def _refuse(faults: Sequence[str], where: str) -> None:
    if len(faults) == 1:
        raise InputError(f"{where}: {faults[0]}")
    if faults:
        raise InputError("\n  ".join([f"{where} has {len(faults)} faults:", *faults]))


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file{_near(path)}") from None
    except IsADirectoryError:
        inside = f"; its recipe is {path / 'recipe.yaml'}" if (path / "recipe.yaml").is_file() else ""
        raise InputError(f"{path} is a folder, not a recipe{inside}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text in UTF-8 (byte {error.start}); a recipe is a YAML file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    value = recipe_yaml.read(text, str(path))
    if value is None:
        raise InputError(f"{path}: empty; the shortest recipe is\ndata:\n  source: python-docstrings")
    if not isinstance(value, dict):
        raise InputError(f"{path}: a recipe is a mapping (key: value), found {shown(value)}")
    return value


def _near(path: Path) -> str:
    """The recipe that was probably meant, beside ``path`` or among the shipped ones."""
    folders = [path.parent, Path("recipes")]
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.y*ml"))]
    shipped = Path("recipes", path.with_suffix(".yaml").name)
    return nearest(str(path), map(str, files)) or nearest(str(shipped), map(str, files))


def _override(mapping: dict[str, Any], override: str) -> str:
    """Put ``key.sub=value`` into ``mapping``; the fault, or the empty string."""
    key, equals, text = override.partition("=")
    if not equals or not KEY.fullmatch(key):
        return f"{override!r} isn't key=value, such as optimizer.learning_rate=3e-4"
    if not text:
        return f"{override} has no value; write {key}=null for nothing, {key}='\"\"' for empty text"
    *sections, last = key.split(".")
    for depth, name in enumerate(sections, start=1):
        section = {} if mapping.get(name) is None else mapping[name]
        if not isinstance(section, dict):
            return f"{key}: {'.'.join(sections[:depth])} is {shown(section)}, which has no keys; override it whole"
        # A copy: by an anchor (&name) it may stand elsewhere too.
        mapping[name] = dict(section)
        mapping = mapping[name]
    try:
        mapping[last] = _value(text, override)
    except InputError as error:
        return str(error)
    return ""


def _value(text: str, override: str) -> Any:
    """Lists, mappings and quoted text are YAML; anything else is one plain word, so that *norm* needs no quotes."""
    return recipe_yaml.read(text, override) if text[0] in "[{\"'" else recipe_yaml.read_word(text)
