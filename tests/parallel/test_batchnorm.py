"""BatchNorm over processes against BatchNorm on the whole batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests import ranks
from tests.parallel.zero import world
from trainwright.adapt import norms
from trainwright.parallel import batchnorm
from trainwright.parallel.mesh import Axis

SHAPES: dict[type[nn.Module], tuple[int, ...]] = {nn.BatchNorm1d: (), nn.BatchNorm2d: (3, 2), nn.BatchNorm3d: (2, 2, 1)}
OPTIONS: list[dict[str, Any]] = [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False, "eps": 0.1}]


def layer(kind: type[nn.Module], options: dict[str, Any], dtype: torch.dtype) -> Any:
    torch.manual_seed(1)
    made = kind(4, **options)
    for p in made.parameters():
        nn.init.normal_(p)
    return made.to(dtype)


def batch(kind: type[nn.Module], step: int, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    shape = (count, 4, *SHAPES[kind])
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 100
    return x.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def run(
    kind: type[nn.Module], options: dict[str, Any], parts: list[int], dtype: torch.dtype, stored: torch.dtype | None = None
) -> dict[str, Any]:
    """Two steps in training mode, one in evaluation, with a gradient that isn't uniform."""
    size = len(parts)
    made = layer(kind, options, stored or dtype)
    axis = world(size)
    batchnorm.apply(nn.Sequential(made), axis)
    result: dict[str, Any] = {"x": [], "y": []}
    for step in range(2):
        x, dy = (t.split(parts)[axis.index] for t in batch(kind, step, sum(parts), dtype))
        x = (x.contiguous(memory_format=torch.channels_last) if stored else x.clone()).requires_grad_()
        y = made(x)
        assert y.dtype == dtype
        y.backward(dy)
        result["x"].append(x.grad.double().numpy())
        result["y"].append(y.detach().double().numpy())
    result |= {name: p.grad.double().numpy() for name, p in made.named_parameters()}
    result["buffers"] = {name: b.double().numpy() for name, b in made.named_buffers()}
    made.eval()
    if options.get("track_running_stats", True):
        result["y"].append(made(batch(kind, 5, 6, dtype)[0]).detach().double().numpy())
    return result


@pytest.mark.parametrize("parts", [[3, 2], [5, 0], [1, 1], [2, 0, 3, 1]], ids=str)
def test_equals_the_whole_batch(parts: list[int]) -> None:
    for kind in SHAPES:
        for options in OPTIONS:
            found = ranks.run(len(parts), run, kind, options, parts, torch.float64)
            expected = run(kind, options, [sum(parts)], torch.float64)
            for step in range(2):
                for what in ("x", "y"):
                    together = np.concatenate([f[what][step] for f in found])
                    np.testing.assert_allclose(together, expected[what][step], rtol=1e-9, atol=1e-11)
            for f in found:
                for ours, theirs in zip(f["y"][2:], expected["y"][2:], strict=True):
                    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
                assert f["buffers"].keys() == expected["buffers"].keys()
                for name, value in expected["buffers"].items():
                    np.testing.assert_allclose(f["buffers"][name], value, rtol=1e-9, err_msg=name)
            for name in set(expected) - {"x", "y", "buffers"}:
                assert np.any(expected[name])
                np.testing.assert_allclose(sum(f[name] for f in found), expected[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "stored", "tolerance"),
    [(torch.float32, torch.float32, 1e-4), (torch.bfloat16, torch.float32, 0.02), (torch.bfloat16, torch.bfloat16, 0.02)],
)
def test_low_precision_and_channels_last(dtype: torch.dtype, stored: torch.dtype, tolerance: float) -> None:
    """A mean of 100 and a deviation of 3: a difference of large sums would lose most digits."""
    found = ranks.run(2, run, nn.BatchNorm2d, {}, [3, 2], dtype, stored)
    made = layer(nn.BatchNorm2d, {}, stored).double()
    x, dy = (t.double() for t in batch(nn.BatchNorm2d, 0, 5, dtype))
    y = made(x.requires_grad_())
    y.backward(dy)
    np.testing.assert_allclose(np.concatenate([f["y"][0] for f in found]), y.detach().numpy(), atol=tolerance * 3)
    np.testing.assert_allclose(np.concatenate([f["x"][0] for f in found]), x.grad.numpy(), atol=tolerance)


def few(parts: list[int]) -> str:
    made = nn.BatchNorm1d(4)
    axis = world(len(parts))
    batchnorm.apply(nn.Sequential(made), axis)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        made(torch.ones(parts[axis.index], 4))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        made(torch.ones(1, 4, 2, 2))
    return "done"


def test_one_sample_has_no_variance() -> None:
    assert ranks.run(2, few, [1, 0]) == ["done"] * 2


class FakeGroup:
    """Enough to apply it in one process."""


def test_names_and_classes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.LayerNorm(2))
    model[3].requires_grad_(False)
    norms.hold_frozen(model)
    names = [name for name, _ in model.named_parameters()]
    assert batchnorm.apply(model, Axis()) is None
    change = batchnorm.apply(model, Axis(2, 0, FakeGroup()))  # type: ignore[arg-type]
    assert change is not None
    assert change.names == ("0", "2")
    assert "2 BatchNorm layers" in change.summary
    assert "2 processes" in change.summary
    assert [type(m).__name__ for m in model] == [
        "SharedBatchNorm1d", "Linear", "SharedBatchNorm2d", "HeldBatchNorm2d", "LayerNorm",
    ]  # fmt: skip
    assert isinstance(model[0], nn.BatchNorm1d)
    assert [name for name, _ in model.named_parameters()] == names
    assert batchnorm.apply(nn.Sequential(nn.Linear(1, 1)), Axis(2, 0, FakeGroup())) is None  # type: ignore[arg-type]
