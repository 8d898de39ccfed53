"""ResNets against torchvision's, with its weights copied by name; stochastic depth against torchvision.ops."""

import pytest
import torch
import torchvision
from torch import nn

from tests.models.test_catalogue import made
from trainwright.models import catalogue
from trainwright.models.resnet import StochasticDepth
from trainwright.recipe import Task

NAMES = ("resnet18", "resnet34", "resnet50")
TASK = Task("classes", 1000)


def on_meta(name, options=None, inputs=(3, 224, 224), task=TASK):
    with torch.device("meta"):
        return catalogue.make(name, options or {}, inputs, task)


def random_statistics(model):
    """Norms that are not the identity, which would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value in (layer.weight.data, layer.running_var):
                value.uniform_(0.5, 1.5, generator=generator)
            for value in (layer.bias.data, layer.running_mean):
                value.normal_(0, 0.2, generator=generator)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_statistics_and_gradients_equal_torchvision(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=10)
    random_statistics(theirs)
    ours = catalogue.make(name, {"stem": "imagenet"}, (3, 64, 64), Task("classes", 10))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)
    for model in (ours, theirs):
        model.train()(x).logsumexp(1).sum().backward()
    torch.testing.assert_close(ours.bn1.running_var, theirs.bn1.running_var)
    assert ours.bn1.num_batches_tracked == 1
    mine = dict(ours.named_parameters())
    for key in ("conv1.weight", "layer2.0.downsample.0.weight", "layer4.1.bn2.weight", "fc.weight"):
        theirs_grad = theirs.get_parameter(key).grad
        assert theirs_grad.abs().max() > 0
        torch.testing.assert_close(mine[key].grad, theirs_grad, rtol=1e-3, atol=1e-4 * theirs_grad.abs().max().item())


@pytest.mark.parametrize(("name", "parameters"), [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032)])
def test_names_shapes_and_counts_equal_torchvision(name, parameters):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
    ours = on_meta(name)
    assert [(n, v.shape) for n, v in ours.state_dict().items()] == [(n, v.shape) for n, v in theirs.state_dict().items()]
    assert sum(p.numel() for p in ours.parameters()) == parameters


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_width_is_that_of_torchvision(name):
    with torch.device("meta"):
        block = torchvision.models.resnet.BasicBlock if name == "resnet18" else torchvision.models.resnet.Bottleneck
        theirs = torchvision.models.ResNet(block, [2, 2, 2, 2] if name == "resnet18" else [3, 4, 6, 3])
    ours = on_meta(name, {"width": 32})
    for key, value in theirs.state_dict().items():
        expected = [n if (n in (1, 3, 7, 1000) and i != 0) or n == 1000 else n // 2 for i, n in enumerate(value.shape)]
        assert list(ours.state_dict()[key].shape) == expected, key


@pytest.mark.parametrize(
    ("size", "options", "stem"),
    [
        ((64, 64), {}, "small"), ((64, 65), {}, "imagenet"), ((65, 8), {}, "imagenet"), ((28, 28), {}, "small"),
        ((32, 32), {"stem": "imagenet"}, "imagenet"), ((224, 224), {"stem": "small"}, "small"),
    ],
)  # fmt: skip
def test_the_stem(size, options, stem):
    model = on_meta("resnet18", options, (3, *size)).eval()
    kernel, stride, padding = (7, 2, 3) if stem == "imagenet" else (3, 1, 1)
    assert (model.conv1.kernel_size, model.conv1.stride, model.conv1.padding) == ((kernel,) * 2, (stride,) * 2, (padding,) * 2)
    assert isinstance(model.maxpool, nn.MaxPool2d) == (stem == "imagenet")
    shapes = []
    model.avgpool.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[-2:]))
    model(torch.empty(1, 3, *size, device="meta"))
    assert tuple(shapes[0]) == tuple(-(-side // (32 if stem == "imagenet" else 8)) for side in size)


def test_other_channels_change_the_first_layer_only():
    gray, colour = (on_meta("resnet18", inputs=(channels, 224, 224)).state_dict() for channels in (1, 3))
    assert [name for name in gray if gray[name].shape != colour[name].shape] == ["conv1.weight"]


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_init_residual_is_torchvisions(name, last):
    model = made(name, {"width": 4, "zero_init_residual": True}, (3, 16, 16))
    theirs = getattr(torchvision.models, name)(zero_init_residual=True, width_per_group=64)
    zero = {n for n, p in model.named_parameters() if n.endswith("weight") and p.abs().max() == 0}
    assert zero == {n for n, p in theirs.named_parameters() if n.endswith("weight") and p.abs().max() == 0}
    assert zero == {n for n, _ in model.named_parameters() if n.endswith(f"{last}.weight") and "layer" in n}
    x = torch.rand(2, model.layer1[1].conv1.in_channels, 8, 8)
    torch.testing.assert_close(model.layer1[1](x), x)


def test_the_published_start_has_the_spread_of_torchvision():
    torch.manual_seed(0)
    theirs, ours = torchvision.models.resnet18(), made("resnet18", {}, (3, 224, 224), TASK)
    for name, value in theirs.named_parameters():
        mine = ours.get_parameter(name)
        if value.numel() > 5000:
            assert mine.std().item() == pytest.approx(value.std().item(), rel=0.05), name
            assert abs(mine.mean()) < 0.1 * mine.std(), name
        elif not name.startswith("fc"):
            assert torch.equal(mine, value), name


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("shape", [(64, 3, 2, 2), (64, 5)])
def test_stochastic_depth_is_torchvisions(rate, shape):
    x = torch.randn(shape)
    torch.manual_seed(1)
    expected = torchvision.ops.stochastic_depth(x, rate, "row")
    torch.manual_seed(1)
    torch.testing.assert_close(StochasticDepth(rate)(x), expected)
    assert torch.equal(StochasticDepth(rate).eval()(x), x)


def test_stochastic_depth_keeps_the_expectation():
    torch.manual_seed(0)
    out = StochasticDepth(0.25)(torch.ones(20_000, 1))
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_stochastic_depth_grows_linearly_over_the_blocks_and_rests_in_evaluation():
    options = {"width": 4, "stochastic_depth": 0.4}
    model = made("resnet18", options, (3, 16, 16))
    assert [block.drop.rate for block in model.blocks()] == pytest.approx([0.4 * n / 8 for n in range(1, 9)])
    plain = made("resnet18", {"width": 4}, (3, 16, 16))
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    # A sample whose branch is dropped keeps the shortcut.
    block = model.blocks()[1]
    block.drop.rate = 0.5
    torch.manual_seed(0)
    x = torch.rand(16, 4, 8, 8)
    kept = (block(x) == x).flatten(1).all(1)
    assert 0 < kept.sum() < 16


def test_dropout_is_before_the_head():
    model = made("resnet18", {"width": 64, "dropout": 0.5}, (3, 16, 16))
    before = []
    model.fc.register_forward_pre_hook(lambda module, args: before.append(args[0]))
    x = torch.randn(4, 3, 16, 16)
    model(x), model.eval()(x)
    assert (before[0] == 0).float().mean() > (before[1] == 0).float().mean() + 0.2
