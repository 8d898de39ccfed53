"""Random changes of training images, a whole batch at a time, each sample with numbers of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from trainwright.data import colour, draws, geometry
from trainwright.data.draws import Slot
from trainwright.recipe import Augment, InputError, Task

# Of torchvision's RandomResizedCrop, here times the image's own, as wide images would always be stretched otherwise.
CROP_RATIO = (3 / 4, 4 / 3)
ERASE_AREA, ERASE_RATIO = (0.02, 0.33), (0.3, 3.3)  # Zhong et al. 2017, and torchvision's RandomErasing
Fetch = Callable[[np.ndarray], tuple[Tensor, Tensor]]


def is_identity(section: Augment) -> bool:
    """Whether nothing is switched on."""
    return section.model_dump() == Augment().model_dump()


def check(section: Augment, channels: int, dense: bool, classes: int) -> None:
    """Refuses settings that have no effect on such images, or no meaning for such targets.

    Args:
        channels: of an image.
        dense: the targets are masks.
        classes: as ``Augmenter`` has them.

    Raises:
        InputError: with the keys, the reason and the fix.
    """
    colours = [key for key in ("saturation", "hue") if getattr(section, key)]
    if colours and channels != 3:
        keys, need, them = _words(colours, "needs", "need")
        fix = ", or set data.colour to rgb if the files are coloured" if channels == 1 else ""
        have = f"{channels} channel{'s' * (channels != 1)}"
        raise InputError(f"{keys} {need} red, green and blue, but the images have {have}; remove {them}{fix}")
    mixes = [key for key in ("mixup", "cutmix") if getattr(section, key)]
    if mixes and (dense or classes < 1):
        keys, mix, them = _words(mixes, "mixes", "mix")
        targets = "masks" if dense else "values"
        raise InputError(f"{keys} {mix} the classes of whole images, but the targets are {targets}; set {them} to 0")


def make(section: Augment, *, seed: int, task: Task, channels: int) -> Augmenter:
    """The augmenter of a run.

    Raises:
        InputError: as ``check`` does.
    """
    classes = 0 if task.kind == "values" else 1 if task.kind == "binary" else task.outputs
    check(section, channels, task.dense, classes)
    return Augmenter(section, seed, classes, task.dense)


@dataclass(frozen=True)
class Augmenter:
    """Changes micro-batches of a global batch; what a sample becomes depends on (seed, step, position) alone.

    In this order: colours (first: padding stays black); translate, rotate and scale about the centre, then resized_crop,
    all in one bilinear resampling without antialiasing and with zeros outside; pad_crop; flips; erase; mixup or cutmix. The
    numbers of each are in ``draws.Slot``.

    section  what is switched on; ``check`` it first
    seed     of the run
    classes  how many outputs the task has: 1 where binary, and 0 where the targets are values
    dense    the targets are masks: they move with their images (nearest pixel, class 0 outside) and ignore colours and erase
    """

    section: Augment
    seed: int
    classes: int
    dense: bool

    def __call__(self, step: int, positions: np.ndarray, batch: int, fetch: Fetch) -> tuple[Tensor, Tensor]:
        """The samples at some positions of a step's global batch.

        Args:
            step: from 0.
            positions: (n,) int64, below ``batch``.
            batch: the samples of the whole global batch.
            fetch: gives raw images (m, channels, height, width), uint8 or float32 from 0 to 1, and raw targets, (m,) int64 or
                masks (m, height, width) uint8, at any positions of the global batch, partners of mixing among them; it is
                called once, and what it gives is not modified.

        Returns:
            Images of the same dtype (mixed bytes are rounded: half a gray level is lost at most), targets too;
            with mixing (n, classes) float32 whose rows sum to one, or for binary tasks (n,) float32, the share of class 1.
        """
        numbers = draws.uniform(self.seed, step, batch, draws.SLOTS)
        if not (self.section.mixup or self.section.cutmix):
            return self._changed(numbers[positions], *fetch(positions))
        partners = draws.partners(numbers[:, Slot.MIX_PARTNER])[positions]
        wanted, places = np.unique(np.concatenate((positions, partners)), return_inverse=True)
        images, targets = self._changed(numbers[wanted], *fetch(wanted))
        mine, theirs = places[: len(positions)], places[len(positions) :]
        pair = (_picked(images, mine), _picked(images, theirs))
        mixed, shares = self._mixed_images(numbers[0, Slot.MIX_KIND], numbers[positions], *pair)
        return mixed, self._mixed_targets(shares, _picked(targets, mine), _picked(targets, theirs))

    def _changed(self, numbers: np.ndarray, raw: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """All but mixing, for samples with these numbers (n, slots)."""
        section = self.section
        images = _recoloured(section, numbers, raw)
        masks = targets[:, None] if self.dense else None
        if _resamples(section):
            images, masks = _resampled(section, numbers, images, masks)
        if images.dtype != raw.dtype:
            images = images.round().to(raw.dtype)
        if section.pad_crop or section.flip or section.flip_vertical:
            images = _moved(section, numbers, images)
            masks = None if masks is None else _moved(section, numbers, masks)
        if section.erase:
            images = _erased(section, numbers, images)
        return images, targets if masks is None else masks[:, 0]

    def _mixed_images(self, kind: float, numbers: np.ndarray, mine: Tensor, theirs: Tensor) -> tuple[Tensor, np.ndarray]:
        """Mixed images, and each one's share of its own class (n,) float64."""
        mixup, cutmix = self.section.mixup, self.section.cutmix
        if mixup and (not cutmix or kind < 0.5):
            return _mixup(mixup, numbers, mine, theirs)
        return _cutmix(cutmix, numbers, mine, theirs)

    def _mixed_targets(self, shares: np.ndarray, mine: Tensor, theirs: Tensor) -> Tensor:
        own, other = (torch.from_numpy(part.astype(np.float32)) for part in (shares, 1 - shares))
        if self.classes == 1:
            return own * mine + other * theirs
        targets = torch.zeros(len(mine), self.classes)
        targets.scatter_(1, mine[:, None], own[:, None])
        return targets.scatter_add_(1, theirs[:, None], other[:, None])


