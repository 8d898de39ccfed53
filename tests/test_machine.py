"""The yardstick of the share of the peak."""

import pytest
import torch

from trainwright import machine

CPU = torch.device("cpu")


@pytest.mark.parametrize(("rate", "size"), [(1e9, 256), (5e10, 512), (1e14, 2048)])
def test_slow_products_are_small(rate, size, monkeypatch):
    """2 x 256 cubed operations take 34 ms at 1 GFLOP/s; products of 2,048 would take 17 seconds each."""
    asked = []

    def timed(a, b, device):
        asked.append(len(a))
        return 2 * len(a) ** 3 / rate

    monkeypatch.setattr(machine, "_timed", timed)
    assert machine.matrix_product_rate.__wrapped__(CPU, torch.float32) == pytest.approx(rate)
    assert max(asked) == asked[-1] == size


def test_a_rate_is_measured():
    assert 1e8 < machine.matrix_product_rate(CPU, torch.float32) < 1e15
