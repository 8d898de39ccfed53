"""Precisions: what is stored in which dtype, and gradients against float64; loss scaling against torch's GradScaler."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import small, tiny
from trainwright import build, loop
from trainwright.memory import precision, scaling
from trainwright.models.contract import Change
from trainwright.recipe import InputError, RunError
from trainwright.recipe.file import parse

CPU = torch.device("cpu")
ROUNDING = {"fp32": 1e-6, "bf16": 2e-2, "pure_bf16": 2e-2, "fp16": 3e-3}


def gradients(folder: Path, **changes) -> tuple[dict[str, torch.Tensor], float, loop.Run]:
    """Of the first step."""
    run = build.assemble(tiny.recipe(folder, **changes))
    run.model.train()
    loss = run.forward_backward(run.batch(0)).item()
    return {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}, loss, run


@pytest.mark.parametrize("adapt", [{"method": "full"}, {"method": "lora", "rank": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["bf16", "pure_bf16", "fp16"])
def test_every_gradient_is_float64s_but_for_rounding(kind, adapt, folder):
    found, loss, run = gradients(folder, precision=kind, adapt=adapt)
    exact, right, _ = gradients(folder, precision="fp64", adapt=adapt)
    assert loss == pytest.approx(right, rel=5e-3)
    assert found.keys() == exact.keys()
    learns = torch.bfloat16 if kind == "pure_bf16" else torch.float32
    assert {g.dtype for g in found.values()} == {learns}
    for name, gradient in exact.items():
        assert gradient.any() or "lora_A" in name, name  # A gets none as long as B is zero
        off = (found[name].double() - gradient).norm()
        assert off <= 2 * ROUNDING[kind] * gradient.norm(), f"{name}: {off / gradient.norm():.1e}"
    stored = {p.dtype for p in run.model.parameters() if not p.requires_grad}
    assert stored <= {precision.DTYPES[kind]}


def test_pure_bf16_has_no_masters(folder):
    run = build.assemble(tiny.recipe(folder, precision="pure_bf16"))
    next(iter(loop.train(run)))
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}
    kept = {name.rpartition(".")[2] for name, held in run.remember().items() if held.tensor.ndim and "optimizer" in name}
    assert kept == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("arch", ["mlp", "resnet9", "lstm"])
def test_pure_bf16_of_samples(arch, tmp_path):
    options = {"hidden": [16]} if arch == "mlp" else {}
    model = {"architecture": arch, "options": options}
    losses = {}
    for kind in ("fp32", "pure_bf16"):
        run = build.assemble(small.recipe(tmp_path, precision=kind, model=model, training__steps=3))
        losses[kind] = [step.loss for step in loop.train(run)]
    assert losses["pure_bf16"] == pytest.approx(losses["fp32"], rel=5e-2)
    assert losses["pure_bf16"] != losses["fp32"]
    norms = [m for m in run.model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        assert norm.weight.dtype == norm.running_mean.dtype == torch.float32
    others = {p.dtype for m in run.model.modules() if m not in norms for p in m.parameters(recurse=False)}
    assert others == {torch.bfloat16}
    assert len(norms) == (10 if arch == "resnet9" else 0)


def test_pure_bf16_leaves_batchnorms_own_start_alone():
    """A user's module has its values already: they must not go through bfloat16."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with torch.no_grad():
        model[1].weight.fill_(1.001)
    found = precision.apply(model, "pure_bf16")
    assert isinstance(found, Change)
    assert "16 parameters that learn" in found.summary
    assert "1 norms over batches" in found.summary
    assert model[1].weight.eq(1.001).all()
    assert model[0].weight.dtype == torch.bfloat16


# --- loss scaling -----------------------------------------------------------------


