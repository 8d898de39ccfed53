"""Configurations of DeepSpeed, accelerate and Hugging Face's Trainer, read into one recipe, with findings on every key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainwright.importing import accelerate, arguments, deepspeed
from trainwright.importing.files import KINDS, File, kind_of, load
from trainwright.importing.findings import Finding, Reading
from trainwright.importing.settling import Together
from trainwright.importing.together import combine, nested
from trainwright.recipe import InputError
from trainwright.recipe.file import parse

TRANSLATORS = {"deepspeed": deepspeed.translate, "accelerate": accelerate.translate, "transformers": arguments.translate}
PLACEHOLDER = "REPLACE-ME"
LEVELS = ("error", "warning", "note")


@dataclass(frozen=True)
class Imported:
    """A recipe out of other tools' files.

    recipe       valid once ``model`` and ``data`` are in it
    nproc        processes to start, on each machine; None where no file says it
    findings     errors first, then warnings, then notes
    machines     how many machines the processes are on
    translated   for each file, its keys and what they became in the recipe
    """

    recipe: dict[str, Any]
    nproc: int | None
    findings: list[Finding]
    machines: int
    translated: dict[str, dict[str, str]]


def read(files: Sequence[Path], *, model: str | None = None, data: str | None = None) -> Imported:
    """Read one or more files, of different kinds, and those that they name.

    Args:
        files: DeepSpeed's JSON, accelerate's YAML, TrainingArguments as JSON or YAML; told apart by what is in them.
        model: goes into ``model.pretrained``.
        data: goes into ``data.source``.

    Raises:
        InputError: no files, not readable, of no known kind, two of one kind; values that make no sense, all of them at once.
    """
    if not files:
        raise InputError(f"name at least one file: {', '.join(KINDS.values())}")
    found = _by_kind([load(Path(file)) for file in files])
    readings = {kind: Reading(name, kind, file.values) for (kind, file), name in zip(found.items(), _short(found), strict=True)}
    for kind, reading in readings.items():
        TRANSLATORS[kind](reading)
    faults = [fault for reading in readings.values() for fault in dict.fromkeys(reading.faults)]
    if faults:
        raise InputError(faults[0] if len(faults) == 1 else "\n  ".join([f"{len(faults)} values make no sense:", *faults]))
    together = combine(readings)
    if model is not None:
        together.recipe["model.pretrained"] = model
    if data is not None:
        together.recipe["data.source"] = data
    return _imported(together)


def _short(found: dict[str, File]) -> list[str]:
    """The files' names without their folders, unless two are named alike."""
    short = [Path(file.name).name for file in found.values()]
    return short if len(set(short)) == len(short) else [file.name for file in found.values()]


def _by_kind(given: list[File]) -> dict[str, File]:
    """The files by their kind, with those that they name; the same file twice is one."""
    found: dict[str, File] = {}
    for file in given:
        _add(found, file)
    for file in list(found.values()):
        named = _named(file)
        if named is not None:
            if kind_of(named) != "deepspeed":
                raise InputError(f"{file.name} names {named.name} as DeepSpeed's, but that is {KINDS[kind_of(named)]}")
            _add(found, named)
    return found


def _add(found: dict[str, File], file: File) -> None:
    kind = kind_of(file)
    other = found.get(kind)
    if other is not None and other.path.resolve() != file.path.resolve():
        raise InputError(f"{other.name} and {file.name} are both {KINDS[kind]}; one of a kind can be read")
    found.setdefault(kind, file)


def _named(file: File) -> File | None:
    """The DeepSpeed file that another names, relative to itself or to the working folder, or holds."""
    kind = kind_of(file)
    if kind == "accelerate":
        name: Any = accelerate.config_file(Reading(file.name, kind, file.values))
        key = "deepspeed_config.deepspeed_config_file"
    else:
        name, key = (file.values.get("deepspeed") if kind == "transformers" else None), "deepspeed"
    if isinstance(name, dict):
        return File(file.path / "deepspeed", f"{file.name}: deepspeed", name)
    if not isinstance(name, str) or not name:
        return None
    places = [file.path.parent / name, Path(name)]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise InputError(
            f"{file.name}: {key}: no such file: {name}; it is looked for beside {file.name} and in the working folder"
        )
    return load(place)


def _imported(together: Together) -> Imported:
    recipe = nested(together.recipe)
    if "data" in recipe:
        recipe["data"] = {"kind": "text", **recipe["data"]}
    _check(recipe)
    readings = together.readings.values()
    findings = [*together.findings, *(finding for reading in readings for finding in reading.findings)]
    findings = sorted(dict.fromkeys(findings), key=lambda finding: LEVELS.index(finding.level))
    nproc = together.processes and max(1, together.processes // together.machines)
    translated = {reading.file: dict(reading.used) for reading in readings}
    return Imported(recipe, nproc, findings, together.machines, translated)


def with_placeholders(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with a model and data that are plainly not meant, where it has none; in the order of the recipe's keys."""
    model = {"pretrained": PLACEHOLDER, **recipe.get("model", {})}
    data = {"kind": "text", "source": PLACEHOLDER, **recipe.get("data", {})}
    first = {"model": model, **({"adapt": recipe["adapt"]} if "adapt" in recipe else {}), "data": data}
    return {**first, **{key: value for key, value in recipe.items() if key not in first}}


def _check(recipe: dict[str, Any]) -> None:
    """What the files say may be out of the recipe's bounds."""
    parse(with_placeholders(recipe), "the recipe that these files make")
