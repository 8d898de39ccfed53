"""The rows of a step depend on the seed and the step, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.data import sampler

sizes = st.tuples(st.integers(0, 2**31 - 1), st.integers(1, 50), st.integers(1, 12))


@given(sizes, st.integers(0, 3))
def test_an_epoch_visits_every_row_once(size: tuple[int, int, int], epoch: int) -> None:
    seed, rows, batch_size = size
    steps = sampler.steps_per_epoch(rows, batch_size)
    batches = [sampler.global_batch(seed, epoch * steps + step, rows, batch_size) for step in range(steps)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(rows))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


@given(sizes, st.lists(st.integers(0, 60), min_size=1, max_size=12))
def test_a_step_has_the_same_rows_whatever_was_asked_before(size: tuple[int, int, int], steps: list[int]) -> None:
    seed, rows, batch_size = size
    fresh = {}
    for step in steps:
        sampler._permutation.cache_clear()  # as in a process that has just resumed
        fresh[step] = sampler.global_batch(seed, step, rows, batch_size).tolist()
    for step in reversed(steps):
        assert sampler.global_batch(seed, step, rows, batch_size).tolist() == fresh[step]


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = {tuple(sampler.global_batch(seed, epoch, 30, 30).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert tuple(range(30)) not in orders


def test_the_order_stays_for_good() -> None:
    """A run that was started with an older version must resume with the same rows."""
    assert sampler.global_batch(7, 0, 10, 10).tolist() == [8, 4, 3, 6, 2, 1, 0, 5, 9, 7]
    assert sampler.global_batch(7, 3, 10, 4).tolist() == [7, 9, 6, 1]


def test_rows_cannot_be_changed_by_who_receives_them() -> None:
    with pytest.raises(ValueError, match="read-only"):
        sampler.global_batch(0, 0, 4, 4)[0] = 1


def test_micro_batches_keep_the_order_and_the_rest() -> None:
    portions = sampler.micro_batches(7, 3)
    assert portions == [slice(0, 3), slice(3, 6), slice(6, 7)]


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 6))
def test_processes_share_a_batch_without_gaps_and_overlaps(count: int, size: int, processes: int) -> None:
    shares = [sampler.micro_batches(count, size, sampler.Share(index, processes)) for index in range(processes)]
    assert len({len(parts) for parts in shares}) == 1, "all take part in every collective"
    taken = [list(range(*part.indices(count))) for portion in zip(*shares, strict=True) for part in portion]
    assert [position for part in taken for position in part] == list(range(count))
    assert max(map(len, taken)) <= size
    assert all(len(part) == size for part in taken[: count // (size * processes) * processes])
    sizes = [len(part) for part in taken[-processes:]]
    assert max(sizes) - min(sizes) <= 1
