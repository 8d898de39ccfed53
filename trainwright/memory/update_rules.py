"""What the settings of updates in portions ask for, and what excludes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trainwright.memory import eight_bit
from trainwright.models.contract import Change
from trainwright.recipe import InputError, Memory, Recipe, TorchOptimizer

PLAIN = {"optimizer_states": "plain", "optimizer_offload": "none", "optimizer_in_backward": False}


def asked(section: Memory) -> list[str]:
    """The settings that aren't plain, as ``memory.KEY: VALUE``."""
    given = {key: getattr(section, key) for key, plain in PLAIN.items() if getattr(section, key) != plain}
    return [f"memory.{key}: {str(value).lower()}" for key, value in given.items()]


def needed(section: Memory, parameters: Iterable[Tensor]) -> bool:
    """Whether torch's optimizer alone won't do."""
    return bool(asked(section)) or any(p.dtype == torch.bfloat16 for p in parameters)


def check(recipe: Recipe) -> None:
    """Raises InputError where another setting of the recipe excludes one."""
    found = asked(recipe.memory)
    if found and recipe.parallel.engine == "deepspeed":
        other = "parallel.offload_optimizer: true" if recipe.memory.optimizer_offload == "cpu" else "parallel.engine: torch"
        raise InputError(f"{found[0]}, but DeepSpeed keeps optimizer states its own way; set {other} instead")
    kind = recipe.optimizer.type if isinstance(recipe.optimizer, TorchOptimizer) else ""
    if kind in TorchOptimizer.WHOLE_MATRICES and (found or recipe.precision == "pure_bf16"):
        raise InputError(
            f"{(found or ['precision: pure_bf16'])[0]}, but {kind} looks at whole matrices, and updates are made in portions; "
            f"take another optimizer, such as adamw, or leave that out"
        )
    if recipe.memory.optimizer_in_backward:
        _check_in_backward(recipe)


def _check_in_backward(recipe: Recipe) -> None:
    """A gradient may be used up as it arrives if it is all there, and nothing else must be known first."""
    key = "memory.optimizer_in_backward: each gradient is used up as it arrives"
    parallel = recipe.parallel
    if recipe.training.clip_norm is not None:
        raise InputError(
            f"{key}, but training.clip_norm: {recipe.training.clip_norm:g} needs the norm of all of them first; "
            "set training.clip_norm: null"
        )
    for name, value in (("data", parallel.data), ("tensor", parallel.tensor), ("pipeline", parallel.pipeline)):
        if value not in (1, "auto"):
            raise InputError(
                f"{key}, but with parallel.{name}: {value} it isn't whole yet: processes sum it afterwards; "
                "use one process, or leave optimizer_in_backward out (parallel.zero: 2 keeps a part of the gradients only)"
            )


def check_portions(recipe: Recipe, micro_batches: int, processes: int) -> None:
    """The same, where it must be known how batches and model are divided."""
    if not recipe.memory.optimizer_in_backward:
        return
    key = "memory.optimizer_in_backward: each gradient is used up as it arrives"
    if processes > 1:
        raise InputError(f"{key}, but {processes} processes sum it afterwards; use one, or leave optimizer_in_backward out")
    if micro_batches > 1:
        raise InputError(
            f"{key}, but a step sums those of {micro_batches} micro-batches; set training.micro_batch_size: "
            f"{recipe.training.batch_size} (the whole batch), or leave optimizer_in_backward out"
        )


def check_states(section: Memory, kind: str, keys: Sequence[str]) -> None:
    """Raises InputError where a setting has no states to work on, or wrong ones."""
    for key in ("optimizer_states", "optimizer_offload"):
        value = getattr(section, key)
        if value != PLAIN[key] and not keys:
            raise InputError(f"memory.{key}: {value} has no effect: {kind} keeps no states with these settings; leave it out")
    if section.optimizer_states == "8bit" and (others := set(keys) - eight_bit.SIGNED - eight_bit.UNSIGNED):
        raise InputError(
            f"memory.optimizer_states: 8bit, but {kind} keeps {', '.join(sorted(others))}, which 8 bits don't suit: they are "
            "for means of gradients and of their squares; set plain, or take another optimizer, such as adamw"
        )


def described(section: Memory, parameters: Sequence[Tensor]) -> Change:
    """What is done, in words."""
    rounded = sum(p.numel() for p in parameters if p.dtype == torch.bfloat16)
    device = parameters[0].device.type
    places = {"none": "", "cpu": "in the CPU's memory", "disk": "in a file"}
    where = places[section.optimizer_offload] + (
        ", where the model is, too" if (section.optimizer_offload, device) == ("cpu", "cpu") else ""
    )
    said = [
        "states " + " ".join(filter(None, ("in 8 bits" if section.optimizer_states == "8bit" else "in float32", where))),
        "updated while the backward runs" if section.optimizer_in_backward else "",
        f"{rounded:,} bfloat16 parameters rounded stochastically" if rounded else "",
    ]
    return Change("optimizer", "; ".join(filter(None, said)))
