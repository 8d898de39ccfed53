"""The U-Net: shapes, what a pixel of the output sees, and its layers called by hand."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv_transpose2d, max_pool2d, pad

from tests.models.test_catalogue import DENSE, made


@pytest.mark.parametrize("size", [(16, 16), (15, 16), (17, 9), (1, 1), (3, 50)])
@pytest.mark.parametrize("channels", [[4], [4, 6], [3, 4, 5, 6]])
def test_the_output_is_as_large_as_the_input(size, channels):
    model = made("unet", {"channels": channels, "norm": "none"}, (2, *size), DENSE)
    assert model(torch.randn(2, 2, *size)).shape == (2, 3, *size)
    assert len(model.blocks()) == 2 * len(channels) - 1


def double(block, x):
    """Two convolutions of a model without norms."""
    first, second = (layer for layer in block.modules() if isinstance(layer, nn.Conv2d))
    x = nn.functional.conv2d(x, first.weight, first.bias, padding=1).relu()
    return nn.functional.conv2d(x, second.weight, second.bias, padding=1).relu()


def test_the_same_by_hand():
    model = made("unet", {"norm": "none"}, (2, 10, 13), DENSE)
    x = torch.randn(2, 2, 10, 13)
    full = double(model.down[0], pad(x, (0, 3, 0, 2)))
    half = double(model.down[1], max_pool2d(full, 2))
    quarter = double(model.down[2], max_pool2d(half, 2))
    up = model.up[0].up
    half = double(model.up[0].merge, torch.cat([half, conv_transpose2d(quarter, up.weight, up.bias, stride=2)], 1))
    up = model.up[1].up
    full = double(model.up[1].merge, torch.cat([full, conv_transpose2d(half, up.weight, up.bias, stride=2)], 1))
    torch.testing.assert_close(model(x), model.head(full)[:, :, :10, :13])
    assert [block[-2].out_channels for block in model.down] == [16, 32, 64]


def test_batch_norm_is_the_default_and_takes_the_biases():
    model = made("unet", {}, (1, 8, 8), DENSE)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 10
    assert all(m.bias is None for m in convolutions)
