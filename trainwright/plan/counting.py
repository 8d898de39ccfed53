"""What a step computes, moves and sends: each operator's floating-point operations and bytes, each message between processes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trainwright.plan.work import Message, Work

KNOWN = {"aten", "prims", "prim", "c10d", "_c10d_functional", "trainwright", "fsdp", "profiler", "torch_attn"}
NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "alias", "resize_",
           "set_", "_local_scalar_dense", "_unsafe_view", "_reshape_alias", "record_stream"}  # fmt: skip
COPIES = {"copy_", "_to_copy", "clone", "cat", "stack", "_foreach_copy_", "_chunk_cat", "split_with_sizes_copy", "index_select",
          "embedding", "gather", "contiguous", "constant_pad_nd"}  # fmt: skip
MESSAGES = {
    "allreduce_": "all_reduce", "all_reduce": "all_reduce", "all_reduce_": "all_reduce",
    "_allgather_base_": "all_gather", "allgather_": "all_gather", "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather", "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter", "reduce_scatter_": "reduce_scatter", "broadcast_": "broadcast",
    "broadcast": "broadcast", "send": "send", "alltoall_base_": "all_to_all", "all_to_all_single": "all_to_all",
    "alltoall_": "all_to_all",
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "_scaled_mm"}


class Counts:
    """Counts calls. ``pairs`` is how many pairs of a token and one it attends to the batch in hand has."""

    def __init__(self) -> None:
        self.pairs = 0
        self.scale = 1  # how many times what is counted now happens in a step
        self.works: Counter[Work] = Counter()
        self.messages: Counter[Message] = Counter()
        self.unknown: Counter[str] = Counter()

    def count(self, operator: Any, args: Any, kwargs: Any, result: Any, phase: str) -> None:
        """One call."""
        namespace, name = operator.namespace, operator._schema.name.partition("::")[2]
        if name in MESSAGES and namespace in ("c10d", "_c10d_functional"):
            self._send(MESSAGES[name], args, result, phase)
            return
        if operator.is_view or name in NOTHING or namespace in ("c10d", "_c10d_functional", "profiler"):
            return
        if namespace not in KNOWN:
            self.unknown[f"{namespace}.{name}"] += self.scale
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        largest = max(tensors + results, key=Tensor.numel, default=None)
        if largest is None:
            return
        work = Work(
            operator=f"{namespace}.{name}",
            kind=kind_of(operator, name),
            dtype=str((tensors or results)[0].dtype).removeprefix("torch."),
            flops=self._flops(operator, name, args, kwargs, result),
            bytes=sum(x.numel() * x.element_size() for x in tensors + results),
            shape=_shape(name, tensors, largest),
            phase=phase,
            calls=1,
        )
        self.works[work] += self.scale

    def _flops(self, operator: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
        if name.startswith("packed_attention"):  # a multiply and an add for each of two products forward, of five backward
            q = args[1 if name.endswith("backward") else 0]
            heads = q.shape[1] * q.shape[3]
            return int((20 if name.endswith("backward") else 4) // 2 * heads * q.shape[-1] * self.pairs)
        formula = flop_registry.get(operator.overloadpacket)
        if formula is not None:
            return int(formula(*args, **kwargs, out_val=result))
        return sum(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))

    def _send(self, kind: str, args: Any, result: Any, phase: str) -> None:
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        group = _group(args)
        size, stride = (1, 1) if group is None else (group.size(), _stride(group))
        sizes = [x.numel() * x.element_size() for x in tensors]
        amount = max(sizes, default=0) if kind in ("all_gather", "reduce_scatter") else sum(sizes[:1])
        if size > 1:
            self.messages[Message(kind, amount, size, stride, 1, phase == "backward" or kind == "all_gather")] += self.scale


def _group(args: Any) -> dist.ProcessGroup | None:
    for value in tree_leaves(args):
        if isinstance(value, dist.ProcessGroup):
            return value
        if isinstance(value, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(value)
            except (RuntimeError, TypeError):
                continue
        if isinstance(value, str):
            try:
                return torch.distributed.distributed_c10d._resolve_process_group(value)
            except (RuntimeError, ValueError):
                continue
    return None


def _stride(group: dist.ProcessGroup) -> int:
    ranks = dist.get_process_group_ranks(group)
    return ranks[1] - ranks[0] if len(ranks) > 1 else 1


def kind_of(operator: Any, name: str) -> str:
    """What sort of work an operator is."""
    if name in PRODUCTS:
        return "product"
    if "convolution" in name:
        return "convolution"
    if "attention" in name or "attn" in name:
        return "attention"
    if name in COPIES:
        return "copy"
    return "elementwise" if torch.Tag.pointwise in operator.tags or name.startswith(("_foreach", "_fused", "sum")) else "other"


def _shape(name: str, tensors: list[Tensor], largest: Tensor) -> tuple[int, ...]:
    """(batch, m, n, k) of a product."""
    matrices = [x for x in tensors if x.ndim >= 2]
    if name not in PRODUCTS or len(matrices) < 2:
        return tuple(largest.shape)
    left, right = matrices[-2], matrices[-1]
    batch = left.shape[0] if left.ndim == 3 else 1
    return batch, left.shape[-2], right.shape[-1], left.shape[-1]
