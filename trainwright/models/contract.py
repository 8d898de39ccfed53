"""What techniques may know of a model: pattern matching on names, changes, a layer's weight, and how processes may share it."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import linear as multiply

from trainwright.recipe import InputError, nearest


@dataclass(frozen=True)
class Change:
    """What a technique did to a model, for the log, ``inspect`` and ``plan``."""

    technique: str
    summary: str
    names: tuple[str, ...] = field(default=())


class Chain(Protocol):
    """A model that a pipeline can cut: its forward sends one tensor through its parts, one after the other."""

    def parts(self) -> Mapping[str, int]:
        """Names of submodules in the order that data runs through them.

        With each, how often its matrices are applied to a token or sample: 1 for a linear layer, the pixels that a
        convolution makes, 0 for a lookup. Every parameter belongs to a part, and any part may become ``Absent``.
        """


class Absent(nn.Module):
    """Stands for a part of a model that another process holds: no parameters; gives its first argument back."""

    def forward(self, x: Tensor, *others: object, **named: object) -> Tensor:
        return x


def present(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those that this process holds."""
    return [module for module in modules if not isinstance(module, Absent)]


def match(patterns: Iterable[str], names: Iterable[str], what: str) -> list[str]:
    """The names that match any of the patterns, in the order of ``names``.

    Raises:
        InputError: a pattern that matches nothing, with the nearest name.
    """
    known = list(names)
    chosen: set[str] = set()
    for pattern in patterns:
        hits = fnmatch.filter(known, pattern)
        if not hits:
            leaves = {part for name in known for part in (name, name.rsplit(".", 1)[-1], *name.split("."))}
            raise InputError(
                f"{what}: pattern {pattern!r} matches none of {len(known)} names{nearest(pattern.strip('*.'), leaves)}; "
                f"they look like {known[0]!r}; * matches anything"
            )
        chosen.update(hits)
    return [name for name in known if name in chosen]


def seed_of(seed: int, name: str) -> int:
    """The seed of what is drawn for a layer or parameter: 63 bits that depend on both, so that no draw depends on another."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1


def effective_weight(linear: nn.Linear) -> Tensor:
    """The weight that the layer's product really uses, (out, in): an adapter may add to the stored one."""
    adapted: Callable[[], Tensor] | None = getattr(linear, "effective_weight", None)
    return adapted() if adapted is not None else linear.weight


def apply_all(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """The outputs of linear layers that read the same input; an adapter may share work among them."""
    together: Callable[..., Sequence[Tensor]] | None = getattr(layers[0], "apply_all", None)
    return together(layers, x) if together is not None else [layer(x) for layer in layers]


def product(linear: nn.Linear, x: Tensor) -> Tensor:
    """What the layer makes of its input, without its bias."""
    adapted: Callable[[Tensor], Tensor] | None = getattr(linear, "product", None)
    return adapted(x) if adapted is not None else multiply(x, linear.weight)


@dataclass(frozen=True)
class Stretch:
    """Neighbouring layers, by their names, between which each process may hold a part of the features.

    ``columns`` are linear layers with the same input, split by their outputs; ``row`` is the linear layer after them, split by
    its inputs; ``between`` are layers that treat each feature alone: activations, BatchNorm1d, dropout.

    after   the norm whose output the columns, and nothing else, read; None: there is one column, and its module is called
    counts  (module, attribute): numbers of heads or the like that become those of one process
    """

    columns: tuple[str, ...]
    row: str
    after: str | None = None
    between: tuple[str, ...] = ()
    counts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Vocabulary:
    """An embedding (nn.Embedding) and a head (nn.Linear), split by their rows; ``norm`` gives the hidden states between them.

    ``alone``: methods of the model that see tokens of any number: there the length is never divided.
    """

    embedding: str
    norm: str
    head: str
    alone: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorPlan:
    """How processes may share a model's products (Shoeybi et al. 2019): what its ``tensor_plan()`` gives.

    ``divided``: the model's numbers, under the names the user knows, that the number of processes must divide.
    """

    divided: Mapping[str, int]
    stretches: tuple[Stretch, ...]
    vocabulary: Vocabulary | None = None


def features_of(linear: nn.Linear) -> dict[str, tuple[str, ...]]:
    """For each parameter of a linear layer what runs along its dimensions: "out" and "in" features, or another thing."""
    adapters: Mapping[str, tuple[str, ...]] = getattr(linear, "FEATURES", {})
    known = {"weight": ("out", "in"), "bias": ("out",), **adapters}
    return {name: known[name] for name, _ in linear.named_parameters(recurse=False)}


@dataclass(frozen=True)
class Portion:
    """Of ``whole`` features this process has those from ``first`` on."""

    first: int
    whole: int


def dropout(x: Tensor, p: float, training: bool, portion: Portion | None = None) -> Tensor:
    """Dropout (..., features); of a portion, by its part of the mask that the whole would draw from the same generator."""
    if portion is None or not (training and p):
        return drop(x, p, training)
    mask = drop(x.new_ones(*x.shape[:-1], portion.whole), p)
    return x * mask.narrow(-1, portion.first, x.shape[-1])
