"""Image files to bytes of one shape: upright, gray or RGB, over white, resized. Imports no torch, see image_worker."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from trainwright.recipe import InputError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
GRAY_MODES = ("1", "L", "LA")
WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # 16 bits, in the usual files

Colour = Literal["gray", "rgb"]
Size = int | Sequence[int] | None


class UnreadableImage(InputError):
    """A damaged image: what ``data.unreadable: skip`` passes over."""


@dataclass(frozen=True)
class Form:
    """What every image becomes.

    fit   keep: the size must be this one already; crop: the shorter side is resized to it and the middle cut out;
          stretch: both sides are resized. Bilinear, with antialiasing.
    like  what has this size, for the message that another image has not
    """

    colour: Colour
    height: int
    width: int
    fit: Literal["keep", "crop", "stretch"]
    like: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1 if self.colour == "gray" else 3, self.height, self.width)


def form_for(size: Size, colour: Colour, found: tuple[int, int], like: str) -> Form:
    """The form for ``data.size``, where ``like`` is (height, width) = ``found``."""
    if size is None:
        return Form(colour, *found, "keep", like)
    if isinstance(size, int):
        return Form(colour, size, size, "crop")
    return Form(colour, size[0], size[1], "stretch")


def listed(folder: Path) -> Iterator[Path]:
    """The image files below a folder in sorted order, hidden ones left out; links to folders are followed, once each."""
    yield from (path for path in walked(folder) if path.suffix.lower() in SUFFIXES)


def walked(folder: Path) -> Iterator[Path]:
    """All files below a folder, hidden ones left out: first its own, then those of its folders, each sorted by name."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            yield from (Path(place, name) for name in sorted(files) if not name.startswith("."))
        seen.add(real)


def decode(path: Path, form: Form) -> np.ndarray:
    """An image file as (channels, height, width) uint8.

    Raises:
        UnreadableImage: damaged, truncated or not an image.
        InputError: it has another size, and ``form`` doesn't resize.
    """
    return pixels(opened(path), form, str(path))


def opened(path: Path) -> Image.Image:
    """A decoded image, turned as its EXIF data says, of mode L or RGB: the first frame, transparency over white."""
    try:
        with Image.open(path) as image:
            image.load()
            return plain(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    # Anything can be raised from inside of a damaged file: SyntaxError, struct.error, zlib.error, IndexError, ...
    except Exception as error:
        raise UnreadableImage(_unreadable(path, error)) from None


def plain(image: Image.Image) -> Image.Image:
    """Any mode as L or RGB, whichever holds it."""
    if image.mode in WIDE_MODES:  # Pillow would clip them at 255
        return Image.fromarray(_bytes_of_wide(np.asarray(image)))
    if image.mode == "F":
        raise ValueError("its pixels are floats; save it with 8 bits a channel")
    gray = image.mode in GRAY_MODES
    if image.has_transparency_data:
        over = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(over, image.convert("RGBA"))
    return image.convert("L" if gray else "RGB")


def colour_of(image: Image.Image, wanted: Literal["auto", "gray", "rgb"]) -> Colour:
    """What ``data.colour`` means where ``image`` (as ``plain`` makes it) is the first one."""
    if wanted != "auto":
        return wanted
    return "gray" if image.mode == "L" else "rgb"


def pixels(image: Image.Image, form: Form, name: str) -> np.ndarray:
    """A plain image as (channels, height, width) uint8."""
    coloured = image.convert("L" if form.colour == "gray" else "RGB")
    array = np.asarray(fitted(coloured, form, name, Image.Resampling.BILINEAR))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def fitted(image: Image.Image, form: Form, name: str, resample: Image.Resampling) -> Image.Image:
    """The image in the form's height and width.

    Raises:
        InputError: it has another size, and ``form`` doesn't resize.
    """
    if form.fit == "stretch":
        return image.resize((form.width, form.height), resample)
    if form.fit == "crop":
        return _cropped(image, form.height, resample)
    if image.size != (form.width, form.height):
        raise InputError(
            f"images differ in size: {form.like} is {form.height} x {form.width} (height x width), {name} is "
            f"{image.height} x {image.width}; set data.size to what all shall be resized to"
        )
    return image


def mask_of(path: Path, image: Image.Image, name: str) -> Image.Image:
    """The mask of a plain image: mode L, whose values are as the file has them (indices of a palette, not its colours).

    Raises:
        UnreadableImage: damaged or truncated.
        InputError: it has colours, or another size than its image.
    """
    try:
        with Image.open(path) as file:
            file.load()
            mask = ImageOps.exif_transpose(file)
    except Exception as error:
        raise UnreadableImage(_unreadable(path, error)) from None
    if mask.mode not in ("1", "L", "P"):
        raise InputError(
            f"mask {path} has the mode {mask.mode}; a mask is a palette or 8-bit gray image whose values number the classes"
        )
    if mask.size != image.size:
        raise InputError(f"mask {path} is {mask.height} x {mask.width}, its image {name} is {image.height} x {image.width}")
    return Image.fromarray(np.asarray(mask).astype(np.uint8))


def _cropped(image: Image.Image, side: int, resample: Image.Resampling) -> Image.Image:
    """The shorter side resized to ``side``, then the middle square; rounded as torchvision's Resize and CenterCrop do."""
    shorter = min(image.size)
    width, height = (side if length == shorter else int(side * length / shorter) for length in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.resize((width, height), resample).crop((left, top, left + side, top + side))


def _bytes_of_wide(values: np.ndarray) -> np.ndarray:
    """16 bits to 8, as 65535 / 255 = 257."""
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels are from {values.min()} to {values.max()}; save it with 8 or 16 bits a channel")
    return np.round(values / 257).astype(np.uint8)


def _unreadable(path: Path, error: Exception) -> str:
    reason = "not an image, or damaged" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
    return f"image {path} can't be read: {reason}; mend or remove it, or set data.unreadable to skip"
