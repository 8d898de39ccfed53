"""What a process sends, and what its tensors hold: counted at every operation that torch dispatches."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# How often the largest of a collective's tensors goes over the wire, times (N - 1) / N; not so the last.
ROUNDS = {
    "allreduce_": 2,
    "all_reduce": 2,
    "all_reduce_": 2,
    "_allgather_base_": 1,
    "all_gather_into_tensor": 1,
    "allgather_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_tensor": 1,
    "reduce_scatter_": 1,
    "alltoall_base_": 1,
    "all_to_all_single": 1,
    "broadcast_": 1,
    "send": 1,
}


class Traffic(TorchDispatchMode):
    """Bytes that this process sends, as the best algorithm of each collective would: a ring sends b (N - 1) / N bytes for a
    reduce-scatter or all-gather of b bytes, and an all-reduce is the one followed by the other.

    ``with Traffic() as traffic: step()``, then ``traffic.bytes`` (by the kind of collective) and ``traffic.total``.
    Sends from one to another count whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    @property
    def total(self) -> float:
        return sum(self.bytes.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace in ("c10d", "_c10d_functional"):
            self._count(function._schema.name.split("::")[1], args, result)
        return result

    def _count(self, kind: str, args: Any, result: Any) -> None:
        if kind not in ROUNDS:
            assert kind in ("barrier", "wait_tensor", "recv_", "recv_any_source_"), f"count {kind}"
            return
        sides = [[t for t in tree_leaves(side) if isinstance(t, Tensor)] for side in (*args[:2], result)]
        size = max(sum(t.nbytes for t in side) for side in sides)
        ranks = _ranks(args)
        self.bytes[kind] += ROUNDS[kind] * size * (1 if kind == "send" else (ranks - 1) / ranks)


def _ranks(args: Any) -> int:
    """How many processes take part."""
    for value in args:
        if isinstance(value, torch.ScriptObject):
            try:
                return int(dist.ProcessGroup.unbox(value).size())
            except (RuntimeError, TypeError):
                continue
    names = [value for value in args if isinstance(value, str)]
    return int(dist.distributed_c10d._resolve_process_group(names[-1]).size())


class Live(TorchDispatchMode):
    """Bytes of all tensors alive, and the most at any time inside (``peak``); those alive before count too."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref[Any]] = {}
        self.peak = self.largest = 0
        gc.collect()
        for value in gc.get_objects():
            if type(value) in (Tensor, torch.nn.Parameter):
                self._note(value)
                if value.is_leaf and value.grad is not None:
                    self._note(value.grad)

    @property
    def bytes(self) -> int:
        """Now; a storage may change its size."""
        alive = {key: (ref, ref()) for key, ref in self._storages.items()}
        self._storages = {key: ref for key, (ref, storage) in alive.items() if storage is not None}
        return sum(storage.nbytes() for _, storage in alive.values() if storage is not None)

    def _note(self, tensor: Any) -> None:
        if tensor.device.type != "meta" and type(tensor) in (Tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value)
                if value.device.type != "meta" and type(value) is Tensor:
                    self.largest = max(self.largest, value.untyped_storage().nbytes())
        self.peak = max(self.peak, self.bytes)
        return result