def test_the_rule_is_gradscalers(monkeypatch):
    """A thousand steps, some of which overflow, against torch's own; with growth every 3rd step, so that it happens."""
    monkeypatch.setattr(scaling, "GROWTH", 3)
    theirs = torch.amp.GradScaler("cpu", init_scale=scaling.START, growth_interval=3)
    ours = scaling.Scaler(CPU)
    weight = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], 0.0)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(400):
        overflows = torch.rand((), generator=generator).item() < (0.3 if ours.scale > 4 else 0.0)
        weight.grad = torch.tensor(math.inf if overflows else 1.0)
        theirs.scale(torch.ones(()))
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        assert bool(ours.judge(1.0, math.inf if overflows else 1.0)) is overflows
        assert ours.scale == theirs.get_scale()
        assert ours.good == theirs._get_growth_tracker()
        seen.add(ours.scale)
    assert len(seen) > 5


def test_it_starts_as_gradscaler_does():
    theirs = torch.amp.GradScaler("cpu")
    assert theirs.get_scale() == scaling.START
    assert theirs.get_growth_interval() == scaling.GROWTH


def test_nan_counts_as_overflow():
    scaler = scaling.Scaler(CPU)
    assert "the loss scale is 32768 now" in scaler.judge(2.0, math.nan)


def test_a_scale_below_one_ends_the_run():
    scaler = scaling.Scaler(CPU)
    for _ in range(16):
        assert scaler.judge(1.0, math.inf)
    assert scaler.scale == 1.0
    with pytest.raises(RunError, match=r"overflows float16 even with a loss scale of 1 \(loss 1.0\); use precision: bf16"):
        scaler.judge(1.0, math.inf)


def test_gradients_are_unscaled_before_anybody_sees_them():
    scaler = scaling.Scaler(CPU)
    weight = nn.Parameter(torch.tensor([2.0, 3.0]))
    count = scaler.count(lambda batch: 4)

    def inner(batches):
        loss = (weight * batches[0]).sum() / count(batches[0])
        loss.backward()
        assert weight.grad.abs().max() > 1e4
        return loss.detach()

    loss = scaler.forward_backward(inner, [("weight", weight)])([torch.tensor([1.0, 5.0])])
    assert loss == 17 / 4
    assert weight.grad.tolist() == [0.25, 1.25]


def test_small_gradients_survive_float16_only_scaled(folder, monkeypatch):
    """The point of it: without a scale, gradients of activations vanish."""
    exact = gradients(folder, precision="fp64")[0]
    # NOTE: the loss's count makes gradients small: as if the batch had a million times as many tokens.
    lost = {}
    for start in (1.0, 2.0**24):
        monkeypatch.setattr(scaling, "START", start)
        run = build.assemble(tiny.recipe(folder, precision="fp16"))
        scaler_of(run).scale = start
        inner = run.forward_backward
        shrink(run, monkeypatch)
        inner(run.batch(0))
        lost[start] = sum(
            int((p.grad == 0).sum() - (exact[name] == 0).sum()) for name, p in run.model.named_parameters() if p.ndim == 2
        )
    assert lost[1.0] > 10 * max(lost[2.0**24], 1)


def shrink(run: loop.Run, monkeypatch) -> None:
    """Divide the loss by a million more, behind everybody's back: in the head's gradient."""
    head = run.model.get_submodule("model.norm")
    head.register_full_backward_pre_hook(lambda module, grads: tuple(g / 2**20 for g in grads))


def scaler_of(run: loop.Run) -> scaling.Scaler:
    return run.judge.__self__  # type: ignore[attr-defined]


def test_an_overflowing_step_is_left_out_and_told(folder):
    run = build.assemble(tiny.recipe(folder, precision="fp16", training__steps=3))
    scaler_of(run).scale = 2.0**60
    weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    steps = loop.train(run)
    first = next(steps)
    assert not math.isfinite(first.grad_norm)
    assert first.skipped == "the gradient overflowed, so nothing was updated; the loss scale is 5.76461e+17 now"
    assert all(torch.equal(p, weights[name]) for name, p in run.model.named_parameters())
    assert not run.optimizer.state  # type: ignore[attr-defined]
    assert run.step == 1
    scaler_of(run).scale = 1024.0
    second = next(steps)
    assert second.skipped == ""
    assert second.learning_rate == run.factor(1) * run.optimizer.param_groups[0]["peak"]  # the schedule went on
    assert not all(torch.equal(p, weights[name]) for name, p in run.model.named_parameters())


