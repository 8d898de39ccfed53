"""Neighbouring blocks that are computed again at once: only what enters them from outside is kept.

The way of ``torch.utils.checkpoint`` without reentrant autograd, but for several calls of modules, between which the model's
own code stands.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import get_device_states, set_device_states

from trainwright.memory.offloading import Away, Store, worth
from trainwright.memory.replay import Before, Buffers


class Segment:
    """Neighbouring blocks; ``again`` while they are computed again."""

    def __init__(self, device: torch.device, store: Store | None) -> None:
        self.device, self.store = device, store
        self.again = False
        self._frame: Frame | None = None
        # NOTE: not in the frame, to which the graph of these tensors refers: they would keep each other alive.
        self._last: list[Tensor] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self, block: nn.Module, buffers: Buffers, first: bool, args: Any, kwargs: Any) -> AbstractContextManager[object]:
        """The context in which a block's forward runs."""
        if first or self._frame is None:
            self._frame, self._last = Frame(self), []
        return self._frame.watch(block, buffers, args, kwargs, self._last)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(self, last: bool, output: object) -> None:
        """After it."""
        self._last = [] if last else [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if last:
            self._frame = None


@dataclass(frozen=True)
class Earlier:
    """An argument that is a result of the block before."""

    number: int
    learns: bool


@dataclass(frozen=True)
class Kept:
    """An argument from outside of the segment."""

    tensor: Tensor | Away
    version: int
    learns: bool

    def get(self) -> Tensor:
        if isinstance(self.tensor, Away):
            return self.tensor.fetch().requires_grad_(self.learns)
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a block's input was changed in place, so the block can't be computed again; set memory.every to 1"
            )
        return self.tensor.detach().requires_grad_(self.learns)


@dataclass(frozen=True)
class Call:
    """A block's forward, and all that it depended on."""

    block: nn.Module
    args: Any
    kwargs: Any
    before: Before
    generators: Generators
    autocast: Callable[[], AbstractContextManager[object]]


class Ticket:
    """Stands in the graph for a tensor that must be computed again."""

    __slots__ = ("__weakref__",)


class Done(Exception):
    """All that was wanted has been computed."""


class Frame:
    """One forward through a segment."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._calls: list[Call] = []
        self._tickets: list[weakref.ref[Ticket]] = []
        self._found: weakref.WeakKeyDictionary[Ticket, Tensor] = weakref.WeakKeyDictionary()
        self._count = 0

    def watch(
        self, block: nn.Module, buffers: Buffers, args: Any, kwargs: Any, last: list[Tensor]
    ) -> AbstractContextManager[object]:
        """Note a call; within the context autograd keeps tickets."""
        args, kwargs = tree_map_only(Tensor, lambda x: self._note(x, last), (args, kwargs))
        device = self._segment.device
        self._calls.append(Call(block, args, kwargs, buffers.before_forward(), Generators(device), _autocast(device)))
        return saved_tensors_hooks(self._pack, self._unpack)

    def _note(self, tensor: Tensor, last: list[Tensor]) -> Earlier | Kept:
        for number, other in enumerate(last):
            if _same(tensor, other):
                return Earlier(number, tensor.requires_grad)
        store = self._segment.store
        kept = store.keep(tensor) if store is not None and worth(tensor) else tensor.detach()
        return Kept(kept, tensor._version, tensor.requires_grad)

    def _pack(self, tensor: Tensor) -> Tensor | Ticket:
        if isinstance(tensor, nn.Parameter):
            return tensor  # which is there all the same, or will be gathered
        ticket = Ticket()
        self._tickets.append(weakref.ref(ticket))
        return ticket

    def _unpack(self, packed: Tensor | Ticket) -> Tensor:
        if not isinstance(packed, Ticket):
            return packed
        if packed not in self._found:
            self._compute_again()
        return self._found.pop(packed)

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def _compute_again(self) -> None:
        self._count = 0
        self._segment.again = True
        with Generators(self._segment.device), torch.enable_grad(), saved_tensors_hooks(self._collect, lambda x: x):
            try:
                self._calls_again()
            except Done:
                pass
            finally:
                self._segment.again = False
        if self._count != len(self._tickets):
            raise RuntimeError(
                f"blocks that were computed again kept {self._count} tensors for the backward, not {len(self._tickets)}: their "
                "forward depends on something that changed; set memory.every to 1, or memory.checkpointing to none"
            )

    def _calls_again(self) -> None:
        last: list[Tensor] = []
        for call in self._calls:
            gather: Callable[[], object] | None = getattr(call.block, "unshard", None)
            if gather is not None:
                gather()  # its backward comes next, and drops the parameters again
            args, kwargs = tree_map_only((Earlier, Kept), partial(_get, last), (call.args, call.kwargs))
            call.generators.restore()
            with call.autocast(), call.before:
                output = call.block.forward(*args, **kwargs)
            last = [x for x in tree_leaves(output) if isinstance(x, Tensor)]

    def _collect(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            return tensor
        tensor = tensor.detach()
        if self._count < len(self._tickets) and (ticket := self._tickets[self._count]()) is not None:
            self._found[ticket] = tensor
        self._count += 1
        if self._count == len(self._tickets):
            raise Done
        return tensor


def _get(last: list[Tensor], argument: Earlier | Kept) -> Tensor:
    if isinstance(argument, Kept):
        return argument.get()
    tensor = last[argument.number]
    return tensor if tensor.requires_grad == argument.learns else tensor.detach().requires_grad_(argument.learns)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor is another one, perhaps through a function that does nothing to it."""
    return _place(one) == _place(other) and _kind(one) == _kind(other)


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where it begins, of fake tensors too, which have no address."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor._version


class Generators(AbstractContextManager[None]):
    """The states of the random generators when this was made; as a context, it sets them again behind it."""

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._type = device.type
        self._devices, self._states = ([], []) if device.type == "cpu" else get_device_states(torch.empty(0, device=device))

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._devices:
            set_device_states(self._devices, self._states, device_type=self._type)

    def __exit__(self, *exception: Any) -> None:
        self.restore()


def _autocast(device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """What makes autocast as it is now."""
    cached = torch.is_autocast_cache_enabled()
    now = {kind: (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in {"cpu", device.type}}

    @contextmanager
    def again() -> Iterator[None]:
        with ExitStack() as stack:
            for kind, (dtype, enabled) in now.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached))
            yield

    return again
