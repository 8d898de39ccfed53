"""Parameters with their optimizer states, cut into portions of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from trainwright.memory import eight_bit
from trainwright.memory.stores import InMemory
from trainwright.pieces import Piece

CHUNK = 2**19  # numbers at once: few enough to stay in a cache, a multiple of what torch's kernels take at once


class State(Protocol):
    """A number for each of a parameter."""

    def read(self, start: int, count: int) -> Tensor:
        """(count,) float32 (or wider), on the device of the parameter."""

    def write(self, start: int, values: Tensor) -> None:
        """Put some back."""

    def tensors(self) -> list[Tensor]:
        """What of it is in memory."""

    def hint(self, start: int, count: int) -> None:
        """These will be read next."""


@dataclass(frozen=True)
class Place:
    """What the whole model calls a parameter, and which box of it is here."""

    name: str
    piece: Piece


@dataclass
class Entry:
    """A parameter that is updated here.

    states   by their keys; they have no values before the first update
    numbers  states that are one number for the whole parameter, such as a count of steps
    """

    parameter: nn.Parameter
    place: Place
    group: int
    wide: torch.dtype
    states: dict[str, State] = field(default_factory=dict)
    numbers: dict[str, Tensor] = field(default_factory=dict)
    begun: bool = False

    @property
    def count(self) -> int:
        return self.parameter.numel()

    def flat(self) -> Tensor:
        """All numbers in their order in memory, a view."""
        return flat(self.parameter.detach())

    def gradient(self) -> Tensor:
        """The same of the gradient."""
        grad = self.parameter.grad
        assert grad is not None
        if grad.stride() != self.parameter.stride():
            grad = torch.empty_like(self.parameter, dtype=grad.dtype).copy_(grad)
        return flat(grad)


@dataclass(frozen=True)
class Slice:
    """Some numbers of a parameter."""

    entry: Entry
    start: int
    count: int

    @property
    def last(self) -> bool:
        return self.start + self.count == self.entry.count

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.count]


def dense(p: nn.Parameter) -> nn.Parameter:
    """It, without gaps in its memory."""
    if torch.empty_like(p, device="meta").stride() != p.stride():
        p.data = p.data.contiguous()
    return p


def flat(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,))


def slices(entry: Entry) -> Iterator[Slice]:
    return (Slice(entry, start, min(CHUNK, entry.count - start)) for start in range(0, entry.count, CHUNK))


def portions(entries: Iterable[Entry]) -> Iterator[list[Slice]]:
    """Of at most ``CHUNK`` numbers, of several parameters if they are small."""
    portion: list[Slice] = []
    for piece in (piece for entry in entries for piece in slices(entry)):
        if sum(other.count for other in portion) + piece.count > CHUNK:
            yield portion
            portion = []
        portion.append(piece)
    if portion:
        yield portion


def worth(entry: Entry) -> bool:
    """Whether its states are kept in 8 bits: matrices that aren't small (Dettmers et al. 2022, section 2)."""
    return entry.parameter.ndim > 1 and Piece.all_of(entry.place.piece.shape).numel >= eight_bit.SMALLEST


def lend(piece: Slice) -> nn.Parameter:
    """The numbers for torch's optimizer, with their gradients: the parameter's memory itself if it is wide enough."""
    scratch = nn.Parameter(piece.of(piece.entry.flat()).to(piece.entry.wide))
    scratch.grad = piece.of(piece.entry.gradient()).to(piece.entry.wide)
    return scratch


def states_of(piece: Slice) -> dict[str, Tensor]:
    found = {key: state.read(piece.start, piece.count) for key, state in piece.entry.states.items()}
    return found | {key: number.clone() for key, number in piece.entry.numbers.items()}


def whole(entry: Entry, state: State) -> Tensor:
    """A state in the parameter's shape and order in memory."""
    if isinstance(state, InMemory):
        return state.read(0, entry.count).as_strided(entry.parameter.shape, entry.parameter.stride())
    out = torch.empty_like(entry.parameter, dtype=entry.wide)
    numbers = flat(out)
    for piece in slices(entry):
        piece.of(numbers).copy_(state.read(piece.start, piece.count))
    return out
