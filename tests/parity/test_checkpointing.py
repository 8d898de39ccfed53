"""Checkpointed runs over many processes against one process that keeps everything: losses, norms, every gradient and weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.parity import together

TEXT: dict[str, Any] = {
    "training__steps": 2,
    "training__batch_size": 8,
    "training__micro_batch_size": 2,
    "evaluation__before": False,
    # eps is large because Adam makes a whole step of the rounding of a tiny gradient
    "optimizer": {"name": "adamw", "learning_rate": 0.01, "eps": 1e-3, "weight_decay": 0.1},
}
ADAPT: dict[str, dict[str, Any]] = {"full": {}, "lora": {"adapt": {"method": "lora", "rank": 4}}}
FULL, SELECTIVE, OFFLOAD = ({"checkpointing": mode} for mode in ("full", "selective", "offload"))
DEEPSPEED = {"parallel__engine": "deepspeed", "parallel__zero": 3}
COMBINATIONS: dict[str, tuple[int, dict[str, Any], str, dict[str, Any]]] = {
    "ZeRO2, selective": (2, {"parallel__zero": 2}, "full", SELECTIVE),
    "ZeRO3, full": (2, {"parallel__zero": 3}, "lora", FULL),
    "ZeRO3, two at once": (2, {"parallel__zero": 3}, "full", {**FULL, "every": 2}),
    "ZeRO3, offload": (2, {"parallel__zero": 3}, "full", OFFLOAD),
    "TP2, full": (2, {"parallel__tensor": 2}, "full", FULL),
    "TP2, selective": (2, {"parallel__tensor": 2}, "lora", SELECTIVE),
    "PP2, offload": (2, {"parallel__pipeline": 2}, "lora", OFFLOAD),
    "PP2, two at once": (2, {"parallel__pipeline": 2}, "full", {**OFFLOAD, "every": 2}),
    "ZeRO3 x TP2, full": (4, {"parallel__zero": 3, "parallel__tensor": 2}, "lora", FULL),
    "DeepSpeed 3, full": (2, DEEPSPEED, "lora", FULL),
    "DeepSpeed 3, selective": (2, DEEPSPEED, "full", SELECTIVE),
    "DeepSpeed 3, offload": (2, DEEPSPEED, "full", OFFLOAD),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama of 4 blocks, and data with ragged lengths."""
    place = tmp_path_factory.mktemp("checkpointing")
    tiny.model(place / "base", num_hidden_layers=4)
    tiny.pairs(place / "pairs.jsonl", 60)
    return place


@pytest.fixture(scope="module")
def plain(folder) -> dict[str, together.Trace]:
    """One process that keeps everything."""
    return {name: together.trace("text", str(folder), {**TEXT, **changes}) for name, changes in ADAPT.items()}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_many_processes(name, folder, plain):
    count, parallel, adapt, memory = COMBINATIONS[name]
    first, *others = together.many(count, "text", folder, {**TEXT, **ADAPT[adapt], **parallel, "memory": memory})
    together.agree(first, plain[adapt], tolerance=5e-5)  # B of LoRA is small after two steps
    for other in others:
        assert (other.losses, other.norms) == (first.losses, first.norms)


def test_deepspeed_gathers_one_block_at_a_time(folder):
    with pytest.raises(AssertionError, match=r"InputError: memory\.every: 2 blocks at once, but DeepSpeed's stage 3 has .*"):
        together.many(2, "text", folder, {**TEXT, **DEEPSPEED, "memory": {**FULL, "every": 2}})
