"""Optimizer states elsewhere and in 8 bits over many processes: the same bits as plain ones with the same division."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import ranks, tiny
from tests.parity import together
from trainwright import build, checkpoint, loop
from trainwright.memory import portions

TEXT: dict[str, Any] = {
    "training__steps": 4,
    "training__batch_size": 8,
    "training__micro_batch_size": 2,
    "evaluation__before": False,
    "optimizer": {"name": "adamw", "learning_rate": 0.01, "eps": 1e-3, "weight_decay": 0.1},
}
WAYS = {"cpu": {"optimizer_offload": "cpu"}, "disk": {"optimizer_offload": "disk"}}
DIVIDED: dict[str, dict[str, Any]] = {
    "ZeRO1": {"parallel__zero": 1},
    "ZeRO2": {"parallel__zero": 2},
    "ZeRO3": {"parallel__zero": 3},
    "TP2": {"parallel__tensor": 2},
    "PP2": {"parallel__pipeline": 2},
    "DP2": {},
}
Found = tuple[list[tuple[float, float]], dict[str, Tensor], dict[str, Tensor]]


def trace(folder: str, changes: dict[str, Any], stop: int | None = None, resume: str | None = None) -> Found:
    """Steps; whole weights and states at rank 0; and this process's own parameters. Perhaps stopped, or gone on with."""
    portions.CHUNK = 1024
    try:
        run = build.assemble(tiny.recipe(Path(folder), **changes))
        if resume:
            reader = checkpoint.newest_reader(Path(resume), pytest.fail)
            assert reader is not None
            run.recall(reader, True)
            run.step = stop or 0
        steps = []
        for step in loop.train(run):
            steps.append((step.loss, step.grad_norm))
            if stop == run.step and not resume:
                break
        if stop and not resume:
            tokens = run.share(None)
            team = checkpoint.Team(run.rank, len(tokens), "t")
            checkpoint.write_held(Path(folder) / "stopped", run.step, run.remember(), {}, team)
        own = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        return steps, together.whole(run, run.remember()), {} if "parallel__zero" in changes else own
    finally:
        portions.CHUNK = 2**19


def many(folder: Path, changes: dict[str, Any], *args: Any) -> list[Found]:
    return ranks.run(2, trace, str(folder), {**TEXT, **changes}, *args)


@pytest.mark.parametrize("name", DIVIDED)
def test_the_same_bits(name, folder):
    (steps, values, _), *_ = many(folder, DIVIDED[name])
    states = {key: value for key, value in values.items() if key.startswith("optimizer.") and not key.endswith(".step")}
    assert steps[0][0] != steps[-1][0]
    assert states
    assert all(value.any() for value in states.values())
    for way, memory in WAYS.items():
        (found, others, _), *_ = many(folder, {**DIVIDED[name], "memory": memory})
        assert found == steps, way
        assert others.keys() == values.keys()
        assert all(torch.equal(others[key], value) for key, value in values.items()), way


EIGHT = {"memory": {"optimizer_states": "8bit"}}


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, Found]:
    """One process, in float32 and in 8 bits."""
    return {"plain": trace(str(folder), TEXT), "8bit": trace(str(folder), {**TEXT, **EIGHT})}


@pytest.mark.parametrize("name", ["ZeRO1", "ZeRO3", "TP2", "PP2"])
def test_eight_bits_stay_near(name, folder, alone):
    """Pieces have other blocks than the whole, so bits differ a little; weights move by at most 0.01 a step."""
    (steps, values, _), *_ = many(folder, {**DIVIDED[name], **EIGHT})
    assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in alone["plain"][0]], rel=5e-3)
    for key, value in alone["8bit"][1].items():
        if key.startswith("model."):
            assert (values[key] - value).abs().max() < 2e-3, key
            assert (values[key] - alone["plain"][1][key]).abs().max() < 5e-3, key
        elif key.endswith("exp_avg") and value.numel() >= 4096:
            assert (values[key] - value).abs().max() < 0.04 * value.abs().max(), key
            assert not torch.equal(value, alone["plain"][1][key]), key


@pytest.mark.parametrize("name", ["ZeRO1", "ZeRO3", "TP2"])
def test_eight_bits_resume_with_the_same_bits(name, folder, tmp_path):
    changes = {**DIVIDED[name], "memory": {"optimizer_states": "8bit", "optimizer_offload": "disk"}}
    (_, expected, _), *_ = many(folder, changes)
    many(folder, changes, 2)
    (steps, found, _), *_ = many(folder, changes, 2, str(folder / "stopped"))
    assert len(steps) == 2
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


PURE = {"precision": "pure_bf16", "optimizer": {**TEXT["optimizer"], "learning_rate": 1e-4}}


@pytest.mark.parametrize("name", ["DP2", "TP2"])
def test_replicas_are_rounded_alike(name, folder):
    """In bfloat16: what both processes hold whole has the same bits at both."""
    (_, values, first), (_, _, second) = many(folder, {**DIVIDED[name], **PURE})
    assert all(value.dtype == torch.bfloat16 for key, value in values.items() if key.startswith("model."))
    alike = [key for key, value in first.items() if value.shape == values[f"model.{key}"].shape]
    assert alike
    assert all(torch.equal(first[key], second[key]) for key in alike)


@pytest.mark.parametrize("name", ["ZeRO1", "ZeRO3", "TP2"])
def test_parts_are_rounded_as_in_the_whole(name, folder):
    """The chance belongs to the place in the whole: where gradients agree, so do nearly all weights, to the bit."""
    one = {**PURE, "training__steps": 1, "training__batch_size": 2, "training__clip_norm": None}
    (_, values, _), *_ = many(folder, {**DIVIDED[name], **one, "training__micro_batch_size": 1})
    _, expected, _ = trace(str(folder), {**TEXT, **one, "training__micro_batch_size": 1})
    same = [(values[key] == value).double().mean().item() for key, value in expected.items() if key.startswith("model.")]
    assert min(same) > 0.85
