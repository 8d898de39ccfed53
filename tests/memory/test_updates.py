"""Updates in portions against torch's own optimizers: the same bits, wherever states are; near them in 8 bits."""

from __future__ import annotations

import copy
import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainwright import optim
from trainwright.memory import portions
from trainwright.memory.portions import Place
from trainwright.memory.updates import Updater
from trainwright.pieces import Piece
from trainwright.recipe import AdamW, InputError, Memory, Optimizer
from trainwright.recipe.file import parse

KINDS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "learning_rate": 0.01},
    "adam": {"name": "adam", "learning_rate": 0.01, "weight_decay": 0.1},
    "sgd": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "nesterov": True},
    "plain sgd": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.0},
    "rmsprop": {"name": "rmsprop", "learning_rate": 0.01, "momentum": 0.5, "centered": True},
    "adagrad": {"name": "adagrad", "learning_rate": 0.1, "initial_accumulator_value": 0.5},
    "adadelta": {"name": "adadelta", "learning_rate": 1.0},
    "amsgrad": {"name": "torch", "type": "AdamW", "learning_rate": 0.01, "arguments": {"amsgrad": True}},
    **{kind: {"name": "torch", "type": kind, "learning_rate": 0.01} for kind in ("NAdam", "RAdam", "Adamax", "ASGD", "Rprop")},
}
PLACES: dict[str, dict[str, Any]] = {"memory": {}, "cpu": {"optimizer_offload": "cpu"}, "disk": {"optimizer_offload": "disk"}}


def section(given: dict[str, Any]) -> Optimizer:
    return parse({"data": {"source": "x"}, "optimizer": given}).optimizer


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    """Matrices larger than a portion and smaller ones, a vector, a number, other orders in memory, gaps, nothing."""
    torch.manual_seed(seed)
    tensors = {
        "matrix": torch.randn(70, 50),
        "conv": torch.randn(12, 8, 3, 3).to(memory_format=torch.channels_last),
        "turned": torch.randn(40, 30).T,
        "gaps": torch.randn(20, 20)[:, :7],
        "norm": torch.randn(50),
        "number": torch.randn(()),
        "nothing": torch.randn(0, 5),
        "frozen at first": torch.randn(30, 30),
    }
    return [(name, nn.Parameter(tensor.to(dtype))) for name, tensor in tensors.items()]


def groups_of(named: list[tuple[str, nn.Parameter]], chosen: Optimizer) -> list[dict[str, Any]]:
    return optim.parameter_groups(named, chosen)


def updater(named: list[tuple[str, nn.Parameter]], chosen: Optimizer, seed: int = 0, **memory: Any) -> Updater:
    make = partial(optim.make_optimizer, section=chosen, instead_of=[p for _, p in named])
    places = {name: Place(name, Piece.all_of(tuple(p.shape))) for name, p in named}
    return Updater(groups_of(named, chosen), make, places, Memory.model_validate(memory), seed)


def give_gradients(named: list[tuple[str, nn.Parameter]], step: int) -> None:
    for index, (name, p) in enumerate(named):
        generator = torch.Generator().manual_seed(100 * step + index)
        if name != "frozen at first" or step:
            gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = torch.empty_like(p).copy_(gradient) if step % 2 else gradient  # also in another order in memory


