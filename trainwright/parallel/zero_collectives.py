"""Collectives that are begun now and waited for later, and a reduce-scatter that sends what theory says also on gloo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Landing = Callable[[], Tensor]  # waits, and gives the result


def start_all_reduce(values: Tensor, group: dist.ProcessGroup) -> Landing:
    """Begin to sum in place."""
    return partial(_land, dist.all_reduce(values, group=group, async_op=True), values)


def start_all_gather(parts: Tensor, index: int, group: dist.ProcessGroup) -> Landing:
    """Begin to fill ``parts``, (processes, n), of which row ``index`` is this process's."""
    work = dist.all_gather_single(parts.view(-1), parts[index], group=group, async_op=True)
    return partial(_land, work, parts)


def start_reduce_scatter(parts: Tensor, group: dist.ProcessGroup) -> Landing:
    """Begin to sum ``parts``, (processes, n), over the processes, each of which gets its own row, (n,).

    gloo's own reduce-scatter is an all-reduce, which sends twice as much. So on CPUs the terms are exchanged and added here: in
    the order of the ranks, and in float32 at least.
    """
    if parts.device.type != "cpu":
        total = parts.new_empty(parts.shape[1])
        return partial(_land, dist.reduce_scatter_single(total, parts.view(-1), group=group, async_op=True), total, parts)
    terms = torch.empty_like(parts)
    work = dist.all_to_all_single(terms.view(-1), parts.view(-1), group=group, async_op=True)
    return lambda: _land(work, terms, parts).sum(0)


def _land(work: dist.Work | None, result: Tensor, kept: Tensor | None = None) -> Tensor:
    """The result of work that is done; ``kept`` had to live until then."""
    assert work is not None
    work.wait()
    return result


class GlooReduceScatter:
    """The same for FSDP2's ``set_custom_reduce_scatter``, whose interface has no public name."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        assert op == dist.ReduceOp.SUM
        assert not async_op
        parts, rank, ranks = input_tensor.view(group.size(), -1), group.rank(), group.size()
        output_tensor.copy_(parts[rank])
        term = torch.empty_like(output_tensor)  # one at a time: all at once would be as large as the input
        for step in range(1, ranks):
            sent = dist.isend(parts[(rank + step) % ranks], group=group, group_dst=(rank + step) % ranks)
            dist.recv(term, group=group, group_src=(rank - step) % ranks)
            assert sent is not None
            sent.wait()
            output_tensor.add_(term)
        input_tensor.untyped_storage().resize_(0)  # NOTE: FSDP2 would keep this buffer of ours through the next backward
        return None
