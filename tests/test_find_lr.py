"""The learning-rate range test: its steps are the loop's, its answer is that of a known loss, and nothing stays behind."""

import copy
import json
import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from tests import tiny
from trainwright import find_lr, loop, optim
from trainwright.ema import Average
from trainwright.recipe import Ema, InputError, Optimizer
from trainwright.recipe.file import parse
from trainwright.report import curves

RECIPE = parse({"model": {"architecture": "mlp"}, "data": {"kind": "images", "source": "digits"}, "run": {"seed": 3}})


@dataclass
class Batch:
    x: Tensor
    y: Tensor
    size: int = 8
    supervised: int = 8


def run_of(model=None, objective=None, **keys):
    """A run of noisy regression, with BatchNorm and dropout unless a model is given."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
    settings = TypeAdapter(Optimizer).validate_python({"name": "adamw", "learning_rate": 1e-3, **keys})
    optimizer = optim.make_optimizer(optim.parameter_groups(model.named_parameters(), settings), settings)

    def batch(step):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return [Batch(x, x.sum(1, keepdim=True))]

    def squares(batch):
        return (model(batch.x) - batch.y).square().sum()

    return loop.Run(
        recipe=RECIPE, model=model, changes=[], device=torch.device("cpu"), optimizer=optimizer, factor=lambda step: 1.0,
        steps=10, steps_per_epoch=10, batch=batch, identity=str,
        forward_backward=partial(loop.accumulate, objective or squares, lambda batch: batch.supervised),
        clip=partial(optim.clip_, list(model.parameters()), 1.0), splits={}, measure=lambda batches, done: {},
        save=lambda path: None, gradients=dict, weights=dict, remember=dict, recall=lambda stored, everything: None,
        compute_dtype=torch.float32, unit="samples", fingerprint="",
    )  # fmt: skip


def everything(run):
    """All that a run is: its tensors, cloned, and the rest."""
    extra = run.extra.state() if run.extra else {}
    state = [dict(run.model.state_dict()), run.optimizer.state_dict(), extra, run.step, run.model.training]
    return tree_flatten(copy.deepcopy(state))


def assert_same(one, other):
    (leaves, shape), (others, other_shape) = one, other
    assert shape == other_shape
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(leaves, others, strict=True))


def width(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return picture.size[0]


@pytest.mark.parametrize("name", ["adamw", "sgd", "adagrad"])
@pytest.mark.parametrize("begun", [False, True])
def test_the_run_is_left_as_it_was(name, begun):
    run = run_of(name=name)
    run.extra = average = Average(run.model, Ema())
    run.optimizer.register_step_post_hook(average.update)
    if begun:
        for _ in loop.train(replace(run, steps=3)):
            pass
    run.model.eval()
    before = everything(run)
    result = find_lr.find_lr(run, steps=60)
    assert len(result["losses"]) > 20
    assert_same(everything(run), before)
    assert all(p.grad is None for p in run.model.parameters())


def test_also_after_an_error():
    run = run_of()
    before, take = everything(run), run.batch

    def fail(step):
        if step == 5:
            raise KeyError
        return take(step)

    run.batch = fail
    with pytest.raises(KeyError):
        find_lr.find_lr(run)
    assert_same(everything(run), before)


def test_training_afterwards_is_the_same():
    plain, tested = run_of(), run_of()
    find_lr.find_lr(tested, steps=40)
    assert [r.loss for r in loop.train(plain)] == [r.loss for r in loop.train(tested)]


def test_its_steps_are_those_of_the_loop():
    """With the same rates the loop sees the same losses; groups keep their proportion."""
    groups = [{"match": ["3.*"], "learning_rate": 5e-4}]
    run, other = run_of(groups=groups), run_of(groups=groups)
    run.step = 4
    seen = []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append([g["lr"] for g in optimizer.param_groups]))
    result = find_lr.find_lr(run, start=1e-5, end=1e-2, steps=30)
    rates = np.geomspace(1e-5, 1e-2, 30)
    assert result["learning_rates"] == pytest.approx(rates)
    assert [rates[0] for rates in seen] == pytest.approx(rates)
    assert all(r[-1] == pytest.approx(r[0] / 2) for r in seen)
    other.step, other.steps, other.factor = 4, 34, lambda step: rates[step - 4] / 1e-3
    assert [r.loss for r in loop.train(other)] == pytest.approx(result["losses"], rel=1e-5)


def test_smoothing_is_that_of_pandas():
    losses = np.random.default_rng(0).normal(size=50).tolist()
    assert find_lr.smooth(losses) == pytest.approx(pd.Series(losses).ewm(alpha=0.1).mean().tolist())


def test_the_steepest_place_of_a_known_curve():
    rates = np.geomspace(1e-6, 1, 200)
    assert find_lr.suggest(rates.tolist(), (-np.tanh(np.log(rates / 1e-3))).tolist()) == pytest.approx(1e-3, rel=0.05)
    assert find_lr.suggest(rates.tolist(), np.linspace(1, 2, 200).tolist()) is None
    assert find_lr.suggest(rates.tolist(), [1.0] * 200) is None
    assert find_lr.suggest([], []) is None
    # What is behind the lowest point, or in the first ten steps, doesn't count.
    curve = np.concatenate([[9.0, 1.0], np.linspace(1, 0, 98), np.linspace(0, 5, 50), np.linspace(5, 1, 50)])
    assert rates[10] <= find_lr.suggest(rates.tolist(), curve.tolist()) <= rates[99]


def test_it_finds_what_suits_a_quadratic():
    """SGD on c/2 |w|^2 is best at 1 / c and diverges beyond 2 / c."""
    model = nn.Linear(1, 1, bias=False)
    run = run_of(model, lambda batch: 8 * 50 / 2 * model.weight.square().sum(), name="sgd", momentum=0.0)
    run.clip = partial(optim.clip_, list(model.parameters()), None)
    result = find_lr.find_lr(run, start=1e-5)
    assert 1 / 500 < result["suggestion"] < 1 / 50
    assert result["learning_rates"][-1] < 10
    assert result["at_minimum_tenth"] == result["learning_rates"][int(np.argmin(result["smoothed"]))] / 10
    assert result["smoothed"][-1] > 4 * min(result["smoothed"])
    assert all(value <= 4 * min(result["smoothed"][: i + 1]) for i, value in enumerate(result["smoothed"][:-1]))


@pytest.mark.parametrize(
    ("smoothed", "expected"), [([2.0, 1.0, 4.1], True), ([2.0, 1.0, 3.9], False), ([1.0, -2.0, -1.0], False)]
)
def test_when_it_has_diverged(smoothed, expected):
    assert find_lr._diverged(smoothed) is expected


@pytest.mark.parametrize("bad", ["loss", "norm"])
def test_what_is_not_finite_ends_it(bad):
    run = run_of()
    steps = iter(range(100))

    def broken(*given, call=run.forward_backward if bad == "loss" else run.clip):
        return call(*given) * (math.nan if next(steps) == 30 else 1.0)

    setattr(run, {"loss": "forward_backward", "norm": "clip"}[bad], broken)
    before = everything(run)
    result = find_lr.find_lr(run, end=1e-4)
    assert len(result["losses"]) == len(result["smoothed"]) == len(result["learning_rates"]) == 30
    json.dumps(result, allow_nan=False)
    assert_same(everything(run), before)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"start": 0.0}, "must ascend from above 0: found start 0 and end 10"),
        ({"start": 1.0, "end": 0.1}, "found start 1 and end 0.1"),
        ({"end": math.inf}, "found start 1e-07 and end inf"),
        ({"steps": 5}, "steps: found 5; at least 20"),
    ],
)
def test_ranges_that_tell_nothing(keys, message):
    with pytest.raises(InputError, match=message):
        find_lr.find_lr(run_of(), **keys)


def test_a_rate_of_zero_has_no_proportions():
    with pytest.raises(InputError, match=r"set optimizer\.learning_rate above 0"):
        find_lr.find_lr(run_of(learning_rate=0.0))


def test_the_verb(tmp_path):
    result = find_lr.main(tiny.recipe(tmp_path), start=1e-6, end=1.0, steps=25, out=tmp_path / "new" / "lr.png")
    assert json.loads(json.dumps(result, allow_nan=False))["picture"] == str(tmp_path / "new" / "lr.png")
    assert width(result["picture"]) == 1200


def test_pictures_of_results_without_an_answer(tmp_path):
    nothing = {"suggestion": None, "at_minimum_tenth": None, "learning_rates": [], "losses": [], "smoothed": []}
    flat = {"suggestion": None, "at_minimum_tenth": 1e-9, "learning_rates": [1e-8], "losses": [0.0], "smoothed": [0.0]}
    for result in (nothing, flat):
        assert width(curves.find_lr(result, tmp_path / "lr.png")) == 1200
