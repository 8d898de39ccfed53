"""NumPy arrays as samples: one along the first axis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainwright.data import frames, npz, splitting, targets
from trainwright.data.examples import Examples, InMemory, Preparation, Splits, Target, moments
from trainwright.recipe import ArrayData, InputError

KERAS = (("x_train", "y_train"), ("x_test", "y_test"))
ROW = "(the first row is row 1)"
Pair = tuple[np.ndarray, np.ndarray]


def prepare(section: ArrayData, target: Target, seed: int, progress: Callable[[str, int], None]) -> Splits:
    """Samples of any shape, uint8 as they are and all other numbers as float32, normalised along the last axis (per feature).

    The file holds inputs and targets, or x and y; or x_train, y_train, x_test and y_test, of which the latter are the test
    split. Samples that are single numbers have the shape (1,).

    Args:
        target: classes: whole numbers or text (n,), as int64 of the sorted distinct ones. values: (n,) or (n, k), as float32
            (n, k).

    Raises:
        InputError: arrays that are missing, hold Python objects, NaN or infinity, or don't fit each other.
    """
    pairs = _source(section)
    for key, file in splitting.files(section, section.source).items():
        path = frames.locate(file)
        arrays = npz.load(path)
        pairs[key] = _pair(arrays, npz.pair_names(arrays, path), path)
    progress(f"reading {section.source}", sum(len(inputs) for inputs, _ in pairs.values()))
    inputs = {key: _inputs(x, f"{section.source if key == 'source' else key}: inputs") for key, (x, _) in pairs.items()}
    _check_alike(inputs)
    labels, wanted = _targets({key: y for key, (_, y) in pairs.items()}, section.source, target)
    classes = wanted["source"].numpy() if target == "classes" else None
    sizes = {key: len(y) for key, y in wanted.items() if key != "source"}
    sources = list(pairs)
    examples = {
        key: _examples(inputs[sources[number]], wanted[sources[number]], ids)
        for key, (number, ids) in splitting.divide(section, seed, len(wanted["source"]), classes, sizes).items()
    }
    train = examples["train"]
    assert isinstance(train.inputs, InMemory)
    mean, std = moments(train.inputs.tensor, -1) if section.normalize else (None, None)
    scale = targets.scale(train.targets, section.normalize)
    details = {"dtype": str(train.inputs.tensor.dtype).removeprefix("torch.")}
    preparation = Preparation("arrays", train.inputs.shape, labels, mean, std, *scale, details)
    counts = splitting.counts({key: len(split) for key, split in examples.items()})
    notes = [
        f"{section.source}: samples {train.inputs.shape} {details['dtype']}, to predict {_what(labels, target)}; {counts}",
        *(targets.absent(labels, train.targets) if target == "classes" else []),
    ]
    return Splits(train, examples.get("held_out"), examples.get("test"), target, preparation, notes)


def read_new(paths: Sequence[Path], preparation: Preparation) -> Iterator[tuple[str, Tensor]]:
    """('new.npz row 17', a float32 sample of ``preparation.shape``, not normalised) of .npz (inputs or x) and .npy files.

    Bytes are divided by 255 if the model was trained on bytes. A .npy file is read sample after sample.

    Raises:
        InputError: a file that can't be read, samples of another shape, or NaN or infinity among them.
    """
    for path in paths:
        arrays = npz.load(frames.locate(str(path)))
        raw = arrays[npz.inputs_name(arrays, path)]
        raw = raw[None] if raw.shape == preparation.shape else raw[:, None] if raw.ndim == 1 else raw
        if raw.shape[1:] != preparation.shape:
            raise InputError(f"{path}: samples of the shape {raw.shape[1:]}; the model takes {preparation.shape}")
        scale = _scale(raw, preparation, path)
        for number in range(len(raw)):
            sample = _inputs(raw[number : number + 1], str(path), number)[0].float()
            yield f"{path.name} row {number + 1}", sample / scale


def _scale(raw: np.ndarray, preparation: Preparation, path: Path) -> float:
    """What new samples are divided by, so that they are as those trained on."""
    if preparation.details["dtype"] != "uint8":
        return 1.0
    if raw.dtype != np.uint8:
        raise InputError(f"{path}: numbers of the type {raw.dtype}; the model was trained on bytes: save them as uint8")
    return 255.0


def _source(section: ArrayData) -> dict[str, Pair]:
    """The source, and the test split that it may bring."""
    path = frames.locate(section.source)
    arrays = npz.load(path)
    if not set(KERAS[0]) <= arrays.keys():
        return {"source": _pair(arrays, npz.pair_names(arrays, path), path)}
    pairs = {"source": _pair(arrays, KERAS[0], path)}
    if set(KERAS[1]) <= arrays.keys():
        if section.test not in (None, splitting.AUTO):
            raise InputError(f"data.test is {section.test}, but {path} brings its own test split; set it to auto")
        if section.test == splitting.AUTO:
            pairs["test"] = _pair(arrays, KERAS[1], path)
    return pairs


def _pair(arrays: dict[str, np.ndarray], names: tuple[str, str], path: Path) -> Pair:
    inputs, wanted = (arrays[name] for name in names)
    npz.check_lengths(inputs, wanted, names, path)
    return (inputs[:, None] if inputs.ndim == 1 else inputs), wanted


def _inputs(array: np.ndarray, where: str, first: int = 0) -> Tensor:
    """uint8, or float32, all finite; ``first`` is the number of the first row, from 0."""
    if array.dtype.kind not in "biuf":
        raise InputError(f"{where}: arrays of {array.dtype} can't be used; save numbers")
    if array.size == 0:
        raise InputError(f"{where}: the shape {array.shape} holds no numbers")
    if array.dtype == np.uint8:
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))
    return torch.from_numpy(_finite(array, where, first))


def _finite(array: np.ndarray, where: str, first: int = 0) -> np.ndarray:
    """As float32, a copy; an InputError names the first row that is not finite there."""
    with np.errstate(over="ignore"):
        found = array.astype(np.float32, order="C")
    bad = ~np.isfinite(found).reshape(len(found), -1).all(axis=1)
    if bad.any():
        row = int(bad.argmax())
        fault = "NaN" if np.isnan(found[row]).any() else "infinity" if np.isinf(array[row]).any() else "a number above float32"
        more = f" (so do {bad.sum() - 1} below it)" if bad.sum() > 1 else ""
        raise InputError(f"{where}, row {first + row + 1} holds {fault}{more}; fill it or leave the row out {ROW}")
    return found


def _check_alike(inputs: dict[str, Tensor]) -> None:
    source = inputs["source"]
    for key, other in inputs.items():
        if other.shape[1:] != source.shape[1:] or other.dtype != source.dtype:
            raise InputError(
                f"data.{key}: samples {tuple(other.shape[1:])} {other.dtype}, but those of data.source are "
                f"{tuple(source.shape[1:])} {source.dtype}; make them alike"
            )


def _targets(wanted: dict[str, np.ndarray], where: str, target: Target) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Labels, and the targets of each source."""
    if target == "classes":
        parts = [_classes(array, f"{where}: targets") for array in wanted.values()]
        labels, codes = targets.classes(parts, f"{where}: targets")
        return labels, dict(zip(wanted, codes, strict=True))
    values = {key: _values(array, f"{where if key == 'source' else key}: targets") for key, array in wanted.items()}
    widths = {part.shape[1] for part in values.values()}
    if len(widths) > 1:
        raise InputError(f"{where}: {' and '.join(map(str, sorted(widths)))} values a sample in its splits; make them alike")
    width = widths.pop()
    return (("target",) if width == 1 else tuple(f"target {number}" for number in range(1, width + 1))), values


