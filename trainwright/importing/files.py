"""Files as mappings, and of which tool they are, by what is in them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trainwright.importing import accelerate, arguments, deepspeed
from trainwright.importing.findings import shown
from trainwright.recipe import InputError, nearest
from trainwright.recipe import yaml as recipe_yaml

KINDS = {
    "deepspeed": "a DeepSpeed configuration",
    "accelerate": "an accelerate configuration",
    "transformers": "Hugging Face TrainingArguments",
}
VOCABULARIES: dict[str, tuple[str, ...]] = {
    "deepspeed": deepspeed.KNOWN,
    "accelerate": accelerate.KNOWN,
    "transformers": arguments.KNOWN,
}
KNOWN = "known are DeepSpeed's JSON, the YAML of accelerate config, and TrainingArguments as JSON or YAML"
# Keys that tell of other files that people have at hand: all of a group must be there.
OTHERS: list[tuple[set[str], str]] = [
    ({"model_type"}, "the config.json of a model; name its folder with --model"),
    ({"architectures"}, "the config.json of a model; name its folder with --model"),
    ({"peft_type"}, "the adapter_config.json of an adapter"),
    ({"log_history"}, "the trainer_state.json of a finished run"),
    ({"base_model", "datasets"}, "a file of axolotl"),
    ({"tokenizer_class"}, "the tokenizer_config.json of a model"),
    ({"messages"}, "data; name it with --data"),
    ({"data", "training"}, "a recipe already"),
    ({"model", "data"}, "a recipe already"),
]
TELLING = {
    "deepspeed": {"zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size"},
    "accelerate": {"distributed_type", "compute_environment"},
    "transformers": {"output_dir", "per_device_train_batch_size"},
}
SIGNS: list[tuple[bytes, str]] = [
    (b"\x80", "a pickle, which is never loaded; write the arguments with args.to_json_string()"),
    (
        b"PK\x03\x04",
        "a zip archive, such as training_args.bin, which is never loaded; write the arguments with args.to_json_string()",
    ),
]


class File(NamedTuple):
    """name: as the user gave it."""

    path: Path
    name: str
    values: dict[str, Any]


def load(path: Path) -> File:
    """The mapping in a JSON or YAML file.

    Raises:
        InputError: no such file, not text, neither JSON nor YAML (with the place), keys there twice, empty, not a mapping.
    """
    text = _text(path)
    value = _json(text, path) if _looks_like_json(text) else _yaml(text, path)
    if value is None or value == {}:
        raise InputError(f"{path}: empty; {KNOWN}")
    if not isinstance(value, Mapping):
        kind = "a list" if isinstance(value, list) else f"the value {shown(value)}"
        raise InputError(f"{path}: a configuration is a mapping of keys and values, found {kind}; {KNOWN}")
    return File(path, str(path), {str(key): entry for key, entry in value.items()})


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        beside = sorted(map(str, path.parent.glob("*"))) if path.parent.is_dir() else []
        raise InputError(f"{path}: no such file{nearest(str(path), beside)}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; name the files in it") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    for sign, what in SIGNS:
        if data.startswith(sign):
            raise InputError(f"{path}: {what}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text in UTF-8 (byte {error.start}); {KNOWN}") from None


def _looks_like_json(text: str) -> bool:
    return text.lstrip().startswith(("{", "["))


def _json(text: str, path: Path) -> Any:
    """JSON, strictly: of a key that is there twice nobody knows which is meant."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"{path}: {', '.join(map(repr, twice))} is there twice; a key may stand once only")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        hint = (
            "; remove comments and the commas before } and ]" if "//" in text or "#" in text or "xpecting" in error.msg else ""
        )
        raise InputError(f"{path}: not JSON: line {error.lineno}, column {error.colno}: {error.msg}{hint}") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply") from None


def _yaml(text: str, path: Path) -> Any:
    first = next((line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")), "")
    if path.suffix == ".py" or first.startswith(("import ", "from ", "def ", "class ", '"""', "#!")):
        raise InputError(
            f"{path}: a Python program, which isn't run; write its arguments with "
            "open('training_arguments.json', 'w').write(args.to_json_string())"
        )
    return recipe_yaml.read(text, str(path))


def kind_of(file: File) -> str:
    """Of which tool a file is: the one that knows most of its keys; deepspeed, accelerate or transformers.

    Raises:
        InputError: none knows enough of them, or two know as many; with what it looks like.
    """
    for keys, what in OTHERS:
        if keys <= file.values.keys() and not _telling(file):
            raise InputError(f"{file.path}: looks like {what}; {KNOWN}")
    scores = {kind: _score(file, kind) for kind in VOCABULARIES}
    best = max(scores, key=lambda kind: scores[kind])
    if scores[best] == 0 or (scores[best] < len(file.values) / 3 and not _telling(file)):
        raise InputError(f"{file.path}: of no known kind: {_resembles(file)}; {KNOWN}")
    ties = [kind for kind, score in scores.items() if score == scores[best]]
    if len(ties) > 1:
        keys_there = ", ".join(list(file.values)[:5])
        raise InputError(f"{file.path}: too little to tell its kind: {keys_there} are known to {_words(ties)}; {KNOWN}")
    return best


def _telling(file: File) -> bool:
    """Whether keys are there that only one tool has."""
    return (
        any(keys & file.values.keys() for keys in TELLING.values()) and not {"base_model", "log_history"} & file.values.keys()
    )


def _score(file: File, kind: str) -> int:
    """How many of its keys a tool knows; those that only it has tell more than all others."""
    known = set(VOCABULARIES[kind])
    for key in ("bf16", "fp16", "optimizer", "scheduler", "debug"):  # sections in DeepSpeed, plain values elsewhere
        if key in file.values and isinstance(file.values[key], Mapping) is not (kind == "deepspeed"):
            known.discard(key)
    return len(known & file.values.keys()) + 1000 * len(TELLING[kind] & file.values.keys())


def _resembles(file: File) -> str:
    """A key that was probably misspelt, or else what keys there are."""
    known = [key for keys in VOCABULARIES.values() for key in keys]
    for key in file.values:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if near:
            return f"{key!r} isn't a key of any (did you mean {near[0]!r}?)"
    return f"its keys are {', '.join(list(file.values)[:5])}"


def _words(kinds: list[str]) -> str:
    return " and ".join(KINDS[kind] for kind in kinds)
