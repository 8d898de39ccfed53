"""Preparation and moments, against NumPy and scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as np_arrays
from sklearn.preprocessing import StandardScaler

from trainwright.data.examples import Examples, InMemory, Preparation, moments

NUMBERS = st.floats(-1e6, 1e6, width=32)
CPU = torch.device("cpu")


@given(np_arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 4)), elements=NUMBERS))
@settings(max_examples=60, deadline=None)
def test_moments_are_those_of_scikit_learn(table):
    scaler = StandardScaler().fit(table.astype(np.float64))
    mean, std = moments(torch.from_numpy(table), -1)
    np.testing.assert_allclose(mean, scaler.mean_, rtol=1e-9, atol=1e-9)
    constant = table.min(0) == table.max(0)
    np.testing.assert_allclose(np.array(std)[~constant], table.astype(np.float64).std(0)[~constant], rtol=1e-7)
    assert (np.array(std)[constant] == 1).all()


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_moments_along_any_axis(axis):
    table = np.random.default_rng(0).normal(3, 2, (5, 3, 4)).astype(np.float32)
    others = tuple(other for other in range(3) if other != axis % 3)
    mean, std = moments(torch.from_numpy(table), axis)
    np.testing.assert_allclose(mean, table.astype(np.float64).mean(others))
    np.testing.assert_allclose(std, table.astype(np.float64).std(others))


def test_moments_of_bytes_and_with_missing_cells():
    table = np.random.default_rng(0).integers(0, 256, (50, 3), dtype=np.uint8)
    mean, std = moments(torch.from_numpy(table), -1)
    np.testing.assert_allclose(mean, (table / 255).mean(0))
    np.testing.assert_allclose(std, (table / 255).std(0))
    holes = np.where(table < 100, np.nan, table).astype(np.float32)
    mean, std = moments(torch.from_numpy(holes), -1)
    np.testing.assert_allclose(mean, np.nanmean(holes.astype(np.float64), 0))
    np.testing.assert_allclose(std, np.nanstd(holes.astype(np.float64), 0))


@pytest.mark.parametrize("count", [3, 1000, 1001])
def test_a_constant_has_the_deviation_1(count):
    """Summing may round: the deviation of equal numbers must not be 1e-17."""
    assert moments(torch.full((count, 1), 0.1, dtype=torch.float64), -1) == ((0.1,), (1.0,))


def test_normalising_is_what_scikit_learn_does():
    table = np.random.default_rng(0).normal(5, 3, (40, 3)).astype(np.float32)
    mean, std = moments(torch.from_numpy(table), -1)
    preparation = Preparation("table", (3,), ("y",), mean, std, (2.0,), (4.0,))
    theirs = StandardScaler().fit_transform(table.astype(np.float64))
    np.testing.assert_allclose(preparation.inputs_on(CPU)(torch.from_numpy(table)), theirs, atol=1e-5)
    values = torch.tensor([[10.0], [2.0]])
    assert preparation.targets(values).tolist() == [[2.0], [0.0]]
    assert preparation.values(preparation.targets(values)).tolist() == values.tolist()
    assert preparation.targets(torch.tensor([1, 2], dtype=torch.uint8)).dtype == torch.int64


def test_bytes_become_0_to_1_and_are_then_normalised():
    raw = torch.tensor([[0, 255]], dtype=torch.uint8)
    assert Preparation("arrays", (2,), ()).inputs_on(CPU)(raw).tolist() == [[0.0, 1.0]]
    normalised = Preparation("arrays", (2,), (), (0.5, 0.5), (0.25, 0.5)).inputs_on(CPU)(raw)
    torch.testing.assert_close(normalised, torch.tensor([[-2.0, 1.0]]))


FINITE = st.floats(allow_nan=False, allow_infinity=False)
TUPLES = st.none() | st.lists(FINITE, max_size=3).map(tuple)


@given(st.lists(st.text(), max_size=4).map(tuple), TUPLES, TUPLES, st.dictionaries(st.text(), st.lists(st.integers())))
@settings(max_examples=60, deadline=None)
def test_a_preparation_survives_json(labels, mean, target_mean, details):
    preparation = Preparation("series", (24, 2), labels, mean, mean, target_mean, target_mean, details)
    assert Preparation.load(preparation.dump()) == preparation


def test_samples_are_taken_by_number():
    inputs = InMemory(torch.arange(12.0).view(4, 3))
    assert inputs.shape == (3,)
    assert inputs.take(np.array([2, 0])).tolist() == [[6, 7, 8], [0, 1, 2]]
    with pytest.raises(AssertionError):
        Examples(inputs, torch.zeros(3), ["a"] * 4)
