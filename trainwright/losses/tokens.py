"""Cross-entropy of the next token as (sum, count), so that means are exact under accumulation and over any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from trainwright import widened
from trainwright.recipe import CrossEntropy

CHUNK = 256  # rows of logits that exist at once: 256 x 49,152 in bfloat16 is 25 MB
CHUNK_LEARNING_HEAD = 1024  # more where the head learns: each chunk costs a pass over its float32 gradient
STRIDE = 64  # rows are padded to a multiple of it: a new size of logits each time would leave the heap in pieces


Split = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shard:
    """Where this process's rows of the head stand: from ``first`` on, of ``vocabulary``; the group has the others."""

    first: int
    vocabulary: int
    group: dist.ProcessGroup


def token_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    section: CrossEntropy,
    split: Split | None = None,
    shard: Shard | None = None,
) -> tuple[Tensor, int]:
    """Cross-entropy of the next token, its logits made a chunk at a time and only where a label is.

    Args:
        hidden: (rows, length, size), the states after the last norm.
        weight: (vocabulary, size), the head; its gradient is accumulated in float32. Where it has fewer bits than ``hidden``,
            it is widened a part at a time.
        labels: (rows, length) int64; -100 where nothing is predicted.
        split: ``split_softmax``, or the same compiled.
        shard: where ``weight`` is a part of the head's rows. Every process of the group has the same hidden states and labels
            and gets the same sum; of hidden's gradient each gets the part that comes from its rows, to be summed.

    Returns:
        The sum over the supervised positions (0-dim float32, differentiable in hidden and weight) and their number.
    """
    supervised = labels.flatten().ne(-100).nonzero().squeeze(1)
    index = pad(supervised, (0, -len(supervised) % STRIDE))
    counts = torch.arange(len(index), device=index.device) < len(supervised)
    rows = hidden.flatten(0, -2).index_select(0, index)
    targets = labels.flatten().index_select(0, index).clamp(min=0)
    total = _ChunkedCrossEntropy.apply(
        rows, weight, targets, counts, section.label_smoothing, section.z_loss, split or split_softmax, shard
    )
    return total, len(supervised)


def logits_cross_entropy(logits: Tensor, labels: Tensor, section: CrossEntropy) -> tuple[Tensor, int]:
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
    """The gradients are made in the forward, while a chunk's logits are at hand; the backward only scales them.

    With E = exp(logits - max), s its row sums, L = logsumexp, a = (1 + 2 z L) / s and e the label smoothing over V classes,

        loss of a row  = L - (1 - e) logit[target] - e mean(logits) + z L^2
        d loss/d rows  = a (E W) - (1 - e) W[target] - e mean(W)
        d loss/d W     = E' (a rows) - (1 - e) rows at the targets - e / V sum(rows)

    so that the softmax is never divided out nor the target subtracted over the whole vocabulary: that is left to small tensors.
    Rows that don't count (padding) have every term times zero.

    Of a shard, E, s and W are its own, L is of all shards, and a gets the factor exp(own logsumexp - L).
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        counts: Tensor,
        smoothing: float,
        z_loss: float,
        split: Split,
        shard: Shard | None,
    ) -> Tensor:
        need_rows, need_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(rows.dtype, torch.float32)
        head = weight if widened.narrower(weight.dtype, rows.dtype) else weight.to(rows.dtype)
        vocabulary = shard.vocabulary if shard else len(head)
        mean_head = widened.total(head, wide) / vocabulary if smoothing else None
        total = torch.zeros((), dtype=wide, device=rows.device)
        d_rows = torch.empty_like(rows) if need_rows else None
        d_head = torch.zeros_like(weight, dtype=wide) if need_weight else None
        size = CHUNK_LEARNING_HEAD if need_weight else CHUNK
        if widened.narrower(head.dtype, rows.dtype):  # who keeps it so has little memory
            size = max(STRIDE, size * head.element_size() // rows.element_size())
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            chunk, target, real = rows[part], targets[part], counts[part, None].to(wide)
            exps = widened.scores(chunk, head)
            mine, target = (real, target) if shard is None else _mine(real, target, shard, len(head))
            picked = exps.gather(1, target[:, None]).squeeze(1).to(wide)
            own, sums = split(exps)
            mean = chunk.to(wide) @ mean_head if mean_head is not None else None
            lse, picked, mean = (own, picked, mean) if shard is None else _whole(own, picked * (mine[:, 0] > 0), mean, shard)
            # NOTE: sums, not products of vectors, which autocast would make in bfloat16.
            total += ((lse - (1 - smoothing) * picked + z_loss * lse.square()) * real.squeeze(1)).sum()
            share = 1 / sums if shard is None else (own - lse).exp() / sums
            factor = ((1 + 2 * z_loss * lse) * share)[:, None] * real
            if mean is not None:
                total -= (smoothing * mean * real.squeeze(1)).sum()
            if d_rows is not None:
                gradient = factor * widened.mixture(exps, head).to(wide) - (1 - smoothing) * mine * head[target].to(wide)
                d_rows[part] = gradient if mean_head is None else gradient - smoothing * real * mean_head
            if d_head is not None:
                d_head += exps.T @ (factor * chunk).to(rows.dtype)
                d_head.index_add_(0, target, mine * chunk.to(wide), alpha=smoothing - 1)
                if mean_head is not None:
                    d_head -= smoothing / vocabulary * (real * chunk.to(wide)).sum(0)
        ctx.save_for_backward(d_rows, d_head)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None, None]:
        d_rows, d_head = ctx.saved_tensors
        scale = grads[0]
        rows = None if d_rows is None else d_rows * scale.to(d_rows.dtype)
        head = None if d_head is None else (d_head * scale).to(ctx.weight_dtype)
        return rows, head, None, None, None, None, None, None


def _mine(real: Tensor, target: Tensor, shard: Shard, rows: int) -> tuple[Tensor, Tensor]:
    """Of a chunk's targets, which are among this shard's rows (those that count as 1.0), and their places there."""
    local = target - shard.first
    inside = (local >= 0) & (local < rows)
    return real * inside[:, None], local * inside


def _whole(own: Tensor, picked: Tensor, mean: Tensor | None, shard: Shard) -> tuple[Tensor, Tensor, Tensor | None]:
    """logsumexp, the targets' logits and the mean logits over all shards, bitwise alike on each: one collective."""
    mine = torch.stack([own, picked] if mean is None else [own, picked, mean])
    parts = mine.new_empty(dist.get_world_size(shard.group), *mine.shape)
    dist.all_gather_single(parts.flatten(0, 1), mine, group=shard.group)
    return parts[:, 0].logsumexp(0), parts[:, 1].sum(0), None if mean is None else parts[:, 2].sum(0)


def split_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logsumexp (rows,) and the sums (rows,) of exp(logits - max), both wide; the logits (rows, classes) become those exps."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = wide.amax(-1, keepdim=True)
    exps = wide.sub_(largest).exp_()  # in place, for logits are the largest tensors of a step
    sums = exps.sum(-1)
    logits.copy_(exps)
    return largest.squeeze(-1) + sums.log(), sums
