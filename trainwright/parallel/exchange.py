"""Whole tensors from the pieces that live processes hold, one at a time: what saves a model needs no more memory than that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.parallel.collectives import gather_json
from trainwright.pieces import Held, Piece


@dataclass(frozen=True)
class Spread:
    """A tensor in the job: the ranks that speak for its pieces, in their order. Empty pieces are left out."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[int, Piece], ...]

    def blank(self) -> Tensor:
        """A tensor of its shape and dtype on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def table(held: Mapping[str, Held], device: torch.device) -> dict[str, Spread]:
    """What all processes of the job hold, the same at each: names in the order of the first process, then of the next.

    Every process calls it; pieces that don't make up a tensor exactly are an assertion error, which names it.
    """
    rows = [_row(name, one) for name, one in held.items() if one.speaks]
    found: dict[str, Spread] = {}
    for rank, spoken in enumerate(gather_json(rows, device)):
        for name, kind, *box in spoken:
            piece = Piece(*map(tuple, box))
            known = found.get(name, Spread(piece.shape, getattr(torch, kind), ()))
            same = (known.shape, known.dtype) == (piece.shape, getattr(torch, kind))
            assert same, f"{name}: rank {rank} holds it as {kind} {list(piece.shape)}, others as {known}"
            found[name] = Spread(known.shape, known.dtype, (*known.pieces, *([(rank, piece)] if piece.numel else [])))
    for name, spread in found.items():
        _check(name, spread)
    return found


def _row(name: str, one: Held) -> list[Any]:
    assert one.shape == one.piece.size, f"{name}: {list(one.shape)} held as {one.piece}"
    kind = str(one.dtype).removeprefix("torch.")
    return [name, kind, one.piece.shape, one.piece.start, one.piece.size]


def _check(name: str, spread: Spread) -> None:
    boxes = [piece for _, piece in spread.pieces]
    total = sum(piece.numel for piece in boxes)
    assert total == Piece.all_of(spread.shape).numel, f"{name}: pieces of {total} numbers for {list(spread.shape)}"
    assert not any(one.overlap(other) for one, other in combinations(boxes, 2)), f"{name}: two pieces overlap"


def collect(
    held: Mapping[str, Held], device: torch.device, spreads: Mapping[str, Spread] | None = None
) -> Iterator[tuple[str, Tensor | None]]:
    """Every tensor that is held anywhere, whole, at rank 0; its name alone at the others.

    Every process of the job takes part and goes through all of it, else the others wait. One tensor is in memory at a
    time, on rank 0's CPU; what rank 0 holds whole is given as it is, not a copy.

    Args:
        device: where the backend wants what is sent (gloo: cpu, NCCL: cuda).
        spreads: what ``table`` gave for the same ``held``, if it was called already.
    """
    for name, spread in (spreads if spreads is not None else table(held, device)).items():
        if _rank() == 0:
            yield name, _received(held.get(name), spread, device)
            continue
        if any(rank == _rank() for rank, _ in spread.pieces):
            dist.send(_bytes(held[name].tensor.detach().to(device).contiguous()), 0)
        yield name, None


def _received(own: Held | None, spread: Spread, device: torch.device) -> Tensor:
    """The whole tensor, from what rank 0 holds and what the others send."""
    if own is not None and own.speaks and own.piece.whole:
        return own.tensor.detach()
    out = torch.empty(spread.shape, dtype=spread.dtype)
    for rank, piece in spread.pieces:
        place = piece.of(out)
        if rank == 0:
            assert own is not None
            place.copy_(own.tensor.detach())
        elif device == out.device and place.is_contiguous():
            dist.recv(_bytes(place), rank)
        else:
            buffer = torch.empty(piece.size, dtype=spread.dtype, device=device)
            dist.recv(_bytes(buffer), rank)
            place.copy_(buffer)
    return out


def _bytes(tensor: Tensor) -> Tensor:
    """Its memory: backends don't know every dtype."""
    return tensor.view(-1).view(torch.uint8)


@contextmanager
def collecting(
    held: Mapping[str, Held], device: torch.device
) -> Iterator[tuple[dict[str, Tensor], Iterator[tuple[str, Tensor | None]]]]:
    """What is coming (names with tensors on the meta device), and ``collect``'s stream for rank 0 to save.

    The others need do nothing in the block. What is left of the stream at its end is gone through, also where rank 0 could
    not write it: else the others would wait for it.
    """
    spreads = table(held, device)
    stream = collect(held, device, spreads)
    try:
        yield {name: spread.blank() for name, spread in spreads.items()}, stream
    finally:
        for _ in stream:
            pass


def gather_all(held: Mapping[str, Held], device: torch.device) -> dict[str, Tensor]:
    """All tensors at once at rank 0, nothing at the others: for small ones, such as adapters."""
    return {name: tensor for name, tensor in collect(held, device) if tensor is not None}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
