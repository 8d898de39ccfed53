"""First values: each layer's own start, then the recipe's scheme for the weight matrices of a type of layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from trainwright.models.contract import Change, seed_of
from trainwright.pieces import Piece, box_of, local
from trainwright.recipe import Init, InputError

Nonlinearity = Literal["linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu"]
TYPES: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "conv": (_ConvNd,),
    "recurrent": (nn.RNNBase, nn.RNNCellBase),
    "embedding": (nn.Embedding, nn.EmbeddingBag),
}


@torch.no_grad()
def initialize(
    model: nn.Module,
    section: Init,
    names: set[str],
    seed: int,
    pieces: Mapping[str, Piece] = MappingProxyType({}),
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> Change:
    """Values for exactly the named parameters and buffers, in place, on their device and in their dtype.

    A layer without values (NaN, as ``weights.allocate`` leaves it) first gets its own start: its ``reset_parameters``, then the
    model's ``published_start(name, layer)`` where the model has one. A model that has started itself keeps its start, but for
    the scheme. Values depend on the seed and the layer's name alone: not on the other layers, on which names are asked for, on
    device and precision, or on the state of torch's generator, which stays as it was.

    Args:
        pieces: which box of the whole a parameter is, where it isn't all of it.
        aliases: the name of the parameter whose values one takes, where it is a copy.

    Raises:
        InputError: the section names a type of layer that the model doesn't have.
    """
    schemes = _schemes(model, section)
    state = model.state_dict(keep_vars=True)
    assert names <= state.keys(), f"no part of the model: {sorted(names - state.keys())}"
    with torch.random.fork_rng(devices=[]):
        for prefix, layer in model.named_modules():
            wanted = [leaf for leaf in _own_tensors(layer) if f"{prefix}.{leaf}".lstrip(".") in names]
            seeded = {aliases.get(f"{prefix}.{leaf}", f"{prefix}.{leaf}").rpartition(".")[0] for leaf in wanted} or {prefix}
            assert len(seeded) == 1, "a layer isn't the copy of two"
            _fill(model, prefix, layer, wanted, seed_of(seed, seeded.pop()), pieces)
            if scheme := schemes.get(_type_of(layer)):
                _apply(prefix, layer, wanted, scheme, section, seed, pieces)
    empty = [name for name in names if local(state[name]).isnan().any()]
    assert not empty, f"without a start of their own: {empty}"
    return Change("init", _summary(section, schemes, names, seed), tuple(name for name in state if name in names))


def _schemes(model: nn.Module, section: Init) -> dict[str, str]:
    """The scheme of each type of layer that the model has, where it isn't the layer's own."""
    present = {_type_of(layer) for layer in model.modules()} - {""}
    for kind in TYPES:
        if getattr(section, kind) is not None and kind not in present:
            raise InputError(
                f"model.init.{kind} has no effect: the model has no such layers; "
                f"it has {', '.join(k for k in TYPES if k in present) or 'none that can be drawn'}"
            )
    chosen = {kind: getattr(section, kind) or section.scheme for kind in TYPES if kind in present}
    return {kind: scheme for kind, scheme in chosen.items() if scheme != "default"}


def _type_of(layer: nn.Module) -> str:
    return next((kind for kind, classes in TYPES.items() if isinstance(layer, classes)), "")


def _own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    return dict(layer.named_parameters(recurse=False)) | dict(layer.named_buffers(recurse=False))


def _fill(model: nn.Module, prefix: str, layer: nn.Module, wanted: list[str], seed: int, pieces: Mapping[str, Piece]) -> None:
    """The layer's own start, for what of ``wanted`` has no values. Counters have no NaN: they always start anew."""
    own = _own_tensors(layer)
    blank = [leaf for leaf in wanted if not own[leaf].is_floating_point() or local(own[leaf]).isnan().any()]
    if not blank or not hasattr(layer, "reset_parameters"):
        return
    twin: Any = _twin(prefix, layer, pieces)  # a reset changes all that the layer has, also what was loaded
    torch.default_generator.manual_seed(seed)
    twin.reset_parameters()
    published: Callable[[str, nn.Module], None] | None = getattr(model, "published_start", None)
    if published is not None:
        published(prefix, twin)
    drawn = _own_tensors(twin)
    for leaf in blank:
        local(own[leaf]).copy_(_box(prefix, leaf, own[leaf], pieces).of(drawn[leaf]))


