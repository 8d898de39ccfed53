"""What the catalogue makes and refuses; each model learns, runs through its blocks, and lives on the meta device."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from trainwright.models import catalogue
from trainwright.models.init import initialize
from trainwright.models.weights import allocate
from trainwright.recipe import Init, InputError, Task

CLASSES = Task("classes", 5)
DENSE = Task("classes", 3, dense=True)
IMAGE, SERIES, ROW = (3, 20, 24), (9, 4), (7,)
# A small one of each kind, but vgg16, which has a file of its own.
SMALL = {
    "mlp": ({"hidden": [8, 6], "norm": "batch"}, IMAGE, CLASSES),
    "cnn": ({"channels": [4, 6], "hidden": 8}, IMAGE, CLASSES),
    "resnet18": ({"width": 4}, IMAGE, CLASSES),
    "resnet34": ({"width": 2}, IMAGE, CLASSES),
    "resnet50": ({"width": 2}, IMAGE, CLASSES),
    "resnet9": ({"stem": 2, "channels": [4, 6]}, IMAGE, CLASSES),
    "rnn": ({"hidden": 6}, SERIES, CLASSES),
    "lstm": ({"hidden": 6, "bidirectional": True}, SERIES, CLASSES),
    "gru": ({"hidden": 6, "layers": 2}, IMAGE, CLASSES),
    "unet": ({"channels": [4, 6]}, IMAGE, DENSE),
}


def made(name, options=None, inputs=None, task=None, section=None, seed=0):
    """A model as a run makes it: on the meta device, then with values."""
    usual = SMALL.get(name, ({}, IMAGE, CLASSES))
    with torch.device("meta"):
        model = catalogue.make(name, usual[0] if options is None else options, inputs or usual[1], task or usual[2])
    assert all(value.is_meta for value in model.state_dict().values())
    initialize(model, section or Init(), allocate(model, "cpu"), seed)
    return model


def test_the_names():
    assert set(catalogue.NAMES) == {*SMALL, "vgg16", "vgg16_bn"}


@pytest.mark.parametrize("name", SMALL)
def test_shapes_and_gradients_of_every_parameter(name):
    model, (_, inputs, task) = made(name), SMALL[name]
    x = torch.randn(4, *inputs)
    outputs = model(x)
    assert outputs.shape == ((4, 3, 20, 24) if task.dense else (4, 5))
    assert outputs.dtype == torch.float32
    outputs.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert sum(bool(p.grad.abs().max() > 0) for p in model.parameters()) >= 0.9 * len(list(model.parameters()))


@pytest.mark.parametrize("name", SMALL)
def test_it_learns_a_batch_by_heart(name):
    model, (_, inputs, task) = made(name), SMALL[name]
    x = torch.randn(10, *inputs, generator=torch.Generator().manual_seed(0))
    targets = (x[:, 0] > 0).long() if task.dense else torch.arange(10) % 5
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        loss = cross_entropy(model(x), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", SMALL)
def test_the_forward_runs_through_every_block_once(name):
    """A technique may replace a block's forward, as compiling does."""
    model, seen = made(name), []
    for index, block in enumerate(model.blocks()):
        plain = block.forward

        def counted(*args, plain=plain, index=index):
            seen.append(index)
            return plain(*args)

        block.forward = counted
    model(torch.randn(2, *SMALL[name][1]))
    assert seen == list(range(len(model.blocks())))
    assert seen
    assert all(isinstance(block, nn.Module) for block in model.blocks())


@pytest.mark.parametrize(("name", "count"), [("mlp", 2), ("cnn", 2), ("resnet18", 8), ("resnet34", 16), ("resnet50", 16)])
def test_the_number_of_blocks(name, count):
    assert len(made(name).blocks()) == count


@pytest.mark.parametrize("name", SMALL)
def test_a_sample_is_answered_alone_in_evaluation(name):
    model = made(name).eval()
    x = torch.randn(3, *SMALL[name][1])
    torch.testing.assert_close(torch.cat([model(row[None]) for row in x]), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in SMALL if n != "unet"])
