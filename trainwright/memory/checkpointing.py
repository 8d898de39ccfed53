"""Gradient checkpointing (Chen et al. 2016): less of a block's forward is kept for its backward, the rest computed again.

The forward of each block gets another one around it by a change of its class, so that names stay and compiled equal blocks
share one graph. Compiled blocks are computed again inside of their own compiled backward, which leaves out what nobody needs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from trainwright.memory import offloading, selective
from trainwright.memory.blocks import find
from trainwright.memory.offloading import Store
from trainwright.memory.replay import Before, Buffers
from trainwright.memory.segments import Segment
from trainwright.models.contract import Change
from trainwright.recipe import InputError, Memory, Parallel

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
ALONE = Parallel()
SUMMARIES = {
    "full": "the inputs of {0} are kept, the rest is computed again in the backward",
    "selective": "products, attention and inputs of {0} are kept, the rest is computed again in the backward",
    "offload": "the inputs of {0} wait {1}, the rest is computed again in the backward",
}


def apply(
    model: nn.Module, section: Memory, device: torch.device, parallel: Parallel = ALONE, *, values: bool = True
) -> list[Change]:
    """Checkpoint the blocks of a model that has its parameters; before they are compiled. Gradients keep every bit.

    Args:
        parallel: who gathers parameters for a block, where they are divided.
        values: whether tensors have any; else nothing is written to files.

    Raises:
        InputError: no blocks, names that match nothing, or a folder that can't be written to.
    """
    mode = section.checkpointing
    if mode == "none":
        return []
    if section.every > 1 and parallel.engine == "deepspeed" and parallel.zero == 3:
        raise InputError(
            f"memory.every: {section.every} blocks at once, but DeepSpeed's stage 3 has the parameters of one; "
            "set it to 1, or parallel.engine to torch"
        )
    blocks = find(model, section.blocks, "memory.blocks")
    store = offloading.store_for(device, section.folder, values) if mode == "offload" else None
    if section.every > 1:
        _join(list(blocks.values()), section.every, device, store)
    else:
        for block in blocks.values():
            _become(block, Recomputed, buffers_=Buffers(block), selects=mode == "selective")
            if store is not None:
                _become(block, Offloaded, store=store)
    for module in (module for block in blocks.values() for module in block.modules()):
        if getattr(module, "inplace", False):
            vars(module)["inplace"] = False  # what is kept must not change
    # torch warns of such changes wherever results are selected in compiled code.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    what = f"{len(blocks)} block{'s' * (len(blocks) > 1)}" + (f", {section.every} at once" if section.every > 1 else "")
    where = "in a file" if device.type == "cpu" else "in CPU memory"
    return [Change("checkpointing", f"{mode}: {SUMMARIES[mode].format(what, where)}", tuple(blocks))]


def _join(blocks: Sequence[nn.Module], every: int, device: torch.device, store: Store | None) -> None:
    for start in range(0, len(blocks), every):
        members = blocks[start : start + every]
        segment = Segment(device, store)
        for block in members:
            ends = block is members[0], block is members[-1]
            _become(block, Segmented, buffers_=Buffers(block), segment=segment, ends=ends)


def _become(block: nn.Module, kind: type[nn.Module], **attributes: Any) -> None:
    """Put a forward around a block's own."""
    classes = kind, type(block)
    if classes not in _BOTH:
        _BOTH[classes] = type(kind.__name__ + type(block).__name__, classes, {})
    block.__class__ = _BOTH[classes]
    for name, value in attributes.items():
        setattr(block, name, value)


# Classes of two, the first one's forward around the second's; equal blocks must have one.
_BOTH: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


class Recomputed(nn.Module):
    """Before a block's class: its inputs are kept, and with ``selects`` what is dear to compute."""

    buffers_: Buffers
    selects: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        if torch.compiler.is_compiling():  # NOTE: a graph would change buffers again, so nobody compiles what has such
            if self.selects:
                return checkpoint(super().forward, *args, use_reentrant=False, context_fn=_selecting, **kwargs)
            return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)
        contexts = partial(_contexts, self.buffers_, self.selects)
        return checkpoint(super().forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


_selecting = partial(create_selective_checkpoint_contexts, selective.policy)


def _contexts(buffers: Buffers, selects: bool) -> Contexts:
    """For a block's forward, and for when it is computed again."""
    before = buffers.before_forward()
    if not selects:
        return nullcontext(), before
    forward, again = _selecting()
    return forward, _Both(before, again)  # in this order: copies of buffers are no operators of the block


class _Both(AbstractContextManager[None]):
    """Two contexts, any number of times."""

    def __init__(self, before: Before, again: AbstractContextManager[Any]) -> None:
        self._contexts = before, again

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for context in self._contexts:
                stack.enter_context(context)
            self._stack = stack.pop_all()

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)


class Offloaded(nn.Module):
    """Before the class of a checkpointed block: its inputs are kept elsewhere.

    NOTE: never a part of what is compiled, unlike the block, because a graph can't write files.
    """

    store: Store

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        with self.store.instead_of(args):
            return super().forward(*args, **kwargs)


class Segmented(nn.Module):
    """Before a block's class: computed again with its neighbours; ``ends``: whether it is the first, the last."""

    buffers_: Buffers
    segment: Segment
    ends: tuple[bool, bool]

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward
        if "forward" not in vars(self):  # not compiled alone, and a part of something compiled couldn't be repeated alone
            forward = partial(_plainly, forward)
        if self.segment.again or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with self.segment.enter(self, self.buffers_, self.ends[0], args, kwargs):
            output = forward(*args, **kwargs)
        self.segment.leave(self.ends[1], output)
        return output


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _plainly(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)
