"""The average of weights against torch's AveragedModel."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainwright.ema import Average
from trainwright.recipe import Ema, InputError


class Model(nn.Module):
    """Tied weights, BatchNorm and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.last = nn.Linear(3, 3, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.frozen(self.norm(self.first(x))))


def made(dtype=torch.float32):
    torch.manual_seed(0)
    model = Model().to(dtype)
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)


def take(model, optimizer, steps, *averaged):
    for _ in range(steps):
        model(torch.randn(5, 3, dtype=model.first.weight.dtype)).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for average in averaged:
            average.update_parameters(model)


def copies(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.9, 0.3])
def test_torch(warmup, decay):
    model, optimizer = made()

    def growing(averages, current, count):
        n = int(count) - 1  # theirs counts the copy at the start
        torch._foreach_lerp_(averages, current, 1 - min(decay, (1 + n) / (10 + n)))

    average = Average(model, Ema(decay=decay, warmup=warmup))
    theirs = AveragedModel(model, multi_avg_fn=growing if warmup else get_ema_multi_avg_fn(decay))
    theirs.update_parameters(model)
    optimizer.register_step_post_hook(average.update)
    take(model, optimizer, 12, theirs)
    expected = dict(theirs.module.named_parameters())
    state = average.state()
    names = ["first.weight", "first.bias", "norm.weight", "norm.bias"]
    assert list(state) == [*(name for name in names), "updates"]
    assert all(torch.equal(state[name], expected[name]) for name in names)
    assert state["updates"].dtype == torch.int64
    assert state["updates"].shape == ()
    assert state["updates"] == 12
    assert not torch.equal(state["first.weight"], model.first.weight)


def test_swapped_and_back():
    model, optimizer = made()
    average = Average(model, Ema())
    optimizer.register_step_post_hook(average.update)
    take(model, optimizer, 3)
    own, averages = copies(model), {name: t.clone() for name, t in average.state().items()}
    storage = model.first.weight.data_ptr()
    with average.swapped():
        inside = copies(model)
        assert all(torch.equal(inside[name], t) for name, t in averages.items() if name != "updates")
        assert torch.equal(inside["last.weight"], inside["first.weight"])
        assert torch.equal(inside["norm.running_mean"], own["norm.running_mean"])
        assert torch.equal(inside["frozen.weight"], own["frozen.weight"])
        assert not torch.equal(inside["first.weight"], own["first.weight"])
    assert all(torch.equal(t, own[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(t, averages[name]) for name, t in average.state().items())
    assert model.first.weight.data_ptr() == storage
    assert model.last.weight is model.first.weight


def test_back_after_an_error():
    model, optimizer = made()
    average = Average(model, Ema())
    take(model, optimizer, 2)
    own = copies(model)

    def fail():
        with average.swapped():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(t, own[name]) for name, t in model.state_dict().items())


def test_the_training_is_the_same_with_an_average():
    plain, optimizer = made()
    take(plain, optimizer, 4)
    model, optimizer = made()
    average = Average(model, Ema())
    optimizer.register_step_post_hook(average.update)
    for _ in range(4):
        take(model, optimizer, 1)
        with average.swapped():
            pass
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in model.state_dict().items())


def test_resuming_gives_the_same_bits():
    model, optimizer = made()
    average = Average(model, Ema())
    optimizer.register_step_post_hook(average.update)
    take(model, optimizer, 3)
    kept = {name: t.clone() for name, t in average.state().items()}
    other = Average(model, Ema())
    other.restore({**kept, "model.first.weight": torch.zeros(3, 3)})
    optimizer.register_step_post_hook(other.update)
    take(model, optimizer, 3)
    assert all(torch.equal(t, other.state()[name]) for name, t in average.state().items())
    assert other.state()["updates"] == 6
    assert not torch.equal(kept["first.weight"], other.state()["first.weight"])
    with pytest.raises(KeyError, match=r"first\.weight"):
        other.restore({})


def test_averages_are_float32_where_parameters_are_less():
    model, optimizer = made(torch.bfloat16)
    average = Average(model, Ema(decay=0.999, warmup=False))
    optimizer.register_step_post_hook(average.update)
    expected = model.first.weight.detach().float()
    own = None
    for _ in range(5):
        take(model, optimizer, 1)
        own = model.first.weight.detach().clone()
        expected = torch.lerp(expected, own.float(), 1 - 0.999)
    found = average.state()["first.weight"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    with average.swapped():
        assert torch.equal(model.first.weight, found.bfloat16())
    assert torch.equal(model.first.weight, own)
    assert torch.equal(average.state()["first.weight"], found)


def test_float64_stays():
    model, _ = made(torch.float64)
    assert Average(model, Ema()).state()["first.weight"].dtype == torch.float64


def test_a_name_that_is_taken():
    model = nn.Linear(2, 2)
    model.updates = nn.Parameter(torch.ones(1))
    with pytest.raises(InputError, match="'updates'"):
        Average(model, Ema())
