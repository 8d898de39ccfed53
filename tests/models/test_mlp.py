"""The mlp and the cnn against the same layers written down by hand with torch.nn."""

import pytest
import torch
from torch import nn

from tests.models.test_catalogue import made

ACTIVATIONS = {
    "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "leaky_relu": nn.LeakyReLU,
}  # fmt: skip


def agree(ours, theirs, x):
    """Equal outputs and running statistics, with our values under their names, in training and then in evaluation."""
    values = [value.clone() for value in ours.state_dict().values()]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x))
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_mlp(activation, norm):
    def layer(inputs, outputs):
        between = {"none": [], "batch": [nn.BatchNorm1d(outputs)], "layer": [nn.LayerNorm(outputs)]}[norm]
        return [nn.Linear(inputs, outputs), *between, ACTIVATIONS[activation]()]

    model = made("mlp", {"hidden": [6, 4], "activation": activation, "norm": norm}, (2, 3, 4))
    agree(model, nn.Sequential(nn.Flatten(), *layer(24, 6), *layer(6, 4), nn.Linear(4, 5)), torch.randn(8, 2, 3, 4))


def test_an_mlp_without_hidden_layers_is_linear():
    agree(made("mlp", {"hidden": []}, (7,)), nn.Linear(7, 5), torch.randn(3, 7))


def test_mlp_defaults():
    model = made("mlp", {}, (10,))
    assert [tuple(p.shape) for p in model.parameters()] == [(512, 10), (512,), (512, 512), (512,), (5, 512), (5,)]
    x = torch.randn(2, 10)
    assert torch.equal(model(x), model.eval()(x))


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("pooling", ["max", "avg"])
@pytest.mark.parametrize(("kernel", "repeat"), [(3, 1), (5, 2)])
def test_cnn(norm, pooling, kernel, repeat):
    def stage(inputs, outputs):
        for index in range(repeat):
            yield nn.Conv2d(outputs if index else inputs, outputs, kernel, padding="same", bias=norm == "none")
            if norm == "batch":
                yield nn.BatchNorm2d(outputs)
            yield nn.ReLU()
        yield nn.MaxPool2d(2) if pooling == "max" else nn.AvgPool2d(2)

    options = {"channels": [4, 6], "hidden": 8, "norm": norm, "pooling": pooling, "kernel": kernel, "repeat": repeat}
    flat = 6 * (13 // 4) * (9 // 4)
    head = [nn.Flatten(), nn.Linear(flat, 8), nn.ReLU(), nn.Linear(8, 5)]
    agree(made("cnn", options, (2, 13, 9)), nn.Sequential(*stage(2, 4), *stage(4, 6), *head), torch.randn(4, 2, 13, 9))


@pytest.mark.parametrize("size", [(4, 4), (7, 5), (28, 28)])
def test_cnn_takes_any_size_that_survives(size):
    assert made("cnn", {}, (1, *size))(torch.randn(2, 1, *size)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "options", "inputs"), [("mlp", {"hidden": [4000]}, (7,)), ("cnn", {"hidden": 4000}, (1, 8, 8))]
)
def test_dropout_is_for_training_only_and_keeps_the_expectation(name, options, inputs):
    """Seen just before the head: so many zeros, and the rest scaled."""
    model = made(name, {**options, "dropout": 0.25}, inputs)
    before = []
    model.head.register_forward_pre_hook(lambda module, args: before.append(args[0]))
    x = torch.randn(2, *inputs)
    model(x), model.eval()(x), model(x)
    dropped, plain, again = before
    assert torch.equal(plain, again)
    if name == "mlp":  # the cnn's norm has other statistics in training
        alive = plain > 0
        assert 0.2 < (dropped[alive] == 0).float().mean() < 0.3
        kept = alive & (dropped != 0)
        torch.testing.assert_close(dropped[kept], plain[kept] / 0.75)
    else:
        assert (dropped == 0).float().mean() > (plain == 0).float().mean() + 0.05