def test_average_isnt_updated_by_a_step_that_is_left_out(folder):
    run = build.assemble(tiny.recipe(folder, precision="fp16", training__ema={"decay": 0.5}))
    scaler_of(run).scale = 2.0**60
    next(iter(loop.train(run)))
    assert run.extra is not None
    assert run.extra.state()["updates"] == 0
    assert run.extra.state()[scaling.SCALE] == 2.0**59


def test_a_checkpoint_keeps_the_scale(folder):
    class Stored:
        def __init__(self, held):
            self.held = held

        def names(self):
            return list(self.held)

        def shape(self, name):
            return tuple(self.held[name].tensor.shape)

        def load(self, name, piece=None):
            return self.held[name].tensor.clone()

    recipe = tiny.recipe(folder, precision="fp16", training__steps=4, training__ema={"decay": 0.5})
    whole = build.assemble(recipe)
    scaler_of(whole).scale = 2.0**40
    steps = loop.train(whole)
    [next(steps) for _ in range(2)]
    kept = whole.remember()
    assert kept[f"extra.{scaling.SCALE}"].tensor == 2.0**38
    again = build.assemble(recipe)
    again.recall(Stored(kept), True)
    again.step = 2
    assert scaler_of(again).scale == 2.0**38
    scaler_of(whole).scale = scaler_of(again).scale = 512.0
    assert [(s.loss, s.grad_norm, s.skipped) for s in loop.train(again)] == [(s.loss, s.grad_norm, s.skipped) for s in steps]
    for name, p in whole.model.named_parameters():
        assert torch.equal(p, dict(again.model.named_parameters())[name])


def test_an_operator_without_a_kernel_is_told(tmp_path):
    recipe = small.recipe(tmp_path, precision="fp16", model={"architecture": "lstm", "options": {}})
    with pytest.raises(
        RunError, match=r"precision: fp16, but an operator of this model has no kernel for float16 on this cpu .*bf16"
    ):
        list(loop.train(build.assemble(recipe)))


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), warnings.catch_warnings(), precision.context("fp16", CPU):
        torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.mark.parametrize("kind", ["fp16", "pure_bf16"])
def test_deepspeed_refuses(kind, tmp_path):
    mapping = {**small.mapping(tmp_path), "precision": kind, "parallel": {"engine": "deepspeed"}}
    with pytest.raises(InputError, match=rf"precision: {kind} isn't offered with parallel.engine: deepspeed.*use bf16"):
        parse(mapping)


def test_updates_in_the_backward_come_too_early(tmp_path):
    mapping = {**small.mapping(tmp_path), "precision": "fp16", "memory": {"optimizer_in_backward": True}}
    mapping["training"] = {**mapping["training"], "clip_norm": None}
    with pytest.raises(InputError, match=r"optimizer_in_backward: not with precision: fp16.*use bf16"):
        parse(mapping)


def test_without_scaling_a_bad_number_still_ends_the_run():
    assert loop.finite(1.0, 2.0) == ""
    with pytest.raises(RunError, match=r"^loss nan is not finite; lower"):
        loop.finite(math.nan, 1.0)
    with pytest.raises(RunError, match=r"^gradient norm inf \(loss 1.0000\) is not finite"):
        loop.finite(1.0, math.inf)


@pytest.mark.parametrize("capable", [True, False])
def test_a_processor_without_instructions_for_it_is_told(capable, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: capable)
    run = build.assemble(small.recipe(tmp_path, precision="bf16"))
    told = [change.summary for change in run.changes if "no instructions for bfloat16" in change.summary]
    assert len(told) == (0 if capable else 1)
    assert precision.choose("auto", CPU) == ("bf16" if capable else "fp32")
    assert precision.slow("fp32", CPU) is precision.slow("bf16", torch.device("cuda")) is None
