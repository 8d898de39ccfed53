"""Pretrained models: find them, read their config, weights and tokenizer, fill a model with them, save one again."""

from __future__ import annotations

import hashlib
from typing import Any

from trainwright.models.folder import FolderWeights, read_json, save_folder, weight_files
from trainwright.models.gguf import GGUFWeights
from trainwright.models.source import Source, locate
from trainwright.models.tokenizer import load_tokenizer, locate_tokenizer
from trainwright.models.torchvision_weights import TorchWeights
from trainwright.models.weights import LoadReport, Weights, allocate, blank, load_into
from trainwright.recipe import InputError

__all__ = [
    "LoadReport",
    "Source",
    "Weights",
    "allocate",
    "blank",
    "fingerprint",
    "load_into",
    "load_tokenizer",
    "locate",
    "locate_tokenizer",
    "open_weights",
    "read_config",
    "save_folder",
]

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_config(source: Source) -> dict[str, Any]:
    """The source's config.json with ``rope_theta`` and ``rope_scaling`` at the top, and generate's token ids; {} of a file.

    Raises:
        InputError: it can't be read, or belongs to quantised weights.
    """
    if source.kind == "gguf":
        return GGUFWeights(source.path).config()
    if source.kind != "folder":
        return {}
    config = read_json(source.path / "config.json")
    if method := config.get("quantization_config"):
        kind = method.get("quant_method", "an unknown method") if isinstance(method, dict) else method
        raise InputError(f"{source.shown}: its weights are quantised with {kind}; take the model they were made from")
    return flat_rope(config) | generation_ids(source)


def flat_rope(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5's ``rope_parameters`` as ``rope_theta`` and ``rope_scaling``: options can change each alone."""
    nested = config.get("rope_parameters")
    if not isinstance(nested, dict) or any(isinstance(value, dict) for value in nested.values()):
        return config
    flat = {key: value for key, value in config.items() if key != "rope_parameters"}
    scaling = {key: value for key, value in nested.items() if key != "rope_theta"}
    flat["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    if "rope_theta" in nested:
        flat["rope_theta"] = nested["rope_theta"]
    return flat


def generation_ids(source: Source) -> dict[str, Any]:
    """The token ids of generation_config.json: chat models list there all tokens that end an answer."""
    path = source.path / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    return {key: settings[key] for key in TOKEN_IDS if settings.get(key) is not None}


def open_weights(source: Source) -> Weights:
    """The source's tensors, to be read one at a time.

    Raises:
        InputError: files are missing, damaged, or in a format that isn't supported.
    """
    if source.kind == "gguf":
        return GGUFWeights(source.path)
    return TorchWeights(source.path) if source.kind == "torch" else FolderWeights(source.path)


def fingerprint(source: Source) -> str:
    """SHA-256 over the weights: of a file's bytes, or of the names and bytes of a folder's weight files.

    A file gives the same wherever it lies; an adapter or delta recognises its base by it.
    """
    if source.kind != "folder":
        with source.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    for path in sorted(weight_files(source.path)):
        with path.open("rb") as file:
            total.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
