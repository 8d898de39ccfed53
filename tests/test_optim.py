"""Groups, schedules and clipping, against torch's and transformers' own."""

import math

import pytest
import torch
from transformers import get_scheduler

from tests import tiny
from trainwright import build, optim
from trainwright.recipe import SGD, AdamW, InputError, Schedule


def test_norms_and_biases_get_no_decay(tmp_path):
    tiny.model(tmp_path / "base", attention_bias=True)
    run = build.assemble(tiny.recipe(tmp_path, optimizer__weight_decay=0.3))
    decay = {name: group["weight_decay"] for group in run.optimizer.param_groups for name in group["names"]}
    assert decay == {name: 0.3 if p.ndim == 2 else 0.0 for name, p in run.model.named_parameters()}
    assert sum(1 for value in decay.values() if value == 0) == 5 + 2 * 4


@pytest.mark.parametrize("section", [AdamW(weight_decay=0.1), SGD(name="sgd", weight_decay=0.1, nesterov=True)])
def test_trajectory_is_torchs(section):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    made = optim.make_optimizer(optim.parameter_groups([("w", ours)], section.weight_decay), section)
    options = section.model_dump(exclude={"name", "learning_rate"})
    kind = torch.optim.AdamW if isinstance(section, AdamW) else torch.optim.SGD
    plain = kind([theirs], lr=section.learning_rate, **options, fused=False, foreach=False)
    for _ in range(10):
        ours.grad = torch.randn(4, 3)
        theirs.grad = ours.grad.clone()
        made.step()
        plain.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedule_is_transformers_after_the_warmup(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=50)
    rate = optim.schedule(Schedule(name=name, warmup=0), 2.0, 50)
    for step in range(50):
        assert rate(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_closed_forms():
    assert [optim.schedule(Schedule(name="constant", warmup=0), 3.0, 9)(s) for s in range(9)] == [3.0] * 9
    rate = optim.schedule(Schedule(name="cosine", warmup=0.2, final=0.1), 1.0, 10)
    assert [rate(0), rate(1), rate(2)] == pytest.approx([0.5, 1.0, 1.0])
    assert rate(6) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert rate(10) == pytest.approx(0.1)


def test_warmup_must_end():
    with pytest.raises(InputError, match=r"schedule\.warmup"):
        optim.schedule(Schedule(warmup=10), 1.0, 10)


@pytest.mark.parametrize("largest", [0.5, 1e6, None])
def test_clipping_gives_the_norm_before(largest):
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 5)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    norm = optim.clip_(parameters, largest)
    assert norm.item() == pytest.approx(math.sqrt(8 * 4))
    after = torch.cat([p.grad for p in parameters]).norm().item()
    assert after == pytest.approx(min(norm.item(), largest or math.inf), rel=1e-4)


def test_nothing_to_train():
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(InputError, match="frozen"):
        optim.parameter_groups([("w", frozen)], 0.0)
