"""Splits: sizes, disjoint, complete, stratified; scikit-learn and plain counting as the oracles."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedShuffleSplit

from trainwright.data import splitting
from trainwright.data.sampler import shuffled
from trainwright.recipe import ArrayData, InputError

FRACTIONS = st.floats(0.01, 0.99)


def section(**settings):
    return ArrayData(kind="arrays", source="rows.npz", **{"held_out": None, **settings})


@given(st.integers(0, 2**40), st.integers(2, 300), FRACTIONS, st.integers(0, 6))
@settings(max_examples=80, deadline=None)
def test_a_split_is_whole_disjoint_and_stratified(seed, count, fraction, kinds):
    classes = np.random.default_rng(seed).integers(0, kinds, count) if kinds else None
    stay, taken = splitting.split(seed, splitting.TEST, classes, count, fraction, "data.test")
    assert sorted([*stay, *taken]) == list(range(count))
    assert len(taken) == min(max(round(fraction * count), 1), count - 1)
    assert stay.dtype == taken.dtype == np.int64
    assert (np.diff(stay) > 0).all()
    assert (np.diff(taken) > 0).all()
    if classes is not None:
        exact = np.bincount(classes, minlength=kinds) * len(taken) / count
        assert (np.abs(np.bincount(classes[taken], minlength=kinds) - exact) < 1).all()
    again = splitting.split(seed, splitting.TEST, classes, count, fraction, "data.test")
    assert np.array_equal(again[1], taken)


def test_the_shares_are_those_of_scikit_learn():
    classes = np.repeat([0, 1, 2], [100, 50, 30])
    shares = StratifiedShuffleSplit(1, test_size=36, random_state=0)
    theirs = next(shares.split(classes, classes))[1]
    _, ours = splitting.split(0, splitting.TEST, classes, 180, 0.2, "data.test")
    assert np.array_equal(np.bincount(classes[ours]), np.bincount(classes[theirs]))


def test_each_sample_is_as_likely_as_any_other():
    drawn = np.zeros(20)
    for seed in range(2000):
        drawn[splitting.split(seed, splitting.HELD_OUT, np.arange(20) % 3, 20, 0.3, "k")[1]] += 1
    assert np.abs(drawn / 2000 - 0.3).max() < 0.06


def test_the_draws_are_not_those_of_epochs_nor_of_each_other():
    """NumPy's SeedSequence fills up with zeros, so that (seed, 1, 0) is (seed, 1)."""
    salts = [splitting.HELD_OUT, splitting.TEST, splitting.LIMIT, splitting.DOCUMENTS]
    orders = [shuffled((7, *salt), 50) for salt in salts] + [shuffled((7, epoch), 50) for epoch in range(5)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_one_sample_cannot_be_divided():
    with pytest.raises(InputError, match=r"data\.test is 0\.5, but there is only one sample or document"):
        splitting.split(0, splitting.TEST, None, 1, 0.5, "data.test")


@given(st.integers(0, 999), st.integers(6, 200), FRACTIONS, FRACTIONS, st.integers(1, 250), st.booleans())
@settings(max_examples=60, deadline=None)
def test_divide(seed, count, held_out, test, limit, stratified):
    classes = np.random.default_rng(seed).integers(0, 2, count) if stratified else None
    if count - round(test * count) < 2:
        return
    found = splitting.divide(section(held_out=held_out, test=test), seed, count, classes, {})
    ids = {key: set(part.tolist()) for key, (number, part) in found.items() if number == 0}
    assert set.union(*ids.values()) == set(range(count))
    assert sum(map(len, ids.values())) == count
    assert len(ids["test"]) == min(max(round(test * count), 1), count - 1)
    rest = count - len(ids["test"])
    assert len(ids["held_out"]) == min(max(round(held_out * rest), 1), rest - 1)
    if classes is not None:
        remaining = np.bincount(np.delete(classes, found["test"][1]), minlength=2) * len(ids["held_out"]) / rest
        assert (np.abs(np.bincount(classes[found["held_out"][1]], minlength=2) - remaining) < 1).all()
    few = splitting.divide(section(held_out=held_out, test=test, limit=limit), seed, count, classes, {})
    assert set(few["train"][1].tolist()) <= ids["train"]
    assert len(few["train"][1]) == min(limit, len(ids["train"]))
    assert np.array_equal(few["test"][1], found["test"][1])
    assert np.array_equal(few["held_out"][1], found["held_out"][1])
    if classes is not None and limit < len(ids["train"]):
        share = np.bincount(classes[found["train"][1]], minlength=2) * limit / len(ids["train"])
        assert (np.abs(np.bincount(classes[few["train"][1]], minlength=2) - share) < 1).all()


def test_splits_of_their_own_are_numbered():
    found = splitting.divide(section(held_out="a.npz", test=0.5), 0, 10, None, {"held_out": 4})
    assert found["held_out"][0] == 1
    assert found["held_out"][1].tolist() == [0, 1, 2, 3]
    assert len(found["train"][1]) == len(found["test"][1]) == 5
    assert splitting.divide(section(), 0, 3, None, {}).keys() == {"train"}


def test_a_file_must_not_be_the_source():
    assert splitting.files(section(held_out="a.npz", test=0.5), "rows.npz") == {"held_out": "a.npz"}
    with pytest.raises(InputError, match=r"data\.test is \./rows\.npz, which is data\.source itself"):
        splitting.files(section(test="./rows.npz"), "rows.npz")
