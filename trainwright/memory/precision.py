"""Low precision: products in bfloat16 under autocast; frozen weights are stored in it, trained ones keep float32 masters.

An update smaller than 1/256 of a weight is lost in a bfloat16 weight; that is why what learns stays in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from trainwright.models.contract import Change
from trainwright.recipe import InputError

Precision = Literal["fp32", "bf16", "fp64"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def choose(section: Literal["auto", "fp32", "bf16", "fp64"], device: torch.device) -> Precision:
    """What ``auto`` means on this device: bf16 where the hardware multiplies it, else fp32."""
    if section == "fp64" and device.type == "mps":
        raise InputError("precision: fp64, but Metal devices have no float64; use fp32, or run.device: cpu")
    if section != "auto":
        return section
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device.type == "cpu":
        capable = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()
        return "bf16" if capable else "fp32"
    return "fp32"


def apply(model: nn.Module, precision: Precision) -> Change:
    """Give parameters their stored dtype; on the meta device, so that loading makes no second copy."""
    if precision == "fp32":
        return Change("precision", "everything in float32")
    if precision == "fp64":
        model.double()
        return Change("precision", "everything in float64")
    wide = _kept_wide(model)
    frozen = [p for p in model.parameters() if not (p.requires_grad or id(p) in wide)]
    for parameter in frozen:
        parameter.data = parameter.data.to(torch.bfloat16)
    count = sum(p.numel() for p in frozen)
    return Change("precision", f"products in bfloat16, {count:,} frozen parameters stored in it; float32 masters for the rest")


def _kept_wide(model: nn.Module) -> set[int]:
    """Parameters of layers that autocast gives float32 input: torch's norms and recurrent layers refuse a mixture."""
    wide = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RNNBase)
    return {id(p) for module in model.modules() if isinstance(module, wide) for p in module.parameters(recurse=False)}


def context(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """What the forward and the loss run under."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def of_inputs(precision: Precision) -> Callable[[Tensor], Tensor]:
    """What gives float32 inputs the dtype that the model takes; under autocast it takes them as they are."""
    return Tensor.double if precision == "fp64" else lambda inputs: inputs
