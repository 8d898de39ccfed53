"""Which rows a step trains on: pure functions of the seed and the step.

So resuming needs no state but the step, and the data is the same for any number of processes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Batches that see every row once; the last one may be shorter."""
    return -(-rows // batch_size)


def epoch_of(step: int, rows: int, batch_size: int) -> int:
    """The epoch (from 0) that the step (from 0) belongs to."""
    return step // steps_per_epoch(rows, batch_size)


def global_batch(seed: int, step: int, rows: int, batch_size: int) -> np.ndarray:
    """Row ids of one optimizer step over all processes, (at most batch_size,) int64, read-only.

    Each epoch visits every row once in an order of its own; a batch never crosses the end of an epoch, which makes the
    last batch of an epoch shorter rather than repeating or losing rows.
    """
    assert rows > 0
    assert step >= 0
    first = step % steps_per_epoch(rows, batch_size) * batch_size
    return _permutation(seed, epoch_of(step, rows, batch_size), rows)[first : first + batch_size]


def micro_batches(ids: np.ndarray, micro_batch_size: int) -> list[np.ndarray]:
    """The ids in portions of ``micro_batch_size``, in order; the last one may be shorter."""
    return [ids[first : first + micro_batch_size] for first in range(0, len(ids), micro_batch_size)]


def shuffled(entropy: tuple[int, ...], count: int) -> np.ndarray:
    """An order of ``range(count)`` that depends on the numbers in ``entropy`` alone, (count,) int64.

    NOTE: sorted raw words of a counter-based generator, because NumPy guarantees the stream of a bit generator for good
    but not that of ``Generator.permutation``, and a run must resume with the same rows under a later NumPy.
    """
    words = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)


# Steps come in order, so one permutation is enough.
@lru_cache(maxsize=1)
def _permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    """The order in which an epoch visits the rows, (rows,) int64, read-only since it is shared."""
    order = shuffled((seed, epoch), rows)
    order.setflags(write=False)
    return order
