"""Colour changes of whole batches with a factor for each sample; formulas of ``torchvision.transforms.v2.functional``.

Images are (n, channels, height, width) float32 from 0 to ``top`` (255 or 1) and stay within it; factors are (n,) float64.

NOTE: torchvision cuts off the fraction after each change of bytes; these keep it, and the caller rounds once at the end.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

STEPS = 2**20  # a mean of gray values is taken of whole numbers up to this one


def brighten(images: Tensor, factors: np.ndarray, top: float) -> Tensor:
    """Each value times the sample's factor."""
    return (images * _each(factors)).clamp_(0, top)


def contrast(images: Tensor, factors: np.ndarray, top: float) -> Tensor:
    """Away from, or towards, the mean gray of the sample."""
    return _blend(images, _mean(gray(images), top), factors, top)


def saturate(images: Tensor, factors: np.ndarray, top: float) -> Tensor:
    """Away from, or towards, each pixel's own gray; three channels."""
    return _blend(images, gray(images), factors, top)


def shift_hue(images: Tensor, shifts: np.ndarray, top: float) -> Tensor:
    """Around the colour circle by a fraction of it; three channels. Each pixel keeps its largest and smallest value."""
    red, green, blue = images.unbind(1)
    low, high = images.amin(1), images.amax(1)
    spread = high - low
    safe = torch.where(spread > 0, spread, 1)
    sixth = torch.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    sixth = torch.where(high == red, (green - blue) / safe, sixth) + 6 * _each(shifts)[:, 0]
    # A channel follows a trapezium around the circle (https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative).
    around = torch.stack([(sixth + corner) % 6 for corner in (5, 3, 1)], 1)
    lowered = torch.minimum(around, 4 - around).clamp_(0, 1) * spread[:, None]
    return (high[:, None] - lowered).clamp_(0, top)


def gray(images: Tensor) -> Tensor:
    """(n, 1, height, width): the luma of ITU-R BT.601 for three channels, else the mean of the channels."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return red * 0.2989 + green * 0.587 + blue * 0.114


def _mean(values: Tensor, top: float) -> Tensor:
    """The mean of each sample, (n, 1, 1, 1), of whole numbers: the sum of floats may depend on how many samples there are."""
    whole = (values * (STEPS / top)).round().long()
    return (whole.sum((1, 2, 3), keepdim=True) * (top / STEPS / values.shape[1:].numel())).float()


def _blend(images: Tensor, other: Tensor, factors: np.ndarray, top: float) -> Tensor:
    return (images * _each(factors) + other * _each(1 - factors)).clamp_(0, top)


def _each(factors: np.ndarray) -> Tensor:
    """(n, 1, 1, 1) float32."""
    return torch.from_numpy(factors.astype(np.float32))[:, None, None, None]
