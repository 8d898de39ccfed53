"""A recipe that was read from other tools' files, as YAML with the findings as comments above the keys that they are about."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from trainwright.importing.findings import Finding
from trainwright.importing.read import PLACEHOLDER, Imported, with_placeholders
from trainwright.recipe import Recipe
from trainwright.recipe import yaml as recipe_yaml

WRAP = textwrap.TextWrapper(118, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)
MARKS = {
    "model.pretrained": "REPLACE: no file says which model: a hub name, a folder, or smollm2-135m (or import with --model)",
    "data.source": "REPLACE: no file says which data: a .jsonl .csv .txt file, or python-docstrings (or import with --data)",
}


def render(imported: Imported) -> str:
    """YAML that ``trainwright.recipe.file`` reads, ending in a comment with the command that trains.

    Errors, warnings and notes stand above the keys that they are about; notes of the same wording are told once.
    """
    recipe = with_placeholders(imported.recipe)
    comments = _comments(imported.findings, recipe)
    for path, mark in MARKS.items():
        section, _, key = path.partition(".")
        if recipe[section][key] == PLACEHOLDER:
            comments.setdefault(path, []).insert(0, mark)
    lines = [*_as_comment(_title(imported)), *_as_comment(comments.pop("", []))]
    silent = [name for name in Recipe.model_fields if name not in recipe]
    if silent:
        lines += _as_comment([f"the files say nothing of {', '.join(silent)}: the defaults of trainwright hold"])
    return "\n".join([*lines, *_section(recipe, "", comments), *_as_comment([_command(imported)], wrap=False)]) + "\n"


def _title(imported: Imported) -> list[str]:
    return [f"imported from {', '.join(imported.translated)}"]


def _command(imported: Imported) -> str:
    if imported.machines > 1:
        return "trainwright launch-script recipe.yaml --torchrun"
    return "trainwright train recipe.yaml" + (f" --nproc {imported.nproc}" if imported.nproc else "")


def _comments(findings: Iterable[Finding], recipe: Mapping[str, Any]) -> dict[str, list[str]]:
    """Texts by the path that they stand above: the key itself, or the nearest section around it that is there."""
    groups: dict[tuple[str, str, str, str, str], list[str]] = {}
    for finding in findings:
        place = _place(finding.about, recipe)
        groups.setdefault((place, finding.level, finding.file, finding.what, finding.fix), []).append(finding.key)
    texts: dict[str, list[str]] = {}
    for (place, level, file, what, fix), keys in groups.items():
        text = f"{level}: {file}: {', '.join(keys)}: {what}" + (f"; {fix}" if fix else "")
        texts.setdefault(place, []).append(text)
    return texts


def _place(path: str, recipe: Mapping[str, Any]) -> str:
    parts = path.split(".") if path else []
    while parts:
        section: Any = recipe
        for part in parts:
            section = section.get(part, _MISSING) if isinstance(section, Mapping) else _MISSING
        if section is not _MISSING:
            return ".".join(parts)
        parts.pop()
    return ""


_MISSING = object()


def _section(values: Mapping[str, Any], prefix: str, comments: Mapping[str, list[str]]) -> list[str]:
    """The lines of a mapping: each key below its comments."""
    lines: list[str] = []
    for key, value in values.items():
        path = f"{prefix}{key}"
        lines += _as_comment(comments.get(path, []))
        if isinstance(value, Mapping) and value:
            lines += [f"{key}:", *(f"  {line}" for line in _section(value, f"{path}.", comments))]
        else:
            lines += recipe_yaml.write({key: value}).splitlines()
    return lines


def _as_comment(texts: Iterable[str], *, wrap: bool = True) -> list[str]:
    """Whatever a file holds, a comment stays one: line ends in it become spaces."""
    lines: list[str] = []
    for text in texts:
        plain = "".join(character if character.isprintable() else " " for character in text)
        lines += WRAP.wrap(plain) if wrap else [f"# {plain}"]
    return lines
