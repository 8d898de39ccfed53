"""The numbers of augmentation: whose they are, that they never change, and that they are uniform."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trainwright.data import draws
from trainwright.data.draws import SALT, SLOTS, Slot, uniform

UNIT = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (7, 0), (7, 123), (2**40, 2**33)])
def test_numbers_are_those_that_numpy_makes_of_the_same_words(seed, step):
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, SALT, step))))
    np.testing.assert_array_equal(uniform(seed, step, 9, SLOTS), generator.random((9, SLOTS)))


def test_numbers_stay_as_they_are():
    """A run that resumes under a later version goes on with the same images."""
    expected = [0.8777807185128982, 0.7396141782097022, 0.7688808912443523]
    np.testing.assert_array_equal(uniform(7, 3, 4, SLOTS)[[0, 1, 3], [0, 1, 2]], expected)
    assert SLOTS == 32
    assert [slot.value for slot in Slot] == list(range(27))
    pinned = {"FLIP": 6, "TRANSLATE_X": 8, "BRIGHTNESS": 12, "ERASE": 16, "MIX_KIND": 21, "CUTMIX_LEFT": 26}
    assert {name: Slot[name].value for name in pinned} == pinned


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(1, 30), st.integers(1, 30))
def test_a_row_belongs_to_its_position_whatever_the_batch(seed, step, batch, more):
    np.testing.assert_array_equal(uniform(seed, step, batch, SLOTS), uniform(seed, step, batch + more, SLOTS)[:batch])


def test_no_number_twice():
    steps = [uniform(seed, step, 50, SLOTS) for seed in (0, 1, SALT) for step in (0, 1, 2, SALT)]
    every = np.concatenate(steps).ravel()
    assert len(np.unique(every)) == len(every)


def test_apart_from_the_orders_of_the_sampler():
    mine = set(uniform(0, 0, 20, SLOTS).ravel())
    for entropy in [(0, epoch) for epoch in range(5)] + [(0, 0, 1), (0, 1, 0), (0, 1, 1)]:
        theirs = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy))).random(640)
        assert mine.isdisjoint(theirs), entropy


def test_uniform_in_each_slot_and_without_correlation():
    numbers = np.concatenate([uniform(1, step, 64, SLOTS) for step in range(64)])
    assert 0 <= numbers.min() < numbers.max() < 1
    assert all(stats.kstest(column, "uniform").pvalue > 1e-4 for column in numbers.T)
    correlation = np.corrcoef(numbers.T) - np.eye(SLOTS)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(numbers))


def test_shared_numbers_cant_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        uniform(0, 0, 2, 2)[0, 0] = 1


@given(st.integers(1, 40), st.integers(0, 100))
def test_partners_are_a_permutation_without_oneself(batch, seed):
    partners = draws.partners(uniform(seed, 0, batch, SLOTS)[:, Slot.MIX_PARTNER])
    assert sorted(partners) == list(range(batch))
    assert batch == 1 or (partners != np.arange(batch)).all()


def test_partners_are_drawn():
    numbers = [uniform(0, step, 5, SLOTS)[:, Slot.MIX_PARTNER] for step in range(300)]
    counts = np.zeros((5, 5), dtype=int)
    for row in numbers:
        counts[np.arange(5), draws.partners(row)] += 1
    assert stats.chisquare(counts[~np.eye(5, dtype=bool)]).pvalue > 1e-4


@given(UNIT, st.floats(-10, 10), st.floats(0, 10))
def test_between(number, low, size):
    value = draws.between(np.array([number]), low, low + size)[0]
    assert low <= value <= low + size


@given(UNIT, st.integers(1, 1000))
def test_below(number, count):
    assert draws.below(np.array([number]), count)[0] == int(number * count) < count


def test_below_gives_each_number():
    np.testing.assert_array_equal(draws.below(np.array([0, 0.24, 0.25, 0.5, 0.75, 1 - 2**-53]), 4), [0, 0, 1, 2, 3, 3])
    np.testing.assert_array_equal(draws.below(np.array([0.5, 0.5]), np.array([3, 10])), [1, 5])


@given(st.floats(0.01, 1), UNIT, st.integers(1, 300), st.integers(1, 300))
def test_a_box_has_its_area_and_fits(area, number, height, width):
    tall, wide = (side[0] for side in draws.box(np.array([area]), np.array([number]), (0.3, 3.3), height, width))
    assert tall * wide == pytest.approx(area * height * width)
    assert 0 < tall <= height * (1 + 1e-9)
    assert 0 < wide <= width * (1 + 1e-9)
    fits = area * 3.3 <= min(height / width, width / height)
    assert not fits or 0.3 - 1e-9 <= wide / tall <= 3.3 + 1e-9


def test_the_ratio_of_a_box_is_uniform_in_its_logarithm():
    numbers = uniform(0, 0, 2000, 1)[:, 0]
    tall, wide = draws.box(np.full(2000, 0.1), numbers, (0.5, 2.0), 60, 60)
    assert stats.kstest(np.log2(wide / tall), "uniform", (-1, 2)).pvalue > 1e-4
