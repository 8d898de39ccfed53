"""Arrays of images: .npz files, and folders of IDX files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from trainwright.data import idx, npz
from trainwright.data.image_folders import class_names
from trainwright.data.pictures import Pictures, Source
from trainwright.recipe import InputError

IDX_NAME = re.compile(r"(train|t10k)-(images|labels)[-.]idx([13])-ubyte(\.gz)?")
IDX_IMAGES = re.compile(r".*[-.]idx3-ubyte(\.gz)?")
IMAGE_KEYS, LABEL_KEYS = ("images", "x", "inputs"), ("labels", "y", "targets")
# Keras has x_train, y_train, x_test, y_test.
NPZ_SPLITS = {"": "train", "_train": "train", "_val": "held_out", "_valid": "held_out", "_test": "test"}

Target = Literal["classes", "values"]


def is_idx_folder(folder: Path) -> bool:
    return any(IDX_NAME.fullmatch(path.name) for path in folder.iterdir())


def read_idx(folder: Path, labels: tuple[str, ...] = ()) -> Source:
    """The images of a folder with train-images-idx3-ubyte, train-labels-idx1-ubyte and t10k-..., gzipped or not.

    Raises:
        InputError: a file is missing, isn't IDX, or doesn't fit the others.
    """
    names = labels or class_names(folder)
    files = {
        match.group(1, 2): path for path in sorted(folder.iterdir(), reverse=True) if (match := IDX_NAME.fullmatch(path.name))
    }
    parts = {part for part, _ in files}
    splits = {"train" if part == "train" else "test": _idx_split(folder, part, files, names) for part in sorted(parts)}
    if "train" not in splits:
        splits = {"train": splits["test"]}
    return Source("IDX files", splits)


def read_npz(path: Path, target: Target) -> Source:
    """The images of a .npz file: ``images`` and ``labels`` (or x and y, inputs and targets), or x_train, y_train, ...

    ``classes`` may name them.

    Raises:
        InputError: an array is missing, or of a type or shape that can't be meant.
    """
    arrays = npz.load(path)
    names = tuple(map(str, arrays["classes"])) if "classes" in arrays else ()
    splits: dict[str, Pictures] = {}
    for suffix, split in NPZ_SPLITS.items():
        found = [[key + suffix for key in keys if key + suffix in arrays] for keys in (IMAGE_KEYS, LABEL_KEYS)]
        if all(found) and split not in splits:
            splits[split] = _npz_split(path, arrays, found[0][0], found[1][0], names, target)
    if not splits:
        raise InputError(
            f"{path} needs the arrays images and labels (or x and y, inputs and targets, x_train and y_train); it has "
            f"{', '.join(arrays) or 'none'}"
        )
    return Source(".npz", {"train": splits.get("train") or next(iter(splits.values())), **splits})


def images_of(path: Path) -> np.ndarray:
    """The images of a .npz or IDX file that needs no labels: (n, height, width) or (n, height, width, channels) uint8."""
    if path.suffix.lower() != ".npz":
        return _as_images(idx.read(path), str(path))
    arrays = npz.load(path)
    key = next((key for key in IMAGE_KEYS if key in arrays), None)
    if key is None:
        raise InputError(f"{path} needs an array named images, x or inputs; it has {', '.join(arrays) or 'none'}")
    return _as_images(arrays[key], f"{path}: {key}")


def _idx_split(folder: Path, part: str, files: Mapping[tuple[str, ...], Path], names: tuple[str, ...]) -> Pictures:
    for what, axes in (("images", 3), ("labels", 1)):
        if (part, what) not in files:
            raise InputError(f"{folder} has no {part}-{what}-idx{axes}-ubyte (or .gz), which belongs to its other IDX files")
    image_file, label_file = files[part, "images"], files[part, "labels"]
    images, targets = _as_images(idx.read(image_file), str(image_file)), idx.read(label_file)
    if targets.ndim != 1:
        raise InputError(f"{label_file} must hold one label an image; it has the shape {targets.shape}")
    return _pictures(images, targets, image_file.name.removesuffix(".gz"), str(label_file), names, "classes")


def _npz_split(
    path: Path, arrays: Mapping[str, np.ndarray], image_key: str, label_key: str, names: tuple[str, ...], target: Target
) -> Pictures:
    images = _as_images(arrays[image_key], f"{path}: {image_key}")
    where = f"{path.name}[{image_key}]" if image_key not in IMAGE_KEYS else path.name
    return _pictures(images, arrays[label_key], where, f"{path}: {label_key}", names, target)


def _pictures(
    images: np.ndarray, targets: np.ndarray, source: str, where: str, names: tuple[str, ...], target: Target
) -> Pictures:
    if len(images) != len(targets):
        raise InputError(f"{where} has {len(targets)} labels, but there are {len(images)} images")
    if target == "values":
        checked = _as_values(targets, where)
        labels = names if len(names) == checked.shape[1] else tuple(f"value {i}" for i in range(checked.shape[1]))
    else:
        checked = _as_classes(targets, images.shape[1:3], where)
        labels = _labels(checked, names, where)
    return Pictures(images, checked, [f"{source}[{i}]" for i in range(len(images))], labels)


def _as_images(images: np.ndarray, where: str) -> np.ndarray:
    """(n, height, width) or (n, height, width, 3 or 4) uint8."""
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (3, 4)):
        first = images.ndim == 4 and images.shape[1] in (1, 3)
        hint = "; its channels come first: use x.transpose(0, 2, 3, 1)" if first else ""
        raise InputError(
            f"{where} must be images (n, height, width) or (n, height, width, 1, 3 or 4); found {images.shape}{hint}"
        )
    if not images.size:
        raise InputError(f"{where} holds no images; its shape is {images.shape}")
    return images if images.dtype == np.uint8 else _as_bytes(images, where)


def _as_bytes(images: np.ndarray, where: str) -> np.ndarray:
    floats = np.issubdtype(images.dtype, np.floating)
    if not floats and not np.issubdtype(images.dtype, np.integer):
        raise InputError(f"{where} must be uint8, or floats from 0 to 1; found {images.dtype}")
    low, high = images.min(), images.max()
    if not 0 <= low <= high <= (1 if floats else 255):  # false for NaN
        raise InputError(f"{where} must be uint8, or floats from 0 to 1; found {images.dtype} from {low:g} to {high:g}")
    return np.round(images * 255).astype(np.uint8) if floats else images.astype(np.uint8)


def _as_values(targets: np.ndarray, where: str) -> np.ndarray:
    """(n, values) float32."""
    if targets.ndim not in (1, 2) or not np.issubdtype(targets.dtype, np.number) or np.iscomplexobj(targets):
        raise InputError(f"{where} must be numbers (n,) or (n, values) for this loss; found {targets.dtype} {targets.shape}")
    values = targets.reshape(len(targets), -1).astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(
            f"{where} has values that aren't finite, the first in row {int(np.argwhere(~np.isfinite(values))[0, 0])}"
        )
    return values


def _as_classes(targets: np.ndarray, size: tuple[int, ...], where: str) -> np.ndarray:
    """(n,) int64, or masks (n, height, width) uint8."""
    column = targets.reshape(len(targets)) if targets.shape[1:] == (1,) else targets
    if column.ndim == 3 and column.shape[1:] != size:
        raise InputError(f"{where}: masks are {column.shape[1:]}, the images are {size} (height, width)")
    if column.ndim not in (1, 3):
        hint = "; of one-hot rows take argmax(1)" if column.ndim == 2 else ""
        raise InputError(f"{where} must be classes (n,) or masks (n, height, width); found {targets.shape}{hint}")
    if column.dtype.kind not in "biuf" or not (column == np.round(column)).all():
        raise InputError(f"{where} must be whole numbers from 0; found {column.dtype}; for values choose a loss such as mse")
    if column.min() < 0 or (column.ndim == 3 and column.max() > 255):
        raise InputError(f"{where} must be whole numbers from 0; found {column.min()} to {column.max()}")
    return column.astype(np.int64 if column.ndim == 1 else np.uint8)


def _labels(targets: np.ndarray, names: tuple[str, ...], where: str) -> tuple[str, ...]:
    if targets.ndim == 1 and names and targets.max() >= len(names):
        raise InputError(f"{where}: label {targets.max()} is out of range: there are {len(names)} class names (the first is 0)")
    if targets.ndim == 1 and targets.max() >= max(len(targets), 2) * 100:
        raise InputError(f"{where}: label {targets.max()} is out of range for {len(targets)} images; number the classes from 0")
    return names if names or targets.ndim == 3 else tuple(map(str, range(int(targets.max()) + 1)))
