"""A model over many processes, in the order in which it is divided: tensor, pipeline, then what data ranks share.

Alone, every function here leaves things as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from trainwright.built import Division
from trainwright.models.contract import Change
from trainwright.parallel import batchnorm, collectives, gradients, norm, pipeline, sharded, sharing, tensor
from trainwright.parallel.mesh import Axis, Mesh
from trainwright.parallel.norm import Gradient
from trainwright.parallel.sharing import Sharing
from trainwright.recipe import InputError, Recipe, TextData, TorchOptimizer
from trainwright.state import Places


def check(recipe: Recipe, mesh: Mesh) -> None:
    """What must divide, and what needs whole parameters.

    Raises:
        InputError: a batch that the processes can't share evenly, or a setting that another one excludes.
    """
    training, section, copies = recipe.training, recipe.parallel, mesh.data.size
    if training.batch_size % copies:
        raise InputError(
            f"training.batch_size: {training.batch_size} rows can't be shared by {copies} data ranks; "
            f"choose a multiple of {copies}"
        )
    if training.micro_batch_size and training.batch_size % (training.micro_batch_size * copies):
        raise InputError(
            f"training.micro_batch_size: {training.micro_batch_size} rows x {copies} data ranks don't divide the batch of "
            f"{training.batch_size}; a process's part is {training.batch_size // copies} rows"
        )
    if section.zero and copies == 1:
        raise InputError(f"parallel.zero: {section.zero} has no effect: there is one data rank, so nothing to divide")
    kind = recipe.optimizer.type if isinstance(recipe.optimizer, TorchOptimizer) else ""
    if kind in TorchOptimizer.WHOLE_MATRICES and (section.zero or mesh.tensor.size > 1):
        raise InputError(
            f"optimizer.type: {kind} looks at whole matrices, of which each process would have a part; "
            "set parallel.zero to 0 and tensor to 1, or take another optimizer"
        )


def divide(model: nn.Module, recipe: Recipe, mesh: Mesh) -> tuple[Division, list[Change]]:
    """Cut a model that has no values yet, or the same in all processes, to what is this one's."""
    plain = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    everything = frozenset(model.state_dict(keep_vars=True))
    division, changes = Division(plain, everything), []
    if mesh.tensor.size > 1:
        sequence = isinstance(recipe.data, TextData) and tensor.fits(recipe.data.sequence_length, mesh.tensor)
        found = tensor.apply(model, mesh.tensor, sequence=sequence)
        division = replace(division, pieces=found.pieces, partial=found.partial, head=found.head)
        changes.append(found.change)
    if mesh.pipeline.size > 1:
        split = pipeline.apply(model, mesh.pipeline, recipe.parallel.schedule)
        copied = {name: division.pieces[known] for name, known in split.copies.items() if known in division.pieces}
        division = replace(division, split=split, pieces={**division.pieces, **copied})
        changes.append(split.change)
        _check_stage(model, mesh)
    return division, changes


def _check_stage(model: nn.Module, mesh: Mesh) -> None:
    """Raises InputError where nothing learns in this process's stages."""
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            f"parallel.pipeline: nothing learns in stage {mesh.pipeline.index + 1} of {mesh.pipeline.size}; "
            "set pipeline to 1, or let parameters of all stages learn (section adapt)"
        )


def join_statistics(model: nn.Module, mesh: Mesh) -> list[Change]:
    """BatchNorm over all data ranks."""
    change = batchnorm.apply(model, mesh.data) if mesh.data.size > 1 else None
    return [change] if change else []


def share(model: nn.Module, recipe: Recipe, mesh: Mesh, device: torch.device) -> Sharing:
    """How the data ranks share gradients and what is updated.

    Stage 3 takes a model without values, and makes memory for the local parts; the others one with values.
    """
    stage = recipe.parallel.zero
    if mesh.data.size == 1:
        return sharing.alone(model)
    blocks: Sequence[nn.Module] = [block for block in _blocks(model) if any(True for _ in block.parameters())]
    if stage == 3:
        assert mesh.devices is not None
        return sharded.shard(model, mesh.devices, blocks, device)
    return gradients.share(model, mesh.data, stage, blocks)


def described(recipe: Recipe, mesh: Mesh) -> list[Change]:
    """What the data ranks do, in words."""
    if mesh.data.size == 1:
        return []
    parts = ["optimizer states", "gradients", "parameters"][: recipe.parallel.zero]
    divided = f"; {', '.join(parts)} in parts (ZeRO {recipe.parallel.zero})" if parts else ""
    return [Change("data parallel", f"{mesh.data.size} processes share each batch{divided}")]


def _blocks(model: nn.Module) -> Sequence[nn.Module]:
    blocks: Callable[[], Sequence[nn.Module]] | None = getattr(model, "blocks", None)
    return blocks() if blocks is not None else ()


def complete(places: Places, division: Division) -> None:
    """After a step's backwards: every parameter that is updated here gets the gradient of the whole batch."""
    places.sharing.finish()
    own = dict(places.sharing.named)
    partial = [own[name].grad for name in division.partial if name in own]
    if found := [gradient for gradient in partial if gradient is not None]:
        tensor.sum_partial(found, places.mesh.tensor)


def clip(places: Places, largest: float | None) -> Tensor:
    """The norm of the whole model's gradient; scales what is here so that it is at most ``largest``."""
    found = [
        Gradient(p.grad, _axes(places, name), name not in places.copies)
        for name, p in places.sharing.named
        if p.grad is not None
    ]
    return norm.clip_(found, places.mesh, largest)


def _axes(places: Places, name: str) -> frozenset[str]:
    data = {"data"} if places.sharing.splits(name) else set()
    return frozenset(data | ({"tensor"} if name in places.tensor else set()))


def summing(axis: Axis, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What sums a tensor over an axis; alone it costs nothing."""
    if axis.size == 1:
        return lambda value: value
    return lambda value: collectives.sum_(value.to(device), axis)


def adding(axis: Axis, device: torch.device) -> Callable[[list[float]], list[float]]:
    """What sums numbers over an axis."""
    if axis.size == 1:
        return lambda numbers: numbers
    return lambda numbers: collectives.sum_(torch.tensor(numbers, dtype=torch.float64, device=device), axis).tolist()


def agreeing(mesh: Mesh, device: torch.device) -> Callable[[bool], bool]:
    """Whether any process says yes."""
    if mesh.size == 1:
        return lambda mine: mine

    def agree(mine: bool) -> bool:
        flag = torch.tensor([int(mine)], device=device)
        for axis in (mesh.data, mesh.tensor, mesh.pipeline):
            collectives.largest_(flag, axis)
        return bool(flag.item())

    return agree
