"""Groups, optimizers and clipping, against torch's own."""

import math

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from trainwright import optim
from trainwright.recipe import AdamW, InputError, Optimizer

MODEL = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def section(name="adamw", **keys):
    return TypeAdapter(Optimizer).validate_python({"name": name, **keys})


def told(settings, model=MODEL):
    """What each parameter gets, and in which order the groups come."""
    groups = optim.parameter_groups(model.named_parameters(), settings)
    assert all(set(group) == {"params", "names", "weight_decay", "peak"} for group in groups)
    assert all(len(group["params"]) == len(group["names"]) > 0 for group in groups)
    named = dict(model.named_parameters())
    assert all(named[n] is p for group in groups for n, p in zip(group["names"], group["params"], strict=True))
    return {n: (group["peak"], group["weight_decay"]) for group in groups for n in group["names"]}


def test_norms_and_biases_get_no_decay():
    assert told(section(learning_rate=0.1, weight_decay=0.3)) == {
        "0.weight": (0.1, 0.3), "2.weight": (0.1, 0.3),
        "0.bias": (0.1, 0.0), "1.weight": (0.1, 0.0), "1.bias": (0.1, 0.0), "2.bias": (0.1, 0.0),
    }  # fmt: skip


def test_groups_by_name():
    """The first that matches counts; without a decay of its own it keeps the rule, with one it is for all."""
    groups = [
        {"match": ["2.bias"], "learning_rate": 0.5},
        {"match": ["2.*", "1.*"], "weight_decay": 0.7},
        {"match": ["*.weight"], "learning_rate": 0.0},
    ]
    found = told(section("sgd", learning_rate=0.1, weight_decay=0.3, groups=groups))
    assert found == {
        "0.bias": (0.1, 0.0), "2.bias": (0.5, 0.0), "1.weight": (0.1, 0.7), "1.bias": (0.1, 0.7), "2.weight": (0.1, 0.7),
        "0.weight": (0.0, 0.3),
    }  # fmt: skip
    assert next(iter(found)) == "0.bias"  # what no group matches comes first


def test_every_trainable_parameter_is_in_one_group():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    model[1].requires_grad_(False)
    settings = section(groups=[{"match": ["*bias"]}])
    grouped = [p for group in optim.parameter_groups(model.named_parameters(), settings) for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"match": ["*", "weigth"]}], "optimizer.groups[0].match: pattern 'weigth' matches none of 6 trainable parameters"),
        ([{"match": ["*.weigth"]}], "(did you mean 'weight'?)"),
        ([{"match": ["0.*"]}, {"match": ["0.bias"]}], "optimizer.groups[1] has no effect"),
    ],
)
def test_groups_that_match_nothing(groups, message):
    with pytest.raises(InputError) as error:
        optim.parameter_groups(MODEL.named_parameters(), section(groups=groups))
    assert message in str(error.value)


def test_a_pattern_of_frozen_parameters_matches_nothing():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(InputError, match=r"'1\.weight' matches none of 2"):
        optim.parameter_groups(model.named_parameters(), section(groups=[{"match": ["1.weight"]}]))


def test_nothing_to_train():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(InputError, match="frozen"):
        optim.parameter_groups([("w", frozen)], AdamW())


CASES = [
    ("AdamW", section("adamw", weight_decay=0.1, betas=[0.8, 0.95], eps=1e-6)),
    ("Adam", section("adam", weight_decay=0.1, betas=[0.8, 0.95], eps=1e-6)),
    ("SGD", section("sgd", weight_decay=0.1, nesterov=True, momentum=0.7)),
    ("SGD", section("sgd", momentum=0.0)),
    ("RMSprop", section("rmsprop", weight_decay=0.1, alpha=0.9, momentum=0.5, centered=True, eps=1e-5)),
    ("Adagrad", section("adagrad", weight_decay=0.1, lr_decay=0.2, initial_accumulator_value=0.3, eps=1e-5)),
    ("Adadelta", section("adadelta", weight_decay=0.1, rho=0.7, eps=1e-4)),
    *((kind, section("torch", type=kind, weight_decay=0.1)) for kind in ("NAdam", "RAdam", "Adamax", "ASGD", "Adafactor")),
    ("Rprop", section("torch", type="Rprop", arguments={"etas": [0.4, 1.3]})),
    ("Muon", section("torch", type="Muon", arguments={"momentum": 0.8})),
    ("AdamW", section("torch", type="AdamW", weight_decay=0.1, arguments={"amsgrad": True})),
]


def optimizers(kind, settings, shapes, dtype):
    """Ours with the parameters that it trains, and torch's plain for-loop with the same."""
    torch.manual_seed(0)
    start = [torch.randn(shape, dtype=dtype) for shape in shapes]
    ours, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    made = optim.make_optimizer(optim.parameter_groups([(f"p{i}", p) for i, p in enumerate(ours)], settings), settings)
    options = settings.model_dump(exclude={"name", "learning_rate", "weight_decay", "groups", "type", "arguments"})
    options |= getattr(settings, "arguments", {})
    plain = {} if kind == "Muon" else {"foreach": False}
    groups = [{"params": [p], **({"weight_decay": settings.weight_decay if p.ndim > 1 else 0.0})} for p in theirs]
    return ours, made, theirs, getattr(torch.optim, kind)(groups, lr=settings.learning_rate, **options, **plain)