def test_a_single_output(name):
    assert made(name, task=Task("binary", 1))(torch.randn(4, *SMALL[name][1])).shape == (4, 1)


WRONG = [
    ("resnet19", {}, IMAGE, CLASSES, ["model.architecture", "'resnet19'", "resnet18", "module:function"]),
    ("mlp", {"hiden": [3]}, ROW, CLASSES, ["model.options.hiden", "mlp has no such option", "did you mean 'hidden'?"]),
    ("mlp", {"zzz": 1}, ROW, CLASSES, ["model.options.zzz", "it has hidden, activation, dropout, norm"]),
    ("mlp", {"hidden": 64}, ROW, CLASSES, ["model.options.hidden: found 64; must be a list", "whole number of at least 1"]),
    ("mlp", {"hidden": [0]}, ROW, CLASSES, ["model.options.hidden: found [0]"]),
    ("mlp", {"hidden": [8, "x", 1.5]}, ROW, CLASSES, ["model.options.hidden: found [8, 'x', 1.5]"]),
    (
        "mlp",
        {"activation": "rely"},
        ROW,
        CLASSES,
        ["model.options.activation: found the text 'rely'", "'relu', ", "did you mean 'relu'?"],
    ),
    ("mlp", {"dropout": 1.0}, ROW, CLASSES, ["model.options.dropout: found 1.0", "below 1"]),
    ("mlp", {"dropout": True}, ROW, CLASSES, ["model.options.dropout: found true"]),
    ("cnn", {"kernel": 4}, IMAGE, CLASSES, ["model.options.kernel: 4 is even"]),
    ("cnn", {"channels": []}, IMAGE, CLASSES, ["model.options.channels: found []", "not empty"]),
    ("cnn", {"channels": [4] * 5}, IMAGE, CLASSES, ["model.options.channels", "32 pixels", "20x24", "at most 4", "data.size"]),
    ("cnn", {}, (1, 3, 40), CLASSES, ["model.options.channels", "4 pixels", "3x40", "at most 1 stages"]),
    ("cnn", {}, ROW, CLASSES, ["model.architecture", "images", "(7,)", "mlp"]),
    ("gru", {}, ROW, CLASSES, ["model.architecture", "(time, features)", "(7,)", "mlp"]),
    ("gru", {"layers": 0}, SERIES, CLASSES, ["model.options.layers: found 0"]),
    ("resnet18", {"stem": "tiny"}, IMAGE, CLASSES, ["model.options.stem", "'imagenet' or 'small' or null"]),
    ("vgg16", {}, (3, 32, 32), CLASSES, ["model.options.input", "224x224", "32x32", "{input: any}", "data.size: 224"]),
    ("vgg16", {"input": "any"}, (3, 40, 31), CLASSES, ["model.options.input", "from 32 pixels", "40x31"]),
    ("vgg16_bn", {"inputs": "any"}, (3, 32, 32), CLASSES, ["model.options.inputs", "did you mean 'input'?"]),
    ("unet", {}, IMAGE, CLASSES, ["unet gives an answer for each pixel", "resnet18"]),
    ("cnn", {}, IMAGE, DENSE, ["cnn gives one answer a sample", "use unet"]),
    ("unet", {}, SERIES, DENSE, ["unet reads images", "(9, 4)"]),
]


@pytest.mark.parametrize(("name", "options", "inputs", "task", "words"), WRONG)
def test_what_is_refused(name, options, inputs, task, words):
    with pytest.raises(InputError) as caught:
        catalogue.make(name, options, inputs, task)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_all_faults_of_the_options_at_once():
    with pytest.raises(InputError) as caught:
        catalogue.make("mlp", {"hiden": [3], "dropout": 2, "hidden": [0, -1]}, ROW, CLASSES)
    assert str(caught.value).count("model.options.") == 3
