"""Optimizers from torch, over groups of parameters with settings of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.recipe import SGD, Adadelta, Adagrad, Adam, AdamW, InputError, Optimizer, RMSProp, TorchOptimizer, nearest
from trainwright.recipe import Group as GroupSection

Named = tuple[str, nn.Parameter]
Kind = Callable[..., torch.optim.Optimizer]

KINDS: dict[type[Optimizer], Kind] = {
    AdamW: torch.optim.AdamW,
    Adam: torch.optim.Adam,
    SGD: torch.optim.SGD,
    RMSProp: torch.optim.RMSprop,
    Adagrad: torch.optim.Adagrad,
    Adadelta: torch.optim.Adadelta,
}
REFUSED = {
    "Optimizer": "is only what the others are made from",
    "LBFGS": "evaluates the loss several times a step, which the training loop doesn't",
    "SparseAdam": "takes sparse gradients only",
}
OURS = {"params", "lr", "weight_decay", "foreach", "fused", "differentiable", "capturable"}
ELSEWHERE = {"lr": "optimizer.learning_rate", "weight_decay": "optimizer.weight_decay"}

# Where torch has fused kernels: asking for them elsewhere fails in the first step only.
FUSED: dict[Kind, tuple[str, ...]] = {
    torch.optim.AdamW: ("cpu", "cuda", "mps"),
    torch.optim.Adam: ("cpu", "cuda", "mps"),
    torch.optim.SGD: ("cpu", "cuda", "mps"),
    torch.optim.Adagrad: ("cpu", "cuda"),
}
FUSED_DTYPES = {torch.float32, torch.float64, torch.float16, torch.bfloat16}
SMALL = 8192  # elements of a parameter; measured on a CPU with tensors from 32 x 32 to 512 x 512


def parameter_groups(
    named: Iterable[Named], section: Optimizer, plain: Sequence[str] = (), copies: Mapping[str, str] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """The trainable parameters, by the settings that they get.

    Weight decay is on matrices (and larger) only, not on vectors, that is norms and biases, unless a group of the recipe
    states one for all its members. The first group that matches a parameter counts.

    Args:
        plain: all trainable names, where this process has only some of the parameters; patterns are held against these.
        copies: names here to those in ``plain``, where they differ.

    Returns:
        Groups with params, names, weight_decay, and peak, the learning rate that the schedule multiplies; none is empty.
        What no group of the recipe matches comes first, then the groups of the recipe in their order.

    Raises:
        InputError: no parameter is trainable; a pattern matches none; a group is left without any by those before it.
    """
    trainable = [(name, p) for name, p in named if p.requires_grad]
    if not trainable:
        raise InputError("nothing to train: every parameter is frozen; see the section adapt")
    names = list(plain) or [name for name, _ in trainable]
    chosen = dict(zip(names, _choose(names, section.groups), strict=True))
    groups = []
    for index, settings in enumerate([None, *section.groups], start=-1):
        members = [pair for pair in trainable if chosen[copies.get(pair[0], pair[0])] == index]
        groups += _split(members, settings, section)
    return groups


def _choose(names: Sequence[str], groups: Sequence[GroupSection]) -> list[int]:
    """For each name the index of the group that counts; -1: none matches."""
    for index, group in enumerate(groups):
        for pattern in group.match:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise InputError(
                    f"optimizer.groups[{index}].match: pattern {pattern!r} matches none of {len(names)} trainable parameters"
                    f"{_near(pattern, names)}; they look like {names[0]!r}; * matches anything"
                )
    chosen = [next((index for index, group in enumerate(groups) if _matches(name, group)), -1) for name in names]
    for index in range(len(groups)):
        if index not in chosen:
            raise InputError(
                f"optimizer.groups[{index}] has no effect: earlier groups match all its parameters, and the first one counts; "
                "put it before them"
            )
    return chosen


def _matches(name: str, group: GroupSection) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in group.match)


def _near(pattern: str, names: Sequence[str]) -> str:
    parts = {part for name in names for part in (name, *name.split("."))}
    return nearest(pattern.strip("*."), sorted(parts))


def _split(members: list[Named], settings: GroupSection | None, section: Optimizer) -> list[dict[str, Any]]:
    """The group or two that members of one group of the recipe make: with weight decay, and without."""
    own_rate = settings.learning_rate if settings else None
    own_decay = settings.weight_decay if settings else None

    def decay(p: nn.Parameter) -> float:
        if own_decay is not None:
            return own_decay
        return section.weight_decay if p.ndim >= 2 else 0.0

    kinds = (
        [members] if own_decay is not None else [[m for m in members if (m[1].ndim >= 2) is large] for large in (True, False)]
    )
    return [
        {
            "params": [p for _, p in kind],
            "names": [name for name, _ in kind],
            "weight_decay": decay(kind[0][1]),
            "peak": section.learning_rate if own_rate is None else own_rate,
        }
        for kind in kinds
        if kind
    ]


def make_optimizer(
    groups: list[dict[str, Any]], section: Optimizer, instead_of: Sequence[Tensor] | None = None
) -> torch.optim.Optimizer:
    """torch's optimizer, in its fastest implementation for these parameters.

    Each group begins with its peak learning rate; the loop sets ``lr`` before each step.

    Args:
        groups: as ``parameter_groups`` gives them.
        instead_of: the parameters that choose the implementation, where those of the groups only stand in for them.

    Raises:
        InputError: ``torch`` with a class or arguments that torch.optim doesn't have, or that don't suit the parameters.
    """
    started = [{**group, "lr": group["peak"]} for group in groups]
    fast = _implementation(_kind(section), instead_of or [p for group in groups for p in group["params"]])
    if isinstance(section, TorchOptimizer):
        return _from_torch(started, section, fast)
    arguments = section.model_dump(exclude={"name", "learning_rate", "weight_decay", "groups"})
    return _kind(section)(started, lr=section.learning_rate, **arguments, **fast)


def _kind(section: Optimizer) -> Kind:
    """The class of torch.optim."""
    if not isinstance(section, TorchOptimizer):
        return KINDS[type(section)]
    if reason := REFUSED.get(section.type):
        raise InputError(f"optimizer.type: {section.type} {reason}; choose another class of torch.optim, such as NAdam")
    known = {name: kind for name, kind in vars(torch.optim).items() if _usable(name, kind)}
    if section.type not in known:
        lower = {name.lower(): name for name in known}
        meant = lower.get(section.type.lower())
        near = f" (did you mean {meant!r}?)" if meant else nearest(section.type, known)
        raise InputError(f"optimizer.type: torch.optim has no {section.type!r}{near}; it has {', '.join(sorted(known))}")
    return known[section.type]


def _usable(name: str, kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in REFUSED


def _from_torch(groups: list[dict[str, Any]], section: TorchOptimizer, fast: dict[str, bool]) -> torch.optim.Optimizer:
    kind = _kind(section)
    _check_arguments(kind, section, any(group["weight_decay"] for group in groups))
    _try_arguments(kind, section)
    try:
        return kind(groups, lr=section.learning_rate, **section.arguments, **fast)
    except (ValueError, TypeError, RuntimeError) as error:  # Muon takes matrices only
        raise InputError(f"optimizer.type: {section.type} doesn't suit these parameters: {error}") from None


def _check_arguments(kind: Kind, section: TorchOptimizer, decays: bool) -> None:
    parameters = inspect.signature(kind).parameters
    known = [name for name in parameters if name not in OURS]
    for name in section.arguments:
        if name in ELSEWHERE:
            raise InputError(f"optimizer.arguments.{name}: set {ELSEWHERE[name]} instead")
        if name not in known:
            raise InputError(
                f"optimizer.arguments.{name}: {section.type} has no such argument{nearest(name, known)}; "
                f"it takes {', '.join(known)}"
            )
    if decays and "weight_decay" not in parameters:
        raise InputError(f"optimizer.weight_decay has no effect: {section.type} has none; set it to 0")


def _try_arguments(kind: Kind, section: TorchOptimizer) -> None:
    """A step with a parameter of its own: some classes look at their arguments only then."""
    probe = nn.Parameter(torch.ones(2, 2))
    probe.grad = torch.ones(2, 2)
    try:
        kind([probe], lr=section.learning_rate, **section.arguments).step()
    except Exception as error:  # whatever torch makes of a user's values
        raise InputError(f"optimizer.arguments: {section.type} refuses them: {error}") from None


def _implementation(kind: Kind, parameters: Sequence[Tensor]) -> dict[str, bool]:
    """Arguments that choose among fused, foreach and the plain for-loop, which compute the same.

    On a CPU foreach saves Python's time a tensor but goes through memory once an operation, so it wins with small tensors.
    """
    accepted = inspect.signature(kind).parameters
    if "fused" in accepted and all(_fusable(kind, p) for p in parameters):
        return {"fused": True}
    if "foreach" not in accepted:
        return {}
    small = sum(p.numel() for p in parameters) < SMALL * len(parameters)
    return {"foreach": small or all(p.device.type != "cpu" for p in parameters)}


def _fusable(kind: Kind, p: Tensor) -> bool:
    return p.device.type in FUSED.get(kind, ()) and p.dtype in FUSED_DTYPES


def clip_(parameters: list[nn.Parameter], largest: float | None) -> Tensor:
    """Scale the gradients so that their global 2-norm is at most ``largest``; gives the norm before, 0-dim float32."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = total_norm(gradients)
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The global 2-norm, 0-dim; in float32 at least: one in bfloat16 has three digits."""
    if all(g.dtype in (torch.float32, torch.float64) for g in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    kinds = [[g for g in gradients if g.dtype == dtype] for dtype in dict.fromkeys(g.dtype for g in gradients)]
    wide = torch.promote_types(kinds[0][0].dtype, torch.float32)
    return torch.linalg.vector_norm(torch.stack([n for kind in kinds for n in torch._foreach_norm(kind, 2.0, dtype=wide)]))