@pytest.mark.parametrize("size", [4, 100], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "settings"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_trajectory_is_torchs(kind, settings, dtype, size):
    shapes = [(size, size), (3, size)] + ([] if kind == "Muon" else [(size,), ()])
    ours, made, theirs, plain = optimizers(kind, settings, shapes, dtype)
    for step in range(8):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for group in [*made.param_groups, *plain.param_groups]:
            group["lr"] = settings.learning_rate * (1 - step / 10)
        made.step()
        plain.step()
    # ASGD keeps its rate in float32 whatever the parameters are.
    close = {"rtol": 2e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-9}
    torch.testing.assert_close(ours, theirs, **close)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [("adamw", 500, "fused"), ("adam", 4, "fused"), ("sgd", 4, "fused"), ("adagrad", 4, "fused"),
     ("rmsprop", 4, "foreach"), ("adadelta", 4, "foreach"), ("rmsprop", 500, "")],
)  # fmt: skip
def test_the_fastest_implementation(name, size, expected):
    parameter = nn.Parameter(torch.ones(size, size))
    made = optim.make_optimizer(optim.parameter_groups([("w", parameter)], section(name)), section(name))
    assert [key for key in ("fused", "foreach") if made.defaults.get(key)] == ([expected] if expected else [])


def test_where_fused_kernels_are_missing():
    """A device or dtype without them gets foreach, and the first step doesn't fail."""
    meta = torch.ones(2, device="meta")
    assert optim._implementation(torch.optim.AdamW, [meta]) == {"foreach": True}
    complex_ones = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    complex_ones.grad = torch.ones_like(complex_ones)
    made = optim.make_optimizer(optim.parameter_groups([("w", complex_ones)], section("adam")), section("adam"))
    made.step()
    assert (complex_ones.detach() != 1).all()


def test_groups_keep_their_settings():
    groups = [{"match": ["0.*"], "learning_rate": 0.5, "weight_decay": 0.25}]
    settings = section(learning_rate=0.1, weight_decay=0.3, groups=groups)
    made = optim.make_optimizer(optim.parameter_groups(MODEL.named_parameters(), settings), settings)
    found = {name: (g["peak"], g["lr"], g["weight_decay"]) for g in made.param_groups for name in g["names"]}
    assert found["0.bias"] == (0.5, 0.5, 0.25)
    assert found["2.weight"] == (0.1, 0.1, 0.3)
    assert found["2.bias"] == (0.1, 0.1, 0.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"type": "nadam"}, "optimizer.type: torch.optim has no 'nadam' (did you mean 'NAdam'?); it has ASGD"),
        ({"type": "Adamx"}, "did you mean 'Adam"),
        ({"type": "lr_scheduler"}, "torch.optim has no 'lr_scheduler'"),
        ({"type": "Optimizer"}, "is only what the others are made from"),
        ({"type": "LBFGS"}, "evaluates the loss several times a step"),
        ({"type": "SparseAdam"}, "takes sparse gradients only"),
        ({"type": "NAdam", "arguments": {"momentum_decy": 1.0}}, "no such argument (did you mean 'momentum_decay'?)"),
        ({"type": "NAdam", "arguments": {"lr": 1.0}}, "optimizer.arguments.lr: set optimizer.learning_rate instead"),
        ({"type": "NAdam", "arguments": {"weight_decay": 1.0}}, "set optimizer.weight_decay instead"),
        ({"type": "NAdam", "arguments": {"foreach": True}}, "NAdam has no such argument"),
        ({"type": "NAdam", "arguments": {"betas": [2.0, 0.9]}}, "NAdam refuses them: Invalid beta"),
        ({"type": "NAdam", "arguments": {"momentum_decay": "x"}}, "optimizer.arguments: NAdam refuses them"),
        ({"type": "ASGD", "arguments": {"t0": "x"}}, "optimizer.arguments: ASGD refuses them"),
        ({"type": "Rprop", "weight_decay": 0.1}, "optimizer.weight_decay has no effect: Rprop has none"),
        ({"type": "Muon"}, "optimizer.type: Muon doesn't suit these parameters: Muon only supports 2D"),
    ],
)
def test_what_torch_does_not_have(keys, message):
    settings = section("torch", **keys)
    with pytest.raises(InputError) as error:
        optim.make_optimizer(optim.parameter_groups(MODEL.named_parameters(), settings), settings)
    assert message in str(error.value)


@pytest.mark.parametrize("largest", [0.5, 1e6, None])
def test_clipping_gives_the_norm_before(largest):
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 5)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    norm = optim.clip_(parameters, largest)
    assert norm.item() == pytest.approx(math.sqrt(8 * 4))
    after = torch.cat([p.grad for p in parameters]).norm().item()
    assert after == pytest.approx(min(norm.item(), largest or math.inf), rel=1e-4)
