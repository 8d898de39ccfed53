"""Packing and cutting against naive versions, and the properties that training relies on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.data import packing
from trainwright.data.packing import Documents

Problem = tuple[list[int], int]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Lengths and a capacity that holds each of them."""
    capacity = draw(st.integers(1, 70))
    return draw(st.lists(st.integers(1, capacity), max_size=60)), capacity


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The loads of the rows, by looking at every row for every document."""
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [load for load in loads if load + length <= capacity]
        if fitting:
            loads.remove(max(fitting))
        loads.append(max(fitting, default=0) + length)
    return sorted(loads)


@given(problems())
def test_every_document_is_in_exactly_one_row(problem: Problem) -> None:
    rows = packing.pack(np.array(problem[0], dtype=np.int64), problem[1])
    assert sorted(int(document) for row in rows for document in row) == list(range(len(problem[0])))


@given(problems())
def test_rows_are_those_of_best_fit_decreasing_and_none_is_over_capacity(problem: Problem) -> None:
    lengths, capacity = np.array(problem[0], dtype=np.int64), problem[1]
    loads = sorted(int(lengths[row].sum()) for row in packing.pack(lengths, capacity))
    assert all(load <= capacity for load in loads)
    assert loads == naive_best_fit_decreasing(problem[0], capacity)


def test_packing_is_deterministic() -> None:
    lengths = np.random.default_rng(0).integers(1, 513, 500)
    first, second = packing.pack(lengths, 512), packing.pack(lengths.copy(), 512)
    assert [row.tolist() for row in first] == [row.tolist() for row in second]


def test_documents_of_ordinary_lengths_fill_the_rows() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.0, 0.8, 3000).astype(np.int64), 1, 512)
    rows = packing.pack(lengths, 512)
    assert lengths.sum() / (len(rows) * 512) > 0.97


def test_a_document_above_the_capacity_is_our_own_fault() -> None:
    with pytest.raises(AssertionError, match="cut the documents first"):
        packing.pack(np.array([5, 9]), 8)


def test_one_per_row() -> None:
    assert [row.tolist() for row in packing.one_per_row(np.array([3, 1, 2]))] == [[0], [1], [2]]


def naive_pieces(length_of_document: int, length: int, policy: str) -> list[tuple[int, int]]:
    """Ranges inside one document."""
    if length_of_document <= length:
        return [(0, length_of_document)] if length_of_document else []
    if policy != "split":
        return [(0, length)] if policy == "truncate" else []
    pieces, first = [], 0
    while first + 1 < length_of_document:
        pieces.append((first, min(first + length, length_of_document)))
        first += length - 1
    return pieces


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(2, 12), st.sampled_from(("truncate", "drop", "split")))
def test_cut_agrees_with_the_naive_version(lengths: list[int], length: int, policy: packing.LengthPolicy) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    pieces, origins = packing.cut(offsets[:-1], offsets[1:], length, policy)
    expected = [
        (document, int(offsets[document]) + first, int(offsets[document]) + end)
        for document, size in enumerate(lengths)
        for first, end in naive_pieces(size, length, policy)
    ]
    assert [(int(origin), *piece.tolist()) for origin, piece in zip(origins, pieces, strict=True)] == expected


def numbered(lengths: list[int], supervised: list[bool] | None = None) -> Documents:
    """Documents whose tokens are 0, 1, 2, ... throughout."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    mask = np.ones(offsets[-1], dtype=bool) if supervised is None else np.array(supervised)
    return Documents(np.arange(offsets[-1], dtype=np.int32), mask, offsets)


@given(st.lists(st.integers(2, 40), min_size=1, max_size=8), st.integers(2, 12))
def test_split_makes_every_token_but_the_first_a_target_exactly_once(lengths: list[int], length: int) -> None:
    documents = numbered(lengths)
    fitted = packing.fit(documents, np.arange(len(lengths)), length, "split")
    assert fitted.lengths.max() <= length
    assert fitted.tokens[fitted.supervised].tolist() == sorted(set(range(sum(lengths))) - set(documents.offsets.tolist()))
    assert fitted.counts.split == sum(size > length for size in lengths)


def test_fit_counts_what_happened_and_keeps_only_what_teaches() -> None:
    supervised = [False, True, True, True, True] + [False] * 4 + [True, False] + [False, False, False, False, True]
    documents = numbered([5, 4, 0, 2, 5], supervised)
    fitted = packing.fit(documents, np.arange(5), 4, "truncate")
    # 0: truncated; 1: nothing supervised; 2: empty; 3: only its first token; 4: truncated before its only target
    assert fitted.counts == packing.Counts(documents=5, empty=1, truncated=2, masked=3, tokens=4, supervised_tokens=3)
    assert fitted.tokens.tolist() == [0, 1, 2, 3]
    assert fitted.origins is not None
    assert fitted.origins.tolist() == [0]


def test_fit_takes_the_chosen_documents_and_says_where_they_come_from() -> None:
    fitted = packing.fit(numbered([3, 4, 9, 2]), np.array([0, 2, 3]), 5, "split")
    assert fitted.origins is not None
    assert fitted.origins.tolist() == [0, 2, 2, 3]
    assert fitted.tokens.tolist() == [0, 1, 2, 7, 8, 9, 10, 11, 11, 12, 13, 14, 15, 16, 17]
    assert fitted.offsets.tolist() == [0, 3, 8, 13, 15]


def test_drop_leaves_long_documents_out() -> None:
    fitted = packing.fit(numbered([3, 9, 2]), np.arange(3), 5, "drop")
    assert fitted.counts.dropped == 1
    assert fitted.lengths.tolist() == [3, 2]
