"""Which rows a step trains on: pure functions of the seed and the step.

So resuming needs no state but the step, and the data is the same for any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Batches that see every row once; the last one may be shorter."""
    return -(-rows // batch_size)


def global_batch(seed: int, step: int, rows: int, batch_size: int) -> np.ndarray:
    """Row ids of one optimizer step over all processes, (at most batch_size,) int64, read-only.

    Each epoch visits every row once in an order of its own; a batch never crosses the end of an epoch, which makes the
    last batch of an epoch shorter rather than repeating or losing rows.
    """
    assert rows > 0
    assert step >= 0
    epoch, place = divmod(step, steps_per_epoch(rows, batch_size))
    return _permutation(seed, epoch, rows)[place * batch_size : (place + 1) * batch_size]


@dataclass(frozen=True)
class Share:
    """Which part of each batch is this process's: number ``index`` of ``processes``."""

    index: int = 0
    processes: int = 1


ALONE = Share()


def micro_batches(count: int, micro_batch_size: int, share: Share = ALONE) -> list[slice]:
    """The positions in a batch of ``count`` that a process takes at once, in order: as many portions in every process.

    All processes together take ``micro_batch_size`` times their number of successive positions, the last time what is left
    of them: then portions are shorter, those of the last processes perhaps empty.
    """
    window = micro_batch_size * share.processes
    return [_part(first, min(window, count - first), share) for first in range(0, count, window)]


def _part(first: int, count: int, share: Share) -> slice:
    each, more = divmod(count, share.processes)
    begin = first + share.index * each + min(share.index, more)
    return slice(begin, begin + each + (share.index < more))


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
