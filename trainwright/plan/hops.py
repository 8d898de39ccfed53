"""What travels from one pipeline stage to the next, told from the rehearsal of one process to that of the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.loop import Batch
from trainwright.parallel.pipeline_run import Hidden, Pipe


@contextmanager
def told(hops: dict[int, Hidden], once: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Headers without values say nothing: what a stage sends is noted by its number, and the next one looks there.

    A stage that nobody has reached yet gets the kind that the last known one does: blocks of a model are alike.

    Args:
        once: a context for what only a first step does.
    """
    plain = Pipe._learn_shapes

    def learn(pipe: Pipe, batches: Sequence[Batch]) -> None:
        with once():
            plain(pipe, batches)

    def send(pipe: Pipe, out: Tensor, stage: int) -> list[tuple[Any, Tensor]]:
        hops[stage + 1] = Hidden(tuple(out.shape), out.dtype)
        return [(dist.isend(out, group=pipe.axis.group, group_dst=(stage + 1) % pipe.axis.size), out)]

    def receive(pipe: Pipe, stage: int) -> Tensor:
        kind = hops.get(stage) or hops[max(hops)]
        x = torch.empty(kind.shape, dtype=kind.dtype, device=pipe.device)
        dist.recv(x, group=pipe.axis.group, group_src=(stage - 1) % pipe.axis.size)
        return x

    with mock.patch.multiple(Pipe, _send=send, _receive=receive, _learn_shapes=learn):
        yield