def _classes(array: np.ndarray, where: str) -> np.ndarray:
    """(n,) numbers or text."""
    flat = array.reshape(-1) if array.ndim == 2 and array.shape[1] == 1 else array
    if flat.ndim != 1 or flat.dtype.kind not in "biufU":
        raise InputError(
            f"{where} have the shape {array.shape} and the type {array.dtype}; classes are (samples,) whole numbers or text "
            f"(one-hot ones: .argmax(1)); to predict values set loss.name to {targets.VALUE_LOSSES}"
        )
    if flat.dtype.kind == "f":
        _finite(flat, where)
    return flat


def _values(array: np.ndarray, where: str) -> Tensor:
    """(n, k) float32."""
    if array.ndim > 2 or array.size == 0 or array.dtype.kind not in "biuf":
        raise InputError(
            f"{where} have the shape {array.shape} and the type {array.dtype}; values are (samples,) or (samples, k) numbers; "
            f"to predict classes set loss.name to {targets.CLASS_LOSSES}"
        )
    return torch.from_numpy(_finite(array.reshape(len(array), -1), where))


def _examples(inputs: Tensor, wanted: Tensor, ids: np.ndarray) -> Examples:
    index = torch.from_numpy(ids)
    return Examples(InMemory(inputs[index]), wanted[index], [f"row {number + 1}" for number in ids])


def _what(labels: tuple[str, ...], target: Target) -> str:
    return f"{len(labels)} classes" if target == "classes" else "a value" if len(labels) == 1 else f"{len(labels)} values"
