"""Moving the pixels of whole batches: exact moves by indexing, and one resampling for everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad


@dataclass(frozen=True)
class Affine:
    """A similarity about the centre for each sample, (n,) float64 each: as ``torchvision``'s ``affine`` takes them.

    Degrees clockwise; the shifts in pixels to the right and downwards, not rounded; the factor of enlargement.
    """

    degrees: np.ndarray
    right: np.ndarray
    down: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True)
class Crop:
    """A rectangle for each sample that is resized back to the whole image; in pixels, (n,) float64 each."""

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray


def crop_and_flip(
    images: Tensor, padding: int, top: np.ndarray, left: np.ndarray, mirrored: np.ndarray, inverted: np.ndarray
) -> Tensor:
    """Windows of the zero-padded images, mirrored left to right or top to bottom; exact to the bit.

    Args:
        images: (n, channels, height, width) of any dtype, on the CPU.
        top, left: (n,) int64 from 0 to 2 ``padding``: the window's corner.
        mirrored, inverted: (n,) bool.

    NOTE: an element of the view below is a row of an image, so NumPy copies rows; 20 times faster than an index a pixel.
    """
    n, channels, h, w = images.shape
    padded = pad(images, (padding,) * 4) if padding else images
    height, width = padded.shape[-2:]
    both = torch.stack((padded, padded.flip(-1))) if mirrored.any() else padded.contiguous()
    plane = (np.where(mirrored, n, 0) + np.arange(n))[:, None] * channels + np.arange(channels)
    row = top[:, None] + np.where(inverted[:, None], np.arange(h)[::-1], np.arange(h))
    column = np.where(mirrored, width - w - left, left)
    starts = (plane[:, :, None] * height + row[:, None]) * width + column[:, None, None]
    pixels = both.numpy().reshape(-1)
    count = max(pixels.size - w + 1, 0)
    rows: np.ndarray = np.ndarray((count,), f"V{w * pixels.itemsize}", buffer=pixels, strides=(pixels.itemsize,))
    return torch.from_numpy(rows[starts].view(pixels.dtype).reshape(n, channels, h, w))


def inside(height: int, width: int, top: np.ndarray, left: np.ndarray, bottom: np.ndarray, right: np.ndarray) -> Tensor:
    """Where a rectangle of each sample is, (n, 1, height, width) bool; ``bottom`` and ``right`` are exclusive."""
    y, x = np.arange(height), np.arange(width)
    rows = (y >= top[:, None]) & (y < bottom[:, None])
    columns = (x >= left[:, None]) & (x < right[:, None])
    return torch.from_numpy(rows[:, None, :, None] & columns[:, None, None, :])


def resample(images: Tensor, grid: Tensor, mode: Literal["bilinear", "nearest"]) -> Tensor:
    """The images (n, channels, height, width) float32 at the places of a grid, with zeros outside; without antialiasing."""
    return grid_sample(images, grid, mode=mode, padding_mode="zeros", align_corners=False)


def sampling_grid(height: int, width: int, affine: Affine | None, crop: Crop | None) -> Tensor:
    """Where each pixel comes from, (n, height, width, 2) float32 for ``resample``: the affine map, then a crop of its result.

    A crop that reaches the edge repeats the outermost pixels, as resizing does; it doesn't blend them with the zeros outside.

    NOTE: sums and products of single numbers only. A matrix product may round differently for another number of samples.
    """
    assert affine is not None or crop is not None
    n = len(affine.degrees if affine is not None else crop.top)  # type: ignore[union-attr]
    x = np.broadcast_to(np.arange(width) + 0.5 - width / 2, (n, width))
    y = np.broadcast_to(np.arange(height) + 0.5 - height / 2, (n, height))
    if crop is not None:
        x, y = _stretched(crop.left, crop.width, width), _stretched(crop.top, crop.height, height)
    if affine is None:
        return _grid(2 / width * x, 0 * y, 0 * x, 2 / height * y)
    x, y = x - affine.right[:, None], y - affine.down[:, None]
    radians = np.deg2rad(affine.degrees)
    cos, sin = ((turn(radians) / affine.scale)[:, None] for turn in (np.cos, np.sin))
    return _grid(2 / width * cos * x, 2 / width * sin * y, -2 / height * sin * x, 2 / height * cos * y)


def _stretched(start: np.ndarray, length: np.ndarray, size: int) -> np.ndarray:
    """The places, from the centre, that the pixels of a side have in a part of it, (n, size)."""
    places = start[:, None] + (np.arange(size) + 0.5) * (length[:, None] / size)
    return np.clip(places, 0.5, size - 0.5) - size / 2


def _grid(xx: np.ndarray, xy: np.ndarray, yx: np.ndarray, yy: np.ndarray) -> Tensor:
    """(n, h, w, 2) float32 from what x (n, w) and y (n, h) add to the place in x, and to that in y."""
    across, down, across_y, down_y = (torch.from_numpy(part.astype(np.float32)) for part in (xx, xy, yx, yy))
    grid = torch.empty(len(xx), xy.shape[1], xx.shape[1], 2)
    torch.add(across[:, None, :], down[:, :, None], out=grid[..., 0])
    torch.add(across_y[:, None, :], down_y[:, :, None], out=grid[..., 1])
    return grid
