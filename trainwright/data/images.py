"""Images with classes, masks or values as prepared splits, and new images as training saw them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from trainwright import forking
from trainwright.data import image_arrays, image_files, image_sources, splitting
from trainwright.data.examples import Examples, InMemory, Preparation, Splits, Target, moments
from trainwright.data.image_decoding import MOST_WORKERS, Decoded, LazyImages, Workers, decode_all
from trainwright.data.image_files import Form, UnreadableImage
from trainwright.data.masks import RawMasks, number
from trainwright.data.pictures import Pictures, Source, relabelled
from trainwright.data.targets import absent
from trainwright.recipe import ImageData, InputError

SPLITS = ("held_out", "test")  # besides the training data
MEMORY_SHARE = 3  # images stay decoded where they take less than a third of what is available
NAMED = 5  # things that a note names

Progress = Callable[[str, int], None]


@dataclass(frozen=True, eq=False)
class _Ready:
    """A split, and what its decoding gave; both without damaged images."""

    pictures: Pictures
    decoded: Decoded


def prepare(section: ImageData, target: Target, seed: int, progress: Progress) -> Splits:
    """The images of ``data.source``, divided, decoded and measured; ``progress`` gets "decoded" and how many are so far.

    Every image is decoded once here, also where they don't stay in memory: a damaged one is found now and not after hours.

    Raises:
        InputError: what is wrong with the source, and in which file.
    """
    source = image_sources.find(section.source, target, "data.source")
    parts, notes = _divided(section, source, target, seed)
    form = _form(section, parts["train"])
    keep = _stays(section, parts, form)
    ready = _decoded(section, parts, form, keep, progress)
    targets, labels = _targets(ready)
    workers = Workers(_count(section) if not keep else 0)
    splits = {name: _examples(part, targets[name], form, workers) for name, part in ready.items()}
    details = {"colour": form.colour, "size": section.size}
    preparation = Preparation("images", form.shape, labels, details=details)
    preparation = _normalised(preparation, ready["train"], targets["train"]) if section.normalize else preparation
    return Splits(
        splits["train"],
        splits.get("held_out"),
        splits.get("test"),
        target,
        preparation,
        [
            f"{section.source}: {source.form}",
            *_told(splits, form, labels, target, workers, keep),
            *notes,
            *source.notes,
            *_lost(ready, parts),
            *(absent(labels, splits["train"].targets) if target == "classes" else ()),
        ],
    )


def read_new(
    paths: Sequence[Path], preparation: Preparation, unreadable: Literal["error", "skip"] = "error"
) -> Iterator[tuple[str, Tensor]]:
    """(name, (channels, height, width) uint8 as training saw them) of image files, folders, .npz and IDX files, one by one.

    Folders are walked in sorted order. With ``skip``, damaged images are passed over.

    Raises:
        InputError: there is no such file or no image in a folder; or an image is damaged or has the wrong size.
    """
    details = preparation.details
    _, height, width = preparation.shape
    form = image_files.form_for(details["size"], details["colour"], (height, width), "what the model was trained on")
    for path in paths:
        count = 0
        for name, open_image in _new_images(path):
            count += 1
            try:
                image = open_image()
            except UnreadableImage:
                if unreadable == "error":
                    raise
                continue
            yield name, torch.from_numpy(np.array(image_files.pixels(image, form, name)))
        if not count:
            raise InputError(f"{path} holds no images ({' '.join(sorted(image_files.SUFFIXES))}, .npz or IDX)")


def _new_images(path: Path) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    """Names, and what opens them, of a file or a folder."""
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder")
    for file in image_files.walked(path) if path.is_dir() else (path,):
        if file.suffix.lower() == ".npz" or image_arrays.IDX_IMAGES.fullmatch(file.name):
            for i, pixels in enumerate(image_arrays.images_of(file)):
                yield f"{file}[{i}]", partial(_of_array, pixels)
        elif not path.is_dir() or file.suffix.lower() in image_files.SUFFIXES:
            yield str(file), partial(image_files.opened, file)


def _of_array(pixels: np.ndarray) -> Image.Image:
    return image_files.plain(Image.fromarray(pixels))


def _divided(section: ImageData, source: Source, target: Target, seed: int) -> tuple[dict[str, Pictures], list[str]]:
    """The splits in use, and a note on where each is from."""
    train, files = source.splits["train"], splitting.files(section, section.source)
    own = [name for name in SPLITS if name in source.splits and getattr(section, name) == splitting.AUTO]
    others = {name: _matching(source.splits[name], train, f"{section.source}, split {name},") for name in own}
    for name, path in files.items():
        found = image_sources.find(path, target, f"data.{name}").splits["train"]
        others[name] = _matching(found, train, f"data.{name} {path!r}")
    sizes = {name: len(part) for name, part in others.items()}
    divided = splitting.divide(section, seed, len(train), train.classes, sizes)
    parts = {name: others[name] if number else train.part(ids) for name, (number, ids) in divided.items()}
    each = " of each class" if train.classes is not None else ""
    notes = [
        f"{name}: {files.get(name, 'a split of the source itself')}"
        if name in others
        else f"{name}: {splitting.fraction(section, name):g} of the training images{each}"
        for name in SPLITS
        if name in parts
    ]
    return {name: parts[name] for name in ("train", *SPLITS) if name in parts}, notes


def _matching(other: Pictures, train: Pictures, where: str) -> Pictures:
    """Another split with the training data's classes, masks or values."""
    if other.masked != train.masked:
        found, wanted = ("masks" if pictures.masked else "classes" for pictures in (other, train))
        raise InputError(f"{where} has {found}, but the training data has {wanted}")
    if not train.masked and train.classes is None and len(other.labels) != len(train.labels):
        raise InputError(f"{where} has {len(other.labels)} values an image, the training data has {len(train.labels)}")
    return relabelled(other, train.labels, where)


