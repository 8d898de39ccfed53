"""NumPy's .npz and .npy files, of which nothing is ever unpickled."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trainwright.recipe import InputError

PAIRS = (("inputs", "targets"), ("x", "y"), ("X", "y"))  # names of the arrays that belong together


def load(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a .npz file; the one of a .npy file, mapped from the disk, under the name ''.

    Raises:
        InputError: it can't be read, or holds Python objects.
    """
    try:
        if path.suffix.lower() == ".npy":
            return {"": np.lib.format.open_memmap(path, mode="r")}  # refuses Python objects
        # A file of ours, because NumPy leaves its own open when the zip is damaged.
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            return {"": found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if "pickle" in str(error) or "object" in str(error).lower():
            raise InputError(
                f"{path}: no array file, or one that holds Python objects, which are never loaded since they may run code; "
                "save plain arrays of numbers or text with numpy.savez"
            ) from None
        raise InputError(f"{path}: can't be read: {error}") from None


def inputs_name(arrays: Mapping[str, np.ndarray], path: Path) -> str:
    """The name of the inputs: one of ``PAIRS``, or that of the only array.

    Raises:
        InputError: it can't be told.
    """
    for name, _ in PAIRS:
        if name in arrays:
            return name
    if len(arrays) == 1:
        return next(iter(arrays))
    raise InputError(f"{path}: no array 'inputs' or 'x'; the arrays are {', '.join(arrays) or '(none)'}; rename one")


def pair_names(arrays: Mapping[str, np.ndarray], path: Path) -> tuple[str, str]:
    """The names of the inputs and the targets.

    Raises:
        InputError: they aren't there, or not equally many.
    """
    names = next((pair for pair in PAIRS if set(pair) <= arrays.keys()), None)
    if names is None:
        raise InputError(
            f"{path}: neither the arrays inputs and targets nor x and y; the arrays are {', '.join(arrays) or '(none)'}; "
            "rename them"
        )
    check_lengths(arrays[names[0]], arrays[names[1]], names, path)
    return names


def check_lengths(inputs: np.ndarray, targets: np.ndarray, names: tuple[str, str], path: Path) -> None:
    """That there is a target for each sample, and one sample at least."""
    for name, array in zip(names, (inputs, targets), strict=True):
        if array.ndim == 0 or not len(array):
            raise InputError(f"{path}: {name!r} has the shape {array.shape}: no samples; its first axis counts them")
    if len(inputs) != len(targets):
        raise InputError(f"{path}: {len(inputs)} samples in {names[0]!r}, but {len(targets)} in {names[1]!r}")
