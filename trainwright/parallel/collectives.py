"""What processes tell each other in words: JSON, never pickles. Alone, each of these is the identity."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.parallel.mesh import Axis


def sum_(tensor: Tensor, axis: Axis) -> Tensor:
    """Its sum over an axis, in place."""
    if axis.group is not None:
        dist.all_reduce(tensor, group=axis.group)
    return tensor


def largest_(tensor: Tensor, axis: Axis) -> Tensor:
    """Its largest value over an axis, in place."""
    if axis.group is not None:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=axis.group)
    return tensor


@contextmanager
def in_turn(device: torch.device) -> Iterator[None]:
    """The first process of the job, then all others: what one leaves on the disk, the others find."""
    waits = dist.is_initialized() and dist.get_world_size() > 1
    if waits and dist.get_rank() > 0:
        dist.all_reduce(torch.zeros(1, device=device))
    yield
    if waits and dist.get_rank() == 0:
        dist.all_reduce(torch.zeros(1, device=device))


def gather_json(value: Any, device: torch.device) -> list[Any]:
    """What every process of the job says, in the order of their ranks, at every process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(data)], device=device))
    longest = int(max(length.item() for length in lengths))
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded)
    return [json.loads(bytes(t[: int(n.item())].cpu().tolist())) for t, n in zip(texts, lengths, strict=True)]
