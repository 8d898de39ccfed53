"""Products with a narrower matrix, in parts, against those with the whole matrix widened."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright import losses, widened
from trainwright.recipe import CrossEntropy


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 5),
    size=st.integers(1, 9),
    rows=st.integers(1, 40),
    part=st.integers(1, 50),
    narrow=st.sampled_from([torch.bfloat16, torch.float16]),
    wide=st.sampled_from([torch.float32, torch.float64]),
)
def test_products_are_those_of_the_whole_matrix(count, size, rows, part, narrow, wide):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(rows, size, generator=generator).to(narrow)
    x = torch.randn(count, size, generator=generator, dtype=wide)
    y = torch.randn(count, rows, generator=generator, dtype=wide)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widened, "ROWS", part)
        found = widened.scores(x, matrix), widened.mixture(y, matrix), widened.total(matrix, wide)
    whole = matrix.to(wide)
    for mine, expected in zip(found, (x @ whole.T, y @ whole, whole.sum(0)), strict=True):
        assert mine.dtype == wide
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_narrow_head(monkeypatch, smoothing):
    """Value and gradients are those of a head that was widened as a whole, also in parts that don't divide it."""
    monkeypatch.setattr(widened, "ROWS", 37)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 50, 16, generator=generator, requires_grad=True)
    head = torch.randn(101, 16, generator=generator).bfloat16()
    labels = torch.randint(0, 101, (2, 50), generator=generator)
    section = CrossEntropy(label_smoothing=smoothing, z_loss=0.01)
    values = [losses.token_cross_entropy(hidden, weight, labels, section)[0] for weight in (head, head.float())]
    torch.testing.assert_close(values[0], values[1])
    mine, expected = (torch.autograd.grad(value, hidden)[0] for value in values)
    torch.testing.assert_close(mine, expected)
    assert mine.abs().max() > 0


def test_a_whole_copy_is_never_made(monkeypatch):
    """The largest tensor that a product of a narrow head makes is a part of it."""
    monkeypatch.setattr(widened, "ROWS", 64)
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result = operator(*args, **(kwargs or {}))
            made.extend([result.numel()] if isinstance(result, torch.Tensor) and not operator.is_view else [])
            return result

    head = torch.randn(1000, 32).bfloat16()
    hidden, labels = torch.randn(1, 4, 32, requires_grad=True), torch.zeros(1, 4, dtype=torch.int64)
    monkeypatch.setattr(losses.tokens, "STRIDE", 4)
    with Watch():
        losses.token_cross_entropy(hidden, head, labels, CrossEntropy())[0].backward()
    assert max(made) <= 4 * 1000  # the logits of four rows; the head has 32,000 numbers
