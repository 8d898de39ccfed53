"""Samples with targets: what images, tables, series and arrays become before they are batched."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

Kind = Literal["images", "table", "series", "arrays"]
Target = Literal["classes", "values"]


class Inputs(Protocol):
    """Samples that are fetched by their numbers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (channels, height, width), (features,), (time, features)."""

    def __len__(self) -> int: ...

    def take(self, ids: np.ndarray) -> Tensor:
        """(len(ids), *shape), uint8 or float32, not yet normalised."""


@dataclass(frozen=True)
class InMemory:
    """Samples as one tensor, (n, *shape) uint8 or float32."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape[1:])

    def __len__(self) -> int:
        return len(self.tensor)

    def take(self, ids: np.ndarray) -> Tensor:
        return self.tensor.index_select(0, torch.from_numpy(ids))


@dataclass(frozen=True)
class Examples:
    """The samples of one split.

    targets  classes: (n,) int64. values: (n, values) float32, in the user's units. A mask each: (n, height, width) uint8.
    names    what the user knows a sample by: a file, 'row 17'
    """

    inputs: Inputs
    targets: Tensor
    names: Sequence[str]

    def __post_init__(self) -> None:
        assert len(self.inputs) == len(self.targets) == len(self.names)

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Preparation:
    """How raw input becomes the model's: fitted on the training split, saved with the model, used again by ``predict``.

    shape        of one sample
    labels       names of the classes, or of the values
    mean, std    of the inputs (of bytes: after dividing by 255), one a channel of an image, else one a feature (the last axis);
                 None: not normalised
    target_mean, target_std    of the values, one each; None: classes, or not normalised
    details      what reading new input of this kind needs besides: columns and categories, colour, size, window
    """

    kind: Kind
    shape: tuple[int, ...]
    labels: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    target_mean: tuple[float, ...] | None = None
    target_std: tuple[float, ...] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def inputs_on(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """What makes raw samples (n, *shape) on the device, uint8 or float32, normalised float32 ones."""
        if self.mean is None or self.std is None:
            return lambda raw: raw.float() / 255 if raw.dtype == torch.uint8 else raw
        place = (1, -1, 1, 1) if self.kind == "images" else (-1,)
        mean, std = (torch.tensor(values, dtype=torch.float64, device="cpu").view(place) for values in (self.mean, self.std))
        factor, shift = ((1 / std).float().to(device), (-mean / std).float().to(device))
        byte_factor = (1 / (255 * std)).float().to(device)

        def normalised(raw: Tensor) -> Tensor:
            return torch.addcmul(shift, raw.float(), byte_factor if raw.dtype == torch.uint8 else factor)

        return normalised

    def targets(self, raw: Tensor) -> Tensor:
        """Targets as the loss sees them: values normalised, classes as int64."""
        if not raw.is_floating_point():
            return raw.long()
        if self.target_mean is None or self.target_std is None:
            return raw
        mean, std = (torch.tensor(values, device=raw.device) for values in (self.target_mean, self.target_std))
        return (raw - mean) / std

    def values(self, outputs: Tensor) -> Tensor:
        """A model's outputs (n, values) in the user's units."""
        if self.target_mean is None or self.target_std is None:
            return outputs
        mean, std = (torch.tensor(values, device=outputs.device) for values in (self.target_mean, self.target_std))
        return outputs * std + mean

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def load(text: str) -> Preparation:
        """From JSON."""
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in json.loads(text).items()}
        return Preparation(**fields)


@dataclass(frozen=True)
class Splits:
    """Prepared data. ``held_out`` chooses (the best, when to stop); ``test`` neither trains nor chooses."""

    train: Examples
    held_out: Examples | None
    test: Examples | None
    target: Target
    preparation: Preparation
    notes: list[str] = field(default_factory=list)


def moments(inputs: Tensor, axis: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each of an axis's entries, in float64; a constant has the deviation 1.

    Bytes are divided by 255 first. Missing values (NaN) are left out.
    """
    wide = inputs.transpose(0, axis).flatten(1) if inputs.ndim > 1 else inputs[None]
    rows = [(row[~row.isnan()] if row.is_floating_point() else row).double() for row in wide]
    divisor = 255.0 if inputs.dtype == torch.uint8 else 1.0
    # The mean of equal numbers may be off by a rounding: the deviation of a constant would then be tiny, not 0.
    means = tuple(float(row[0] if _constant(row) else row.mean()) / divisor for row in rows)
    stds = tuple(1.0 if _constant(row) else float(row.std(correction=0)) / divisor for row in rows)
    return means, stds


def _constant(row: Tensor) -> bool:
    return bool(row.min() == row.max())
