"""How a process takes part in the steps of a run: alone or sharing data, in a pipeline, or by DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trainwright import optim, spread, state
from trainwright.built import Built, Part
from trainwright.loop import Batch, Extra, Stored, Updates, accumulate, count_all
from trainwright.memory import update_rules
from trainwright.memory.portions import Place
from trainwright.memory.updates import Updater
from trainwright.parallel import collectives, pipeline_run
from trainwright.parallel.mesh import Mesh
from trainwright.parallel.pipeline import Split
from trainwright.parallel.pipeline_split import bubble
from trainwright.pieces import Held
from trainwright.recipe import Recipe
from trainwright.state import Places

Measure = Callable[[Iterable[Batch], Callable[[int], None]], dict[str, float]]
Pairs = Iterable[tuple[Batch, Tensor]]


@dataclass(frozen=True)
class Steps:
    """What ``loop.Run`` asks for; the fields have its names. ``weights`` gives what a saved model is made from."""

    optimizer: Updates
    forward_backward: Callable[[Sequence[Batch]], Tensor]
    clip: Callable[[], Tensor]
    measure: Measure
    gradients: Callable[[], dict[str, Held]]
    remember: Callable[[], dict[str, Held]]
    recall: Callable[[Stored, bool], None]
    weights: Callable[[], dict[str, Held]]


def sharing_data(recipe: Recipe, built: Built, part: Part, places: Places, extra: Extra | None) -> Steps:
    """One process, or several that share the data and perhaps each product."""
    sharing, mesh = places.sharing, places.mesh
    total = spread.summing(mesh.data, built.device)
    optimizer = _optimizer(recipe, built, places, part.batches.micro_batches)
    early = recipe.memory.optimizer_in_backward
    backward = optimizer.backward if early and isinstance(optimizer, Updater) else _backward

    def objective(batch: Batch) -> Tensor:
        return part.sums(part.forward(built.model, batch, None), batch)

    def forward_backward(batches: Sequence[Batch]) -> Tensor:
        loss = accumulate(objective, part.count, batches, total=total, portion=sharing.portion, backward=backward)
        spread.complete(places, built.division)
        return loss

    def measure(batches: Iterable[Batch], progress: Callable[[int], None]) -> dict[str, float]:
        try:
            return part.measure(((batch, part.forward(built.model, batch, None)) for batch in batches), progress)
        finally:
            sharing.rest()

    return _stepping(recipe, built, places, extra, optimizer, forward_backward, measure)


def pipelined(recipe: Recipe, built: Built, part: Part, places: Places, extra: Extra | None) -> Steps:
    """A process with some of the layers."""
    sharing, mesh, division = places.sharing, places.mesh, built.division
    assert division.split is not None
    total = spread.summing(mesh.data, built.device)
    optimizer = _optimizer(recipe, built, places, part.batches.micro_batches)
    part.notes.append(_idle(division.split, mesh, part.batches.micro_batches))
    pipe = pipeline_run.make(
        division.split, built.model, mesh.pipeline, part.forward, part.sums, part.shape, built.device, sharing.portion
    )

    def forward_backward(batches: Sequence[Batch]) -> Tensor:
        loss = pipe.forward_backward(batches, count_all(part.count, batches, total))
        spread.complete(places, division)
        pipe.finish(sharing.named)
        return total(loss)

    def measure(batches: Iterable[Batch], progress: Callable[[int], None]) -> dict[str, float]:
        assert division.split is not None
        pairs = pipe.outputs(batches)
        found = part.measure(pairs, progress) if division.split.last else _drained(pairs)
        sharing.rest()
        metrics: dict[str, float] = collectives.gather_json(found, built.device)[_last_stage(mesh)]
        return metrics

    return _stepping(recipe, built, places, extra, optimizer, forward_backward, measure)


def _idle(split: Split, mesh: Mesh, count: int) -> str:
    share = bubble(mesh.pipeline.size, count, len(split.mine))
    return f"pipeline: processes idle {share:.1%} of a step of {count} micro-batches; more of them (smaller ones) idle less"


def _drained(pairs: Pairs) -> dict[str, float]:
    for _ in pairs:
        pass
    return {}


def _last_stage(mesh: Mesh) -> int:
    """The first process with the last layers."""
    return (mesh.pipeline.size - 1) * mesh.data.size * mesh.tensor.size


def _backward(loss: Tensor, last: bool) -> None:
    loss.backward()


def _optimizer(recipe: Recipe, built: Built, places: Places, micro_batches: int) -> torch.optim.Optimizer | Updater:
    """torch's, or where states, rounding or gradients ask for it, torch's in portions.

    Raises:
        InputError: a setting that excludes another one.
    """
    sharing, model, section = places.sharing, built.model, recipe.memory
    groups = optim.parameter_groups(sharing.named, recipe.optimizer, built.division.plain, places.copies)
    trained = [p for _, p in sharing.named]
    update_rules.check(recipe)
    if not update_rules.needed(section, trained):
        return optim.make_optimizer(groups, recipe.optimizer)
    update_rules.check_portions(recipe, micro_batches, places.mesh.size)
    everything = dict(model.named_parameters())
    known = {name: Place(places.name(name), places.state_piece(name, everything[name])) for name, _ in sharing.named}
    make = partial(optim.make_optimizer, section=recipe.optimizer, instead_of=trained)
    optimizer = Updater(groups, make, known, section, recipe.run.seed)
    if section.optimizer_in_backward:
        optimizer.in_backward(trained)
    built.changes.append(update_rules.described(section, trained))
    return optimizer


def _clip(recipe: Recipe, places: Places, optimizer: torch.optim.Optimizer | Updater) -> Callable[[], Tensor]:
    """What gives the norm of the gradient, and scales what is too large."""
    if recipe.memory.optimizer_in_backward:
        assert isinstance(optimizer, Updater)
        return optimizer.norm
    largest = recipe.training.clip_norm
    if places.mesh.size > 1:
        return partial(spread.clip, places, largest)
    return partial(optim.clip_, [p for _, p in places.sharing.named], largest)


def _stepping(
    recipe: Recipe,
    built: Built,
    places: Places,
    extra: Extra | None,
    optimizer: torch.optim.Optimizer | Updater,
    forward_backward: Callable[[Sequence[Batch]], Tensor],
    measure: Measure,
) -> Steps:
    """What the optimizer does with the gradients."""
    sharing, model = places.sharing, built.model
    if places.mesh.data.size > 1:
        optimizer.register_step_post_hook(lambda *_: sharing.updated())

    def remember() -> dict[str, Held]:
        return {
            **state.learned(model, places),
            **state.optimizer_states(model, optimizer, places),
            **state.extras(extra, model, places),
        }

    def recall(stored: Stored, everything: bool) -> None:
        state.restore_weights(stored, model, places, extra)
        if everything:
            state.restore_optimizer(stored, model, optimizer, places)

    return Steps(
        optimizer=optimizer,
        forward_backward=forward_backward,
        clip=_clip(recipe, places, optimizer),
        measure=measure,
        gradients=lambda: state.gradients(model, places),
        remember=remember,
        recall=recall,
        weights=lambda: state.weights(model, places),
    )
