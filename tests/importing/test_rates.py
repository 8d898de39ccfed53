"""Optimizers and schedules: the imported one gives the learning rates that the other tool gives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.importing.files import OUTPUT, ZERO, about, imported, one
from trainwright import schedules
from trainwright.recipe import AdamW
from trainwright.recipe.file import parse

STEPS, WARMUP, RATE = 40, 10, 1e-3


def ours(recipe: dict[str, Any]) -> list[float]:
    whole = parse({**recipe, "data": {"kind": "text", "source": "x"}})
    assert isinstance(whole.optimizer, AdamW)
    factor = schedules.factor(whole.schedule, STEPS)
    return [whole.optimizer.learning_rate * factor(step) for step in range(STEPS)]


def rates(scheduler: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def adam() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=RATE)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("constant_with_warmup", {}),
        ("inverse_sqrt", {}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {"lr_end": 1e-4}),
        ("cosine_with_min_lr", {"min_lr": 1e-4}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.2}),
    ],
)
def test_rates_of_transformers(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    optimization = pytest.importorskip("transformers.optimization")
    optimizer = adam()
    theirs = rates(optimization.get_scheduler(name, optimizer, WARMUP, STEPS, options or None), optimizer)
    args = {**OUTPUT, "lr_scheduler_type": name, "lr_scheduler_kwargs": options, "learning_rate": RATE, "max_steps": STEPS}
    found = imported(tmp_path, args={**args, "warmup_steps": WARMUP})
    assert ours(found.recipe)[WARMUP:] == pytest.approx(theirs[WARMUP:], rel=1e-6)
    assert not [finding for finding in found.findings if finding.level != "note" and finding.about.startswith("schedule")]


@pytest.mark.parametrize(
    ("name", "params", "shift"),
    [
        ("WarmupLR", {"warmup_max_lr": RATE}, 0),
        ("WarmupDecayLR", {"warmup_max_lr": RATE, "total_num_steps": STEPS}, 0),
        ("WarmupCosineLR", {"total_num_steps": STEPS, "cos_min_ratio": 0.1}, 1),
    ],
)
def test_rates_of_deepspeed(tmp_path: Path, name: str, params: dict[str, Any], shift: int) -> None:
    with patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):
        module = pytest.importorskip("deepspeed.runtime.lr_schedules")
    params = {**params, "warmup_num_steps": WARMUP, "warmup_type": "linear"}
    optimizer = adam()
    theirs = rates(getattr(module, name)(optimizer, **params), optimizer)
    optimizer_section = {"type": "AdamW", "params": {"lr": RATE}}
    found = imported(tmp_path, ds={**ZERO, "optimizer": optimizer_section, "scheduler": {"type": name, "params": params}})
    mine = ours({**found.recipe, "training": {"steps": STEPS}})
    # The engine steps its scheduler after the first step of the optimizer: theirs stands still for one step.
    # WarmupCosineLR counts from 1 after its warmup.
    theirs = theirs[1:]
    end = len(theirs)
    assert mine[WARMUP + shift : end] == pytest.approx(theirs[WARMUP : end - shift], rel=1e-6)


def test_the_peak_of_the_scheduler_is_the_rate(tmp_path: Path) -> None:
    optimizer = {"type": "AdamW", "params": {"lr": 3e-4}}
    scheduler = {"type": "WarmupDecayLR", "params": {"total_num_steps": 100, "warmup_num_steps": 10}}
    found = imported(tmp_path, ds={**ZERO, "optimizer": optimizer, "scheduler": scheduler})
    assert found.recipe["optimizer"]["learning_rate"] == 1e-3
    assert found.recipe["training"]["steps"] == 100
    assert "the scheduler's warmup_max_lr 0.001, its default, holds" in one(found, "optimizer.params.lr", "warning")
    assert "logarithmic" in one(found, "scheduler.params.warmup_type", "warning")


def test_schedules_that_are_not_offered(tmp_path: Path) -> None:
    for name in ("reduce_lr_on_plateau", "warmup_stable_decay", "greedy"):
        found = imported(tmp_path, args={**OUTPUT, "lr_scheduler_type": name})
        assert found.recipe["schedule"]["name"] == "constant"
        assert f"{name} isn't offered" in one(found, "lr_scheduler_type", "warning")
    scheduler = {"type": "OneCycle", "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3, "cycle_first_step_size": 30}}
    found = imported(tmp_path, ds={**ZERO, "scheduler": scheduler})
    assert found.recipe["schedule"] == {"name": "one_cycle", "warmup": 30, "start": 0.1, "final": 0.1}
    assert found.recipe["optimizer"]["learning_rate"] == 1e-3
    test = imported(tmp_path, ds={**ZERO, "scheduler": {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 1e-4}}})
    assert "trainwright find-lr" in one(test, "scheduler.type", "warning")


@pytest.mark.parametrize(
    ("kind", "params", "expected"),
    [
        ("Adam", {"lr": 1e-3, "betas": [0.8, 0.99], "eps": 1e-7},
         {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0, "betas": [0.8, 0.99], "eps": 1e-7}),
        ("Adam", {"adam_w_mode": False}, {"name": "adam", "learning_rate": 1e-3, "weight_decay": 0.0}),
        ("AdamW", {"lr": "2e-4", "weight_decay": 0.1}, {"name": "adamw", "learning_rate": 2e-4, "weight_decay": 0.1}),
        ("SGD", {"lr": 0.1}, {"name": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "momentum": 0.0}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True},
         {"name": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "momentum": 0.9, "nesterov": True}),
        ("Lion", {"lr": 1e-5}, {"name": "adamw", "learning_rate": 1e-5, "weight_decay": 0.0}),
        ("NAdam", {"lr": 1e-3}, {"name": "torch", "type": "NAdam", "learning_rate": 1e-3, "weight_decay": 0.0}),
    ],
)  # fmt: skip
def test_optimizers_of_deepspeed(tmp_path: Path, kind: str, params: dict[str, Any], expected: dict[str, Any]) -> None:
    found = imported(tmp_path, ds={**ZERO, "optimizer": {"type": kind, "params": params}})
    assert found.recipe["optimizer"] == expected
    assert ("isn't offered" in str(about(found, "optimizer.type"))) is (kind == "Lion")


@pytest.mark.parametrize(
    ("word", "name"),
    [("adamw_torch", "adamw"), ("sgd", "sgd"), ("adamw_bnb_8bit", "adamw"), ("lion_8bit", "adamw"), ("rmsprop", "rmsprop")],
)
def test_optimizers_of_transformers(tmp_path: Path, word: str, name: str) -> None:
    found = imported(tmp_path, args={**OUTPUT, "optim": word, "adam_beta2": 0.95})
    assert found.recipe["optimizer"]["name"] == name
    assert found.recipe["optimizer"].get("betas") == ([0.9, 0.95] if name == "adamw" else None)
    assert found.recipe["optimizer"].get("momentum") == (0.0 if name == "sgd" else None)
    assert bool([f for f in about(found, "optim") if f.level == "warning"]) is (word == "lion_8bit")
