"""Stages 0 to 2 against one process, with every gradient and every weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests import ranks
from tests.parallel import zero
from tests.parallel.zero import Case
from trainwright.parallel import gradients
from trainwright.parallel.sharing import alone
from trainwright.pieces import Piece

MODELS = [*zero.MODELS, "conv-last"]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_equals_one_process(model: str, stage: int, size: int) -> None:
    for micro in (1, 3) if size == 2 else (3,):
        case = Case(model, stage, micro)
        results, expected = ranks.run(size, zero.train, case, size), zero.reference(case, size)
        zero.assert_same(results, expected, 1e-9)
        assert all(any(r["changed"].get(name, False) for r in results) for name in expected["changed"] if "never" not in name)
        nonzero = [name for name, held in zero.assembled([expected], "gradients").items() if held is not None and np.any(held)]
        assert len(nonzero) >= len(expected["gradients"]) - ("unused" in model)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_memory_and_traffic_are_as_in_theory(stage: int, size: int) -> None:
    found = [zero.weigh(stage, 1)] if size == 1 else ranks.run(size, zero.weigh, stage, size)
    for has in found:
        whole, part = has["trained"], has["trained"] / size
        optimizer, gradient = 2 * (part if stage else whole), part if stage == 2 else whole
        assert has["within"] == pytest.approx(whole + gradient + optimizer, rel=0.03)
        assert has["after"] == pytest.approx(whole + optimizer, rel=0.03)
        assert has["sent"] == pytest.approx((3 if stage == 2 else 2) * whole * (size - 1) / size, rel=0.05)  # two portions


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_without_overlap_and_fused_in_float32(stage: int) -> None:
    for model in ("conv-last", "decoder"):
        case = Case(model, stage, 2, torch.float32, steps=2, overlap=False, fused=True)
        zero.assert_same(ranks.run(2, zero.train, case, 2), zero.reference(case, 2), 1e-5 if model == "decoder" else 1e-4)


def several_backwards(stage: int) -> dict[str, list[float]]:
    """As a pipeline does: all micro-batches in one portion that isn't called the last."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for p in model.parameters():
        nn.init.constant_(p, 0.5)
    axis = zero.world(2)
    sharing = gradients.share(model, axis, stage, [model[0]])
    for _ in range(2):
        with sharing.portion(False):
            for number in (1.0, 2.0):
                model(torch.full((1, 3), number + axis.index)).sum().backward()
        sharing.finish()
        found = {name: p.grad.flatten().tolist() for name, p in sharing.named}
        for _, p in sharing.named:
            p.grad = None
    return found


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_several_backwards_in_a_portion(stage: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for p in model.parameters():
        nn.init.constant_(p, 0.5)
    for number in (1.0, 2.0, 2.0, 3.0):
        model(torch.full((1, 3), number)).sum().backward()
    first, second = ranks.run(2, several_backwards, stage)
    for name, p in model.named_parameters():
        together = first[name] if stage == 0 else first[name] + second[name]
        assert together == pytest.approx(p.grad.flatten().tolist())


def late(stage: int) -> str:
    model = nn.Linear(2, 2)
    sharing = gradients.share(model, zero.world(2), stage, [])
    with sharing.portion(True):
        model(torch.ones(1, 2)).sum().backward()
        model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(AssertionError, match="a backward after the last one"):
        sharing.finish()
    return "refused"


def test_a_second_backward_in_the_last_portion_is_noticed() -> None:
    assert ranks.run(2, late, 0) == ["refused"] * 2


def test_alone_costs_nothing() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    sharing = alone(model)
    with sharing.portion(True):
        model(torch.ones(1, 2)).sum().backward()
    sharing.finish()
    sharing.updated()
    sharing.rest()
    assert [(name, p is model.weight) for name, p in sharing.named] == [("weight", True)]
    assert model.weight.grad is not None
    assert not sharing.splits("weight")
    box = Piece.all_of((2, 2))
    assert sharing.piece("weight", box) == box
