"""What the tests of DeepSpeed run, in one process without it and in several with it: a few steps on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainwright import losses
from trainwright.adapt import lora
from trainwright.adapt import partial as partial_tuning
from trainwright.memory import precision
from trainwright.models.decoder import Decoder, read_config
from trainwright.models.mlp import Mlp, MlpOptions
from trainwright.optim import clip_, make_optimizer, parameter_groups
from trainwright.parallel import deepspeed, deepspeed_state
from trainwright.parallel.mesh import Axis
from trainwright.recipe import CrossEntropy, InputError, Lora, Optimizer, Parallel, Partial

CONFIG = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
ROWS, LENGTH, FEATURES, CLASSES = 4, 20, 7, 5
KEPT = "model.layers.1.*", "model.norm.weight"  # what partial tuning trains
GROUPS = [{"match": ["*layers.0.*"], "learning_rate": 3e-3}, {"match": ["*.2.*down*", "*.2.*o_proj*"], "weight_decay": 0.3}]
Arrays = dict[str, np.ndarray]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A program: the model, what of it learns, how, and for how many steps."""

    model: str = "tied"  # tied, untied, mlp
    adapt: str = "full"
    stage: int = 0
    micro: int = 1
    steps: int = 3
    clip: float | None = 0.5
    offload: bool = False
    bf16: bool = False
    compiled: bool = False
    optimizer: dict[str, Any] = field(default_factory=lambda: {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1})
    groups: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Seen:
    """What a run saw, whole: NumPy arrays by name."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: Arrays = field(default_factory=dict)
    weights: Arrays = field(default_factory=dict)
    states: Arrays = field(default_factory=dict)
    groups: list[tuple[list[str], float, float]] = field(default_factory=list)
    evaluated: float = 0.0


def make(case: Case) -> nn.Module:
    """The model with values, frozen parts in their stored dtype."""
    if case.model == "mlp":
        model: nn.Module = Mlp(MlpOptions(hidden=[9, 11]), (FEATURES,), CLASSES)
    else:
        model = Decoder(read_config({**CONFIG, "tie_word_embeddings": case.model == "tied"}))
    if case.adapt == "lora":
        lora.apply(model, Lora(method="lora", rank=3, alpha=3.0))
    if case.adapt == "partial":
        partial_tuning.apply(model, Partial(method="partial", train=list(KEPT)))
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2, generator=draw)
    precision.apply(model, "bf16" if case.bf16 else "fp32")
    for block in model.blocks() if case.compiled else []:
        block.forward = torch.compile(block.forward)
    return model


def batches(case: Case, step: int) -> list[Batch]:
    """The micro-batches of a step: inputs and labels, of which some don't count, more in some rows than in others."""
    draw = torch.Generator().manual_seed(1000 + step)
    found = []
    for _ in range(case.micro):
        if case.model == "mlp":
            inputs, labels = torch.randn(ROWS, FEATURES, generator=draw), torch.randint(CLASSES, (ROWS,), generator=draw)
            labels[-1] = -100
        else:
            inputs, labels = (torch.randint(CONFIG["vocab_size"], (ROWS, LENGTH), generator=draw) for _ in range(2))
            for row in range(ROWS):
                labels[row, : 4 * row + step] = -100
        found.append((inputs, labels))
    return found


def objective_of(case: Case, model: nn.Module) -> Callable[[Batch], Tensor]:
    def objective(batch: Batch) -> Tensor:
        inputs, labels = batch
        with precision.context("bf16" if case.bf16 else "fp32", torch.device("cpu")):
            if isinstance(model, Mlp):
                return nn.functional.cross_entropy(model(inputs), labels, reduction="sum")
            rows, length = inputs.shape
            positions = torch.arange(length).expand(rows, length)
            documents = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
            hidden = model(inputs, positions, documents)
            return losses.token_cross_entropy(hidden, model.head_weight(), labels, CrossEntropy())[0]

    return objective


def section_of(case: Case) -> Optimizer:
    from trainwright.recipe.file import parse

    groups = {"groups": GROUPS} if case.groups else {}
    mapping = {"model": {"architecture": "mlp"}, "data": {"kind": "images", "source": "digits"}}
    return parse({**mapping, "training": {"steps": 1}, "optimizer": {**case.optimizer, **groups}}).optimizer


def mine(batch: Batch, axis: Axis) -> Batch:
    """The rows of this rank."""
    inputs, labels = (part.chunk(axis.size)[axis.index] for part in batch)
    return inputs, labels


def count(window: list[Batch]) -> int:
    return sum(int(labels.ne(-100).sum()) for _, labels in window)


def rate(step: int) -> float:
    return 1 / (1 + step)


