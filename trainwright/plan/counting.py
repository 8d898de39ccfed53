"""What a step computes, moves and sends: floating-point operations and bytes of operators, messages between processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed._functional_collectives import _remap_traceable_collective, traceable_collective_remaps
from torch.distributed.distributed_c10d import GroupName
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trainwright.memory import selective
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
UNPACKED = 24  # bytes read and written for a number of a packed weight: three passes in float32
PRODUCTS = {name.removeprefix("aten::") for name in selective.PRODUCTS}


class Counts:
    """Counts calls. ``pairs`` is how many pairs of a token and one it attends to the batch in hand has."""

    def __init__(self) -> None:
        self.pairs = 0
        self.scale = 1.0  # how many times what is counted now happens in a step
        self.works: defaultdict[Work, float] = defaultdict(float)
        self.messages: defaultdict[Message, float] = defaultdict(float)
        self.unknown: defaultdict[str, float] = defaultdict(float)

    def clear(self) -> None:
        """Begin anew."""
        self.works.clear()
        self.messages.clear()
        self.unknown.clear()

    @contextmanager
    def nothing(self) -> Iterator[None]:
        """While calls count for nothing."""
        before = self.works.copy(), self.messages.copy(), self.unknown.copy()
        try:
            yield
        finally:
            self.works, self.messages, self.unknown = before

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
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)] or _changed(operator, args)
        largest = max(tensors + results, key=Tensor.numel, default=None)
        if largest is None:
            return
        if name.startswith("supplied_linear"):
            self._supplied(args[0], result, phase)
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

    def _supplied(self, x: Tensor, result: Tensor, phase: str) -> None:
        """A product whose weight is unpacked for it, by passes over float32 numbers."""
        m, n, k = x.numel() // x.shape[-1], result.shape[-1], x.shape[-1]
        dtype = str(x.dtype).removeprefix("torch.")
        moved = (m * n + m * k + n * k) * x.element_size()
        product = Work("trainwright.supplied_linear", "product", dtype, 2 * m * n * k, moved, (1, m, n, k), phase, 1)
        unpacking = Work("trainwright.unpack", "elementwise", "float32", n * k, UNPACKED * n * k, (n, k), phase, 1)
        self.works[product] += self.scale
        self.works[unpacking] += self.scale

    def fuse(self, reads: Sequence[Tensor], result: Tensor, phase: str) -> None:
        """One kernel of joined elementwise work."""
        moved = sum(x.numel() * x.element_size() for x in (*reads, result))
        dtype = str(result.dtype).removeprefix("torch.")
        work = Work("fused", "elementwise", dtype, result.numel(), moved, tuple(result.shape), phase, 1)
        self.works[work] += self.scale

    def _flops(self, operator: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
        if kind_of(operator, name) == "attention":  # a multiply and an add for each of two products forward, of five backward
            backward = "backward" in name
            q, pairs = args[1 if backward else 0], self.pairs
            if not name.startswith("packed_attention"):  # (rows, heads, length, head_dim), perhaps over pairs alone
                key = args[2 if backward else 1]
                causal = any(value is True for value in (*args[3:], *kwargs.values()))
                pairs = q.shape[0] * q.shape[2] * key.shape[2] // (2 if causal else 1)
            heads = q.shape[1] * (q.shape[3] if q.ndim == 5 else 1)
            return int((10 if backward else 4) * heads * q.shape[-1] * pairs)
        formula = flop_registry.get(operator.overloadpacket)
        if formula is not None:
            return int(formula(*args, **kwargs, out_val=result))
        return sum(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))

    def _send(self, kind: str, args: Any, result: Any, phase: str) -> None:
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        group = _group(args)
        size, stride = (1, 1) if group is None else (group.size(), _stride(group))
        sizes = [x.numel() * x.element_size() for x in tensors]
        if kind == "all_gather":  # of a graph, whose collectives don't get their output as an argument
            sizes += [x.numel() * x.element_size() for x in tree_leaves(result) if isinstance(x, Tensor)]
        amount = max(sizes, default=0) if kind in ("all_gather", "reduce_scatter") else sum(sizes[:1])
        if size > 1:
            self.messages[Message(kind, amount, size, stride, 1, phase == "backward" or kind == "all_gather")] += self.scale

    def all_works(self) -> list[Work]:
        """With the number of their calls in a step."""
        return [replace(work, calls=round(count)) for work, count in self.works.items()]

    def all_messages(self) -> list[Message]:
        """With the number of their calls in a step."""
        return [replace(message, calls=round(count)) for message, count in self.messages.items()]


@contextmanager
def messages_traced() -> Iterator[None]:
    """While collectives become operators of a graph, as dynamo makes them; in a backward no mode would see them."""

    def functional(collective: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            found = _remap_traceable_collective(collective, args, kwargs)
            assert found is not None
            return found[0](*found[1], **found[2])

        return called

    with ExitStack() as stack:
        for collective in traceable_collective_remaps:
            stack.enter_context(mock.patch.object(dist, collective.__name__, functional(collective)))
        yield


def _changed(operator: Any, args: Any) -> list[Tensor]:
    """The arguments that an operator without results writes."""
    written = [
        value
        for argument, value in zip(operator._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [x for x in tree_leaves(written) if isinstance(x, Tensor)]


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
                return _resolve_process_group(GroupName(value))
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
    return "elementwise" if operator.namespace in ("aten", "prims") else "other"


def _shape(name: str, tensors: list[Tensor], largest: Tensor) -> tuple[int, ...]:
    """(batch, m, n, k) of a product."""
    matrices = [x for x in tensors if x.ndim >= 2]
    if name not in PRODUCTS or len(matrices) < 2:
        return tuple(largest.shape)
    left, right = matrices[-2], matrices[-1]
    batch = left.shape[0] if left.ndim == 3 else 1
    return batch, left.shape[-2], right.shape[-1], left.shape[-1]
