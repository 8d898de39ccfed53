"""Tensor parallelism: each process holds a part of every matrix product (Shoeybi et al. 2019), by a plan that the model gives.

Layers keep their names and get smaller parameters; the few where activations pass between processes change their class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import embedding

from trainwright.models.contract import (
    Change,
    Portion,
    Stretch,
    TensorPlan,
    Vocabulary,
    dropout,
    features_of,
    product,
)
from trainwright.parallel.mesh import Axis
from trainwright.parallel.tensor_ops import Stream
from trainwright.pieces import Piece
from trainwright.recipe import InputError


@dataclass(frozen=True)
class Sharding:
    """What became of a model.

    pieces   what this process has of every parameter and buffer that is split; the others are whole
    partial  parameters that are whole, but whose gradients must be summed over the axis (``sum_partial``)
    head     what it has of the head's weight, where the vocabulary is split
    """

    change: Change
    pieces: dict[str, Piece]
    partial: tuple[str, ...]
    head: Piece | None = None


def apply(model: nn.Module, axis: Axis, *, sequence: bool) -> Sharding:
    """Give this process its part of the model, which may be on the meta device or have values.

    Args:
        sequence: divide the length too, where no product does (Korthikanti et al. 2022); only of models with a vocabulary.
            Every length must then satisfy ``fits``.

    Raises:
        InputError: the model can't be shared among so many processes.
    """
    plan = plan_of(model)
    check(plan, model, axis.size)
    if axis.size == 1:
        return Sharding(Change("tensor parallel", "one process"), {}, ())
    stream = Stream(axis, sequence and plan.vocabulary is not None)
    splits, summands = dict(_splits(model, plan)), tuple(_partial(model, plan, stream.sequence))
    pieces = _cut(model, splits, axis)
    for stretch in plan.stretches:
        _share(model, stretch, stream)
    if plan.vocabulary is not None:
        _share_vocabulary(model, plan.vocabulary, stream)
    how = ", the length divided between them" if stream.sequence else ""
    summary = f"{axis.size} processes share {len(pieces)} tensors in {len(plan.stretches)} stretches of layers{how}"
    head = _head_piece(model, plan.vocabulary, pieces) if plan.vocabulary is not None else None
    return Sharding(Change("tensor parallel", summary, tuple(pieces)), pieces, summands, head)


def fits(length: int, axis: Axis) -> bool:
    """Whether rows of this length can be divided."""
    return length % axis.size == 0


@torch.no_grad()
def sum_partial(gradients: list[Tensor], axis: Axis) -> None:
    """Replace gradients by their sums over the axis: one collective for each dtype among them."""
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        mine = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in mine])
        dist.all_reduce(flat, group=axis.group)
        for gradient, total in zip(mine, flat.split([gradient.numel() for gradient in mine]), strict=True):
            gradient.copy_(total.view_as(gradient))


def plan_of(model: nn.Module) -> TensorPlan:
    """The model's plan.

    Raises:
        InputError: it has none, or one that shares nothing.
    """
    method: Callable[[], TensorPlan] | None = getattr(model, "tensor_plan", None)
    if method is None:
        raise InputError(
            f"parallel.tensor: {type(model).__name__} has no tensor-parallel plan; set it to 1 and use parallel.data or "
            "parallel.zero (decoder, mlp, vgg16 and vgg16_bn have one; a module of your own may give tensor_plan())"
        )
    plan = method()
    if not plan.stretches:
        raise InputError(
            f"parallel.tensor: this {type(model).__name__} has no two linear layers in succession that could be shared "
            "(a LayerNorm between them needs all features); set it to 1 and use parallel.data or parallel.zero"
        )
    return plan


def check(plan: TensorPlan, model: nn.Module, size: int) -> None:
    """Refuse a number of processes that the model's numbers can't be divided by, and say which can."""
    if not (wrong := _faults(plan, model, size)):
        return
    able = [n for n in range(1, min(plan.divided.values()) + 1) if not _faults(plan, model, n)]
    raise InputError(
        f"parallel.tensor: {size} processes can't share this {type(model).__name__}: {'; '.join(wrong)}; "
        f"set it to {' or '.join(map(str, able))}"
    )


def _faults(plan: TensorPlan, model: nn.Module, size: int) -> Iterator[str] | list[str]:
    found = [f"{name} {value} is not a multiple of {size}" for name, value in plan.divided.items() if value % size]
    if plan.vocabulary is not None:
        rows = model.get_submodule(plan.vocabulary.embedding).num_embeddings
        assert isinstance(rows, int)
        if Piece.all_of((rows,)).chunk(size, size - 1).numel == 0:
            found.append(f"the last would have none of the vocabulary's {rows} rows")
    return found


def _splits(model: nn.Module, plan: TensorPlan) -> Iterator[tuple[str, int]]:
    """(name, dimension) of every parameter and buffer to be split."""
    for layer, along in _linears(plan):
        dims = features_of(_linear(model, layer))
        yield from ((f"{layer}.{name}", runs.index(along)) for name, runs in dims.items() if along in runs)
    for name in chain.from_iterable(stretch.between for stretch in plan.stretches):
        module = model.get_submodule(name)
        tensors = [*module.named_parameters(), *module.named_buffers()]
        yield from ((f"{name}.{own}", 0) for own, tensor in tensors if tensor.ndim)
    if plan.vocabulary is not None:
        yield f"{plan.vocabulary.embedding}.weight", 0


def _partial(model: nn.Module, plan: TensorPlan, sequence: bool) -> Iterator[str]:
    """Names of what learns on every process from a part of its gradient.

    An adapter's factor that isn't split sees a part of the features; what works on a divided length sees a part of that. A row
    layer's bias is added behind the sum, so it belongs to the latter.
    """
    for layer, along in _linears(plan):
        for name, runs in features_of(_linear(model, layer)).items():
            if along not in runs and (sequence or name != "bias") and model.get_parameter(f"{layer}.{name}").requires_grad:
                yield f"{layer}.{name}"
    norms = [stretch.after for stretch in plan.stretches] + ([plan.vocabulary.norm] if plan.vocabulary else [])
    for norm in filter(None, norms if sequence else []):
        yield from (f"{norm}.{name}" for name, p in model.get_submodule(norm).named_parameters() if p.requires_grad)


def _linears(plan: TensorPlan) -> Iterator[tuple[str, str]]:
    """Names of the linear layers, with the features that are divided."""
    for stretch in plan.stretches:
        yield from ((column, "out") for column in stretch.columns)
        yield stretch.row, "in"
    if plan.vocabulary is not None:
        yield plan.vocabulary.head, "out"


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _cut(model: nn.Module, splits: dict[str, int], axis: Axis) -> dict[str, Piece]:
    """Leave of each tensor this process's part; a tied one has one name here, and stays one."""
    pieces = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name in splits:
            piece = Piece.all_of(tuple(tensor.shape)).chunk(axis.size, axis.index, splits[name])
            tensor.data = piece.of(tensor.data).clone(memory_format=torch.contiguous_format)
            pieces[name] = piece
    return pieces


