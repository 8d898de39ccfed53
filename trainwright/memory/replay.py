"""What a second forward must find as the first one did, and must leave as it is: buffers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[nn.Module, str]


class Buffers:
    """The buffers of a block that its forward changes: BatchNorm's statistics and counters, a spectral norm's vectors.

    The first forward tells which they are.
    """

    def __init__(self, block: nn.Module) -> None:
        self.places: list[Place] = [(module, name) for module in block.modules() for name in module._buffers]
        self.changing: set[Place] | None = None

    def before_forward(self) -> Before:
        """How they are now."""
        return Before(self)


class Before(AbstractContextManager[None]):
    """A context in which buffers are what they were when it was made; what happens to them inside is forgotten."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        noted = {place: place[0]._buffers[place[1]] for place in buffers.places}
        self._noted = {place: (buffer, buffer._version) for place, buffer in noted.items() if buffer is not None}
        wanted = self._noted if buffers.changing is None else buffers.changing
        self._values = {place: self._noted[place][0].detach().clone() for place in wanted if place in self._noted}
        self._now: dict[Place, Tensor | None] = {}

    def __enter__(self) -> None:
        if self._buffers.changing is None:
            self._buffers.changing = {place for place in self._noted if self._changed(place)}
        places = {place for place in self._noted if place in self._buffers.changing or self._changed(place)}
        self._values = {place: value for place, value in self._values.items() if place in places}
        for module, name in places:
            now = self._now[module, name] = module._buffers[name]
            value = self._values.get((module, name), now)
            module._buffers[name] = None if value is None else value.clone()

    def __exit__(self, *exception: Any) -> None:
        for (module, name), buffer in self._now.items():
            module._buffers[name] = buffer
        self._now = {}

    def _changed(self, place: Place) -> bool:
        """NOTE: BatchNorm's kernel changes its statistics without a new version."""
        module, name = place
        buffer, version = self._noted[place]
        now = module._buffers[name]
        if now is not buffer or now._version != version:
            return True
        value = self._values.get(place)
        return value is not None and not torch.equal(value, now)
