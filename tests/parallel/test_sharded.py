"""Stage 3 against one process, with every gradient and every weight, from the meta device."""

from __future__ import annotations

import numpy as np
import pytest

from tests import ranks
from tests.parallel import zero
from tests.parallel.zero import Case

MODELS = ["decoder", "decoder-tied", "decoder-lora", "decoder-partial", "decoder-head", "mlp", "conv-vector", "branches"]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_equals_one_process(model: str, size: int) -> None:
    for micro in (1, 3):
        case = Case(model, 3, micro, meta=micro == 1)
        results, expected = ranks.run(size, zero.train, case, size), zero.reference(case, size)
        zero.assert_same(results, expected, 1e-9)
        assert all(any(r["changed"].get(name, False) for r in results) for name in expected["changed"] if "never" not in name)
        nonzero = [name for name, held in zero.assembled([expected], "gradients").items() if held is not None and np.any(held)]
        assert len(nonzero) >= len(expected["gradients"]) - ("branches" in model)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_memory_and_traffic_are_as_in_theory(size: int, frozen: bool) -> None:
    for has in ranks.run(size, zero.weigh, 3, size, frozen):
        whole = has["trained"] + has["frozen"]
        rest = whole - 6 * has["block"]
        assert has["started"] <= 1.03 * whole / size + 1024, "more than the local parts was made"
        assert has["largest"] <= has["block"], "a whole parameter was made"
        assert has["within"] == pytest.approx((whole + 3 * has["trained"]) / size, rel=0.03, abs=1024)
        assert has["after"] == pytest.approx((whole + 2 * has["trained"]) / size, rel=0.03, abs=1024)
        rounds = 2 * whole - rest + has["trained"] if not frozen else whole + has["trained"]
        assert has["sent"] == pytest.approx(2 * rounds * (size - 1) / size, rel=0.05)
        assert has["peak"] <= 2 * has["block"] + rest, has
