"""rnn, lstm and gru against torch.nn.RNN, LSTM and GRU called by hand."""

import pytest
import torch
from torch import nn

from tests.models.test_catalogue import made
from trainwright.recipe import Task

KINDS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


def by_hand(name, options, features):
    return KINDS[name](
        features, 6, num_layers=options.get("layers", 1), bidirectional=options.get("bidirectional", False), batch_first=True
    )


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_head_reads_the_last_state(name, layers, bidirectional):
    options = {"hidden": 6, "layers": layers, "bidirectional": bidirectional}
    model = made(name, options, (9, 4))
    theirs = by_hand(name, options, 4)
    theirs.load_state_dict(model.recurrent.state_dict())
    x = torch.randn(5, 9, 4)
    outputs, _ = theirs(x)
    # The forward direction has seen everything at the last step, the backward one at the first.
    last = torch.cat([outputs[:, -1, :6], outputs[:, 0, 6:]], 1) if bidirectional else outputs[:, -1]
    torch.testing.assert_close(model(x), nn.functional.linear(last, model.head.weight, model.head.bias))
    assert {n.partition(".")[0] for n, _ in model.named_parameters()} == {"recurrent", "head"}


def test_images_are_read_row_by_row():
    model = made("gru", {"hidden": 6}, (3, 5, 7))
    theirs = by_hand("gru", {}, 21)
    theirs.load_state_dict(model.recurrent.state_dict())
    image = torch.randn(2, 3, 5, 7)
    rows = torch.stack([torch.cat([image[:, c, r] for c in range(3)], 1) for r in range(5)], 1)
    torch.testing.assert_close(model(image), model.head(theirs(rows)[0][:, -1]))


def test_defaults_and_forecasts():
    model = made("lstm", {}, (24, 2), Task("values", 6))
    assert (model.recurrent.hidden_size, model.recurrent.num_layers, model.recurrent.bidirectional) == (128, 1, False)
    assert model(torch.randn(3, 24, 2)).shape == (3, 6)
    assert model(torch.randn(3, 50, 2)).shape == (3, 6)


@pytest.mark.parametrize("layers", [1, 2])
def test_dropout_is_between_the_layers_and_before_the_head(layers):
    model = made("gru", {"hidden": 400, "layers": layers, "dropout": 0.25}, (9, 4))
    assert model.recurrent.dropout == (0.25 if layers > 1 else 0.0)
    before = []
    model.head.register_forward_pre_hook(lambda module, args: before.append(args[0]))
    x = torch.randn(3, 9, 4)
    model(x), model.eval()(x), model(x)
    assert 0.18 < (before[0] == 0).float().mean() < 0.32
    assert torch.equal(before[1], before[2])
    if layers == 1:
        kept = before[0] != 0
        torch.testing.assert_close(before[0][kept], before[1][kept] / 0.75)