def advance(optimizer: Any, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"], group["update"] = group["peak"] * (1 - 0.1 * step), step
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_as_torch(kind, place, small_portions, tmp_path):
    chosen = section(KINDS[kind])
    mine, theirs = parameters(), [(name, nn.Parameter(p.detach().contiguous())) for name, p in parameters()]
    for (_, own), (_, other) in zip(mine, theirs, strict=True):
        other.data = torch.empty_like(own).copy_(own)
    if kind == "plain sgd" and place != "memory":
        with pytest.raises(InputError, match=f"memory.optimizer_offload: {place} has no effect: SGD keeps no states"):
            updater(mine, chosen, **PLACES[place])
        return
    extra = {"folder": str(tmp_path)} if place == "disk" else {}
    one = updater(mine, chosen, **PLACES[place], **extra)
    other = optim.make_optimizer(groups_of(theirs, chosen), chosen)
    for step in range(4):
        for optimizer, named in ((one, mine), (other, theirs)):
            give_gradients(named, step)
            if kind == "sgd":
                named[-1][1].grad = None  # torch's fused kernel can't begin later
            for _, p in named:
                if p.grad is not None and p.grad.stride() != p.stride():
                    p.grad = torch.empty_like(p).copy_(p.grad)  # fused kernels of torch want it, ours take any
            advance(optimizer, step)
    for (name, own), (_, its) in zip(mine, theirs, strict=True):
        assert torch.equal(own, its), name
        kept = one.kept(own)
        states = {key: value for key, value in other.state.get(its, {}).items() if isinstance(value, Tensor)}
        if not own.numel():
            continue
        assert kept.keys() == states.keys(), name
        for key, value in states.items():
            assert kept[key].dtype == value.dtype
            assert torch.equal(made(kept[key]), value), (name, key)
            assert kind == "plain sgd" or key in ("step", "eta", "mu", "prev") or value.any(), (name, key)
    assert not os.listdir(tmp_path), "a file with a name"


def made(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value.make()


def test_gradients_in_another_order_in_memory(small_portions):
    (name, one), (_, other) = parameters()[1], parameters()[1]
    for optimizer, p in ((updater([(name, one)], AdamW()), one), (updater([(name, other)], AdamW()), other)):
        gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        p.grad = gradient if p is one else gradient.to(memory_format=torch.channels_last)
        advance(optimizer, 0)
    assert torch.equal(one, other)


@pytest.mark.parametrize("memory", [{}, {"optimizer_states": "8bit"}, {"optimizer_offload": "disk"}], ids=str)
def test_states_can_be_taken_and_given_back(memory, small_portions):
    """Resuming gives the same bits, also of 8 bits."""
    chosen, straight, stopped = AdamW(learning_rate=0.01), parameters(), parameters()
    one, first = updater(straight, chosen, **memory), updater(stopped, chosen, **memory)
    for step in range(2):
        for optimizer, named in ((one, straight), (first, stopped)):
            give_gradients(named, step)
            advance(optimizer, step)
    second = updater(stopped, chosen, **memory)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(2, 5):
        for optimizer, named in ((one, straight), (second, stopped)):
            give_gradients(named, step)
            advance(optimizer, step)
    for (name, p), (_, q) in zip(straight, stopped, strict=True):
        assert torch.equal(p, q), name
        for (key, value), other in zip(one.kept(p).items(), second.kept(q).values(), strict=True):
            assert torch.equal(made(value), made(other)), (name, key)
    second.load_state_dict(updater(parameters(), chosen, **memory).state_dict())
    assert not any(second.kept(q) for _, q in stopped)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "rmsprop", "adagrad", "adadelta", "amsgrad", "NAdam", "Adamax"])
def test_eight_bits_stay_near(kind, small_portions):
    """Matrices of 4,096 numbers and more; all else is as in torch, to the bit."""
    chosen = section(KINDS[kind])
    named, theirs = ([("large", nn.Parameter(torch.ones(64, 80))), ("small", nn.Parameter(torch.ones(64, 63))),
                      ("vector", nn.Parameter(torch.ones(5000)))] for _ in range(2))  # fmt: skip
    one, other = updater(named, chosen, optimizer_states="8bit"), optim.make_optimizer(groups_of(theirs, chosen), chosen)
    start = torch.ones(64, 80)
    for step in range(20):
        for optimizer, pairs in ((one, named), (other, theirs)):
            give_gradients(pairs, step)
            advance(optimizer, step % 10)
    moved = (theirs[0][1] - start).detach()
    errors = (named[0][1] - theirs[0][1]).detach()
    assert errors.any()
    assert errors.norm() / moved.norm() < 0.03
    assert errors.abs().max() < 0.15 * moved.abs().max()
    for (name, p), (_, q) in zip(named[1:], theirs[1:], strict=True):
        assert torch.equal(p, q), name


