"""vgg16 and vgg16_bn against torchvision's, with its weights copied by name. Large: each is built once."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from trainwright.models import catalogue, vgg
from trainwright.models.init import initialize
from trainwright.models.weights import allocate
from trainwright.recipe import Init, Task

TASK = Task("classes", 1000)


def on_meta(name, options=None, inputs=(3, 224, 224), task=TASK):
    with torch.device("meta"):
        return catalogue.make(name, options or {}, inputs, task)


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.fixture(scope="module", params=["vgg16", "vgg16_bn"])
def theirs(request):
    """torchvision's model with random weights, and its name; made without its slow start."""
    with torch.device("meta"):
        model = getattr(torchvision.models, request.param)()
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                spread = (2 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
                value.uniform_(-1.7 * spread, 1.7 * spread, generator=generator)
                if "running_var" in name or (value.ndim == 1 and name.endswith("weight")):
                    value.abs_().add_(0.9)
            else:
                value.zero_()
    return request.param, model.eval()


@torch.no_grad()
def test_outputs_equal_torchvision(theirs):
    name, oracle = theirs
    small = on_meta(name, {"input": "any"}, (3, 64, 48)).eval()
    small.load_state_dict(oracle.state_dict(), assign=True)
    x = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    expected = oracle(x)
    assert expected.std() > 0.01
    torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-5)
    if name == "vgg16":  # the published head, at its size
        fixed = on_meta(name).eval()
        fixed.load_state_dict(oracle.state_dict(), assign=True)
        x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(fixed(x), oracle(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
def test_names_shapes_and_counts_equal_torchvision(name):
    with torch.device("meta"):
        oracle = getattr(torchvision.models, name)()
    for options, inputs in (({}, (3, 224, 224)), ({"input": "any"}, (3, 32, 32)), ({"input": "any"}, (3, 512, 100))):
        model = on_meta(name, options, inputs)
        assert shapes(model) == shapes(oracle)
        assert list(model.state_dict()) == list(oracle.state_dict())
    assert sum(p.numel() for p in model.parameters()) == {"vgg16": 138_357_544, "vgg16_bn": 138_365_992}[name]


def test_other_channels_change_the_first_layer_only():
    gray, colour = (shapes(on_meta("vgg16", {"input": "any"}, (channels, 32, 32))) for channels in (1, 3))
    assert {name for name in gray if gray[name] != colour[name]} == {"features.0.weight"}


def test_other_classes_change_the_last_layer_only():
    few, many = (shapes(on_meta("vgg16", task=Task("classes", outputs))) for outputs in (10, 1000))
    assert {name for name in few if few[name] != many[name]} == {"classifier.6.weight", "classifier.6.bias"}


@pytest.fixture
def narrow(monkeypatch):
    """The same network with few channels, to be run and drawn quickly."""
    monkeypatch.setattr(vgg, "STAGES", ((4, 4), (6, 6), (8, 8, 8), (8, 8, 8), (8, 8, 8)))
    monkeypatch.setattr(vgg, "WIDE", 32)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("size", [(32, 32), (33, 70), (224, 224), (512, 32)])
@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
def test_any_takes_any_size_and_its_stages_are_its_features(name, size):
    model = on_meta(name, {"input": "any", "dropout": 0.0}, (1, *size), Task("classes", 5))
    initialize(model, Init(), allocate(model, "cpu"), 0)
    model.eval()
    x = torch.randn(2, 1, *size)
    through = adaptive_avg_pool2d(model.features(x), 7).flatten(1)
    torch.testing.assert_close(model(x), model.classifier(through))
    assert len(model.blocks()) == 5
    model(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.ndim > 1)


@pytest.mark.usefixtures("narrow")
def test_dropout_is_in_the_classifier():
    model = on_meta("vgg16", {"input": "any", "dropout": 0.3}, (1, 32, 32), Task("classes", 5))
    found = {name: layer.p for name, layer in model.named_modules() if isinstance(layer, nn.Dropout)}
    assert found == {"classifier.2": 0.3, "classifier.5": 0.3}
    assert [m.p for m in on_meta("vgg16").modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]


@pytest.mark.usefixtures("narrow")
def test_the_published_start():
    model = on_meta("vgg16_bn", {"input": "any"}, (3, 32, 32), TASK)
    initialize(model, Init(), allocate(model, "cpu"), 0)
    conv, linear = model.features[7], model.classifier[6]
    assert conv.weight.std().item() == pytest.approx((2 / (6 * 9)) ** 0.5, rel=0.12)  # fan out: 6 of 4
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert all(p.abs().max() == 0 for n, p in model.named_parameters() if n.endswith("bias"))
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.usefixtures("narrow")
def test_a_copy_has_stages_of_its_own():
    model = on_meta("vgg16", {"input": "any"}, (3, 32, 32), TASK)
    twin = copy.deepcopy(model)
    features = {id(layer) for layer in twin.features}
    assert {id(layer) for stage in twin.blocks() for layer in stage} == features
    assert not features & {id(layer) for layer in model.features}