def _recoloured(section: Augment, numbers: np.ndarray, images: Tensor) -> Tensor:
    """As float32 where a colour changes, with the fraction of bytes."""
    top = 255.0 if images.dtype == torch.uint8 else 1.0
    steps = (
        (section.brightness, Slot.BRIGHTNESS, 1.0, colour.brighten),
        (section.contrast, Slot.CONTRAST, 1.0, colour.contrast),
        (section.saturation, Slot.SATURATION, 1.0, colour.saturate),
        (section.hue, Slot.HUE, 0.0, colour.shift_hue),
    )
    for size, slot, middle, change in steps:
        if size:
            images = change(images.float(), draws.between(numbers[:, slot], middle - size, middle + size), top)
    return images


def _resamples(section: Augment) -> bool:
    return _affine_is_on(section) or section.resized_crop is not None


def _affine_is_on(section: Augment) -> bool:
    return bool(section.translate or section.rotate or section.scale)


def _resampled(section: Augment, numbers: np.ndarray, images: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Images as float32, and masks as they came, after translate, rotate, scale and resized_crop."""
    height, width = images.shape[2:]
    affine = _affine(section, numbers, height, width) if _affine_is_on(section) else None
    crop = None if section.resized_crop is None else _crop(section.resized_crop, numbers, height, width)
    grid = geometry.sampling_grid(height, width, affine, crop)
    moved = geometry.resample(images.float(), grid, "bilinear")
    return moved, None if masks is None else geometry.resample(masks.float(), grid, "nearest").to(masks.dtype)


def _affine(section: Augment, numbers: np.ndarray, height: int, width: int) -> geometry.Affine:
    right, down, turn, scale = (
        draws.between(numbers[:, slot], -1, 1) for slot in (Slot.TRANSLATE_X, Slot.TRANSLATE_Y, Slot.ROTATE, Slot.SCALE)
    )
    share = section.translate
    return geometry.Affine(section.rotate * turn, share * width * right, share * height * down, 1 + section.scale * scale)


def _crop(least: float, numbers: np.ndarray, height: int, width: int) -> geometry.Crop:
    area = draws.between(numbers[:, Slot.CROP_AREA], least, 1)
    low, high = (bound * width / height for bound in CROP_RATIO)
    tall, wide = draws.box(area, numbers[:, Slot.CROP_RATIO], (low, high), height, width)
    top, left = numbers[:, Slot.CROP_TOP] * (height - tall), numbers[:, Slot.CROP_LEFT] * (width - wide)
    return geometry.Crop(top, left, tall, wide)


def _moved(section: Augment, numbers: np.ndarray, images: Tensor) -> Tensor:
    """After pad_crop and flips."""
    top, left = (draws.below(numbers[:, slot], 2 * section.pad_crop + 1) for slot in (Slot.PAD_TOP, Slot.PAD_LEFT))
    mirrored, inverted = numbers[:, Slot.FLIP] < section.flip, numbers[:, Slot.FLIP_VERTICAL] < section.flip_vertical
    return geometry.crop_and_flip(images, section.pad_crop, top, left, mirrored, inverted)


def _erased(section: Augment, numbers: np.ndarray, images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    area = draws.between(numbers[:, Slot.ERASE_AREA], *ERASE_AREA)
    sides = draws.box(area, numbers[:, Slot.ERASE_RATIO], ERASE_RATIO, height, width)
    high, wide = (np.maximum(np.rint(side), 1).astype(np.int64) for side in sides)
    top, left = (
        draws.below(numbers[:, Slot.ERASE_TOP], height - high + 1),
        draws.below(numbers[:, Slot.ERASE_LEFT], width - wide + 1),
    )
    bottom = np.where(numbers[:, Slot.ERASE] < section.erase, top + high, 0)
    return images * ~geometry.inside(height, width, top, left, bottom, left + wide)


def _mixup(alpha: float, numbers: np.ndarray, mine: Tensor, theirs: Tensor) -> tuple[Tensor, np.ndarray]:
    """Zhang et al. 2018, with a share for each sample."""
    shares = betaincinv(alpha, alpha, numbers[:, Slot.MIXUP_SHARE])
    own, other = (torch.from_numpy(part.astype(np.float32))[:, None, None, None] for part in (shares, 1 - shares))
    mixed = own * mine + other * theirs
    return mixed if mine.is_floating_point() else mixed.round_().to(mine.dtype), shares


def _cutmix(alpha: float, numbers: np.ndarray, mine: Tensor, theirs: Tensor) -> tuple[Tensor, np.ndarray]:
    """Yun et al. 2019, with a rectangle for each sample; the share is of pixels, as the rectangle may cross the edge."""
    height, width = mine.shape[2:]
    half = np.sqrt(1 - betaincinv(alpha, alpha, numbers[:, Slot.CUTMIX_SHARE])) / 2
    top, bottom = _reach(draws.below(numbers[:, Slot.CUTMIX_TOP], height), half, height)
    left, right = _reach(draws.below(numbers[:, Slot.CUTMIX_LEFT], width), half, width)
    mixed = torch.where(geometry.inside(height, width, top, left, bottom, right), theirs, mine)
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _reach(centre: np.ndarray, half: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """From and to where a part around a centre goes, within the image."""
    pixels = (half * size).astype(np.int64)
    return np.maximum(centre - pixels, 0), np.minimum(centre + pixels, size)


def _picked(values: Tensor, places: np.ndarray) -> Tensor:
    """``values[places]``, without a copy where that is all of them in order."""
    if np.array_equal(places, np.arange(len(values))):
        return values
    return values.index_select(0, torch.from_numpy(places))


def _words(names: list[str], one: str, several: str) -> tuple[str, str, str]:
    """Keys of the recipe with a verb and a pronoun that agree."""
    keys = " and ".join(f"data.augment.{name}" for name in names)
    return (keys, one, "it") if len(names) == 1 else (keys, several, "them")
