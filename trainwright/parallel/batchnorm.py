"""BatchNorm whose statistics are those of the whole micro-batch, each part of which another process has.

torch's SyncBatchNorm is for GPUs alone; this one is for any device, with torch's own kernels for what each process computes.
They read bfloat16 in either memory format and compute in float32, so that nothing is widened in memory.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainwright.models.contract import Change
from trainwright.parallel.mesh import Axis

PORTION = 2**16  # numbers of a thread's portion: with two copies in float32 it stays in a second-level cache


class _Shared(nn.modules.batchnorm._BatchNorm):
    """Before a BatchNorm class: statistics over the processes of ``group``, while training."""

    group: dist.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, squares, count = _Normalise.apply(x, self.weight, self.bias, self.eps, self.group)
        if self.running_mean is not None:
            self._follow(mean, squares, count)
        return cast(Tensor, y)

    @torch.no_grad()
    def _follow(self, mean: Tensor, squares: Tensor, count: Tensor) -> None:
        """Update the running statistics as torch does, with the unbiased variance."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((squares / (count - 1)).to(self.running_var.dtype), momentum)


class SharedBatchNorm1d(_Shared, nn.BatchNorm1d):
    """Of (n, channels) or (n, channels, length)."""


class SharedBatchNorm2d(_Shared, nn.BatchNorm2d):
    """Of images."""


class SharedBatchNorm3d(_Shared, nn.BatchNorm3d):
    """Of volumes."""


SHARED: dict[type[nn.Module], type[_Shared]] = {
    nn.BatchNorm1d: SharedBatchNorm1d,
    nn.BatchNorm2d: SharedBatchNorm2d,
    nn.BatchNorm3d: SharedBatchNorm3d,
}


def apply(model: nn.Module, axis: Axis) -> Change | None:
    """Let every BatchNorm that learns take its statistics over the processes of an axis; None if there is none.

    All processes call the model the same number of times in training mode, also with a part of a batch that is empty. The
    class of a layer is changed, so that names stay. Gradients of the layer's parameters are of this process's samples.
    """
    names = [name for name, module in model.named_modules() if type(module) in SHARED]
    if axis.group is None or not names:
        return None
    group = _aside(axis.group)
    for name in names:
        module = model.get_submodule(name)
        module.__class__ = SHARED[type(module)]
        cast(_Shared, module).group = group
    return Change("batchnorm", f"{len(names)} BatchNorm layers share statistics over {axis.size} processes", tuple(names))


def _aside(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The same processes, with threads and connections of their own where that matters; all of them call it.

    gloo does one thing after another, so statistics, for which a backward waits, would queue behind the gradients of layers.
    """
    if dist.get_backend(group) != "gloo":
        return group
    members, options = dist.get_process_group_ranks(group), group._get_backend(torch.device("cpu")).options
    made = dist.new_group(members, options._timeout, "gloo", use_local_synchronization=True)
    return cast(dist.ProcessGroup, made)


class _Normalise(torch.autograd.Function):
    """Normalise (n, channels, ...) by mean and variance over all processes; also gives mean, squares and count.

    Means and sums of squared deviations are put together as in Chan, Golub and LeVeque 1983: no difference of large sums.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, squares, count = _moments(x, group)
        if not mean.is_cuda and count <= 1:  # on a GPU to look would be to wait
            raise ValueError(f"Expected more than 1 value per channel when training, got {int(count)} over all processes")
        variance = squares / count
        scale, shift = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
        y = nn.functional.batch_norm(x, mean, variance, scale, shift, False, 0.0, eps) if len(x) else x.clone()
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, squares, count)
        return y, mean, squares, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, mean, variance, count = ctx.saved_tensors
        # Kernels are slow where the orders in memory differ.
        grad = grads[0] if grads[0].stride() == x.stride() else torch.empty_like(x).copy_(grads[0])
        d_weight, d_bias = _own_sums(grad, x, mean, variance, ctx.eps)
        means = torch.stack([d_bias, d_weight]) / count
        dist.all_reduce(means, group=ctx.group)
        needs = ctx.needs_input_grad
        d_x = _through_statistics(grad, x, weight, mean, variance, ctx.eps, means) if needs[0] else None
        return d_x, d_weight if needs[1] else None, d_bias if needs[2] else None, None, None


def _moments(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (channels,), sum of squared deviations from it (channels,), values per channel (0-dim), over all processes."""
    channels, wide = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    own = x.new_zeros(2 * channels + 1, dtype=wide)
    if len(x):
        mean, variance = _own_moments(x, own[:channels])
        own = torch.cat([mean, variance * (x.numel() // channels), own.new_full((1,), x.numel() // channels)])
    every = own.new_empty(group.size(), len(own))
    dist.all_gather_single(every.view(-1), own, group=group)
    means, squares, counts = every.split([channels, channels, 1], 1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    return mean, (squares + counts * (means - mean).square()).sum(0), count


def _own_moments(x: Tensor, unused: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (channels,) of this process's values, in the dtype of ``unused``, (channels,)."""
    if x.is_cpu:
        return torch.batch_norm_update_stats(x, unused, unused.clone(), 0.0)
    variance, mean = torch.var_mean(x.to(unused.dtype), [dim for dim in range(x.ndim) if dim != 1], correction=0)
    return mean, variance


def _own_sums(grad: Tensor, x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Sums (channels,) over this process's values: of the gradient times the normalised input, and of the gradient."""
    if not len(x):
        return torch.zeros_like(mean), torch.zeros_like(mean)
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        grad, x, torch.ones_like(mean), mean, variance, None, None, False, eps, [False, True, True]
    )
    return products, sums


def _through_statistics(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, variance: Tensor, eps: float, means: Tensor
) -> Tensor:
    """The gradient of the input: that of the output without its parts along a constant and the normalised input, scaled.

    torch has no kernel for it; so it is done in portions that stay in the cache, in the statistics' dtype, and rounded once.

    Args:
        means: (2, channels), over all processes: of the output's gradient, and of it times the normalised input.
    """
    scale = torch.rsqrt(variance + eps)
    factor = scale if weight is None else scale * weight.to(scale.dtype)
    slope = -factor * scale * means[1]
    shift = -(factor * means[0] + slope * mean)
    d_x = torch.empty_like(x)
    tensors = _by_rows(x, grad, d_x)
    first = tensors[0]
    factor, slope, shift = (t.view(-1, *[1] * (first.ndim - 2)) for t in (factor, slope, shift))
    count = max(1, PORTION * torch.get_num_threads() // max(1, math.prod(first.shape[1:]))) if x.is_cpu else max(1, len(x))
    wide = [torch.empty_like(first[:count], dtype=scale.dtype) for _ in range(2)]
    for x_part, grad_part, out in zip(*(t.split(count) for t in tensors), strict=True):
        total, term = (t[: len(x_part)] for t in wide)
        torch.addcmul(shift, total.copy_(x_part), slope, out=total)
        out.copy_(total.addcmul_(term.copy_(grad_part), factor))
    return d_x


def _by_rows(*tensors: Tensor) -> list[Tensor]:
    """As (values, channels) if that is their order in memory, so that portions may have any size; else as they are."""
    turned = [t.movedim(1, -1) for t in tensors]
    return [t.flatten(0, -2) for t in turned] if all(t.is_contiguous() for t in turned) else list(tensors)