def _twin(prefix: str, layer: nn.Module, pieces: Mapping[str, Piece]) -> nn.Module:
    """A whole layer to draw in: on the CPU, in float32: torch draws other numbers elsewhere, and in float64."""

    def whole(leaf: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return torch.zeros(_box(prefix, leaf, tensor, pieces).shape, dtype=kind)

    twin = copy.copy(layer)
    parameters = {leaf: whole(leaf, p) for leaf, p in layer._parameters.items()}
    twin._parameters = {leaf: None if p is None else nn.Parameter(p) for leaf, p in parameters.items()}
    twin._buffers = {leaf: whole(leaf, buffer) for leaf, buffer in layer._buffers.items()}
    return twin


def _box(prefix: str, leaf: str, tensor: Tensor, pieces: Mapping[str, Piece]) -> Piece:
    return box_of(pieces, f"{prefix}.{leaf}".lstrip("."), tensor)


def _apply(
    prefix: str, layer: nn.Module, wanted: list[str], scheme: str, section: Init, seed: int, pieces: Mapping[str, Piece]
) -> None:
    """Draw the layer's weight matrices."""
    own = _own_tensors(layer)
    for leaf in wanted:
        if leaf != "weight" and not leaf.startswith(("weight_ih", "weight_hh")):
            continue
        piece = _box(prefix, leaf, own[leaf], pieces)
        wide = torch.empty(piece.shape)
        torch.default_generator.manual_seed(seed_of(seed, f"{prefix}.{leaf}".lstrip(".")))
        gates = len(wide) // layer.hidden_size if isinstance(layer, nn.RNNBase | nn.RNNCellBase) else 1
        draw(wide, scheme, section.nonlinearity, gates)
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.padding_idx is not None:
            wide[layer.padding_idx] = 0
        local(own[leaf]).copy_(piece.of(wide))


def draw(weight: Tensor, scheme: str, nonlinearity: Nonlinearity, gates: int = 1) -> None:
    """Fill a weight by one of ``torch.nn.init``'s schemes with the gain of what follows; fan in for Kaiming's.

    Args:
        gates: so many matrices lie one below the other; orthogonal makes each orthogonal (Saxe et al. 2014).
    """
    gain = nn.init.calculate_gain(nonlinearity)
    if scheme.startswith("xavier"):
        (nn.init.xavier_uniform_ if scheme == "xavier_uniform" else nn.init.xavier_normal_)(weight, gain)
    elif scheme.startswith("kaiming"):
        kaiming = nn.init.kaiming_uniform_ if scheme == "kaiming_uniform" else nn.init.kaiming_normal_
        kaiming(weight, a=0.01, nonlinearity=nonlinearity)  # the slope counts for leaky_relu only; torch's default there
    else:
        assert scheme == "orthogonal"
        for gate in weight.chunk(gates):
            nn.init.orthogonal_(gate, gain)


def _summary(section: Init, schemes: dict[str, str], names: set[str], seed: int) -> str:
    if not names:
        return "nothing to draw: every value is there already"
    by_scheme: dict[str, list[str]] = {}
    for kind, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(kind)
    parts = [f"{', '.join(kinds)}: {scheme} ({section.nonlinearity})" for scheme, kinds in by_scheme.items()]
    return "; ".join([*parts, "others: the layer's own" if parts else "each layer's own", f"seed {seed}"])
