"""Which results are dear to compute again: those of matrix products, convolutions, attention and recurrent kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy

FEW = 64  # terms of a sum that cost no more than to write it and read it again: LoRA's factors, a first convolution
# Operators by the place of the argument whose last dimension, or for a kernel all dimensions but the first, is summed over.
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::mv": 0, "aten::addmm": 1, "aten::baddbmm": 1, "aten::addmv": 1,
            "aten::linear": 0, "aten::_scaled_mm": 0}  # fmt: skip
CONVOLUTIONS = {"aten::convolution": 1, "aten::_convolution": 1}
# Our own attention, torch's kernels for it, and recurrent ones: always.
KERNELS = {
    "trainwright::packed_attention",
    "trainwright::supplied_linear",
    "torch_attn::_varlen_attn",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_attention_math_for_mps",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "aten::_cudnn_attention_forward",
    "aten::mkldnn_rnn_layer",
    "aten::_cudnn_rnn",
    "aten::miopen_rnn",
    "aten::_lstm_mps",
    "aten::_thnn_fused_lstm_cell",
    "aten::_thnn_fused_gru_cell",
}


def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What becomes of an operator's result, for ``torch.utils.checkpoint.create_selective_checkpoint_contexts``."""
    keep = is_dear(operator, args) and not _draws(operator, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def is_dear(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether it costs more to compute the result again than to keep it."""
    schema = getattr(operator, "_schema", None)
    name = schema.name if schema is not None else ""
    if name in PRODUCTS:
        return bool(args[PRODUCTS[name]].shape[-1] >= FEW)
    if name in CONVOLUTIONS:
        return bool(args[CONVOLUTIONS[name]][0].numel() >= FEW)
    return name in KERNELS


def _draws(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a kernel drops something itself: left out in a second forward, it would move all later masks."""
    if torch.Tag.nondeterministic_seeded not in operator.tags:
        return False
    given = {argument.name: value for argument, value in zip(operator._schema.arguments, args, strict=False)} | kwargs
    return bool(given.get("dropout_p") or given.get("dropout"))
