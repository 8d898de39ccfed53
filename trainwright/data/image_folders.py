"""Folders of images: a folder for each class, or images/ with masks/; either of them below train/, val/ and test/, or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trainwright.data import image_files
from trainwright.data.pictures import Pictures, Source
from trainwright.recipe import InputError

SPLITS = {"train": "train", "val": "held_out", "valid": "held_out", "validation": "held_out", "test": "test"}
CLASSES_FILE = "classes.txt"


def read(folder: Path) -> Source:
    """The images below a folder, by their paths.

    Raises:
        InputError: no images, an empty class, an image without a mask, several folders for one split, ...
    """
    parts = _parts(folder)
    masked = _has_masks(parts["train"])
    read_part = _masked if masked else _classes
    splits = {name: read_part(folder, part, name == "train") for name, part in parts.items()}
    form = "images/ with masks/" if masked else "a folder for each class"
    return Source(form, splits, tuple(_left_out(folder)))


def class_names(*folders: Path) -> tuple[str, ...]:
    """The lines of the first ``classes.txt``, or nothing."""
    file = next((folder / CLASSES_FILE for folder in folders if (folder / CLASSES_FILE).is_file()), None)
    if file is None:
        return ()
    try:
        labels = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} can't be read as UTF-8 text: {error}") from None
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"{file} has the class {label!r} twice")
    return labels


def _parts(folder: Path) -> dict[str, Path]:
    """The folders of the splits, or the folder itself as 'train'."""
    below = _folders(folder)
    found = [path for path in below if path.name.lower() in SPLITS and _is_split(path)]
    parts = {SPLITS[path.name.lower()]: path for path in found}
    if len(parts) < len(found):
        raise InputError(
            f"{folder} has several folders for one split: {', '.join(path.name for path in found)}; keep one of them"
        )
    if found and "train" not in parts:
        raise InputError(f"{folder} has {found[0].name}/ but no train/; put the training images into {folder / 'train'}")
    return parts or {"train": folder}


def _is_split(folder: Path) -> bool:
    """Whether it holds folders and no images: a folder of images named 'train' is a class."""
    is_image = (path.suffix.lower() in image_files.SUFFIXES for path in folder.iterdir() if path.is_file())
    return bool(_folders(folder)) and not any(is_image)


def _has_masks(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "masks").is_dir()


def _classes(root: Path, folder: Path, training: bool) -> Pictures:
    """A folder for each class; only to train does each need an image."""
    folders = _folders(folder)
    if not folders:
        raise InputError(f"{folder} needs a folder for each class, or images/ and masks/; it has no folders")
    files = {path.name: list(image_files.listed(path)) for path in folders}
    if not any(files.values()):
        raise InputError(f"{folder} holds no images ({' '.join(sorted(image_files.SUFFIXES))}) in its folders")
    for name, listed in files.items():
        if training and not listed:
            raise InputError(f"{folder / name} holds no images, so nothing can be learned of this class; fill or remove it")
    files = {name: listed for name, listed in files.items() if listed}
    targets = np.repeat(np.arange(len(files)), [len(listed) for listed in files.values()])
    images = [path for listed in files.values() for path in listed]
    return Pictures(images, targets, _names(root, images), tuple(files))


def _masked(root: Path, folder: Path, training: bool) -> Pictures:
    """images/ and masks/ with the same stems."""
    if not _has_masks(folder):
        raise InputError(f"{folder} needs images/ and masks/, as the training data has them")
    images, masks = (_by_stem(folder / name) for name in ("images", "masks"))
    if not images:
        raise InputError(f"{folder / 'images'} holds no images ({' '.join(sorted(image_files.SUFFIXES))})")
    for stem in images.keys() - masks.keys():
        raise InputError(f"image {images[stem]} has no mask; {folder / 'masks' / stem}.png is missing")
    for stem in masks.keys() - images.keys():
        raise InputError(f"mask {masks[stem]} has no image of the same name in {folder / 'images'}")
    paths = list(images.values())
    labels = class_names(folder, root) if training else ()  # number() takes the training data's
    return Pictures(paths, [masks[stem] for stem in images], _names(root, paths), labels)


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in image_files.listed(folder):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise InputError(f"{found[stem]} and {path} have the same name; images and masks belong together by their names")
        found[stem] = path
    return found


def _left_out(folder: Path) -> Iterator[str]:
    """A note where files were passed over that could have been meant."""
    known = {*image_files.SUFFIXES, ".txt", ".md", ".json", ".csv", ".db"}
    others = [path for path in image_files.walked(folder) if path.suffix.lower() not in known]
    if others:
        yield f"{len(others)} file(s) of other kinds left out, such as {others[0]}"


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _names(root: Path, paths: list[Path]) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]
