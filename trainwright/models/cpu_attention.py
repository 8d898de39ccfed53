"""Exact causal attention inside packed documents on the CPU, by a C++ kernel that is compiled when first asked for.

The algorithm stands in ``cpu_attention.cpp``; here is the differentiable operator. ``torch.compile`` sees one opaque operator.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainwright import native

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether the kernel can be used here. The first call builds it (some seconds) if need be; a failure is logged."""
    return _load()[0] is not None


def reason() -> str:
    """Why the kernel is not available, empty if it is."""
    return _load()[1]


def supports(q: Tensor) -> bool:
    """Whether ``packed_attention`` takes such queries: on the CPU, float32 or bfloat16, head_dim 16, 32, ... 256."""
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16)
        and q.shape[-1] % 16 == 0
        and 16 <= q.shape[-1] <= 256
    )


def packed_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """Each token attends to itself and the earlier tokens of its document. Differentiable once, in q, k and v.

    Any strides are fine and nothing is copied as long as the last dimension is contiguous. The result and the
    gradients lie in memory as (rows, length, KV heads, ...), so flattening a token's heads after ``transpose(1, 2)``
    is free. Their bits depend on neither the number of threads nor the run.

    Args:
        q: (rows, KV heads, length, group, head_dim), see ``supports``; query head = KV head * group + index in it.
        k, v: (rows, KV heads, length, head_dim) in q's dtype.
        documents: (n + 1,) int32 on the CPU, ascending offsets of the documents in the flattened rows * length tokens,
            from 0 to rows * length; no document crosses the end of a row.

    Returns:
        (rows, KV heads, length, group, head_dim) in q's dtype.

    Raises:
        ValueError: shapes, dtypes or documents are not as described.
        RuntimeError: the kernel is not available.
    """
    return _forward(q, k, v, documents)[0]


# --- the operators ------------------------------------------------------------


@torch.library.custom_op("trainwright::packed_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the base-2 logarithm of each softmax's sum: float32 (rows, KV heads, length, group)."""
    _check(q, k, v, documents)
    out, lse = _empty_forward(q, k, v, documents)
    _call(False, q, (q, k, v, out), lse, documents)
    return out, lse


@torch.library.custom_op("trainwright::packed_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, documents: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, documents)
    grads = _empty_backward(grad, q, k, v, out, lse, documents)
    _call(True, q, (q, k, v, out, grad.to(q.dtype), *grads), lse, documents)
    return grads


@_forward.register_fake
def _empty_forward(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    return _token_major(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_backward.register_fake
def _empty_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, documents: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _token_major(q), _token_major(k), _token_major(v)


def _token_major(x: Tensor) -> Tensor:
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, documents = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, documents)
    ctx.mark_non_differentiable(lse)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_backward(grad, *ctx.saved_tensors), None


_forward.register_autograd(_differentiate, setup_context=_save)


def _check(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> None:
    if not supports(q):
        raise ValueError(f"q is {q.dtype} on {q.device} with head_dim {q.shape[-1]}: see cpu_attention.supports")
    expected = (*q.shape[:3], q.shape[4])
    for name, x in (("k", k), ("v", v)):
        if x.shape != expected or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}; q asks for {q.dtype} {expected} on {q.device}"
            )
    if documents.dtype != torch.int32 or documents.device.type != "cpu" or documents.dim() != 1:
        found = f"{documents.dtype} {tuple(documents.shape)} on {documents.device}"
        raise ValueError(f"documents are {found}; they must be int32 (n + 1,) on the CPU")


def _call(backward: bool, q: Tensor, tensors: Sequence[Tensor], lse: Tensor, documents: Tensor) -> None:
    function, why = _load()
    if function is None:
        raise RuntimeError(f"the CPU attention kernel is not available: {why}")
    dense = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    strides = [s for x in dense for s in (*x.stride()[:-1], 0)[:4]]  # k, v have no group
    offsets = documents.contiguous()
    rows, heads, length, group, size = q.shape
    error = function(
        backward,
        q.dtype == torch.bfloat16,
        _array(ctypes.c_int64, (rows, heads, length, group, size)),
        size**-0.5,
        _array(ctypes.c_void_p, [x.data_ptr() for x in dense]),
        _array(ctypes.c_int64, strides),
        lse.data_ptr(),
        offsets.data_ptr(),
        len(offsets) - 1,
    )
    if error:
        message = error.decode()
        raise (ValueError if message.startswith("documents") else RuntimeError)(message)


def _array(kind: Any, values: Sequence[int]) -> Any:
    return (kind * len(values))(*values)


@functools.cache
def _load() -> tuple[Any, str]:
    """The C function and "", or None and why not."""
    try:
        function = native.load(SOURCE).trainwright_attention
    except native.Unavailable as error:
        logger.warning("The CPU attention kernel is not available, attention will be slower: %s", error)
        return None, str(error)
    function.restype = ctypes.c_char_p
    pointer = ctypes.c_void_p
    function.argtypes = [ctypes.c_int, ctypes.c_int, pointer, ctypes.c_float, *[pointer] * 4, ctypes.c_int64]
    return function, ""
