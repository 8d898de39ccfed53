"""Whole runs with states elsewhere, in 8 bits, or gradients used up in the backward, against plain ones."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import small, tiny
from trainwright import build, fit, loop, runfolder
from trainwright.checkpoint import newest_valid
from trainwright.recipe import InputError, Memory, RunError

WAYS: dict[str, dict[str, Any]] = {
    "cpu": {"optimizer_offload": "cpu"},
    "disk": {"optimizer_offload": "disk"},
    "in backward": {"optimizer_in_backward": True},
    "in backward, disk": {"optimizer_in_backward": True, "optimizer_offload": "disk"},
    "in backward, full": {"optimizer_in_backward": True, "checkpointing": "full"},
}
TEXT: dict[str, Any] = {"training__micro_batch_size": 4, "training__clip_norm": None, "training__ema": {"decay": 0.9}}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "decoder": (tiny, TEXT),
    "lora": (tiny, {**TEXT, "adapt": {"method": "lora", "rank": 4, "dropout": 0.1}}),
    "cnn": (
        small,
        {
            "model": {"architecture": "cnn", "options": {"channels": [4, 16], "norm": "batch"}},
            "training__clip_norm": None,
            "optimizer": {"name": "rmsprop", "learning_rate": 0.01, "momentum": 0.5},
        },
    ),
}


pytestmark = pytest.mark.usefixtures("small_portions")


@pytest.fixture
def other_settings(monkeypatch):
    """A run's folder may be gone on with, with other settings of memory."""
    monkeypatch.setattr(runfolder, "FREE", {*runfolder.FREE, "memory.optimizer_states", "memory.optimizer_offload"})


