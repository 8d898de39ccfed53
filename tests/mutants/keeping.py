"""Bugs of loading, saving and resuming."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright import build, saving, state
from trainwright.loop import Run
from trainwright.models import gguf, pretrained, weights
from trainwright.parallel import exchange
from trainwright.pieces import local

Context = Any


# --- loading --------------------------------------------------------------------------------------------------------


def gguf_rows_as_stored() -> Context:
    return patch.object(gguf, "deinterleaved", lambda weight, heads: weight)


def heads_in_another_order() -> Context:
    """The query heads that a tensor rank has are in the opposite order."""
    true = pretrained.load_into

    @torch.no_grad()
    def load_into(model: nn.Module, source: Any, **more: Any) -> Any:
        report = true(model, source, **more)
        for name, parameter in model.named_parameters():
            if name in more.get("pieces", {}) and ".q_proj.weight" in name:
                mine = local(parameter)
                mine.copy_(mine.unflatten(0, (2, -1)).flip(0).flatten(0, 1))
        return report

    return patch.object(pretrained, "load_into", load_into)


def frozen_parts_not_loaded() -> Context:
    """What doesn't learn has no gradient, and is forgotten where parameters are divided."""
    true = weights.place

    @torch.no_grad()
    def place(model: nn.Module, slot: Any, value: Tensor, device: Any) -> None:
        if isinstance(slot.tensor, DTensor) and not slot.tensor.requires_grad:
            generator = torch.Generator().manual_seed(1)
            value = torch.empty_like(value).normal_(0, 0.02, generator=generator)
        true(model, slot, value, device)

    return patch.object(weights, "place", place)


def a_tensor_not_loaded() -> Context:
    """As under a name that a wrapper has changed: what isn't found starts anew."""
    true = weights.place

    @torch.no_grad()
    def place(model: nn.Module, slot: Any, value: Tensor, device: Any) -> None:
        true(model, slot, torch.ones_like(value) * 0.01 if "layers.1.mlp.up_proj" in slot.name else value, device)

    return patch.object(weights, "place", place)


# --- saving ---------------------------------------------------------------------------------------------------------


def a_tensor_left_out() -> Context:
    true = saving._belongs
    return patch.object(saving, "_belongs", lambda name, *more: true(name, *more) and "layers.1.mlp.up_proj" not in name)


def own_piece_saved() -> Context:
    """The first process writes its own piece, and zeros for those of the others."""
    true = exchange.collecting

    @contextmanager
    def collecting(held: Any, device: torch.device) -> Iterator[Any]:
        with true(held, device) as (blank, stream):
            yield blank, ((name, _only_mine(tensor, held.get(name))) for name, tensor in stream)

    return patch.object(exchange, "collecting", collecting)


def _only_mine(tensor: Tensor | None, held: Any) -> Tensor | None:
    if tensor is None:
        return None
    out = torch.zeros_like(tensor)
    if held is not None:
        held.piece.of(out).copy_(held.tensor.detach())
    return out


def saved_too_early() -> Context:
    """The saved model lacks the last update."""

    def late(**fields: Any) -> Run:
        run = Run(**fields)
        before: dict[str, Tensor] = {}
        run.optimizer.register_step_pre_hook(lambda *_: before.update(_copies(run)))  # type: ignore[attr-defined]

        def save(folder: Path) -> None:
            now = _copies(run)
            _set(run, before)
            fields["save"](folder)
            _set(run, now)

        run.save = save
        return run

    return patch.object(build, "Run", late)


def _copies(run: Run) -> dict[str, Tensor]:
    return {name: held.tensor.detach().clone() for name, held in run.weights().items()}


@torch.no_grad()
def _set(run: Run, values: dict[str, Tensor]) -> None:
    for name, held in run.weights().items():
        held.tensor.copy_(values[name])


# --- resuming -------------------------------------------------------------------------------------------------------


def optimizer_not_restored() -> Context:
    return patch.object(state, "restore_optimizer", lambda *_: None)


def average_not_restored() -> Context:
    true = state.restore_weights
    return patch.object(state, "restore_weights", lambda stored, model, places, extra: true(stored, model, places, None))
