"""Losses as (sum, count), so that means are exact under accumulation and over any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainwright.recipe import Loss

CHUNK = 256  # rows of logits that exist at once: 256 x 49,152 in float32 is 50 MB


def token_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, section: Loss) -> tuple[Tensor, int]:
    """Cross-entropy of the next token, its logits made a chunk at a time and only where a label is.

    Args:
        hidden: (rows, length, size), the states after the last norm.
        weight: (vocabulary, size), the head; its gradient is accumulated in float32.
        labels: (rows, length) int64; -100 where nothing is predicted.

    Returns:
        The sum over the supervised positions (0-dim float32, differentiable in hidden and weight) and their number.
    """
    supervised = labels.flatten().ne(-100).nonzero().squeeze(1)
    rows = hidden.flatten(0, -2).index_select(0, supervised)
    targets = labels.flatten().index_select(0, supervised)
    options = (section.label_smoothing, section.z_loss)
    return _ChunkedCrossEntropy.apply(rows, weight, targets, options), len(supervised)


def logits_cross_entropy(logits: Tensor, labels: Tensor, section: Loss) -> tuple[Tensor, int]:
    """The same from logits (rows, length, vocabulary) that a user's model has made whole."""
    supervised = labels.flatten().ne(-100).nonzero().squeeze(1)
    picked = logits.flatten(0, -2).index_select(0, supervised)
    picked = picked.to(torch.promote_types(picked.dtype, torch.float32))
    targets = labels.flatten().index_select(0, supervised)
    total = cross_entropy(picked, targets, reduction="sum", label_smoothing=section.label_smoothing)
    if section.z_loss:
        total = total + section.z_loss * picked.logsumexp(-1).square().sum()
    return total, len(supervised)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward, while a chunk's logits are at hand; the backward only scales them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, options: tuple[float, float]) -> Tensor:
        need_rows, need_weight = ctx.needs_input_grad[:2]
        head = weight.to(rows.dtype)
        total = torch.zeros((), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
        d_rows = torch.empty_like(rows) if need_rows else None
        d_head = torch.zeros_like(weight) if need_weight else None
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            logits = chunk @ head.T
            loss, d_logits = loss_and_gradient(logits, targets[start : start + CHUNK], *options)
            total += loss
            if d_rows is not None:
                torch.mm(d_logits, head, out=d_rows[start : start + CHUNK])
            if d_head is not None:
                d_head += d_logits.T @ chunk
        ctx.save_for_backward(*(g for g in (d_rows, d_head) if g is not None))
        ctx.need = (need_rows, need_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        saved = list(ctx.saved_tensors)
        d_rows = saved.pop(0) if ctx.need[0] else None
        d_head = saved.pop(0) if ctx.need[1] else None
        scale = grads[0]
        return (
            None if d_rows is None else d_rows * scale.to(d_rows.dtype),
            None if d_head is None else d_head * scale.to(d_head.dtype),
            None,
            None,
        )


def loss_and_gradient(logits: Tensor, targets: Tensor, smoothing: float, z_loss: float) -> tuple[Tensor, Tensor]:
    """Summed loss and its gradient in the logits (rows, vocabulary), given in the logits' dtype.

    With p = softmax(logits) and L = logsumexp(logits), the loss of a row is
    L - (1 - smoothing) * logit[target] - smoothing * mean(logits) + z_loss * L^2.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = wide.logsumexp(-1)
    picked = wide.gather(1, targets[:, None]).squeeze(1)
    loss = lse - (1 - smoothing) * picked + z_loss * lse.square()
    gradient = (wide - lse[:, None]).exp() * (1 + 2 * z_loss * lse)[:, None]
    if smoothing:
        loss = loss - smoothing * wide.mean(-1)
        gradient = gradient - smoothing / logits.shape[1]
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    gradient = torch.where(is_target, gradient - (1 - smoothing), gradient)
    return loss.sum(), gradient.to(logits.dtype)