def taken(module: Any, folder: Path, **changes: Any) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Losses, norms, and all that a checkpoint holds after the last step."""
    run = build.assemble(module.recipe(folder, **changes))
    steps = [(step.loss, step.grad_norm) for step in loop.train(run)]
    return steps, {name: held.tensor.clone() for name, held in run.remember().items()}


@pytest.mark.parametrize("model", MODELS)
def test_the_same_bits(model, tmp_path):
    module, changes = MODELS[model]
    steps, values = taken(module, tmp_path, **changes)
    assert steps[0][0] != steps[-1][0]
    assert all(norm > 0 for _, norm in steps)
    states = [name for name in values if name.startswith("optimizer.") and not name.endswith(".step")]
    assert states
    assert all(values[name].any() for name in states)
    for name, memory in WAYS.items():
        found, others = taken(module, tmp_path, **changes, memory=memory)
        assert found == steps, name
        assert others.keys() == values.keys(), name
        assert all(torch.equal(others[key], value) for key, value in values.items()), name


def trained(folder: Path, steps: int, *, resume: bool, **changes: Any) -> dict[str, Tensor]:
    changes = {"training__steps": steps, "schedule": {"name": "constant"}, **changes}
    fit.train(small.recipe(folder, **changes), quiet=True, resume=resume)
    found = newest_valid(folder / "run", warn=pytest.fail)
    assert found is not None
    return {**load_file(folder / "run" / "model" / "model.safetensors"), **found.tensors}


LARGE = {"model__options": {"hidden": [80, 80]}, "training__clip_norm": None}
RESUMED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "8bit": ({"optimizer_states": "8bit"}, {"optimizer_states": "8bit"}),
    "8bit, then on disk": ({"optimizer_states": "8bit"}, {"optimizer_states": "8bit", "optimizer_offload": "disk"}),
    "disk": ({"optimizer_offload": "disk"}, {"optimizer_offload": "disk"}),
    "plain, then disk": ({}, {"optimizer_offload": "disk"}),
    "disk, then plain": ({"optimizer_offload": "disk"}, {}),
    "in backward": ({"optimizer_in_backward": True}, {"optimizer_in_backward": True}),
}


def test_resuming_rounds_with_the_same_chance(tmp_path):
    changes = {**LARGE, "precision": "pure_bf16"}
    expected = trained(tmp_path / "whole", 6, resume=False, **changes)
    trained(tmp_path / "parts", 3, resume=False, **changes)
    found = trained(tmp_path / "parts", 6, resume=True, **changes)
    assert any(value.dtype == torch.bfloat16 for value in expected.values())
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_each_step_has_its_number(tmp_path):
    run = build.assemble(small.recipe(tmp_path, training__steps=3))
    assert [run.optimizer.param_groups[0]["update"] for _ in loop.train(run)] == [0, 1, 2]


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_gives_the_same_bits(name, other_settings, tmp_path):
    first, second = RESUMED[name]
    expected = trained(tmp_path / "whole", 6, resume=False, **LARGE, memory=first)
    before = trained(tmp_path / "parts", 3, resume=False, **LARGE, memory=first)
    found = trained(tmp_path / "parts", 6, resume=True, **LARGE, memory=second)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert not all(torch.equal(before[key], value) for key, value in expected.items())


def test_any_state_can_go_on_in_eight_bits(other_settings, tmp_path):
    """And checkpoints hold float32 under the same names, so also the other way."""
    plain = trained(tmp_path / "one", 3, resume=False, **LARGE)
    eight = trained(tmp_path / "one", 6, resume=True, **LARGE, memory={"optimizer_states": "8bit"})
    again = trained(tmp_path / "one", 9, resume=True, **LARGE)
    assert plain.keys() == eight.keys() == again.keys()
    assert all(one.dtype == other.dtype for one, other in zip(plain.values(), eight.values(), strict=True))
    moments = [name for name in eight if name.endswith("exp_avg_sq") and eight[name].ndim == 2 and eight[name].numel() >= 4096]
    codes = {name: (eight[name].flatten()[:256] / eight[name].flatten()[:256].max()).unique() for name in moments}
    assert all(len(found) < 200 for found in codes.values())


def test_eight_bits_learn_as_well(tmp_path):
    """The whole way of 8 bits stays within a few per cent of the way of float32."""
    changes = {**TEXT, "training__steps": 12}
    start = {n: h.tensor.clone() for n, h in build.assemble(tiny.recipe(tmp_path, **changes)).weights().items()}
    steps, values = taken(tiny, tmp_path, **changes)
    found, others = taken(tiny, tmp_path, **changes, memory={"optimizer_states": "8bit"})
    assert found != steps
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in steps], rel=0.01)
    ways = [(values[f"model.{n}"] - start[n], others[f"model.{n}"] - start[n]) for n in start if f"model.{n}" in values]
    assert all((other - way).norm() < 0.1 * way.norm() for way, other in ways)


def test_gradients_are_gone_as_the_backward_goes_on(tmp_path):
    """At no time more than one is there."""
    run = build.assemble(tiny.recipe(tmp_path, **TEXT, memory={"optimizer_in_backward": True}))
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = []

    def look(gradient: Tensor) -> None:
        alive.add(gradient)
        most.append(sum(p.grad is not None for p in run.model.parameters()))

    for p in run.model.parameters():
        p.register_hook(look)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.forward_backward(run.batch(0))
    assert len(most) >= len(before)
    assert max(most) <= 1
    assert all(p.grad is None for p in run.model.parameters())
    assert not any(torch.equal(p, old) for p, old in zip(run.model.parameters(), before, strict=True))
    assert run.clip() > 0
    assert run.clip() == 0  # it counts from one call to the next


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_updates_nothing_more(where, tmp_path):
    run = build.assemble(tiny.recipe(tmp_path, **TEXT, memory={"optimizer_in_backward": True}))
    named = dict(run.model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    if where == "loss":
        forward = run.model.forward
        run.model.forward = lambda *args: forward(*args) * torch.nan
    else:  # the last layers have their gradients first
        named["model.layers.1.mlp.down_proj.weight"].register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(RunError, match=r"step 1.*(loss nan|gradient norm (inf|nan)).* is not finite"):
        next(loop.train(run))
    moved = {name for name, p in named.items() if not torch.equal(p, before[name])}
    assert all(p.isfinite().all() for p in named.values())
    assert not moved if where == "loss" else moved <= {"model.norm.weight"}


def test_nothing_stays_in_the_folder(tmp_path):
    (tmp_path / "files").mkdir()
    memory = {"optimizer_offload": "disk", "folder": str(tmp_path / "files")}
    run = build.assemble(tiny.recipe(tmp_path, **TEXT, memory=memory))
    assert not os.listdir(tmp_path / "files")
    next(loop.train(run))
    assert not os.listdir(tmp_path / "files")
    assert ("optimizer", "states in float32 in a file") in [(c.technique, c.summary) for c in run.changes]


def test_a_plain_run_has_the_optimizer_of_torch(tmp_path):
    run = build.assemble(tiny.recipe(tmp_path))
    assert type(run.optimizer) is torch.optim.AdamW
    assert "optimizer" not in [change.technique for change in run.changes]


DEEP = {"parallel__engine": "deepspeed"}
EARLY = {"memory": {"optimizer_in_backward": True}}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "clipping": (
        EARLY,
        "memory.optimizer_in_backward: each gradient is used up as it arrives, but training.clip_norm: 1 needs the norm of all "
        "of them first; set training.clip_norm: null",
    ),
    "accumulation": (
        {**EARLY, "training__clip_norm": None, "training__micro_batch_size": 2},
        "memory.optimizer_in_backward: each gradient is used up as it arrives, but a step sums those of 2 micro-batches; set "
        "training.micro_batch_size: 4 (the whole batch), or leave optimizer_in_backward out",
    ),
    "muon": (
        {"memory": {"optimizer_states": "8bit"}, "optimizer": {"name": "torch", "type": "Adafactor"}},
        "memory.optimizer_states: 8bit, but Adafactor looks at whole matrices, and updates are made in portions; take another "
        "optimizer, such as adamw, or leave that out",
    ),
    "no states": (
        {"memory": {"optimizer_states": "8bit"}, "optimizer": {"name": "sgd", "momentum": 0.0}},
        "memory.optimizer_states: 8bit has no effect: SGD keeps no states with these settings; leave it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_excludes_what(name, tmp_path):
    changes, message = WRONG[name]
    with pytest.raises(InputError) as caught:
        build.assemble(tiny.recipe(tmp_path, **{"training__micro_batch_size": 4, **changes}))
    assert str(caught.value) == message


def test_a_folder_needs_something_to_put_there():
    Memory(optimizer_offload="disk", folder="/tmp")
    with pytest.raises(ValueError, match=r"folder has no effect: .* optimizer_offload isn't disk"):
        Memory(optimizer_offload="cpu", folder="/tmp")
