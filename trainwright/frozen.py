"""Frozen weights of the blocks, held in another form than as plain tensors: packed into 4 bits, or left in their file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from trainwright.built import Built
from trainwright.memory import four_bit, narrow, streaming, supplied
from trainwright.models import pretrained
from trainwright.models.contract import Change, TensorPlan, present
from trainwright.models.folder import FolderWeights
from trainwright.models.gguf import GGUFWeights
from trainwright.models.weights import Weights
from trainwright.recipe import InputError, Lora, Recipe

MIB = 2**20


@dataclass
class Held:
    """What became of the weights of some layers.

    instead   for ``pretrained.load_into``: names of weights to what takes their values
    inner     names of the parameters that layers hold instead
    changes   what was done, in words, once the values are there
    """

    instead: Mapping[str, Callable[[Weights, str], None]] = field(default_factory=dict)
    inner: frozenset[str] = frozenset()
    changes: Callable[[], list[Change]] = list


def hold(built: Built, recipe: Recipe) -> Held:
    """Change the layers whose weights are held in another form, before any values are there.

    Raises:
        InputError: no such weights, or a source that they can't come from.
    """
    if isinstance(recipe.adapt, Lora) and recipe.adapt.base == "4bit":
        return _pack(built)
    return _stream(built) if recipe.memory.frozen == "stream" else Held()


def _frozen(built: Built, key: str) -> dict[str, nn.Linear]:
    found = supplied.layers(built.model, None, key)
    if not found:
        raise InputError(f"{key} has no effect: no linear layer of the model's blocks is frozen; leave it out, or see adapt")
    return found


def _inner(layers: Mapping[str, nn.Linear]) -> frozenset[str]:
    return frozenset(f"{name}.{key}" for name, layer in layers.items() for key in layer.held)  # type: ignore[union-attr]


@dataclass
class _Tally:
    before: int = 0
    after: int = 0
    error: float = 0.0
    square: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)


def _pack(built: Built) -> Held:
    """Linear layers that make their weights from a few bits."""
    assert built.source is not None
    weights, tally = pretrained.open_weights(built.source), _Tally()
    layers = {name: layer for name, layer in _frozen(built, "adapt.base").items() if not layer.weight.numel() % four_bit.BLOCK}
    kinds = {name: _kind(weights, f"{name}.weight") for name in layers}
    for name, layer in layers.items():
        sizes = four_bit.sizes(kinds[name], layer.weight.numel())
        held = {key: torch.empty(size, dtype=dtype, device=layer.weight.device) for key, (size, dtype) in sizes.items()}
        tally.before += layer.weight.nbytes
        tally.after += sum(tensor.nbytes for tensor in held.values())
        tally.kinds[kinds[name]] = tally.kinds.get(kinds[name], 0) + 1
        supplied.become(layer, kinds[name], held, built.device)
    instead = {f"{name}.weight": partial(_take, layer, kinds[name], tally, built.device) for name, layer in layers.items()}
    return Held(instead, _inner(layers), lambda: [_packed(tally, tuple(layers))])


def _kind(weights: Weights, name: str) -> str:
    """The file's own blocks, where there are some that can be used as they are."""
    if not isinstance(weights, GGUFWeights) or name not in weights.names():
        return "nf4"
    return weights.kind(name) if weights.kind(name) in four_bit.GGUF_BYTES else "nf4"


def _take(layer: nn.Linear, kind: str, tally: _Tally, device: torch.device, weights: Weights, stored: str) -> None:
    """Pack the values of one weight, the only one that is in memory as it was."""
    if kind == "nf4":
        weight = weights.load(stored)
        held = dict(zip(four_bit.HELD[kind], four_bit.quantize(weight), strict=True))
        error, square = four_bit.errors(weight, list(held.values()))
        tally.error, tally.square = tally.error + error, tally.square + square
    else:
        assert isinstance(weights, GGUFWeights)
        held = {"packed": weights.blocks(stored).flatten()}
    _set(layer, held, device)


def _set(layer: nn.Linear, held: Mapping[str, Tensor], device: torch.device) -> None:
    for name, tensor in held.items():
        setattr(layer, name, nn.Parameter(tensor.to(device), requires_grad=False))


