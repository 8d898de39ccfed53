"""Which samples are held out: pure functions of the seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trainwright.data.sampler import shuffled
from trainwright.recipe import ArrayBase, InputError

# After the seed: keep these draws apart from the orders of the epochs and from each other.
# NOTE: SeedSequence fills up with zeros, so (seed, 1, 0) would be the order of epoch 1; the last number must not be 0.
DOCUMENTS, HELD_OUT, TEST, LIMIT = (0, 1), (0, 2), (0, 3), (0, 4)

AUTO = "auto"
FRACTIONS = {"held_out": 0.1, "test": None}  # what auto means where the source brings no split of its own


def split(
    seed: int, salt: tuple[int, int], classes: np.ndarray | None, count: int, fraction: float, key: str
) -> tuple[np.ndarray, np.ndarray]:
    """(ids that stay, ids that are taken out), sorted int64, neither empty; stratified where there are ``classes`` (count,).

    Each class gives its share, rounded so that the shares of all make up that of the whole (largest remainders first).

    Raises:
        InputError: fewer than two samples; ``key`` is the recipe's key that asked.
    """
    if count < 2:
        raise InputError(
            f"{key} is {fraction}, but there is only one sample or document, which can't be divided; "
            "set it to null, or to a file"
        )
    mask = _drawn(seed, salt, classes, count, min(max(round(fraction * count), 1), count - 1))
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def files(section: ArrayBase, source: str) -> dict[str, str]:
    """The splits that are files of their own: {'test': 'rows.csv'}.

    Raises:
        InputError: one is the source itself, so that nothing would be held out.
    """
    named = {key: file for key in ("held_out", "test") if isinstance(file := getattr(section, key), str) and file != AUTO}
    for key, file in named.items():
        if Path(file).expanduser().resolve() == Path(source).expanduser().resolve():
            raise InputError(f"data.{key} is {file}, which is data.source itself: nothing is held out; name another file")
    return named


def fraction(section: ArrayBase, key: str) -> float | None:
    """How much of the source a split takes, unless it is a source of its own."""
    part = getattr(section, key)
    return FRACTIONS[key] if part == AUTO else part if isinstance(part, float) else None


def divide(
    section: ArrayBase, seed: int, count: int, classes: np.ndarray | None, others: Mapping[str, int]
) -> dict[str, tuple[int, np.ndarray]]:
    """The samples of each split: the number of their source, and their ids there, sorted int64.

    Source 0, of ``count`` samples, gives the training samples and what is a fraction of it: the test samples are taken out
    first, then the held-out ones from the rest, then the rest is cut to ``section.limit``; all stratified where there are
    ``classes`` (count,). ``others`` are the splits that are sources of their own, numbered from 1, with their counts.
    """
    found = {key: (number, np.arange(size)) for number, (key, size) in enumerate(others.items(), 1)}
    train = np.arange(count)
    for key, salt in (("test", TEST), ("held_out", HELD_OUT)):
        part = fraction(section, key)
        if key not in others and part is not None:
            of_these = None if classes is None else classes[train]
            stay, taken = split(seed, salt, of_these, len(train), part, f"data.{key}")
            found[key], train = (0, train[taken]), train[stay]
    if section.limit is not None and section.limit < len(train):
        of_these = None if classes is None else classes[train]
        train = train[_drawn(seed, LIMIT, of_these, len(train), section.limit)]
    return {"train": (0, train), **found}


def counts(sizes: Mapping[str, int]) -> str:
    """'90 training, 10 held-out samples'."""
    words = {"train": "training", "held_out": "held-out"}
    return (
        f"{', '.join(f'{sizes[key]} {words.get(key, key)}' for key in ('train', 'held_out', 'test') if key in sizes)} samples"
    )


def _drawn(seed: int, salt: tuple[int, int], classes: np.ndarray | None, count: int, wanted: int) -> np.ndarray:
    """Which samples are drawn, (count,) bool with ``wanted`` of them true."""
    order = shuffled((seed, *salt), count)
    mask = np.zeros(count, dtype=bool)
    if classes is None:
        mask[order[:wanted]] = True
        return mask
    _, inverse, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    grouped = order[np.argsort(inverse[order], kind="stable")]  # class after class, each in the drawn order
    rank = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    mask[grouped] = rank < np.repeat(_quota(sizes, wanted), sizes)
    return mask


def _quota(sizes: np.ndarray, wanted: int) -> np.ndarray:
    """How many of each class, together ``wanted``."""
    exact = sizes * wanted / sizes.sum()
    quota = np.floor(exact).astype(np.int64)
    rest = np.argsort(-(exact - quota), kind="stable")[: wanted - quota.sum()]
    quota[rest] += 1
    return quota
