"""float16 with a scaled loss, and bfloat16 without masters, over many processes against one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests import ranks, tiny
from tests.parity import together
from trainwright import build, loop
from trainwright.memory.scaling import Scaler

TEXT: dict[str, Any] = {
    "training__steps": 2,
    "training__batch_size": 8,
    "training__micro_batch_size": 2,
    "evaluation__before": False,
    "optimizer": {"name": "adamw", "learning_rate": 0.01, "eps": 0.1, "weight_decay": 0.1},
}
ADAPT: dict[str, dict[str, Any]] = {"full": {}, "lora": {"adapt": {"method": "lora", "rank": 4}}}
TOLERANCE = {"fp16": 1e-2, "pure_bf16": 5e-2}  # of the largest number of a tensor
COMBINATIONS: dict[str, tuple[int, dict[str, Any], str, str]] = {
    "ZeRO1, fp16": (2, {"parallel__zero": 1}, "full", "fp16"),
    "ZeRO2, pure bf16": (2, {"parallel__zero": 2}, "full", "pure_bf16"),
    "ZeRO3, pure bf16": (2, {"parallel__zero": 3}, "lora", "pure_bf16"),
    "TP2, fp16": (2, {"parallel__tensor": 2}, "lora", "fp16"),
    "TP2, pure bf16": (2, {"parallel__tensor": 2}, "full", "pure_bf16"),
    "PP2, fp16": (2, {"parallel__pipeline": 2}, "full", "fp16"),
    "PP2, pure bf16": (2, {"parallel__pipeline": 2}, "lora", "pure_bf16"),
}


@pytest.fixture(scope="module")
def plain(folder) -> dict[tuple[str, str], together.Trace]:
    """One process."""
    return {
        (name, kind): together.trace("text", str(folder), {**TEXT, **changes, "precision": kind})
        for name, changes in ADAPT.items()
        for kind in TOLERANCE
    }


@pytest.mark.parametrize("name", COMBINATIONS)
def test_many_processes(name, folder, plain):
    count, parallel, adapt, kind = COMBINATIONS[name]
    first, *others = together.many(count, "text", folder, {**TEXT, **ADAPT[adapt], **parallel, "precision": kind})
    together.agree(first, plain[adapt, kind], tolerance=TOLERANCE[kind])
    for other in others:
        assert (other.losses, other.norms) == (first.losses, first.norms)


def overflowing(folder: str, changes: dict[str, Any], who: int) -> list[Any]:
    """A first step whose scale is far too large at one process alone; what became of it here."""
    run = build.assemble(tiny.recipe(Path(folder), **TEXT, **changes, precision="fp16"))
    scaler: Scaler = run.judge.__self__  # type: ignore[attr-defined]
    scaler.scale = 64.0
    inner = run.forward_backward

    def forward_backward(batches: Any) -> Any:
        loss = inner(batches)
        if run.step == 0 and run.rank == who:
            name = next(iter(dict(run.gradients())))
            run.gradients()[name].tensor.fill_(math.inf)
        return loss

    run.forward_backward = forward_backward
    first, second = loop.train(run)
    return [first.skipped, bool(second.skipped), scaler.scale, scaler.good]


@pytest.mark.parametrize("parallel", [{}, {"zero": 3}, {"pipeline": 2}], ids=str)
def test_an_overflow_in_one_process_is_one_in_all(parallel, folder):
    changes = {f"parallel__{name}": value for name, value in parallel.items()}
    for found in ranks.run(2, overflowing, str(folder), changes, 1):
        assert found == ["the gradient overflowed, so nothing was updated; the loss scale is 32 now", False, 32.0, 1]
