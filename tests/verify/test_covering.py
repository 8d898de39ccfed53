"""Covering arrays: every pair that can occur does, nothing forbidden does, and there are few rows."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.verify import covering

NAMES = ("a", "b", "c", "d", "e")


@st.composite
def spaces(draw):
    """Factors of one to four levels, and sets of one to three levels that can't be together."""
    factors = {name: [f"{name}{i}" for i in range(draw(st.integers(1, 4)))] for name in NAMES[: draw(st.integers(2, 5))]}
    levels = st.sampled_from([(name, level) for name in factors for level in factors[name]])
    groups = st.frozensets(levels, min_size=1, max_size=3).filter(lambda one: len(dict(one)) == len(one))
    return factors, draw(st.lists(groups, max_size=6))


def everything(factors, forbidden):
    """All rows that are allowed, by brute force."""
    rows = (dict(zip(factors, levels, strict=True)) for levels in product(*factors.values()))
    return [row for row in rows if not any(one <= set(row.items()) for one in forbidden)]


@settings(max_examples=150, deadline=None)
@given(spaces())
def test_covers_what_can_be_covered_and_nothing_else(space):
    factors, forbidden = space
    rows, allowed = covering.cover(factors, forbidden), everything(factors, forbidden)
    assert all(row in allowed for row in rows)
    possible = set().union(*(covering.within(row) for row in allowed))
    assert set().union(*(covering.within(row) for row in rows)) == possible
    assert possible <= set(covering.pairs(factors))


@settings(max_examples=100, deadline=None)
@given(spaces(), st.data())
def test_a_row_is_finished_where_one_can_be(space, data):
    factors, forbidden = space
    name = data.draw(st.sampled_from(list(factors)))
    begun = {name: data.draw(st.sampled_from(factors[name]))}
    found = covering.finished(factors, begun, forbidden)
    fitting = [row for row in everything(factors, forbidden) if begun.items() <= row.items()]
    assert (found in fitting) if fitting else (found is None)


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ([3] * 4, 9),  # 9 is the least: a Latin square
        ([2] * 10, 10),  # the least is 6 (Katona 1973, Kleitman and Spencer 1973)
        ([3] * 7, 15),  # the least known is 12
        ([5, 4, 4, 3, *[2] * 10], 26),  # not less than 5 * 4
    ],
)
def test_rows_are_few(sizes, most):
    factors = {f"factor {i}": [f"level {j}" for j in range(size)] for i, size in enumerate(sizes)}
    rows = covering.cover(factors)
    largest = sorted(sizes)[-2:]
    assert largest[0] * largest[1] <= len(rows) <= most
    assert rows == covering.cover(factors), "the same rows each time"


def test_pairs_are_all_pairs_of_different_factors():
    assert covering.pairs({"a": ["x", "y"], "b": ["z"], "c": ["w"]}) == [
        frozenset(pair)
        for pair in (
            {("a", "x"), ("b", "z")},
            {("a", "y"), ("b", "z")},
            {("a", "x"), ("c", "w")},
            {("a", "y"), ("c", "w")},
            {("b", "z"), ("c", "w")},
        )
    ]


def test_nothing_is_left_to_cover():
    assert covering.next_row({"a": ["x"], "b": ["y"]}, [], []) is None
    assert covering.cover({"a": ["x"], "b": ["y"]}, [frozenset({("a", "x")})]) == []