def _packed(tally: _Tally, names: tuple[str, ...]) -> Change:
    parts = [f"{count} weights in {kind}" for kind, count in sorted(tally.kinds.items())]
    off = f"off by {(tally.error / tally.square) ** 0.5:.1%} of their root mean square" if tally.square else "as in the file"
    sizes = f"{tally.before / MIB:,.1f} MiB become {tally.after / MIB:,.1f} MiB"
    return Change("4-bit base", f"{', '.join(parts)}: {sizes}, {off}", names)


def _stream(built: Built) -> Held:
    """Linear layers that read their weights from the file."""
    source = built.source
    assert source is not None
    if source.kind not in ("folder", "safetensors"):
        advice = "; adapt.base: 4bit keeps the blocks of a GGUF file as they are" if source.kind == "gguf" else ""
        raise InputError(f"memory.frozen: stream reads safetensors files, and {source.shown} is none{advice}")
    layers, reader = _frozen(built, "memory.frozen"), streaming.Reader()
    for layer in layers.values():
        ticket = torch.empty((), dtype=torch.int64, device=layer.weight.device)
        supplied.become(layer, "stream", {streaming.TICKET: ticket}, built.device)
    instead = {f"{name}.weight": partial(_leave, layer, reader, built.device) for name, layer in layers.items()}
    tables = narrow_tables(built.model, pretrained.open_weights(source))
    for names, dtype in tables.items():
        narrow.become([built.model.get_submodule(name) for name in names], dtype)
    return Held(instead, _inner(layers), lambda: [_streamed(layers, source.shown), *_narrowed(built.model, tables)])


def narrow_tables(model: nn.Module, weights: Weights) -> dict[tuple[str, ...], torch.dtype]:
    """The frozen tables of a vocabulary that can be kept in the fewer bits of their file: layers that share one, and its dtype.

    They aren't streamed: lookups read few of their rows, and the loss reads all of them many times.
    """
    plan: Callable[[], TensorPlan] | None = getattr(model, "tensor_plan", None)
    vocabulary = plan().vocabulary if plan else None
    if vocabulary is None:
        return {}
    both = {name: model.get_submodule(name) for name in (vocabulary.embedding, vocabulary.head)}
    stored = [name for name in both if f"{name}.weight" in weights.names()]
    sharing: dict[int, list[str]] = {}
    for name, layer in both.items():
        if present([layer]):
            sharing.setdefault(id(layer.weight), []).append(name)
    found: dict[tuple[str, ...], torch.dtype] = {}
    for names in sharing.values():
        own = [name for name in names if name in stored] or stored[:1]  # a tied head has no weight of its own in the file
        if own and narrow.possible([both[name] for name in names], dtype := weights.dtype(f"{own[0]}.weight")):
            found[tuple(names)] = dtype
    return found


def _leave(layer: nn.Linear, reader: streaming.Reader, device: torch.device, weights: Weights, name: str) -> None:
    """Note where a weight is."""
    assert isinstance(weights, FolderWeights)
    dtype = weights.dtype(name)
    if not dtype.is_floating_point:
        raise InputError(f"{weights.shown}: {name} is stored as {dtype}; take unquantised weights")
    stored = reader.add(*weights.place(name), (layer.out_features, layer.in_features), dtype)
    vars(layer)["stored"] = stored  # which holds the reader
    _set(layer, {streaming.TICKET: stored.ticket()}, device)


def _streamed(layers: Mapping[str, nn.Linear], shown: str) -> Change:
    sizes = [layer.weight.numel() * layer.weight.dtype.itemsize for layer in layers.values()]
    summary = (
        f"{len(sizes)} weights, {sum(sizes) / MIB:,.1f} MiB, stay in {shown} and are read for each product; "
        f"two at a time are in memory, {2 * max(sizes) / MIB:,.1f} MiB"
    )
    kinds = {(vars(layer)["stored"].dtype, layer.weight.dtype) for layer in layers.values()}
    turned = sorted(f"{stored} to {used}".replace("torch.", "") for stored, used in kinds if stored != used)
    slow = f"; each reading turns {', '.join(turned)}: a file in that dtype would be read faster" if turned else ""
    return Change("streaming", summary + slow, tuple(layers))


def _narrowed(model: nn.Module, tables: Mapping[tuple[str, ...], torch.dtype]) -> Iterator[Change]:
    for names, dtype in tables.items():
        size = sum(parameter.nbytes for parameter in model.get_submodule(names[0]).parameters()) / MIB
        word = str(dtype).replace("torch.", "")
        yield Change(
            "tables", f"{' and '.join(names)} stay in the file's {word}, {size:,.1f} MiB; parts are widened for use", names
        )
