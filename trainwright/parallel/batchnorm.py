"""BatchNorm whose statistics are those of the whole micro-batch, each part of which another process has.

torch's SyncBatchNorm is for GPUs alone; this one is for any device, with torch's own kernels for what each process computes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainwright.models.contract import Change
from trainwright.parallel.mesh import Axis


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
    for name in names:
        module = model.get_submodule(name)
        module.__class__ = SHARED[type(module)]
        cast(_Shared, module).group = axis.group
    return Change("batchnorm", f"{len(names)} BatchNorm layers share statistics over {axis.size} processes", tuple(names))


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
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, stored, mean, variance, count = ctx.saved_tensors
        weight = None if stored is None else stored.to(mean.dtype)
        grad, d_weight, d_bias = _with_constant_statistics(grads[0], x, weight, mean, variance, ctx.eps)
        means = torch.stack([d_bias, d_weight]) / count
        dist.all_reduce(means, group=ctx.group)
        scale = torch.rsqrt(variance + ctx.eps)
        factor = scale if weight is None else weight * scale
        slope = factor * scale * means[1]
        shift = slope * mean - factor * means[0]
        shape = [-1, *[1] * (x.ndim - 2)]
        grad = torch.addcmul(grad + shift.view(shape), x.to(grad.dtype), slope.view(shape), value=-1).to(x.dtype)
        needs = ctx.needs_input_grad
        d_weight, d_bias = (d if stored is None else d.to(stored.dtype) for d in (d_weight, d_bias))
        return grad, d_weight if needs[1] else None, d_bias if needs[2] else None, None, None


def _moments(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (channels,), sum of squared deviations from it (channels,), values per channel (0-dim), over all processes."""
    channels, wide = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    own = x.new_zeros(2 * channels + 1, dtype=wide)
    if len(x):
        variance, mean = torch.var_mean(x.to(wide), _all_but_channels(x), correction=0)
        own = torch.cat([mean, variance * (x.numel() // channels), own.new_full((1,), x.numel() // channels)])
    every = own.new_empty(group.size(), len(own))
    dist.all_gather_single(every.view(-1), own, group=group)
    means, squares, counts = every.split([channels, channels, 1], 1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    return mean, (squares + counts * (means - mean).square()).sum(0), count


def _with_constant_statistics(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias as if mean and variance didn't depend on the input, in the statistics' dtype."""
    if not len(x):
        return torch.zeros_like(x, dtype=mean.dtype), torch.zeros_like(mean), torch.zeros_like(mean)
    grad, x = grad.to(mean.dtype), x.to(mean.dtype)
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, mean, variance, None, None, False, eps, [True, True, True]
    )


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]
