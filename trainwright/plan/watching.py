"""Sees every operator of a program on fake tensors, and answers what such tensors can't."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from trainwright.loop import Batch
from trainwright.plan.counting import Counts
from trainwright.plan.kernels import Memory
from trainwright.plan.ledger import Ledger, numbers
from trainwright.plan.moments import Moments
from trainwright.plan.workspace import workspace
from trainwright.recipe import InputError

aten = torch.ops.aten


class Watching(TorchDispatchMode):
    """Sees every operator; answers what a fake tensor can't."""

    def __init__(self, fake: FakeTensorMode, ledger: Ledger, counts: Counts, moments: Moments) -> None:
        super().__init__()
        self.fake, self.ledger, self.counts, self.moments = fake, ledger, counts, moments
        self.batch: Batch | None = None
        self.messages: set[int] = set()
        self.paused = False
        self.answers: dict[str, Any] = {}
        self.counting: set[int] = set()  # storages of 0, 1, 2, ...

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused or func is torch.ops.prim.device.default:
            return func(*args, **(kwargs or {}))
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local operators are seen
        kwargs = kwargs or {}
        if not types and any(isinstance(x, Tensor) for x in tree_leaves(args)):
            with _disable_current_modes():
                return func(*args, **kwargs)  # data, which are real
        if func is aten._local_scalar_dense.default:
            return self._value(args[0])
        if func is aten.equal.default:
            return True
        if func is aten.nonzero.default:
            assert self.batch is not None
            result: Any = torch.empty((self.batch.supervised, 1), dtype=torch.int64, device=args[0].device)
        elif func is aten.mkldnn_rnn_layer.default:
            result = self._asked(func, args, kwargs)
        else:
            try:
                result = func(*args, **kwargs)
            except (NotImplementedError, RuntimeError) as error:
                raise _unable(func, error) from None
        if func.overloadpacket is aten.arange:
            self.counting |= numbers(self.ledger, [result])
        self.ledger.see(result)
        self._count(func, args, kwargs, result)
        if func.namespace in ("c10d", "_c10d_functional"):
            self.messages |= numbers(self.ledger, [x for x in tree_leaves(args) if isinstance(x, Tensor)])
        return result

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """While nothing is seen."""
        self.paused, before = True, self.paused
        try:
            yield
        finally:
            self.paused = before

    def new(self, like: Tensor) -> Tensor:
        """A tensor as a kernel of a graph makes it."""
        with self.pausing():
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)

    def see(self, result: Tensor | Memory | None) -> None:
        """Memory that a kernel of a graph writes."""
        self.ledger.hold(result) if isinstance(result, Memory) else self.ledger.see(result)

    def fused(self, reads: Sequence[Tensor], result: Tensor) -> None:
        """A kernel of joined work."""
        self.counts.fuse(reads, result, self.moments.now()[0])

    def called(self, operator: Any, args: Any, kwargs: Any, result: Any) -> None:
        """An operator of a graph, with tensors of these shapes."""
        self._count(operator, args, kwargs, result)

    def _count(self, operator: Any, args: Any, kwargs: Any, result: Any) -> None:
        if self.ledger.on_cpu:
            self.ledger.pass_by(workspace(operator, args, result))
        self.counts.count(operator, args, kwargs, result, self.moments.now()[0])

    def _asked(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the kernel itself gives for tensors of this shape: nobody else knows the size of its workspace."""
        key = str(tree_map_only(Tensor, lambda x: (x.shape, x.dtype), (args, kwargs)))
        if key not in self.answers:
            with _disable_current_modes():
                real = tree_map_only(Tensor, lambda x: torch.zeros(x.shape, dtype=x.dtype), (args, kwargs))
                self.answers[key] = tree_map_only(Tensor, lambda x: (x.shape, x.dtype), func(*real[0], **real[1]))
        device = args[0].device
        return tuple(kind and torch.empty(kind[0], dtype=kind[1], device=device) for kind in self.answers[key])

    def _value(self, value: Tensor) -> float | int | bool:
        """A value that is as good as any; of a view of 0, 1, 2, ... its own."""
        if numbers(self.ledger, [value]) & self.counting:
            return int(value.storage_offset())
        if value.dtype == torch.bool:
            return True
        return 1.0 if value.dtype.is_floating_point else 1


def _unable(operator: Any, error: Exception) -> InputError:
    return InputError(
        f"plan: the operator {operator} has no fake form ({str(error).splitlines()[0][:160]}); "
        "give it one by torch.library.register_fake, or measure instead: trainwright train RECIPE training.steps=3"
    )