def _form(section: ImageData, train: Pictures) -> Form:
    """What all images become, as the first readable one says."""
    first, name = _first(train, section.unreadable)
    return image_files.form_for(section.size, image_files.colour_of(first, section.colour), (first.height, first.width), name)


def _first(train: Pictures, unreadable: str) -> tuple[Image.Image, str]:
    for image, name in zip(train.images, train.names, strict=True):
        try:
            return _of_array(image) if isinstance(image, np.ndarray) else image_files.opened(image), name
        except UnreadableImage:
            if unreadable == "error":
                raise
    raise InputError(f"none of the {len(train)} training images can be read, such as {train.names[0]}")


def _stays(section: ImageData, parts: Mapping[str, Pictures], form: Form) -> bool:
    """Whether the decoded images stay in memory; arrays are there already."""
    if section.in_memory == "yes" or isinstance(parts["train"].images, np.ndarray):
        return True
    needed = sum(map(len, parts.values())) * math.prod(form.shape)
    return section.in_memory == "auto" and needed * MEMORY_SHARE < psutil.virtual_memory().available


def _count(section: ImageData) -> int:
    """Worker processes; by default one core is left to the training itself."""
    return section.workers if section.workers is not None else min(max(forking.cores() - 1, 1), MOST_WORKERS)


def _decoded(
    section: ImageData, parts: Mapping[str, Pictures], form: Form, keep: bool, progress: Progress
) -> dict[str, _Ready]:
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        progress("decoded", done)

    ready = {}
    for name, pictures in parts.items():
        decoded = decode_all(pictures, form, keep=keep, skip=section.unreadable == "skip", progress=more)
        if not len(decoded.kept):
            raise InputError(f"none of the {len(pictures)} images of the split {name} can be read, such as {pictures.names[0]}")
        ready[name] = _Ready(pictures.part(decoded.kept) if decoded.damaged else pictures, decoded)
    return ready


def _targets(ready: Mapping[str, _Ready]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The targets of each split, and the names of the classes or values."""
    train = ready["train"].pictures
    labels = train.labels
    if train.masked:
        numbered, labels = number([_raw_masks(part) for part in ready.values()], labels)
        targets = dict(zip(ready, numbered, strict=True))
    else:
        targets = {name: np.asarray(part.pictures.targets) for name, part in ready.items()}
    if len(labels) < 2 and (train.masked or train.classes is not None):
        hint = "; for masks, masks/ must stand beside images/" if labels == ("images",) else ""
        raise InputError(f"data.source has a single class ({', '.join(labels)}); nothing to tell apart{hint}")
    return targets, labels


def _raw_masks(part: _Ready) -> RawMasks:
    assert part.decoded.masks is not None
    assert part.decoded.values is not None
    return RawMasks(part.decoded.masks, part.decoded.values, part.pictures.names)


def _examples(part: _Ready, targets: np.ndarray, form: Form, workers: Workers) -> Examples:
    images, files = part.decoded.images, part.pictures.images
    if images is not None:
        return Examples(InMemory(torch.from_numpy(images)), torch.from_numpy(targets), part.pictures.names)
    return Examples(LazyImages([Path(file) for file in files], form, workers), torch.from_numpy(targets), part.pictures.names)


def _normalised(preparation: Preparation, train: _Ready, targets: np.ndarray) -> Preparation:
    """With the moments of the training split.

    NOTE: ``examples.moments`` would copy all pixels as float64. These are from sums of whole numbers, so they also have the
    same bits whether the images stay in memory or not.
    """
    pixels = len(train.decoded.kept) * math.prod(preparation.shape[1:])
    sums, squares = train.decoded.sums.sum(0).tolist()
    mean = tuple(total / pixels / 255 for total in sums)
    std = tuple(
        math.sqrt(pixels * square - total * total) / pixels / 255 or 1.0 for total, square in zip(sums, squares, strict=True)
    )
    values: dict[str, Any] = {}
    if targets.dtype == np.float32:
        values["target_mean"], values["target_std"] = moments(torch.from_numpy(targets), 1)
    return replace(preparation, mean=mean, std=std, **values)


def _told(
    splits: Mapping[str, Examples], form: Form, labels: tuple[str, ...], target: Target, workers: Workers, keep: bool
) -> Iterator[str]:
    """What a person wants to know of the data."""
    yield splitting.counts({name: len(examples) for name, examples in splits.items()})
    listed = ", ".join(labels[:NAMED]) + (", ..." if len(labels) > NAMED else "")
    yield f"{len(labels)} {'classes' if target == 'classes' else 'values'}: {listed}"
    size = f"{form.height} x {form.width} pixels (height x width), {form.colour}"
    yield size + {"keep": "", "crop": ", resized and cropped", "stretch": ", resized"}[form.fit]
    megabytes = sum(map(len, splits.values())) * math.prod(form.shape) / 1e6
    yield f"{megabytes:.1f} MB decoded, " + (
        "kept in memory" if keep else f"decoded anew each time, by {workers.count} worker process(es)"
    )


def _lost(ready: Mapping[str, _Ready], parts: Mapping[str, Pictures]) -> Iterator[str]:
    """A note on the damaged images that were left out."""
    for name, part in ready.items():
        damaged = part.decoded.damaged
        if damaged:
            more = f" and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
            listed = ", ".join(damaged[:NAMED])
            yield f"{name}: {len(damaged)} of {len(parts[name])} images can't be read and were left out: {listed}{more}"
