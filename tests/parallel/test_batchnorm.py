"""BatchNorm over processes against BatchNorm on the whole batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests import ranks
from tests.parallel.zero import world
from trainwright.adapt import norms
from trainwright.parallel import batchnorm
from trainwright.parallel.mesh import Axis

SHAPES: dict[type[nn.Module], tuple[int, ...]] = {nn.BatchNorm1d: (), nn.BatchNorm2d: (3, 2), nn.BatchNorm3d: (2, 2, 1)}
OPTIONS: list[dict[str, Any]] = [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False, "eps": 0.1}]


def layer(kind: type[nn.Module], options: dict[str, Any], dtype: torch.dtype, channels: int = 4) -> Any:
    torch.manual_seed(1)
    made = kind(channels, **options)
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


def autocast(mean: float, spread: float, common: float) -> dict[str, tuple[float, float]]:
    """Root mean squares of what is wrong here and in nn.BatchNorm on the whole batch, in bfloat16 under autocast."""
    axis, parts, shape = world(2), [3, 5], (8, 48, 10, 9)
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(shape, generator=generator)
    x = (normal * spread + mean).bfloat16()
    dy = torch.randn(shape, generator=generator) + common * torch.randn(1, 48, 1, 1, generator=generator) * (1 + normal)
    truth, theirs, ours = (nn.BatchNorm2d(48, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.float32))
    nn.init.normal_(ours.weight, generator=generator)
    for made in (truth, theirs):
        made.load_state_dict(ours.state_dict())
    batchnorm.apply(nn.Sequential(ours), axis)

    def results(made: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
        x = x.detach().clone(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64):
            y = made(x)
        assert y.dtype == x.dtype
        y.backward(dy.contiguous(memory_format=torch.channels_last))  # in another order torch adds up in bfloat16
        return [t.double() for t in (y.detach(), x.grad, *(p.grad for p in made.parameters()))]

    right, known = results(truth, x.double(), dy.bfloat16().double()), results(theirs, x, dy.bfloat16())
    own = results(ours, x.split(parts)[axis.index], dy.bfloat16().split(parts)[axis.index])
    for total in own[2:]:
        dist.all_reduce(total)
    right[:2] = [whole.split(parts)[axis.index] for whole in right[:2]]
    known[:2] = [whole.split(parts)[axis.index] for whole in known[:2]]
    return {
        name: (float((found - true).square().mean().sqrt()), float((other - true).square().mean().sqrt()))
        for name, true, other, found in zip(("y", "x", "weight", "bias"), right, known, own, strict=True)
    }


@pytest.mark.parametrize(("mean", "spread", "common"), [(0.0, 1.0, 0.1), (100.0, 3.0, 0.1), (0.5, 0.1, 0.85)])
def test_bfloat16_is_as_near_to_the_truth_as_torch(mean: float, spread: float, common: float) -> None:
    for errors in ranks.run(2, autocast, mean, spread, common):
        for name, (ours, theirs) in errors.items():
            assert 0 < theirs < 0.03
            assert ours < 1.1 * theirs, name


class Widened(TorchDispatchMode):
    """The dtypes of what was made with at least so many numbers."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.found = numbers, set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else [result]
        self.found |= {t.dtype for t in tensors if isinstance(t, Tensor) and t.numel() >= self.numbers}
        return result


def passes() -> list[set[torch.dtype]]:
    """What a layer makes of channels-last bfloat16 images, and of a gradient in the other order."""
    axis, found = world(2), []
    for kind, shape, order in (
        (nn.BatchNorm2d, (2, 6, 5, 4), torch.channels_last),
        (nn.BatchNorm3d, (2, 6, 5, 4, 3), torch.channels_last_3d),
    ):
        made = kind(6)
        batchnorm.apply(nn.Sequential(made), axis)
        x = torch.randn(shape, dtype=torch.bfloat16).contiguous(memory_format=order).requires_grad_()
        dy = torch.randn(shape, dtype=torch.bfloat16)
        with Widened(x.numel()) as widened, pytest.MonkeyPatch.context() as patch:
            patch.setattr(batchnorm, "PORTION", 50)
            y = made(x)
            y.backward(dy)
        assert x.grad is not None
        assert x.stride() == y.stride() == x.grad.stride()
        found.append(widened.found)
    return found


def test_nothing_is_widened_and_the_order_in_memory_stays() -> None:
    assert ranks.run(2, passes) == [[{torch.bfloat16}] * 2] * 2


def arranged(portion: int) -> bool:
    """Images and gradients however they lie in memory; one process, whose layer must be nn.BatchNorm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batchnorm, "PORTION", portion)
        return arranged_in_portions()


def arranged_in_portions() -> bool:
    group = dist.group.WORLD
    axis = Axis(1, 0, group)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide, turned = random(6, 10, 8, 3), random(3, 4, 5, 6).permute(3, 2, 1, 0)
    last = random(6, 5, 8, 3).contiguous(memory_format=torch.channels_last)
    for x in (last, wide[:, ::2], wide[:, :, ::2], turned, wide[:1].expand(6, 10, 8, 3), wide[:, :1], wide[:, :, :1, :1]):
        flat = random(1, x.shape[1], 1, 1).expand(x.shape)
        for dy in (random(*x.shape), random(*x.shape).contiguous(memory_format=torch.channels_last), flat):
            results = []
            for shared in (False, True):
                made = layer(nn.BatchNorm2d, {}, torch.float64, x.shape[1])
                if shared:
                    batchnorm.apply(nn.Sequential(made), axis)
                leaf = x.detach().requires_grad_()
                y = made(leaf)
                y.backward(dy)
                results.append([y.detach(), leaf.grad, *(p.grad for p in made.parameters()), *made.buffers()])
            torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)
    return True


@pytest.mark.parametrize("portion", [1, 100, 2**16])
def test_any_order_in_memory(portion: int) -> None:
    assert ranks.run(1, arranged, portion) == [True]


def checked() -> bool:
    """Derivatives by differences; as many processes as one can differ at a time."""
    group = dist.group.WORLD
    assert group is not None
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((3, 2, 2), (2,), (2,))
    )

    def normalised(*inputs: Tensor | None) -> Tensor:
        return batchnorm._Normalise.apply(*inputs, 1e-3, group)[0]

    assert torch.autograd.gradcheck(normalised, (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x: normalised(x, None, None), (x,))
    loss = torch.autograd.grad(normalised(x, weight, bias).square().sum(), x, create_graph=True)[0].sum()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        loss.backward()
    return True


def test_derivatives() -> None:
    assert ranks.run(1, checked) == [True]


def overtaken() -> list[float]:
    """Sums that the other process hasn't begun are under way, as of gradients; statistics don't wait for them."""
    axis = world(2)
    made = nn.BatchNorm1d(3)
    batchnorm.apply(nn.Sequential(made), axis)
    gradients = [torch.full((5,), 1.0 + axis.index) for _ in range(6)]
    works = [dist.all_reduce(g, group=axis.group, async_op=True) for g in gradients if axis.index == 0]
    x = torch.arange(6.0).view(2, 3).mul(1 + axis.index).requires_grad_()
    made(x).square().sum().backward()
    works += [dist.all_reduce(g, group=axis.group, async_op=True) for g in gradients if axis.index == 1]
    for work in works:
        work.wait()
    return [float(g.mean()) for g in gradients]


def test_statistics_overtake_gradients() -> None:
    assert ranks.run(2, overtaken) == [[3.0] * 6] * 2


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


def test_names_and_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batchnorm, "_aside", lambda group: group)
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
