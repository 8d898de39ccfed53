"""Causal attention inside documents that lie one behind the other in a row (packing), and over a key/value cache.

On CUDA this is PyTorch's variable-length flash kernel, on the CPU a kernel of our own (``cpu_attention``), because the backward
of PyTorch's is slow there. Everywhere else, and as the oracle, one masked SDPA.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from trainwright.models import cpu_attention


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """Each token attends to itself and the earlier tokens of its document.

    Args:
        q: (rows, KV heads, length, group, head_dim); query head = KV head * group + index in the group.
        k, v: (rows, KV heads, length, head_dim).
        documents: (n + 1,) int32 on the CPU, offsets of the documents in the flattened rows * length tokens.

    Returns:
        (rows, KV heads, length, group, head_dim), in q's dtype.
    """
    if cpu_attention.supports(q) and cpu_attention.available():
        return cpu_attention.packed_attention(q, k, v, documents)
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        return _flash_attention(q, k, v, documents)
    return masked_attention(q, k, v, documents)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """The same by one mask over everything: the plain definition, quadratic in the length."""
    rows, _, length, group, _ = q.shape
    offsets = documents.to(q.device)
    index = torch.arange(rows * length, device=q.device)
    owner = torch.searchsorted(offsets, index, right=True).view(rows, length)
    order = torch.arange(length, device=q.device)
    mask = (owner[:, :, None] == owner[:, None, :]) & (order[:, None] >= order[None, :])
    heads = q.transpose(2, 3).flatten(1, 2)
    out = scaled_dot_product_attention(heads, k, v, attn_mask=mask[:, None], enable_gqa=group > 1)
    return out.unflatten(1, (k.shape[1], group)).transpose(2, 3)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    rows, kv_heads, length, group, size = q.shape
    offsets = documents.to(q.device)
    flat_q = q.permute(0, 2, 1, 3, 4).reshape(rows * length, kv_heads * group, size)
    flat_k, flat_v = (x.transpose(1, 2).reshape(rows * length, kv_heads, size) for x in (k, v))
    out = varlen_attn(flat_q, flat_k, flat_v, offsets, offsets, length, length, window_size=(-1, 0), enable_gqa=group > 1)
    assert isinstance(out, Tensor)
    return out.view(rows, length, kv_heads, group, size).permute(0, 2, 1, 3, 4)


def cached_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last ``new`` tokens, q (rows, KV heads, new, group, head_dim), over all (rows, KV heads, seen, head_dim)."""
    new, seen, group = q.shape[2], keys.shape[2], q.shape[3]
    heads = q.transpose(2, 3).flatten(1, 2)
    order = torch.arange(seen, device=q.device)
    mask = order[None, :] <= order[seen - new :, None]
    out = scaled_dot_product_attention(heads, keys, values, attn_mask=mask, enable_gqa=group > 1)
    return out.unflatten(1, (keys.shape[1], group)).transpose(2, 3)
