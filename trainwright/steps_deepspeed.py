"""How a process takes part in the steps of a run whose model DeepSpeed has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from trainwright import optim, spread
from trainwright.built import Built, Part
from trainwright.loop import Batch, Extra, Stored, accumulate
from trainwright.memory import update_rules
from trainwright.parallel import deepspeed, deepspeed_state
from trainwright.parallel.deepspeed import Engine
from trainwright.parallel.sharing import trainable
from trainwright.pieces import Held, Piece
from trainwright.recipe import InputError, Recipe
from trainwright.state import Places
from trainwright.steps import Steps


def by_deepspeed(recipe: Recipe, built: Built, part: Part, places: Places, extra: Extra | None) -> Steps:
    """Whole parameters are there only inside of what the engine calls; checkpoints hold them whole, from the first process.

    Raises:
        InputError: DeepSpeed isn't installed, or can't do what the recipe says.
    """
    update_rules.check(recipe)
    if extra is not None:
        raise InputError("training.ema isn't offered with parallel.engine: deepspeed; leave it out, or set engine: torch")
    engine = _start(recipe, built)
    total = spread.summing(built.mesh.data, built.device)
    objective = engine.inside(lambda batch: part.sums(part.forward(built.model, batch, None), batch))

    def forward_backward(batches: Sequence[Batch]) -> Tensor:
        return accumulate(objective, part.count, batches, total=total, backward=engine.backward)

    def measure(batches: Iterable[Batch], progress: Callable[[int], None]) -> dict[str, float]:
        found: dict[str, float] = {}

        def whole() -> Tensor:
            found.update(part.measure(((batch, part.forward(built.model, batch, None)) for batch in batches), progress))
            return torch.zeros((), device=built.device)

        engine.inside(whole)()
        engine.rest()
        return found

    return Steps(
        optimizer=engine.optimizer,
        forward_backward=forward_backward,
        clip=engine.clip,
        measure=measure,
        gradients=lambda: _first(engine, engine.gradients()),
        remember=lambda: _remember(engine),
        recall=lambda stored, everything: _recall(engine, stored, everything),
        weights=lambda: _first(engine, chain(_values(engine), _saved_buffers(engine))),
    )


def _start(recipe: Recipe, built: Built) -> Engine:
    groups = optim.parameter_groups(trainable(built.model), recipe.optimizer)
    return deepspeed.start(
        built.model,
        groups,
        lambda chosen: optim.make_optimizer(chosen, recipe.optimizer),
        recipe.parallel,
        built.mesh.data,
        built.device,
        clip_norm=recipe.training.clip_norm,
    )


def _first(engine: Engine, found: Iterable[tuple[str, Tensor]]) -> dict[str, Held]:
    """Copies of whole tensors at the first process; the others only take part in gathering them."""
    held = {}
    for name, tensor in found:
        if engine.axis.index == 0:
            held[name] = Held(tensor.detach().to("cpu", copy=True), Piece.all_of(tuple(tensor.shape)))
    return held


def _values(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    return ((name, held.tensor) for name, held in deepspeed_state.values(engine))


def _saved_buffers(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    saved = engine.model.state_dict(keep_vars=True).keys()
    return ((name, buffer) for name, buffer in engine.model.named_buffers() if name in saved)


def _remember(engine: Engine) -> dict[str, Held]:
    learns = {name for name, p in engine.model.named_parameters() if p.requires_grad}
    values = ((f"model.{name}", tensor) for name, tensor in _values(engine) if name in learns)
    buffers = ((f"buffer.{name}", buffer) for name, buffer in engine.model.named_buffers())
    states = ((f"optimizer.{name}.{key}", held.tensor) for name, key, held in deepspeed_state.states(engine))
    return _first(engine, chain(values, buffers, states))


def _recall(engine: Engine, stored: Stored, everything: bool) -> None:
    names = stored.names()

    def value(name: str) -> Tensor | None:
        return stored.load(f"model.{name}") if f"model.{name}" in names else None

    def state(name: str) -> dict[str, Tensor]:
        prefix = f"optimizer.{name}."
        return {key.removeprefix(prefix): stored.load(key) for key in names if key.startswith(prefix)}

    deepspeed_state.restore(engine, value, state if everything else None)
    for name, buffer in engine.model.named_buffers():
        buffer.copy_(stored.load(f"buffer.{name}"))
