"""The Pareto front against a brute force that compares all with all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.plan.pareto import ACCURACY, Choice, front


def choice(size, speed, accuracy="exact", **settings):
    return Choice({key: str(value) for key, value in settings.items()}, size, 1 / speed, speed, accuracy, None)


choices = st.lists(
    st.builds(
        lambda size, speed, accuracy, index: choice(size, speed, accuracy, index=index),
        st.integers(1, 6),
        st.integers(1, 6).map(float),
        st.sampled_from(ACCURACY),
        st.integers(),
    ),
    max_size=14,
)


def dominates(one, other):
    better = [
        one.bytes - other.bytes,
        other.units_per_second - one.units_per_second,
        ACCURACY.index(one.accuracy) - ACCURACY.index(other.accuracy),
    ]
    return max(better) <= 0 and min(better) < 0


def costs(one):
    return one.bytes, one.units_per_second, one.accuracy


@given(choices)
def test_the_front_is_what_nothing_dominates(tried):
    found = front(tried)
    expected = {costs(one) for one in tried if not any(dominates(other, one) for other in tried)}
    assert {costs(one) for one in found} == expected
    assert len(found) == len(expected), "one of equals"
    assert all(any(one is other for other in tried) for one in found)
    assert [one.bytes for one in found] == sorted(one.bytes for one in found)


@given(choices)
def test_what_is_left_out_is_no_better(tried):
    found = front(tried)
    for one in tried:
        assert any(dominates(other, one) or costs(other) == costs(one) for other in found)


@given(choices, st.randoms())
def test_the_order_does_not_matter(tried, random):
    shuffled = list(tried)
    random.shuffle(shuffled)
    assert [costs(one) for one in front(shuffled)] == [costs(one) for one in front(tried)]


def test_classes_from_the_most_faithful():
    assert ACCURACY == ("exact", "bf16", "quantized", "fewer trained parameters")
    small = [choice(1, 1.0, accuracy, of=accuracy) for accuracy in reversed(ACCURACY)]
    assert [one.accuracy for one in front(small)] == ["exact"]
    faster = [choice(1, float(place), accuracy) for place, accuracy in enumerate(ACCURACY, 1)]
    assert front(faster) == faster[::-1]


def test_a_class_of_its_own_is_refused():
    with pytest.raises(AssertionError, match="fp8"):
        choice(1, 1.0, "fp8")


def test_the_first_of_equals_stays():
    assert front([choice(1, 1.0, a=1), choice(1, 1.0, a=2)]) == [choice(1, 1.0, a=1)]
    assert front([]) == []
    assert choice(1, 1.0, zero=3, checkpointing="full").name == "zero 3, checkpointing full"
    assert choice(1, 1.0).as_json()["accuracy"] == "exact"
