"""Proofs of one's own technique: the page's example, techniques with mistakes, and models of which nothing learned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from trainwright.recipe import InputError
from trainwright.verify.callables import Growth, prove

PAGE = Path(__file__).parents[2] / "docs" / "verify-python.md"


@pytest.fixture(scope="module")
def example() -> dict:
    """What the page's code defines; running it is the first test."""
    names: dict = {"print": lambda *words: None, "__builtins__": __builtins__}
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    exec(code[1], names)
    return names


def trained(*, change=lambda model: None, dtype=torch.float32, loss_factor=1.0, steps=3, seed=0, skip=0):
    """A network with BatchNorm after a few steps of Adam; ``change`` is made before them."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)).to(dtype)
    change(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01, eps=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(10, 6, generator=torch.Generator().manual_seed(step + skip)).to(dtype)
        (loss_factor * model(x).square().mean()).backward()
        optimizer.step()
    return model


def precise():
    return trained(dtype=torch.float64)


def lines(verdict):
    return {line.what: line for line in verdict.lines}


def test_the_pages_example_is_proved(example):
    verdict = example["verdict"]
    assert verdict.good
    assert not verdict.exact
    assert lines(verdict)["parameters"].value > 0
    assert lines(verdict)["gradients of the last step"].verdict == "within"
    assert lines(verdict)["living models"].verdict == "exact"


def test_the_pages_mistake_is_found(example):
    def mean_of_means():
        model = example["first"]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            x, y = example["batch"](step)
            for some_x, some_y in zip(x.split(5), y.split(5), strict=True):
                (example["cross_entropy"](model(some_x), some_y) / 3).backward()
            optimizer.step()
        return model

    for truth in (None, lambda: example["trained"](12, torch.float64)):
        verdict = prove(lambda: example["trained"](12), mean_of_means, precise=truth, start=example["first"])
        assert {line.what for line in verdict.failed} == {"parameters", "gradients of the last step"}
        assert "0.weight" in verdict.failed[0].why


def test_the_same_is_exact():
    verdict = prove(trained, trained)
    assert verdict.good
    assert verdict.exact


def test_bounds_are_those_of_the_page():
    bound = lines(prove(trained, trained))["parameters"].bound
    assert bound == pytest.approx(2 * 8 * 4e-6)
    assert Growth("fp32", 10**8).bound(0.0) == pytest.approx(2 * 8 * 2.0**-24 * 10**4)
    assert lines(prove(trained, trained, precise=precise))["parameters"].bound == pytest.approx(8 * 4e-6)


def twice(model):
    """Statistics that are updated twice, as by checkpointing that forgets BatchNorm."""
    model[1].register_forward_hook(lambda module, inputs, output: (module.num_batches_tracked.add_(1), None)[1])


@pytest.mark.parametrize("truth", [None, precise], ids=["growth", "precise"])
@pytest.mark.parametrize(
    ("settings", "what", "where"),
    [
        ({"loss_factor": 0.5}, "gradients of the last step", "0.weight"),
        ({"change": twice}, "buffers", "1.num_batches_tracked"),
        ({"steps": 2}, "parameters", "0.weight"),
        ({"skip": 1}, "parameters", "0.weight"),
        ({"change": lambda model: model[3].bias.requires_grad_(False)}, "parameters", "3.bias"),
    ],
    ids=["half a loss", "statistics twice", "too few steps", "a skipped step", "a frozen bias"],
)
def test_mistakes_are_found(settings, what, where, truth):
    verdict = prove(trained, lambda: trained(**settings), precise=truth, start=lambda: trained(steps=0))
    failed = {line.what: line for line in verdict.failed}
    assert what in failed
    assert where in (failed[what].where, *failed[what].tensors)


def test_what_only_one_side_has_is_found():
    def larger():
        model = trained()
        model.register_parameter("extra", nn.Parameter(torch.ones(2)))
        return model

    assert "extra should not be there" in prove(trained, larger).failed[0].why


def dead(model_of=trained):
    model = model_of()
    for p in model.parameters():
        assert p.grad is not None
        p.grad.zero_()
    return model


@pytest.mark.parametrize(
    ("plain", "start", "message"),
    [
        (dead, None, "technique: the gradient of 0.weight is zero"),
        (lambda: trained(steps=0), None, "nothing shows that technique learned: leave the gradients of the last step, or pass"),
        (lambda: trained(steps=0), lambda: trained(steps=0), "technique: 0.weight didn't move"),
        (
            lambda: trained(steps=0).requires_grad_(False),
            lambda: trained(steps=0),
            "technique: nothing learns, every parameter is frozen",
        ),
    ],
)
def test_two_dead_models_agree_and_fail(plain, start, message):
    verdict = prove(plain, plain, start=start)
    assert [line.what for line in verdict.failed] == ["living models"]
    assert message in verdict.failed[0].why


def test_a_plain_run_that_is_another_each_time_is_told():
    seeds = iter(range(10))
    verdict = prove(lambda: trained(seed=next(seeds)), trained, start=lambda: trained(steps=0))
    assert verdict.good, "the first call is that of seed 0"
    seeds = iter(range(1, 10))
    verdict = prove(lambda: trained(seed=next(seeds)), trained)
    assert "plain doesn't return the same twice" in verdict.failed[-1].why
    assert all("twice" not in line.why for line in prove(trained, lambda: trained(seed=1)).failed)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = trained()


MODEL = trained()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lambda: None, trained), "plain: it returned NoneType; return the nn.Module after its steps"),
        ((trained, nn.ReLU), "technique: the model that it returned has no parameters"),
        ((lambda: MODEL, lambda: MODEL), "technique: it returned plain's own parameters; begin with a copy.deepcopy"),
        ((trained, Wrapped), "technique: every name begins with module.; return what is inside of that wrapper"),
    ],
)
def test_wrong_input(arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        prove(*arguments)


def test_an_unknown_precision():
    with pytest.raises(InputError, match="precision: found 'fp16'; give one of fp32, bf16, fp64"):
        prove(trained, trained, precision="fp16")