def test_eight_bits_take_two_bytes_a_number_for_both_states():
    named = [("matrix", nn.Parameter(torch.ones(1024, 1024))), ("norm", nn.Parameter(torch.ones(1024)))]
    optimizer = updater(named, AdamW(), optimizer_states="8bit")
    give_gradients(named, 1)
    optimizer.step()
    taken = sum(t.nbytes for states in optimizer.state.values() for t in states.values())
    assert taken / sum(p.numel() for _, p in named) < 2.1
    on_disk = updater(named, AdamW(), optimizer_states="8bit", optimizer_offload="disk")
    give_gradients(named, 1)
    on_disk.step()
    assert sum(t.nbytes for states in on_disk.state.values() for t in states.values()) == 8  # two counts of steps


def test_a_rare_gradient_does_not_blow_up_in_eight_bits():
    """A row with small gradients beside one with large ones, in one block; then no gradient at all for the small one."""
    named, theirs = ([("embedding", nn.Parameter(torch.zeros(64, 128)))] for _ in range(2))
    one, other = updater(named, AdamW(), optimizer_states="8bit"), optim.make_optimizer(groups_of(theirs, AdamW()), AdamW())
    for step in range(30):
        for optimizer, [(_, p)] in ((one, named), (other, theirs)):
            p.grad = torch.zeros(64, 128)
            p.grad[0::2] = torch.randn(128, generator=torch.Generator().manual_seed(step))
            p.grad[1::2] = 2e-4 * (step < 5)
            advance(optimizer, 0)
    assert named[0][1][1::2].abs().max() < 1.5 * theirs[0][1][1::2].abs().max()


RATE = 1e-6


def fraction_moved(dtype: torch.dtype, ours: bool) -> tuple[float, float]:
    """Of weights like those of a trained model; and the mean change against the gradient's sign, in learning rates."""
    torch.manual_seed(0)
    start = torch.randn(400, 500).mul_(0.02).to(torch.bfloat16)
    named = [("w", nn.Parameter(start.to(dtype, copy=True)))]
    chosen = AdamW(learning_rate=RATE, weight_decay=0.0)
    optimizer = updater(named, chosen) if ours else optim.make_optimizer(groups_of(named, chosen), chosen)
    sign = torch.randn(400, 500).sign()
    for step in range(10):
        named[0][1].grad = sign.to(dtype)
        for group in optimizer.param_groups:
            group["update"] = step
        optimizer.step()
    change = named[0][1].detach().double() - start.double()
    return (change != 0).double().mean().item(), -(change * sign).mean().item() / RATE


def test_small_updates_of_bfloat16_happen_by_chance():
    """PITFALLS 11: rounded to the nearest, a rate of 1e-6 moves hardly any weight; by chance they move as in float32."""
    full, exact = fraction_moved(torch.float32, ours=False)
    lost, nearest = fraction_moved(torch.bfloat16, ours=False)
    some, mean = fraction_moved(torch.bfloat16, ours=True)
    assert full == 1.0
    assert exact == pytest.approx(10, rel=1e-3)
    assert lost < 0.03
    assert nearest < 0.5
    # The chance to move is the change over the distance of two neighbours, about a tenth here.
    assert 0.03 < some < 0.5
    assert mean == pytest.approx(exact, rel=0.05)


