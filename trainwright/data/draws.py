"""Random numbers of augmentation: a pure function of the seed, the step and a sample's position in the global batch."""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np

SALT = 0x617567  # keeps these draws apart from the sampler's, whose second number is a small epoch
SLOTS = 32  # of each sample; some are left for changes to come, since another number of slots would change every run


class Slot(IntEnum):
    """Which of a sample's numbers decides what. Each change has its own, so switching one on leaves the others as they were.

    NOTE: never renumber these; a run that resumes would go on with other images.
    """

    PAD_TOP = 0
    PAD_LEFT = 1
    CROP_AREA = 2
    CROP_RATIO = 3
    CROP_TOP = 4
    CROP_LEFT = 5
    FLIP = 6
    FLIP_VERTICAL = 7
    TRANSLATE_X = 8
    TRANSLATE_Y = 9
    ROTATE = 10
    SCALE = 11
    BRIGHTNESS = 12
    CONTRAST = 13
    SATURATION = 14
    HUE = 15
    ERASE = 16
    ERASE_AREA = 17
    ERASE_RATIO = 18
    ERASE_TOP = 19
    ERASE_LEFT = 20
    MIX_KIND = 21  # that of position 0 counts for the whole batch
    MIX_PARTNER = 22
    MIXUP_SHARE = 23
    CUTMIX_SHARE = 24
    CUTMIX_TOP = 25
    CUTMIX_LEFT = 26


# The micro-batches of a step ask one after the other.
@lru_cache(maxsize=1)
def uniform(seed: int, step: int, batch: int, slots: int) -> np.ndarray:
    """Uniform numbers in [0, 1), (batch, slots) float64, read-only since they are shared; row = position in the global batch.

    A row depends on the seed, the step and its position alone: not on the batch's size, micro-batches, processes or resuming.

    NOTE: raw words of a counter-based generator, because NumPy guarantees their stream for good.
    """
    words = np.random.Philox(np.random.SeedSequence((seed, SALT, step))).random_raw(batch * slots)
    numbers = (words >> np.uint64(11)) * 2.0**-53  # the 53 bits that a float64 holds
    numbers = numbers.reshape(batch, slots)
    numbers.setflags(write=False)
    return numbers


def partners(numbers: np.ndarray) -> np.ndarray:
    """Which position each position of a batch is mixed with, (batch,) int64, from one number each.

    The next one on a circle through all positions in the order of their numbers: a permutation in which nobody is mixed with
    itself, unless the batch is one sample.
    """
    order = np.argsort(numbers, kind="stable")
    chosen = np.empty(len(order), dtype=np.int64)
    chosen[order] = np.roll(order, -1)
    return chosen


def between(numbers: np.ndarray, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    """Uniform numbers in [0, 1) as uniform numbers in [low, high)."""
    return low + numbers * (high - low)


def below(numbers: np.ndarray, count: np.ndarray | int) -> np.ndarray:
    """Uniform numbers in [0, 1) as whole numbers in [0, count), int64, each as likely as the others."""
    return np.floor(numbers * count).astype(np.int64)


def box(
    area: np.ndarray, ratio: np.ndarray, bounds: tuple[float, float], height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths in pixels (float64) of rectangles inside (height, width) images, each of its share of the area.

    Args:
        area: shares in (0, 1].
        ratio: uniform numbers; the logarithm of width / height is uniform between those of ``bounds``.

    NOTE: where a rectangle of some ratio wouldn't fit, the bounds are narrowed, while torchvision draws up to ten times and
    then gives up; so the area is always as drawn.
    """
    widest, narrowest = width / (height * area), width * area / height
    low, high = (np.log(np.clip(bound, narrowest, widest)) for bound in bounds)
    chosen = np.exp(between(ratio, low, high))
    pixels = area * height * width
    return np.sqrt(pixels / chosen), np.sqrt(pixels * chosen)
