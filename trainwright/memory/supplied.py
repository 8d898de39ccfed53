"""Linear layers whose frozen weight isn't kept: it is made for a product, in the forward and again in the backward.

``four_bit`` makes it from packed numbers, ``streaming`` reads it from a file. A layer becomes one by a change of class, so
names stay; what it keeps instead are parameters that don't learn. ``weight`` stays, too, with its shape and dtype, but is one
NaN seen from everywhere: who reads it by mistake notices.

The product is one opaque operator, compiled or not: else a compiler would see that forward and backward make the same weight,
and keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.memory import four_bit, streaming
from trainwright.memory.blocks import find

Shape = tuple[int, int]
# How a weight of a shape, in a dtype, is made from what a layer holds; it may change with the next call.
MAKERS: Mapping[str, Callable[[Sequence[Tensor], Shape, torch.dtype], Tensor]] = {
    "stream": streaming.weight,
    **{kind: four_bit.maker(kind) for kind in four_bit.KINDS},
}


def layers(model: nn.Module, blocks: Sequence[str] | None, what: str) -> dict[str, nn.Linear]:
    """The linear layers of the blocks whose weight doesn't learn, by name; those that this process has."""
    inside = {id(module) for block in find(model, blocks, what).values() for module in block.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, nn.Linear) and not module.weight.requires_grad and _base(type(module))
    }


def become(layer: nn.Linear, kind: str, held: Mapping[str, Tensor], device: torch.device) -> None:
    """Let a layer make its weight from tensors that become its parameters; its weight's memory is free."""
    original = _base(type(layer))
    assert original is not None
    assert kind in MAKERS
    layer.__class__ = _supplied(original)
    assert isinstance(layer, Supplied)
    layer.kind, layer.held = kind, tuple(held)
    for name, tensor in held.items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    nowhere = torch.full((), torch.nan, dtype=layer.weight.dtype, device=device).expand(layer.weight.shape)
    layer.weight = nn.Parameter(nowhere, requires_grad=False)


def _base(kind: type[nn.Module]) -> type[nn.Linear] | None:
    """The class before which ``Supplied`` is put: one whose product is made by a ``base`` (LoRA's), or a plain one."""
    if kind is nn.Linear:
        return _Plain
    return kind if issubclass(kind, nn.Linear) and hasattr(kind, "base") else None


def _supplied(kind: type[nn.Linear]) -> type[nn.Linear]:
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Supplied{kind.__name__}", (Supplied, kind), {})
    return _CLASSES[kind]


_CLASSES: dict[type[nn.Linear], type[nn.Linear]] = {}  # equal layers must have one, else compiled blocks can't share a graph


class _Plain(nn.Linear):
    """A linear layer whose product can be made another way."""

    base: Callable[[Tensor, Tensor | None], Tensor]
    base_weight: Callable[[], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """Without the bias."""
        return self.base(x, None)

    def effective_weight(self) -> Tensor:
        """What the product uses."""
        return self.base_weight()


class Supplied(nn.Linear):
    """Before a layer's class."""

    kind: str
    held: tuple[str, ...]

    def base(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The frozen layer's product (..., out)."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
            bias = bias if bias is None else bias.to(x.dtype)
        held = [getattr(self, name) for name in self.held]
        result: Tensor = _forward(x, bias, held, self.kind, self.out_features)
        return result

    def base_weight(self) -> Tensor:
        """A copy of the weight, in the dtype in which it would be kept."""
        held = [getattr(self, name).detach() for name in self.held]
        return MAKERS[self.kind](held, (self.out_features, self.in_features), self.weight.dtype).clone()


@torch.library.custom_op("trainwright::supplied_linear", mutates_args=())
def _forward(x: Tensor, bias: Tensor | None, held: Sequence[Tensor], kind: str, rows: int) -> Tensor:
    """(..., in) to (..., rows)."""
    weight = MAKERS[kind](held, (rows, x.shape[-1]), x.dtype)
    return nn.functional.linear(x, weight, bias)


@torch.library.custom_op("trainwright::supplied_linear_backward", mutates_args=())
def _backward(grad: Tensor, held: Sequence[Tensor], kind: str, columns: int) -> Tensor:
    weight = MAKERS[kind](held, (grad.shape[-1], columns), grad.dtype)
    return (grad.reshape(-1, grad.shape[-1]) @ weight).view(*grad.shape[:-1], columns)


@_forward.register_fake
def _empty_forward(x: Tensor, bias: Tensor | None, held: Sequence[Tensor], kind: str, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@_backward.register_fake
def _empty_backward(grad: Tensor, held: Sequence[Tensor], kind: str, columns: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], columns)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, held, kind, _ = inputs
    ctx.save_for_backward(*held)
    ctx.kind, ctx.columns, ctx.count = kind, x.shape[-1], len(held)
    ctx.bias = None if bias is None else bias.dtype


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, list[None], None, None]:
    needs_x, needs_bias = ctx.needs_input_grad[:2]
    x = _backward(grad, list(ctx.saved_tensors), ctx.kind, ctx.columns) if needs_x else None
    bias = grad.flatten(0, -2).sum(0).to(ctx.bias) if needs_bias else None
    return x, bias, [None] * ctx.count, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