def alone(case: Case) -> Seen:
    """The oracle: one process, torch only."""
    model, seen = make(case), Seen()
    objective = objective_of(case, model)
    optimizer = make_optimizer(parameter_groups(model.named_parameters(), section_of(case)), section_of(case))
    trained = [p for p in model.parameters() if p.requires_grad]
    for step in range(case.steps):
        window = batches(case, step)
        loss = 0.0
        for batch in window:
            part = objective(batch) / count(window)
            part.backward()
            loss += part.item()
        seen.losses.append(loss)
        if step == 0:
            seen.gradients = {name: numpy(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        seen.norms.append(clip_(trained, case.clip).item())
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(step)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        seen.evaluated = objective(batches(case, 99)[0]).item()
    seen.weights = {name: numpy(p) for name, p in model.named_parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        seen.states |= {f"{names[id(parameter)]}.{key}": numpy(value) for key, value in state.items()}
    seen.groups = [(group["names"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    return seen


def numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy().copy()


def begin(case: Case, model: nn.Module) -> deepspeed.Engine:
    axis = Axis(dist.get_world_size(), dist.get_rank(), dist.group.WORLD) if dist.is_initialized() else Axis()
    section = Parallel(engine="deepspeed", zero=case.stage, offload_optimizer=case.offload)
    recipe = section_of(case)
    groups = parameter_groups(model.named_parameters(), recipe)
    factory = partial(make_optimizer, section=recipe)
    return deepspeed.start(
        model, groups, factory, section, axis, torch.device("cpu"), clip_norm=case.clip, settings=case.settings
    )


def advance(engine: deepspeed.Engine, case: Case, seen: Seen, steps: range) -> None:
    objective = engine.inside(objective_of(case, engine.model))
    for step in steps:
        window = batches(case, step)
        loss = torch.zeros(())
        for index, batch in enumerate(window):
            part = objective(mine(batch, engine.axis)) / count(window)
            engine.backward(part, last=index == len(window) - 1)
            loss += part.detach()
        dist.all_reduce(loss)
        seen.losses.append(loss.item())
        if step == 0:
            seen.gradients = {name: numpy(gradient) for name, gradient in engine.gradients()}
        seen.norms.append(engine.clip().item())
        for group in engine.optimizer.param_groups:
            group["lr"] = group["peak"] * rate(step)
        engine.optimizer.step()
        engine.optimizer.zero_grad(set_to_none=True)


def together(case: Case) -> Seen | None:
    """The same under DeepSpeed, by all ranks; the first one tells."""
    engine, seen = begin(case, make(case)), Seen()
    try:
        zero = engine.engine.optimizer
        assert case.offload == getattr(zero, "offload_optimizer" if case.stage == 3 else "cpu_offload", False)
        advance(engine, case, seen, range(case.steps))
        collect(engine, case, seen)
    finally:
        engine.close()
    return seen if engine.axis.index == 0 else None


def collect(engine: deepspeed.Engine, case: Case, seen: Seen) -> None:
    with torch.no_grad():
        seen.evaluated = engine.inside(objective_of(case, engine.model))(batches(case, 99)[0]).item()
    seen.weights = {name: numpy(held.tensor) for name, held in deepspeed_state.values(engine)}
    seen.states = {f"{name}.{key}": numpy(held.tensor) for name, key, held in deepspeed_state.states(engine)}
    seen.groups = [(group["names"], group["lr"], group["weight_decay"]) for group in engine.optimizer.param_groups]


def interrupted(case: Case, then: int) -> Seen | None:
    """Half of the steps, everything saved; a model with other values at another stage takes it over and goes on."""
    half, seen = case.steps // 2, Seen()
    engine = begin(case, make(case))
    try:
        advance(engine, case, seen, range(half))
        values = {name: held.tensor.clone() for name, held in deepspeed_state.values(engine)}
        states: dict[str, dict[str, Tensor]] = {}
        for name, key, held in deepspeed_state.states(engine):
            states.setdefault(name, {})[key] = held.tensor.clone()
    finally:
        engine.close()
    case, model = replace(case, stage=then), make(case)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    engine = begin(case, model)
    try:
        deepspeed_state.restore(engine, values.__getitem__, states.__getitem__)
        gradients = seen.gradients
        advance(engine, case, seen, range(half, case.steps))
        seen.gradients = gradients
        collect(engine, case, seen)
    finally:
        engine.close()
    return seen if engine.axis.index == 0 else None


def watched(case: Case) -> dict[str, Any]:
    """What else an engine lets see, at every rank: hooks, whole parameters, gradients that aren't finite, memory held."""
    model = make(case)
    whole = {name: numpy(p) for name, p in model.named_parameters()}
    engine = begin(case, model)
    try:
        calls: list[object] = []
        engine.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: calls.append(optimizer))
        held = sum(p.numel() for p in model.parameters())
        with engine.whole():
            same = {name: bool((numpy(p) == whole[name]).all()) for name, p in model.named_parameters()}
        after = sum(p.numel() for p in model.parameters())
        objective = engine.inside(objective_of(case, model))
        with torch.no_grad():
            evaluated = [objective(batches(case, 50)[0]).item() for _ in range(2)]
        advance(engine, case, Seen(), range(1))
        between = sum(p.numel() for p in model.parameters())
        loss = objective(mine(batches(case, 1)[0], engine.axis))
        forward = sum(p.numel() for p in model.parameters())
        engine.backward(loss * float("inf"), last=True)
        return {
            "calls": [call is engine.optimizer for call in calls],
            "same": same,
            "held": (held, after, between, forward),
            "evaluated": evaluated,
            "norm": engine.clip().item(),
            "speaks": {held.speaks for _, held in deepspeed_state.values(engine)},
        }
    finally:
        engine.close()


def refused(case: Case) -> str:
    """What ``start`` says against a program."""
    try:
        begin(case, make(case))
    except InputError as error:
        return str(error)
    raise AssertionError("accepted")


def by_itself(stage: int) -> None:
    """For a process of its own that was not launched with others, and doesn't close its engine."""
    case = Case(stage=stage)
    engine, seen = begin(case, make(case)), Seen()
    advance(engine, case, seen, range(case.steps))
    collect(engine, case, seen)
    theirs = alone(case)
    for name, value in theirs.weights.items():
        np.testing.assert_allclose(seen.weights[name], value, rtol=1e-4, atol=1e-6)