def test_rounding_follows_seed_step_and_name():
    def after(seed: int = 0, update: int = 0, name: str = "w") -> Tensor:
        named = [(name, nn.Parameter(torch.linspace(-1, 1, 5000).to(torch.bfloat16)))]
        optimizer = updater(named, AdamW(learning_rate=1e-4), seed=seed)
        named[0][1].grad = torch.ones(5000, dtype=torch.bfloat16)
        optimizer.param_groups[0]["update"] = update
        optimizer.step()
        return named[0][1].detach()

    base = after()
    assert torch.equal(base, after())
    for other in (after(seed=1), after(update=1), after(name="v")):
        assert not torch.equal(base, other)


def test_a_loss_that_is_not_finite_updates_nothing():
    """Though its gradients may be."""
    named = [("w", nn.Parameter(torch.ones(5)))]
    optimizer = updater(named, AdamW(), optimizer_in_backward=True)
    optimizer.in_backward([p for _, p in named])
    optimizer.backward(named[0][1].sum() + torch.inf, True)
    assert torch.equal(named[0][1], torch.ones(5))
    optimizer.backward(named[0][1].sum(), True)
    assert not torch.equal(named[0][1], torch.ones(5))
    assert optimizer.norm().item() == pytest.approx(5**0.5)


def test_portions_do_not_change_a_bit(monkeypatch):
    def after(chunk: int) -> list[Tensor]:
        monkeypatch.setattr(portions, "CHUNK", chunk)
        named = parameters(torch.bfloat16)
        optimizer = updater(named, AdamW(learning_rate=0.01), optimizer_states="8bit")
        for step in range(3):
            give_gradients(named, step)
            advance(optimizer, step)
        return [p.detach() for _, p in named]

    assert all(map(torch.equal, after(512), after(2**19)))


def test_small_parameters_are_updated_at_once(monkeypatch):
    named = [(str(n), nn.Parameter(torch.ones(10, 10))) for n in range(300)]
    optimizer = updater(named, AdamW())
    calls = []
    monkeypatch.setattr(optimizer, "_update_portion", calls.append)
    for _, p in named:
        p.grad = torch.ones(10, 10)
    optimizer.step()
    assert [len(call) for call in calls] == [300]


@pytest.mark.parametrize("kind", ["ASGD", "Rprop"])
def test_states_that_eight_bits_do_not_suit(kind):
    with pytest.raises(InputError) as caught:
        updater(parameters(), section(KINDS[kind]), optimizer_states="8bit")
    assert str(caught.value).startswith(f"memory.optimizer_states: 8bit, but {kind} keeps ")
    assert "take another optimizer, such as adamw" in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"memory.folder: .*missing is no folder; name one that can be written to"):
        updater(parameters(), AdamW(), optimizer_offload="disk", folder=str(tmp_path / "missing"))


def test_a_folder_without_room(tmp_path, monkeypatch):
    """Said before anything is trained, with what it takes and what is there."""
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 2**10})())

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError) as caught:
        updater(parameters(), AdamW(), optimizer_offload="disk", folder=str(tmp_path))
    assert str(caught.value) == (
        f"memory.folder: {tmp_path} has no room for the optimizer's states: they take 4.96e-05 GiB, 9.54e-07 GiB are free; "
        "name another folder, or make them smaller by memory.optimizer_states: 8bit"
    )
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), (torch.bfloat16, torch.float32), (torch.float32,)], ids=str)
def test_the_norm_of_gradients_in_bfloat16_has_all_digits(dtypes):
    """And clipping scales them to it."""
    named = [nn.Parameter(torch.zeros(300, 3, dtype=dtype)) for dtype in dtypes for _ in range(3)]
    for p in named:
        p.grad = torch.randn_like(p)
    exact = torch.stack([p.grad.double().square().sum() for p in named if p.grad is not None]).sum().sqrt()
    assert optim.clip_(named, 2.0).item() == pytest.approx(exact.item(), rel=1e-6)
    assert optim.clip_(named, None).item() == pytest.approx(2.0, rel=1e-2 if torch.bfloat16 in dtypes else 1e-5)
