"""Convolutions keep values and gradients in channels-last order, also where the CPU's kernel for them is wrong."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import small
from trainwright import build
from trainwright.memory import layout


def gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    images = images.detach().requires_grad_()
    model(images).square().sum().backward()
    return [images.grad, *(p.grad for p in model.parameters())]


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 20),
    outputs=st.sampled_from([3, 8, 20]),
    size=st.integers(2, 9),
    stride=st.sampled_from([2, 3, (1, 2)]),
    bias=st.booleans(),
    groups=st.sampled_from([1, 2]),
)
def test_narrow_strided_pixelwise_convolutions_have_right_gradients(channels, outputs, size, stride, bias, groups):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(channels * groups, outputs * groups, 1, stride, bias=bias, groups=groups))
    images = torch.randn(16, channels * groups, size, size)
    exact = gradients(copy.deepcopy(plain).double(), images.double())
    layout.thin(plain)
    layout.apply(plain)
    for found, expected in zip(gradients(plain, layout.of_inputs(plain)(images)), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("layer", "thinned"),
    [
        (nn.Conv2d(15, 4, 1, 2), True),
        (nn.Conv2d(4, 8, 1, (1, 2), padding="valid"), True),
        (nn.Conv2d(32, 4, 1, 2, groups=4), True),
        (nn.Conv2d(16, 4, 1, 2), False),
        (nn.Conv2d(4, 4, 1), False),
        (nn.Conv2d(4, 4, 3, 2), False),
        (nn.Conv2d(4, 4, 1, 2, padding=1), False),
    ],
)
def test_no_other_layer_is_thinned(layer, thinned):
    model = nn.Sequential(layer)
    names, weights = [name for name, _ in model.named_modules()], {id(p) for p in model.parameters()}
    layout.thin(model)
    assert isinstance(layer, layout.Thinned) == thinned
    assert [name for name, _ in model.named_modules()] == names
    assert {id(p) for p in model.parameters()} == weights


def test_values_and_names_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert "channels-last" in layout.apply(model).summary
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "no convolutions" in layout.apply(nn.Sequential(nn.Linear(2, 2))).summary


def test_a_narrow_model_is_built_with_them(tmp_path):
    run = build.assemble(small.recipe(tmp_path, model={"architecture": "resnet18", "options": {"width": 4}}))
    narrow = [name for name, module in run.model.named_modules() if isinstance(module, layout.Thinned)]
    assert narrow == ["layer2.0.downsample.0", "layer3.0.downsample.0"]