def _head_piece(model: nn.Module, vocabulary: Vocabulary, pieces: dict[str, Piece]) -> Piece:
    return pieces.get(f"{vocabulary.head}.weight") or pieces[f"{vocabulary.embedding}.weight"]


def _share(model: nn.Module, stretch: Stretch, stream: Stream) -> None:
    axis, row = stream.axis, _linear(model, stretch.row)
    portion = Portion(axis.index * (row.in_features // axis.size), row.in_features)
    for name in stretch.columns:
        _linear(model, name).out_features //= axis.size
    for module in map(model.get_submodule, stretch.between):
        if isinstance(module, nn.Dropout):
            _become(module, PortionDropout, portion=portion)
        elif isinstance(module, nn.BatchNorm1d):
            module.num_features //= axis.size
    row.in_features //= axis.size
    _become(row, Row, stream=stream, portion=portion)
    if stretch.after is None:
        assert len(stretch.columns) == 1, stretch
        _become(_linear(model, stretch.columns[0]), Entered, stream=stream)
    else:
        _become(model.get_submodule(stretch.after), Entering, stream=stream)
    for name, attribute in stretch.counts:
        module = model.get_submodule(name)
        setattr(module, attribute, getattr(module, attribute) // axis.size)


def _share_vocabulary(model: nn.Module, vocabulary: Vocabulary, stream: Stream) -> None:
    table, head = model.get_submodule(vocabulary.embedding), _linear(model, vocabulary.head)
    assert isinstance(table, nn.Embedding)
    assert table.padding_idx is None
    whole, table.num_embeddings = table.num_embeddings, len(table.weight)
    head.out_features = len(head.weight)
    piece = Piece.all_of((whole,)).chunk(stream.axis.size, stream.axis.index)
    _become(table, PortionEmbedding, stream=stream, first=piece.start[0])
    _become(model.get_submodule(vocabulary.norm), Entering, stream=stream)
    _become(head, Joined, stream=stream, whole=whole)
    for name in vocabulary.alone:
        setattr(model, name, partial(_undivided, stream, getattr(model, name)))


def _undivided(stream: Stream, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    before, stream.sequence = stream.sequence, False
    try:
        return method(*args, **kwargs)
    finally:
        stream.sequence = before


def _become(layer: nn.Module, kind: type[nn.Module], **attributes: Any) -> None:
    """Put a forward around a layer's own by a change of class, as LoRA does it: compiled equal blocks still share one graph."""
    classes = kind, type(layer)
    if classes not in _BOTH:
        _BOTH[classes] = type(kind.__name__ + type(layer).__name__, classes, {})
    layer.__class__ = _BOTH[classes]
    for name, value in attributes.items():
        setattr(layer, name, value)


# Classes of two, the first one's forward around the second's; made when needed, as FSDP2's are: adapters aren't known here.
_BOTH: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


class Entering(nn.Module):
    """Before a norm's class: what it gives goes to layers that processes share."""

    stream: Stream

    def forward(self, x: Tensor) -> Tensor:
        return self.stream.enter(super().forward(x))


class Entered(nn.Module):
    """Before a linear layer's class: what it takes comes to a layer that processes share."""

    stream: Stream

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(self.stream.enter(x))
        return out


class Row(nn.Linear):
    """Before a linear layer's class: it has a part of the inputs' features; the bias is added once, to the sum."""

    stream: Stream

    def forward(self, input: Tensor) -> Tensor:
        out = self.stream.leave(product(self, input))
        return out if self.bias is None else out + self.bias.to(out.dtype)


class PortionDropout(nn.Dropout):
    """Dropout of a portion of the features."""

    portion: Portion

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training, self.portion)


class PortionEmbedding(nn.Embedding):
    """An embedding that has the rows of the vocabulary from ``first`` on."""

    stream: Stream
    first: int

    def forward(self, input: Tensor) -> Tensor:
        local = input - self.first
        foreign = (local < 0) | (local >= len(self.weight))
        x = embedding(local.masked_fill(foreign, 0), self.weight).masked_fill(foreign[..., None], 0.0)
        kind = x.device.type
        # Only one process has more than zero, so nothing is lost by summing in autocast's dtype.
        return self.stream.leave(x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x)


class Joined(nn.Linear):
    """Before the head's class: scores of the whole vocabulary on every process."""

    stream: Stream
    whole: int

    def forward(self, input: Tensor) -> Tensor:
        return self.stream.join(super().forward(input), self.whole)
