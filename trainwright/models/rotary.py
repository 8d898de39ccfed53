"""Rotary position embeddings (Su et al. 2021), with the frequency scaling of Llama 3.1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainwright.recipe import InputError


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch: long wavelengths are slowed by ``factor``, short ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, frequencies: Tensor) -> Tensor:
        wavelengths = 2 * math.pi / frequencies
        turns = self.original_max_position_embeddings / wavelengths
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = blend.clamp(0.0, 1.0)
        return (1 - blend) * frequencies / self.factor + blend * frequencies


@dataclass(frozen=True)
class Rotary:
    """Angles of a position: position * theta^(-2i/d), the frequencies perhaps scaled."""

    theta: float
    scaling: Llama3Scaling | None = None
    factor: float = 1.0

    def tables(self, positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 (*positions.shape, head_dim / 2), for int64 positions."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float() / head_dim
        frequencies = 1.0 / (self.theta**exponents) / self.factor
        if self.scaling is not None:
            frequencies = self.scaling(frequencies)
        angles = positions[..., None].float() * frequencies
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + d/2) of the last dimension by their angles; computed in cos's dtype, given in x's."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def read_rotary(config: Mapping[str, Any], where: str) -> Rotary:
    """The rotary settings of a Hugging Face config, in its old form (rope_theta, rope_scaling) or new (rope_parameters)."""
    section = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(section.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = section.get("rope_type", section.get("type", "default"))
    try:
        if kind == "default":
            return Rotary(theta)
        if kind == "linear":
            return Rotary(theta, factor=float(section["factor"]))
        if kind == "llama3":
            keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            return Rotary(theta, Llama3Scaling(*(section[key] for key in keys)))
    except KeyError as error:
        raise InputError(f"{where}: rope scaling of type {kind!r} lacks {error.args[0]!r}") from None
    raise InputError(f"{where}: rope scaling of type {kind!r} is not supported; supported: default, linear, llama3")
