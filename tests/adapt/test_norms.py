"""A BatchNorm that doesn't learn stands still; the oracle is torch's own in evaluation mode."""

import torch
from torch import nn

from trainwright.adapt.norms import hold_frozen


def made() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model(torch.randn(16, 3))
    return model


def test_only_the_frozen_one_is_held():
    model = made()
    model[1].requires_grad_(False)
    names, statistics = [*model.state_dict()], model[1].running_mean.clone()
    change = hold_frozen(model)
    assert change is not None
    assert change.names == ("1",)
    assert [*model.state_dict()] == names
    model.train()
    assert (model[1].training, model[3].training) == (False, True)
    x, moved = torch.randn(8, 3), model[3].running_mean.clone()
    plain = nn.BatchNorm1d(4).eval()
    plain.load_state_dict(model[1].state_dict())
    torch.testing.assert_close(model[1](model[0](x)), plain(model[0](x)))
    model(x)
    assert torch.equal(model[1].running_mean, statistics)
    assert not torch.equal(model[3].running_mean, moved)


def test_nothing_to_hold():
    assert hold_frozen(made()) is None
    assert hold_frozen(nn.Linear(2, 2).requires_grad_(False)) is None
