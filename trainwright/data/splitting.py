"""Which samples are held out: pure functions of the seed."""

from __future__ import annotations

import numpy as np

from trainwright.data.sampler import shuffled
from trainwright.recipe import InputError

HELD_OUT, TEST = (1, 0), (1, 1)  # after the seed: keep these draws apart from the orders of the epochs, and each other


def split(seed: int, salt: tuple[int, int], classes: np.ndarray | None, count: int, fraction: float, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids that stay, ids that are taken out), sorted int64, neither empty; stratified where there are ``classes`` (count,).

    Each class gives its share, rounded so that the shares of all make up that of the whole (largest remainders first).

    Raises:
        InputError: fewer than two samples; ``key`` is the recipe's key that asked.
    """
    if count < 2:
        raise InputError(f"{key} is {fraction}, but there is one sample, which can't be divided; set it to null or a file")
    wanted = min(max(round(fraction * count), 1), count - 1)
    order = shuffled((seed, *salt), count)
    if classes is None:
        taken = order[:wanted]
    else:
        _, inverse, sizes = np.unique(classes, return_inverse=True, return_counts=True)
        quota = _quota(sizes, wanted)
        rank = np.empty(count, dtype=np.int64)  # of each sample within its class, in the drawn order
        for label in range(len(sizes)):
            members = order[inverse[order] == label]
            rank[members] = np.arange(len(members))
        taken = np.flatnonzero(rank < quota[inverse])
    mask = np.zeros(count, dtype=bool)
    mask[taken] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def _quota(sizes: np.ndarray, wanted: int) -> np.ndarray:
    """How many of each class, together ``wanted``."""
    exact = sizes * wanted / sizes.sum()
    quota = np.floor(exact).astype(np.int64)
    rest = np.argsort(-(exact - quota), kind="stable")[: wanted - quota.sum()]
    quota[rest] += 1
    return quota
