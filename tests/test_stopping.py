"""Early stopping against transformers' callback, and on values that aren't numbers."""

import json
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import EarlyStoppingCallback

from trainwright import stopping
from trainwright.recipe import EarlyStop

VALUES = st.lists(st.floats(-5, 5).map(lambda value: round(value, 1)), min_size=1, max_size=20)


def section(direction="minimize", patience=3, min_delta=0.0):
    return EarlyStop(metric="loss", direction=direction, patience=patience, min_delta=min_delta)


def observed(settings, values, state=None):
    """The state and the answers; each state goes through JSON, as in a checkpoint."""
    state, answers = state or {}, []
    for value in values:
        state, stop = stopping.observe(settings, json.loads(json.dumps(state, allow_nan=False)), value)
        answers.append(stop)
    return state, answers


def of_transformers(settings, values):
    callback = EarlyStoppingCallback(settings.patience, settings.min_delta)
    arguments = SimpleNamespace(greater_is_better=settings.direction == "maximize")
    state, answers = SimpleNamespace(best_metric=None), []
    for value in values:
        callback.check_metric_value(arguments, state, None, value)
        if callback.early_stopping_patience_counter == 0:
            state.best_metric = value
        answers.append(callback.early_stopping_patience_counter >= settings.patience)
    return answers


@given(VALUES, st.sampled_from(["minimize", "maximize"]), st.integers(1, 4), st.sampled_from([0.0, 0.25, 1.05]))
def test_transformers(values, direction, patience, min_delta):
    settings = section(direction, patience, min_delta)
    assert observed(settings, values)[1] == of_transformers(settings, values)


@given(VALUES, VALUES)
def test_a_state_goes_on(before, after):
    settings = section(patience=2)
    state, first = observed(settings, before)
    end, second = observed(settings, after, state)
    assert (end, first + second) == observed(settings, before + after)


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_no_improvement(direction, bad):
    assert not stopping.better(direction, bad, 1.0)
    assert not stopping.better(direction, bad, None)
    assert stopping.better(direction, 1.0, bad)
    state, answers = observed(section(direction, 2), [bad, bad])
    assert state == {"best": None, "waited": 2}
    assert answers == [False, True]


def test_small_gains_add_up_to_none():
    """The value to beat is that of the last improvement, so that many small ones don't keep a run alive."""
    state, answers = observed(section(patience=3, min_delta=0.5), [1.0, 0.8, 0.6, 0.5])
    assert answers == [False, False, False, True]
    assert state == {"best": 1.0, "waited": 3}


def test_the_direction_counts():
    assert stopping.better("minimize", 1.0, 2.0)
    assert not stopping.better("maximize", 1.0, 2.0)
    assert not stopping.better("minimize", 2.0, 2.0)
    assert not stopping.better("maximize", 2.0, 2.0)


def test_the_state_given_stays_as_it_was():
    state = {"best": 1.0, "waited": 0}
    stopping.observe(section(), state, 2.0)
    assert state == {"best": 1.0, "waited": 0}
