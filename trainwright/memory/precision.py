"""Low precision: what is stored in which dtype, and what products are made in.

bf16       products in bfloat16 under autocast; frozen weights are stored in it, trained ones keep float32 masters
fp16       the same in float16, whose gradients need a scaled loss (``scaling``)
pure_bf16  everything in bfloat16, what learns as well, so no autocast; BatchNorm alone stays in float32

An update smaller than 1/256 of a weight is lost in a bfloat16 weight; that is why what learns stays in float32, or is rounded
stochastically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from trainwright.models.contract import Change
from trainwright.recipe import InputError, RunError

Precision = Literal["fp32", "bf16", "pure_bf16", "fp16", "fp64"]
Wished = Literal["auto", "fp32", "bf16", "pure_bf16", "fp16", "fp64"]
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "pure_bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
AUTOCAST: tuple[Precision, ...] = ("bf16", "fp16")
WORDS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
# What torch and oneDNN say of an operator without a kernel for a dtype.
MISSING = ("not implemented for 'Half'", "not implemented for 'BFloat16'", "could not create a primitive")


def choose(section: Wished, device: torch.device) -> Precision:
    """What ``auto`` means on this device: bf16 where the hardware multiplies it, else fp32."""
    if section == "fp64" and device.type == "mps":
        raise InputError("precision: fp64, but Metal devices have no float64; use fp32, or run.device: cpu")
    if section != "auto":
        return section
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if device.type == "cpu" and multiplies_bfloat16() else "fp32"


def multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for it."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()


def apply(model: nn.Module, precision: Precision) -> Change:
    """Give parameters their stored dtype; on the meta device, so that loading makes no second copy."""
    if precision == "fp32":
        return Change("precision", "everything in float32")
    if precision == "fp64":
        for module in model.modules():
            _store(module, torch.float64)
        return Change("precision", "everything in float64")
    return _all_in_bfloat16(model) if precision == "pure_bf16" else _mixed(model, precision)


def slow(precision: Precision, device: torch.device) -> Change | None:
    """What to know of a precision that this processor emulates."""
    if precision in ("fp32", "fp64") or device.type != "cpu" or multiplies_bfloat16():
        return None
    word = WORDS[DTYPES[precision]]
    return Change("precision", f"this CPU has no instructions for {word}: products take many times as long as in fp32")


def _mixed(model: nn.Module, precision: Precision) -> Change:
    """What is frozen in the dtype of the products."""
    dtype, wide = DTYPES[precision], _kept_wide(model)
    frozen = [p for p in model.parameters() if not (p.requires_grad or id(p) in wide)]
    for parameter in frozen:
        parameter.data = parameter.data.to(dtype)
    count, word = sum(p.numel() for p in frozen), WORDS[dtype]
    return Change("precision", f"products in {word}, {count:,} frozen parameters stored in it; float32 masters for the rest")


def _kept_wide(model: nn.Module) -> set[int]:
    """Parameters of layers that autocast gives float32 input: torch's norms and recurrent layers refuse a mixture."""
    wide = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RNNBase)
    return {id(p) for module in model.modules() if isinstance(module, wide) for p in module.parameters(recurse=False)}


def _all_in_bfloat16(model: nn.Module) -> Change:
    """All floating-point parameters and buffers but BatchNorm's, whose kernels take float32 ones with bfloat16 input."""
    stays = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    for module in model.modules():
        if module not in stays:
            _store(module, torch.bfloat16)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad and p.dtype == torch.bfloat16)
    kept = f"; {len(stays)} norms over batches in float32" if stays else ""
    return Change("precision", f"everything in bfloat16, also {trained:,} parameters that learn, without masters{kept}")


def _store(module: nn.Module, dtype: torch.dtype) -> None:
    """Its own floating-point numbers; not by ``Module.to``, which would exchange tensors that have no values."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def context(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """What the forward and the loss run under."""
    return nullcontext() if precision in ("fp32", "fp64") else _low(precision, device)


@contextmanager
def _low(precision: Precision, device: torch.device) -> Iterator[None]:
    casting = torch.autocast(device.type, dtype=DTYPES[precision]) if precision in AUTOCAST else nullcontext()
    with with_kernels(precision, device), casting:
        yield


@contextmanager
def with_kernels(precision: Precision, device: torch.device) -> Iterator[None]:
    """Say what to do about an operator that has no kernel for a precision on this device.

    Raises:
        RunError: there was one.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RunError) or not any(sign in str(error) for sign in MISSING):
            raise
        others = "bf16 or fp32" if precision == "fp16" else "fp32"
        raise RunError(
            f"precision: {precision}, but an operator of this model has no kernel for {WORDS[DTYPES[precision]]} on this "
            f"{device.type} ({str(error).splitlines()[0]}); use {others}, or another run.device"
        ) from None


def of_inputs(precision: Precision) -> Callable[[Tensor], Tensor]:
    """What gives float32 inputs the dtype that the model takes; under autocast it takes them as they are."""
    if precision == "pure_bf16":
        return lambda inputs: inputs.to(torch.bfloat16) if inputs.is_floating_point() else inputs
    return Tensor.double if precision == "fp64" else lambda inputs: inputs
