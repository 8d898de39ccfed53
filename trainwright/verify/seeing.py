"""What a proof sees of a run, in whatever form the run keeps it: weights, gradients, averages, the optimizer's states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainwright.loop import Run
from trainwright.memory.scaling import GOOD, SCALE
from trainwright.memory.supplied import Supplied
from trainwright.pieces import Held, Piece

CALM = 1024.0  # a loss scale that small models don't overflow with


def weights(run: Run) -> dict[str, Held]:
    """Parameters and buffers; a layer that makes its weight has that one, and not what it makes it from."""
    found = dict(run.weights())
    for name, layer in run.model.named_modules():
        if isinstance(layer, Supplied):
            for inner in layer.held:
                del found[f"{name}.{inner}"]
            found[f"{name}.weight"] = found[f"{name}.weight"].of(layer.base_weight())
    return found


def gradients(run: Run) -> Callable[[], dict[str, Held]]:
    """What gives a step's gradients, also those that the backward has used up: they are copied as they arrive."""
    if not run.recipe.memory.optimizer_in_backward:
        return run.gradients
    seen: dict[str, Held] = {}

    def watch(name: str, parameter: Tensor) -> None:
        def note(gradient: Tensor) -> None:
            seen[name] = Held(gradient.detach().clone(), Piece.all_of(tuple(gradient.shape)))

        parameter.register_hook(note)

    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            watch(name, parameter)
    return lambda: {name: seen[name] for name, _ in run.model.named_parameters() if name in seen}


def averages(run: Run) -> dict[str, Held]:
    """Of weights."""
    found = {name.removeprefix("extra."): one for name, one in run.remember().items() if name.startswith("extra.")}
    return {name: one for name, one in found.items() if name not in (SCALE, GOOD)}


def states(run: Run) -> dict[str, Held]:
    """The optimizer's, as ``NAME.KEY``; DeepSpeed has its own."""
    if run.recipe.parallel.engine != "torch":
        return {}
    return {name.removeprefix("optimizer."): one for name, one in run.remember().items() if name.startswith("optimizer.")}


def calm(run: Run) -> None:
    """Begin with a small loss scale in float16: a step that is left out can't be compared."""
    if run.extra is not None and SCALE in (found := run.extra.state()):
        run.extra.restore({**found, SCALE: torch.tensor(CALM, dtype=torch.float64)})
