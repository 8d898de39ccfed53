"""The runs that ``benchmarks.plan`` compares with their plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import FAST
from trainwright.recipe import Recipe

SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "max_position_embeddings": 512}
TEXT = {"data__sequence_length": 256, "training__batch_size": 8, "training__micro_batch_size": 8}
LORA = {"method": "lora", "rank": 8}
DECODER: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "pure_bf16": {"precision": "pure_bf16"},
    "lora": {"adapt": LORA},
    "lora, bf16": {"adapt": LORA, "precision": "bf16"},
    "lora, 4-bit base": {"adapt": {**LORA, "base": "4bit"}},
    "lora, 4-bit base, bf16": {"adapt": {**LORA, "base": "4bit"}, "precision": "bf16"},
    "lora, streamed base": {"adapt": LORA, "memory": {"frozen": "stream"}},
    "lora, streamed base, bf16": {"adapt": LORA, "precision": "bf16", "memory": {"frozen": "stream"}},
    "checkpointing full": {"memory": {"checkpointing": "full"}},
    "checkpointing full, every 2": {"memory": {"checkpointing": "full", "every": 2}},
    "checkpointing selective": {"memory": {"checkpointing": "selective"}},
    "checkpointing offload": {"memory": {"checkpointing": "offload"}},
    "8-bit states": {"memory": {"optimizer_states": "8bit"}},
    "8-bit states, full": {"memory": {"optimizer_states": "8bit", "checkpointing": "full"}},
    "8-bit states, full, bf16": {"memory": {"optimizer_states": "8bit", "checkpointing": "full"}, "precision": "bf16"},
    "states on disk": {"memory": {"optimizer_offload": "disk"}},
    "optimizer in backward": {"memory": {"optimizer_in_backward": True}, "training__clip_norm": None},
    "accumulation": {"training__micro_batch_size": 2},
    "ema": {"training__ema": {}},
    "kernels off": {"run__kernels": "off"},
    "compiled": {"run__compile": "on"},
    "compiled, bf16": {"run__compile": "on", "precision": "bf16"},
    "compiled, full": {"run__compile": "on", "memory": {"checkpointing": "full"}},
    "compiled, selective": {"run__compile": "on", "memory": {"checkpointing": "selective"}},
    "compiled, lora": {"run__compile": "on", "adapt": LORA},
    "compiled, lora, full": {"run__compile": "on", "adapt": LORA, "memory": {"checkpointing": "full"}},
    "compiled, lora, selective": {"run__compile": "on", "adapt": LORA, "memory": {"checkpointing": "selective"}},
}
DIGITS = {"data": {"kind": "images", "source": "digits", "limit": 600}}
SERIES = {"data": {"kind": "series", "source": "sunspots", "window": 96}, "loss": {"name": "mse"}}
IMAGES = {"data": {"kind": "images", "source": "PICTURES", "held_out": 0.2}}
SAMPLES: dict[str, dict[str, Any]] = {
    "mlp": {**DIGITS, "model": {"architecture": "mlp", "options": {"hidden": [1024, 1024]}}, "training__batch_size": 256},
    "cnn": {**DIGITS, "model": {"architecture": "cnn"}},
    "cnn, 64 pixels": {**IMAGES, "model": {"architecture": "cnn"}},
    "lstm": {**SERIES, "model": {"architecture": "lstm", "options": {"hidden": 128}}, "training__batch_size": 128},
    "gru": {**SERIES, "model": {"architecture": "gru", "options": {"hidden": 128}}, "training__batch_size": 128},
    "resnet18": {**IMAGES, "model": {"architecture": "resnet18"}},
    "resnet18, bf16": {**IMAGES, "model": {"architecture": "resnet18"}, "precision": "bf16"},
    "resnet18, full": {**IMAGES, "model": {"architecture": "resnet18"}, "memory": {"checkpointing": "full"}},
    "resnet18, selective": {**IMAGES, "model": {"architecture": "resnet18"}, "memory": {"checkpointing": "selective"}},
    "resnet50": {**IMAGES, "model": {"architecture": "resnet50"}, "training__batch_size": 8},
    "vgg16": {**IMAGES, "model": {"architecture": "vgg16", "options": {"input": "any"}}, "training__batch_size": 16},
    "unet": {
        "data": {"kind": "images", "source": "digit-strokes", "limit": 64, "held_out": 0.2},
        "model": {"architecture": "unet", "options": {"channels": [16, 32, 64]}},
        "loss": {"name": "dice"},
    },
}
REAL: dict[str, list[str]] = {
    "SmolLM2-135M, LoRA, compiled": ["recipes/docstrings.yaml"],
    "SmolLM2-135M, LoRA": ["recipes/docstrings.yaml", "run.compile=off"],
    "SmolLM2-135M, LoRA, compiled, full": ["recipes/docstrings.yaml", "memory.checkpointing=full"],
}
MEMORY = [*(f"decoder {name}" for name in DECODER), *SAMPLES, *REAL]
BF16 = {case for case in MEMORY if "bf16" in case}
TIME = [
    "decoder fp32", "decoder bf16", "decoder lora", "decoder lora, streamed base", "decoder checkpointing full",
    "decoder checkpointing selective", "decoder accumulation", "decoder compiled", "decoder compiled, bf16",
    "decoder compiled, full", "mlp", "cnn, 64 pixels", "resnet18", "resnet18, bf16", "resnet18, full", "resnet50", "vgg16",
    "unet", "SmolLM2-135M, LoRA, compiled", "SmolLM2-135M, LoRA, compiled, full",
]  # fmt: skip
RSS = ["SmolLM2-135M, LoRA, compiled", "SmolLM2-135M, LoRA", "vgg16", "resnet50"]
RANKS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {"data": 2}),
    "zero 1": (2, {"data": 2, "zero": 1}),
    "zero 2": (2, {"data": 2, "zero": 2}),
    "zero 3": (2, {"data": 2, "zero": 3}),
    "tensor 2": (2, {"tensor": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
    "zero 3 x tensor 2": (4, {"data": 2, "zero": 3, "tensor": 2}),
}
LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_405B = {
    **LLAMA_1B, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
    "head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip
PLANS: dict[str, tuple[dict[str, Any], dict[str, Any], str, int]] = {
    "Llama-3.2-1B": (LLAMA_1B, {}, "h100", 1),
    "Llama-3.1-405B on 1,024": (LLAMA_405B, {"zero": 3, "tensor": 8, "pipeline": 8}, "h100", 1024),
}


SWEEP = ("recipes/docstrings.yaml", "training.batch_size=32")  # on one h100
CASES = {"memory": MEMORY, "time": TIME, "rss": RSS, "ranks": list(RANKS), "seconds": [*PLANS, "sweep"]}


def left_out(case: str) -> bool:
    """Where the processor has no instructions for bfloat16, a step in it takes minutes."""
    return case in BF16 and torch.bfloat16 != FAST


def recipe_of(case: str, work: Path, **more: Any) -> Recipe:
    """Of a case's name; what it reads is made in ``work``."""
    from tests import small, tiny
    from trainwright.recipe.file import load

    if case in REAL:
        return load(Path(REAL[case][0]), REAL[case][1:])
    if case in SAMPLES:
        keys = {**SAMPLES[case], **more}
        if keys["data"]["source"] == "PICTURES":
            keys["data"] = {**keys["data"], "source": str(work / "pictures")}
            if not (work / "pictures").exists():
                small.image_folder(work / "pictures", classes=4, each=30, size=64)
        return small.recipe(work, **{"training__batch_size": 16, **keys})
    base = work / "base"
    if not base.exists():
        tiny.model(base, **SHAPE)
        tiny.pairs(work / "pairs.jsonl", 800)
    return tiny.recipe(work, **{**TEXT, **DECODER[case.removeprefix("decoder ")], **more})
