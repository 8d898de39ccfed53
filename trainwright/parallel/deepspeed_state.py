"""What a checkpoint holds of a model that DeepSpeed trains: whole values and optimizer states, one tensor at a time.

Every function is to be called by all ranks, and a generator to be read to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.parallel.deepspeed import Engine
from trainwright.pieces import Held, Piece


def values(engine: Engine) -> Iterator[tuple[str, Held]]:
    """Each parameter's name and whole value, frozen ones too, tied ones once; the first rank speaks for all."""
    for name, parameter in engine.model.named_parameters():
        with engine.whole([parameter]):
            yield name, _held(engine, parameter.detach())


def states(engine: Engine) -> Iterator[tuple[str, str, Held]]:
    """Each trained parameter's name with the key and whole value of each of its optimizer's states; none before a step.

    A count of steps is 0-dim.
    """
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad:
            for key in sorted(_state(engine, parameter)):
                yield name, key, _held(engine, _whole_state(engine, parameter, key))


@torch.no_grad()
def restore(
    engine: Engine, value: Callable[[str], Tensor | None], state: Callable[[str], Mapping[str, Tensor]] | None = None
) -> None:
    """Set parameters and optimizer states.

    Args:
        value: a parameter's name to its whole value; None keeps it as it is.
        state: a trained parameter's name to its optimizer's states by their keys, whole; None keeps them.
    """
    for name, parameter in engine.model.named_parameters():
        if (new := value(name)) is not None:
            _set_value(engine, parameter, new)
        if state is not None and parameter.requires_grad:
            for key, tensor in state(name).items():
                _set_state(engine, parameter, key, tensor)


def _held(engine: Engine, tensor: Tensor) -> Held:
    return Held(tensor, Piece.all_of(tuple(tensor.shape)), speaks=engine.axis.index == 0)


def _flat(engine: Engine, parameter: nn.Parameter) -> Tensor:
    """What torch's optimizer updates in the parameter's stead: this rank's part of a vector of many parameters."""
    if engine.stage == 0:
        return parameter
    zero = engine.engine.optimizer
    parts, flats = (
        (zero.fp16_groups, zero.fp32_partitioned_groups_flat)
        if engine.stage == 3
        else (zero.bit16_groups, zero.single_partition_of_fp32_groups)
    )
    return next(flat for part, flat in zip(parts, flats, strict=True) if any(p is parameter for p in part))


def _state(engine: Engine, parameter: nn.Parameter) -> dict[str, Any]:
    state: dict[str, Any] = engine.engine.basic_optimizer.state[_flat(engine, parameter)]
    return {key: value for key, value in state.items() if value is not None}


def _whole_state(engine: Engine, parameter: nn.Parameter, key: str) -> Tensor:
    flat, value = _flat(engine, parameter), torch.as_tensor(_state(engine, parameter)[key])
    if engine.stage == 0 or value.shape != flat.shape:
        return value
    _link(engine)
    return import_module("deepspeed.utils").safe_get_full_optimizer_state(parameter, key)


def _set_value(engine: Engine, parameter: nn.Parameter, new: Tensor) -> None:
    if engine.stage < 3:
        parameter.copy_(new)
        if engine.stage and parameter.requires_grad:
            import_module("deepspeed.utils").safe_set_full_fp32_param(parameter, parameter.detach())
        return
    with import_module("deepspeed").zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(new)
    if parameter.requires_grad:
        import_module("deepspeed.utils").safe_set_local_fp32_param(parameter, _part(engine, parameter, new))


def _set_state(engine: Engine, parameter: nn.Parameter, key: str, new: Tensor) -> None:
    flat = _flat(engine, parameter)
    state = engine.engine.basic_optimizer.state[flat]
    if engine.stage == 0 or new.ndim == 0:
        state[key] = new.to(flat.device if new.ndim or _counts_there(engine) else "cpu", copy=True)
        return
    if key not in state:
        state[key] = torch.zeros_like(flat)
    if engine.stage == 3:
        import_module("deepspeed.utils").safe_set_local_optimizer_state(parameter, _part(engine, parameter, new), key)
        return
    _link(engine)
    import_module("deepspeed.utils").safe_set_full_optimizer_state(parameter, new.to(flat), key)


def _link(engine: Engine) -> None:
    """Let stages 1 and 2 find the states: DeepSpeed links them once, when only the first group has any."""
    if engine.stage < 3:
        engine.engine.optimizer._hp_optimizer_states_linked = False
        engine.engine.optimizer._lazy_init_hp_params_optimizer_state()


def _counts_there(engine: Engine) -> bool:
    """Whether the optimizer wants its counts of steps on the device of the parameters."""
    return any(group.get("fused") or group.get("capturable") for group in engine.optimizer.param_groups)


def _part(engine: Engine, parameter: Any, new: Tensor) -> Tensor:
    """This rank's part of a whole tensor, as stage 3 cuts it: the last ones are padded with zeros."""
    size = parameter.ds_tensor.numel()
    vector = nn.functional.pad(new.flatten(), (0, size * engine.axis.size - new.numel()))
    return vector[size * engine.axis.index :][:size]
