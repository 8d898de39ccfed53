"""What a run must remember, as pieces of whole tensors under the plain model's names: any number of processes can read it.

model.NAME            what learns; frozen values come from the base again
buffer.NAME           such as BatchNorm's statistics
optimizer.NAME.KEY    what the optimizer keeps for a parameter
extra.NAME            what a technique adds, such as averaged weights
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainwright.loop import Extra, Stored
from trainwright.parallel.mesh import Mesh
from trainwright.parallel.sharing import Sharing
from trainwright.pieces import Held, Later, Piece, box_of, local


@dataclass(frozen=True)
class Places:
    """Where this process's parameters lie in those of the whole model.

    tensor   the boxes of those that tensor parallelism splits; the others are whole
    copies   local names of tied parameters whose other end lies in an earlier pipeline stage, to their names there
    """

    mesh: Mesh
    sharing: Sharing
    tensor: Mapping[str, Piece] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)

    def name(self, local_name: str) -> str:
        """What the plain model calls a parameter."""
        return self.copies.get(local_name, local_name)

    def outer(self, name: str, tensor: Tensor) -> Piece:
        """The box of a parameter before data ranks divide it."""
        return box_of(self.tensor, name, tensor)

    def boxes(self, model: nn.Module) -> dict[str, Piece]:
        """Of every parameter and buffer that isn't whole here."""
        held = {name: self.parameter(name, p) for name, p in model.named_parameters()}
        held |= {name: self.buffer(name, b) for name, b in model.named_buffers()}
        return {name: one.piece for name, one in held.items() if not one.piece.whole}

    def parameter(self, name: str, parameter: Tensor) -> Held:
        """A parameter of the model as this process holds it."""
        outer, divided = self.outer(name, parameter), self.sharing.shards_parameters
        piece = self.sharing.piece(name, outer) if divided else outer
        return Held(local(parameter.detach()), piece, self._speaks(name, divided))

    def buffer(self, name: str, buffer: Tensor) -> Held:
        """A buffer, which data ranks have alike."""
        return Held(buffer, self.outer(name, buffer), self._speaks(name, divided=False))

    def state(self, name: str, parameter: Tensor, value: Tensor | Later) -> Held:
        """What the optimizer keeps for a parameter: numbers for each of its, or a number for all."""
        if not value.shape:
            alone = self.mesh.data.index == 0 and self.mesh.tensor.index == 0 and name not in self.copies
            return Held(value, Piece.all_of(()), alone)
        values = value if isinstance(value, Later) else local(value)
        return Held(values, self.state_piece(name, parameter), self._speaks(name, self.sharing.splits(name)))

    def state_piece(self, name: str, parameter: Tensor) -> Piece:
        """The box of a parameter that this process's optimizer updates."""
        outer = self.outer(name, parameter)
        return self.sharing.piece(name, outer) if self.sharing.splits(name) else outer

    def _speaks(self, name: str, divided: bool) -> bool:
        """Of the processes that hold the same values, the first one."""
        first_tensor = name in self.tensor or self.mesh.tensor.index == 0
        return first_tensor and (divided or self.mesh.data.index == 0) and name not in self.copies


class Keeper(Protocol):
    """An optimizer that keeps states its own way."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """With ``params`` and their ``names``."""

    def kept(self, parameter: nn.Parameter) -> Mapping[str, Tensor | Later]:
        """The states of a parameter by their keys."""

    def keep(self, parameter: nn.Parameter, values: Mapping[str, Tensor]) -> None:
        """Set them."""


def weights(model: nn.Module, places: Places) -> dict[str, Held]:
    """All parameters, tied ones once, and the buffers that are saved; by the plain model's names."""
    found = {places.name(name): places.parameter(name, p) for name, p in model.named_parameters()}
    saved = model.state_dict(keep_vars=True).keys()
    return found | {name: places.buffer(name, buffer) for name, buffer in model.named_buffers() if name in saved}


def gradients(model: nn.Module, places: Places) -> dict[str, Held]:
    """Of what is updated here, by the plain model's names; a parameter that has none in this step isn't there."""
    whole = dict(model.named_parameters())
    return {
        places.name(name): places.state(name, whole[name], p.grad) for name, p in places.sharing.named if p.grad is not None
    }


def learned(model: nn.Module, places: Places) -> dict[str, Held]:
    """``model.NAME`` and ``buffer.NAME``."""
    found = {f"model.{places.name(name)}": places.parameter(name, p) for name, p in model.named_parameters() if p.requires_grad}
    return found | {f"buffer.{name}": places.buffer(name, buffer) for name, buffer in model.named_buffers()}


def optimizer_states(model: nn.Module, optimizer: torch.optim.Optimizer | Keeper, places: Places) -> dict[str, Held]:
    """``optimizer.NAME.KEY``; nothing before the first step."""
    whole = dict(model.named_parameters())

    def kept(parameter: nn.Parameter) -> Mapping[str, Any]:
        if isinstance(optimizer, torch.optim.Optimizer):
            return optimizer.state.get(parameter, {})
        return optimizer.kept(parameter)

    return {
        f"optimizer.{places.name(name)}.{key}": places.state(name, whole[name], value)
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in kept(parameter).items()
    }


def extras(extra: Extra | None, model: nn.Module, places: Places) -> dict[str, Held]:
    """``extra.NAME``, of parameters' names; numbers belong to the whole run."""
    if extra is None:
        return {}
    whole = dict(model.named_parameters())
    first = places.mesh.rank == 0
    return {
        f"extra.{places.name(name)}": places.parameter(name, whole[name]).of(value)
        if name in whole
        else Held(value, Piece.all_of(tuple(value.shape)), first)
        for name, value in extra.state().items()
    }


@torch.no_grad()
def restore_weights(stored: Stored, model: nn.Module, places: Places, extra: Extra | None) -> None:
    """Set what learned, and what goes along with it, to a checkpoint's values."""
    for name, held in learned(model, places).items():
        held.tensor.copy_(stored.load(name, held.piece))
    if extra is not None:
        found = extras(extra, model, places)
        stored_names = {name: f"extra.{places.name(name)}" for name in extra.state()}
        extra.restore({name: stored.load(known, found[known].piece) for name, known in stored_names.items()})


@torch.no_grad()
def restore_optimizer(stored: Stored, model: nn.Module, optimizer: torch.optim.Optimizer | Keeper, places: Places) -> None:
    """Set the optimizer's states to a checkpoint's, by the names of the parameters."""
    whole, names = dict(model.named_parameters()), stored.names()

    def states(name: str, parameter: Tensor) -> dict[str, Tensor]:
        prefix = f"optimizer.{places.name(name)}."
        piece = places.state_piece(name, whole[name])
        keys = [key.removeprefix(prefix) for key in names if key.startswith(prefix)]
        return {key: _state_like(parameter, stored, prefix + key, piece) for key in keys}

    members = [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]
    if not isinstance(optimizer, torch.optim.Optimizer):
        for name, parameter in members:
            optimizer.keep(parameter, states(name, parameter))
        return
    current = optimizer.state_dict()
    indices = [index for group in current["param_groups"] for index in group["params"]]
    found = {index: states(*member) for index, member in zip(indices, members, strict=True)}
    optimizer.load_state_dict({"state": found, "param_groups": current["param_groups"]})


def _state_like(parameter: Tensor, stored: Stored, name: str, piece: Piece) -> Tensor:
    if stored.shape(name) == ():
        return stored.load(name)
    value = stored.load(name, piece)
    state = torch.empty_like(parameter, dtype=value.dtype)
    local(state).copy_(value)
    return state
