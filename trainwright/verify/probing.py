"""Whether a model can be compared at all: the same batch must give the same loss, however its rows are ordered or divided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from trainwright import loop
from trainwright.data.batches import SampleBatch
from trainwright.data.loader import IGNORED, TextBatch
from trainwright.loop import Run
from trainwright.verify import batches

SEED = 1_000_003  # of another step than any that is run


def probe(run: Run) -> dict[str, float]:
    """Losses of the first step's batch in one process, relative to that of the batch as it is; 0 where nothing differs.

    draws       with other random numbers
    again       the same once more, where other random numbers gave something else
    order       with its rows in the opposite order
    companions  with half of the rows (of the model's outputs, not of the loss); left out where BatchNorm looks at the others
    """
    whole = [_joined(run.batch(0))]
    loss = _loss(run, whole)
    ways: dict[str, Callable[[], float]] = {
        "draws": lambda: _loss(run, whole, SEED),
        "order": lambda: _loss(run, [_reversed(one) for one in whole]),
    }
    if not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in run.model.modules()):
        ways["companions"] = lambda: loss * (1 + max(_companions(run, one) for one in whole))
    found = {name: abs(way() - loss) / max(abs(loss), 1e-12) for name, way in ways.items()}
    again = _loss(run, whole) if found["draws"] else loss
    return found | {"again": abs(again - loss) / max(abs(loss), 1e-12)}


def _loss(run: Run, parts: Sequence[Any], step: int = 0) -> float:
    loop.seed(run, step)
    loss = float(run.forward_backward(parts))
    run.optimizer.zero_grad(set_to_none=True)
    return loss


def _companions(run: Run, batch: Any) -> float:
    """How far the model's output of a row is from that of the row among fewer, relative to all outputs.

    NOTE: not by the loss of several micro-batches, which is what accumulation computes, and may compute wrongly.
    """
    whole, first, worst = _output(run, batch), 0, 0.0
    for half in _halves(batch):
        part = _output(run, half)
        same = whole[first : first + len(part)]
        if isinstance(half, TextBatch):
            counts = (half.labels != IGNORED).view(*half.labels.shape, *[1] * (part.ndim - 2))
            same, part = same[:, : part.shape[1]] * counts, part * counts
        worst = max(worst, float((same - part).norm() / whole.norm().clamp(min=1e-12)))
        first += len(part)
    return worst


class _Seen(Exception):
    """Ends a pass once the model has given its output: the loss and the backward may cost far more."""


def _output(run: Run, batch: Any) -> torch.Tensor:
    """What the model makes of a batch."""
    seen: list[torch.Tensor] = []

    def see(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        seen.append(output.detach())
        raise _Seen

    hook = run.model.register_forward_hook(see)
    with suppress(_Seen):
        _loss(run, [batch])
    hook.remove()
    return seen[0]


def _joined(parts: Sequence[Any]) -> Any:
    """One micro-batch of all."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], SampleBatch):
        return SampleBatch(*(torch.cat([getattr(one, name) for one in parts]) for name in ("inputs", "targets")))
    return batches.stacked([document for one in parts for document in batches.documents(one)])


def _reversed(batch: Any) -> Any:
    if isinstance(batch, TextBatch):
        return batches.stacked(list(batches.documents(batch))[::-1])
    return replace(batch, inputs=batch.inputs.flip(0), targets=batch.targets.flip(0))


def _halves(batch: Any) -> list[Any]:
    """Two parts, or all where there is one row."""
    if isinstance(batch, TextBatch):
        found = list(batches.documents(batch))
        middle = len(found) // 2
        return [batches.stacked(part) for part in (found[:middle], found[middle:]) if part]
    middle = len(batch.inputs) // 2
    parts = [slice(0, middle), slice(middle, None)]
    halves = [replace(batch, inputs=batch.inputs[part], targets=batch.targets[part]) for part in parts]
    return [half for half in halves if len(half.inputs)]
