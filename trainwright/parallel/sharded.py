"""Stage 3: parameters, gradients and optimizer states in parts, by FSDP2 (Zhao et al. 2023) a block at a time.

A block's parameters are gathered before its forward and again before its backward, and dropped after each. The rest of the
model, embedding, last norm and head, forms one more unit that stays gathered from the forward to the end of the backward, so
that a loss may use the head's weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.utils._pytree import tree_map_only

from trainwright.parallel.mesh import Axis
from trainwright.parallel.sharing import Arrivals, Named, Sharing, trainable
from trainwright.parallel.zero_collectives import GlooReduceScatter
from trainwright.pieces import Piece, local
from trainwright.recipe import InputError

METHODS = ("extend",)  # what else of a module is a forward


def shard(model: nn.Module, devices: DeviceMesh, blocks: Sequence[nn.Module], device: torch.device) -> Sharing:
    """Divide a model among the processes of a one-dimensional mesh.

    Args:
        model: the same at every process, or on the meta device: then memory for the local parts alone is made here, without
            values; give them through ``pieces.local``.
        blocks: what is gathered at once, in the order of the forward.
        device: where the parts live.

    Raises:
        InputError: a parameter without dimensions, or parameters of several dtypes that learn in one block.
    """
    blocks = [block for block in blocks if any(True for _ in block.parameters())]
    owners = _check(model, blocks)
    for module in [*blocks, model]:
        module.register_forward_hook(_prepare_output)  # NOTE: before fully_shard, whose own hook must come after it
    for block in blocks:
        fully_shard(block, mesh=devices, reshard_after_forward=True)
    fully_shard(model, mesh=devices, reshard_after_forward=False)
    for module in [*blocks, model]:
        _configure(module, devices, device)
    _materialise(model, device)
    return _Sharded(model, Axis(devices.size(), devices.get_local_rank(), devices.get_group()), owners, device)


def _check(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """The unit of each trainable parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    seen: set[int] = set()
    owners: dict[str, nn.Module] = {}
    for module in [*blocks, model]:
        own = {id(p): p for p in module.parameters() if id(p) not in seen}
        seen |= set(own)
        for p in own.values():
            if not p.ndim:
                raise InputError(
                    f"parallel.zero: 3 can't divide {names[id(p)]}, which has no dimensions; set 2, or give it one"
                )
            if not p.is_contiguous():
                p.data = p.data.contiguous()
        learning = {names[key]: p for key, p in own.items() if p.requires_grad}
        dtypes = {p.dtype: name for name, p in learning.items()}
        if len(dtypes) > 1:
            shown = ", ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for dtype, name in dtypes.items())
            raise InputError(f"parallel.zero: 3 needs one dtype for all that learns in a block, but {shown}; set 2")
        owners |= dict.fromkeys(learning, module)
    return owners


def _prepare_output(module: nn.Module, inputs: Any, output: Any) -> Any:
    """FSDP2 begins a module's backward when its output gets a gradient; views, and what needs none, would hide that."""
    if not torch.is_grad_enabled() or not any(p.requires_grad for p in module.parameters()):
        return output
    return tree_map_only(Tensor, _noticeable, output)


def _noticeable(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if not tensor.requires_grad:
        return tensor.detach().requires_grad_()  # only a head after it learns
    return tensor.clone() if tensor._base is not None else tensor


def _configure(module: nn.Module, devices: DeviceMesh, device: torch.device) -> None:
    """Gradients are sums, of all parameters whether or not they have one here; each portion's are added to the parts."""
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    module.set_reduce_scatter_unused_params(True, recurse=False)
    if devices.device_type == "cpu":
        _spare(module)
    for method in METHODS:
        if hasattr(module, method):
            register_fsdp_forward_method(module, method)


def _spare(module: FSDPModule) -> None:
    """Without streams nothing is gained by gathering ahead, nor by what FSDP2 keeps so that copies may overlap."""
    module.set_custom_reduce_scatter(GlooReduceScatter())  # type: ignore[arg-type]
    module.set_modules_to_backward_prefetch([module])  # itself, so nothing; an empty list means the default
    module._set_unshard_async_op(True)  # else the last gathered buffer stays until the next one is used


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Memory for what is on the meta device. Tied parameters stay one, because ``_apply`` swaps DTensors in place."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.is_meta for t in tensors):
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))


class _Sharded:
    shards_parameters = True

    def __init__(self, model: nn.Module, axis: Axis, owners: dict[str, nn.Module], device: torch.device) -> None:
        self._model, self._axis = model, axis
        self._whole = trainable(model)
        # Plain parts rather than DTensors: every optimizer takes them, at no cost for each operation.
        self.named: Named = [(name, nn.Parameter(local(p))) for name, p in self._whole]
        self._arrivals = Arrivals(len(self._whole), axis, device)
        places = _places(model)
        for module in set(owners.values()):
            members = [(index, *places[name]) for index, (name, _) in enumerate(self._whole) if owners[name] is module]
            _note_arrivals(module, members, self._arrivals)

    def portion(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()  # each backward adds to the parts: whole gradients would be kept from one to the next otherwise

    def finish(self) -> None:
        used = self._arrivals.settle()
        for (_, p), (_, part), has in zip(self._whole, self.named, used, strict=True):
            part.grad = local(p.grad) if has and p.grad is not None else None
            p.grad = None

    def updated(self) -> None:
        """The next forward gathers the new values."""

    def splits(self, name: str) -> bool:
        return True

    def piece(self, name: str, outer: Piece) -> Piece:
        return outer.chunk(self._axis.size, self._axis.index)

    def rest(self) -> None:
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where each parameter is an attribute."""
    return {
        name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name, _ in model.named_parameters()
    }


def _note_arrivals(module: nn.Module, members: list[tuple[int, nn.Module, str]], arrivals: Arrivals) -> None:
    """Watch the gathered parameters, which FSDP2 makes in the first forward and uses ever after."""

    def watch(*_: Any) -> None:
        handle.remove()
        for index, place, name in members:
            getattr(place, name).register_post_accumulate_grad_hook(lambda _, index=index: arrivals.note(index))

    handle = module.register_forward_pre_hook(watch)
