"""The small recipes that mutants are tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

from tests import small, tiny
from trainwright.recipe import Recipe

TEXT: dict[str, Any] = {
    "training__steps": 3, "training__batch_size": 8, "training__micro_batch_size": 2, "evaluation__before": False,
    "optimizer": {"name": "adamw", "learning_rate": 0.01, "weight_decay": 0.1}, "parallel__data": 1,
}  # fmt: skip
SAMPLES: dict[str, Any] = {
    "training__steps": 3, "training__batch_size": 64, "training__micro_batch_size": 16, "evaluation__before": False,
    "optimizer": {"name": "sgd", "momentum": 0.9, "learning_rate": 0.05, "weight_decay": 0.1}, "parallel__data": 1,
    "data__limit": 205,
}  # fmt: skip
SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
PARTIAL = {"method": "partial", "train": ["*layers.0.mlp*", "*norm*", "*embed*"]}
# What stands for places of files; filled in by ``make``.
BASE, FILE = "BASE", "FILE"
BASES: dict[str, dict[str, Any]] = {
    "full": TEXT,
    "lora": {**TEXT, "adapt": {"method": "lora", "rank": 4}},
    "partial": {**TEXT, "adapt": PARTIAL},
    "scratch": {**TEXT, "adapt": PARTIAL, "model": {"options": SIZES, "tokenizer": BASE}},
    "positional": {**TEXT, "model": {"architecture": "tests.mutants.module:positional", "tokenizer": BASE}},
    "gguf": {**TEXT, "model": {"pretrained": FILE, "tokenizer": BASE}},
    "mlp": {**SAMPLES, "model__options": {"hidden": [32, 24, 16], "dropout": 0.0}},
    "resnet9": {**SAMPLES, "model": {"architecture": "resnet9", "options": {"stem": 4, "channels": [8, 8]}}},
}


def prepare(folder: Path) -> None:
    """Files that the recipes read: a model of 2 layers with tied ends, and ragged data."""
    tiny.model(folder / "base")
    tiny.pairs(folder / "pairs.jsonl", 90)


def _gguf(folder: Path) -> Path:
    """The same model in another format."""
    from tests.models.test_gguf import write  # NOTE: here, because only one mutant needs it

    path = folder / "base.gguf"
    return path if path.exists() else write(path, LlamaForCausalLM.from_pretrained(folder / "base"))


def make(base: str, folder: Path, keys: dict[str, Any]) -> Recipe:
    """A recipe of ``BASES`` with other keys, for a folder that is prepared."""
    merged = {**BASES[base], **keys}
    if base in ("mlp", "resnet9"):
        return small.recipe(folder, **merged)
    places = {BASE: str(folder / "base"), FILE: str(_gguf(folder)) if base == "gguf" else ""}
    merged["model"] = {key: places.get(str(value), value) for key, value in merged.get("model", {"pretrained": BASE}).items()}
    return tiny.recipe(folder, **merged)
