"""The norm of a gradient that lies in parts on many processes, every number of it counted once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod

import torch
from torch import Tensor

from trainwright.parallel.collectives import largest_, sum_
from trainwright.parallel.mesh import Mesh


@dataclass(frozen=True)
class Gradient:
    """What a process has of one parameter's gradient.

    split: those of the axes ``data`` and ``tensor`` along which the processes have different parts; along the others they
        have the same values. (Along ``pipeline`` each parameter is at one place.)
    counts: False for the second place of a parameter that stands at two pipeline stages.
    """

    tensor: Tensor
    split: frozenset[str] = frozenset()
    counts: bool = True


def global_norm(gradients: Sequence[Gradient], mesh: Mesh, kind: float = 2.0) -> Tensor:
    """The 2-norm, or with ``inf`` the largest magnitude, of the whole model's gradient: 0-dim, and the same bits everywhere.

    In float32, or in float64 if a gradient is; sums of squares in float64. Every process of the mesh calls it, also one without
    gradients. Alone, without any reduction, it is ``torch.nn.utils.get_total_norm``.
    """
    assert kind in (2.0, inf)
    if mesh.size == 1:
        return torch.nn.utils.get_total_norm([g.tensor for g in gradients if g.counts], kind)
    return _largest(gradients, mesh) if kind == inf else _root_of_squares(gradients, mesh)


def clip_(gradients: Sequence[Gradient], mesh: Mesh, largest: float | None) -> Tensor:
    """Scale the local gradients so that the global 2-norm is at most ``largest``; gives the norm before."""
    norm = global_norm(gradients, mesh)
    if largest is not None and gradients:
        # As in torch.nn.utils.clip_grads_with_norm_, which takes parameters.
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([g.tensor for g in gradients], factor)
    return norm


def _root_of_squares(gradients: Sequence[Gradient], mesh: Mesh) -> Tensor:
    """Each process adds its share of what several have alike, so that one sum over all gives everyone the same bits."""
    device = _device(gradients, mesh)
    wide = _widest(device)
    total = torch.zeros((), dtype=wide, device=device)
    for split in sorted({g.split for g in gradients}, key=sorted):
        alike = prod(axis.size for name, axis in (("data", mesh.data), ("tensor", mesh.tensor)) if name not in split)
        total += _norms([g for g in gradients if g.split == split], 2.0, wide, device).square().sum() / alike
    for axis in (mesh.data, mesh.tensor, mesh.pipeline):
        sum_(total, axis)
    return total.sqrt().to(_dtype(gradients))


def _largest(gradients: Sequence[Gradient], mesh: Mesh) -> Tensor:
    """What several have alike doesn't matter here; NOTE: a reduction may lose NaN, so it has a place of its own."""
    device = _device(gradients, mesh)
    norms = _norms(gradients, inf, _widest(device), device)
    here = norms.max() if len(norms) else norms.sum()
    found = torch.stack([here.nan_to_num(0.0, inf), here.isnan().to(here.dtype)])
    for axis in (mesh.data, mesh.tensor, mesh.pipeline):
        largest_(found, axis)
    return torch.where(found[1] > 0, torch.nan, found[0]).to(_dtype(gradients))


def _norms(gradients: Sequence[Gradient], kind: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n,): of each that counts and holds anything; computed in float32 at least."""
    tensors = [g.tensor for g in gradients if g.counts and g.tensor.numel()]
    norms: list[Tensor] = []
    for own in dict.fromkeys(t.dtype for t in tensors):
        alike = [t for t in tensors if t.dtype == own]
        norms += torch._foreach_norm(alike, kind, dtype=torch.promote_types(own, torch.float32))
    return torch.stack([norm.to(dtype) for norm in norms]) if norms else torch.zeros(0, dtype=dtype, device=device)


def _dtype(gradients: Sequence[Gradient]) -> torch.dtype:
    return torch.float64 if any(g.tensor.dtype == torch.float64 for g in gradients) else torch.float32


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _device(gradients: Sequence[Gradient], mesh: Mesh) -> torch.device:
    if gradients:
        return gradients[0].tensor.device
    assert mesh.devices is not None
    return torch.device(mesh.devices.device_type)
