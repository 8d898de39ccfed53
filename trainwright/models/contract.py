"""What techniques may know of a model: pattern matching on names, changes, and the effective weight of a layer."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from trainwright.recipe import InputError, nearest


@dataclass(frozen=True)
class Change:
    """What a technique did to a model, for the log, ``inspect`` and ``plan``."""

    technique: str
    summary: str
    names: tuple[str, ...] = field(default=())


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


def effective_weight(linear: nn.Linear) -> Tensor:
    """The weight that the layer's product really uses, (out, in): an adapter may add to the stored one."""
    adapted: Callable[[], Tensor] | None = getattr(linear, "effective_weight", None)
    return adapted() if adapted is not None else linear.weight


def apply_all(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """The outputs of linear layers that read the same input; an adapter may share work among them."""
    together: Callable[..., Sequence[Tensor]] | None = getattr(layers[0], "apply_all", None)
    return together(layers, x) if together is not None else [layer(x) for layer in layers]
