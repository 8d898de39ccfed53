"""Stages 0 to 2 against one process, with every gradient and every weight."""

from __future__ import annotations

import numpy as np
import pytest

from tests import ranks
from tests.parallel import zero
from tests.parallel.zero import Case

MODELS = ["decoder", "decoder-tied", "decoder-lora", "decoder-partial", "decoder-head", "mlp", "conv-last", "branches"]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_equals_one_process(model: str, stage: int, size: int) -> None:
    for micro in (1, 3):
        case = Case(model, stage, micro)
        results, expected = ranks.run(size, zero.train, case, size), zero.reference(case, size)
        zero.assert_same(results, expected, 1e-9)
        assert all(any(r["changed"].get(name, False) for r in results) for name in expected["changed"] if "never" not in name)
        nonzero = [name for name, held in zero.assembled([expected], "gradients").items() if held is not None and np.any(held)]
        assert len(nonzero) >= len(expected["gradients"]) - ("branches" in model)


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
