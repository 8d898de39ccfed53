"""Batches against the documents they were made of, position by position."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.data import loader, packing
from trainwright.data.packing import Documents

PAD = 9999


@st.composite
def corpora(draw: st.DrawFn) -> tuple[Documents, int]:
    """Documents with distinct tokens and any supervision, even of first tokens; and the length they are packed for."""
    length = draw(st.integers(1, 14))
    lengths = draw(st.lists(st.integers(1, length), min_size=1, max_size=14))
    supervised = draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Documents(np.arange(offsets[-1], dtype=np.int32), np.array(supervised, dtype=bool), offsets), length


def all_batches(documents: Documents, length: int, height: int, packed: bool) -> list[loader.TextBatch]:
    rows = packing.pack(documents.lengths, length) if packed else packing.one_per_row(documents.lengths)
    return list(loader.in_order(documents, rows, height, length=length, pad_id=PAD))


def segments(batch: loader.TextBatch) -> list[tuple[int, int]]:
    """The ranges of the documents and paddings in the flattened batch."""
    offsets = batch.documents.tolist()
    return list(itertools.pairwise(offsets))


@settings(deadline=None)
@given(corpora(), st.integers(1, 4), st.booleans())
def test_the_batches_hold_exactly_the_documents(corpus: tuple[Documents, int], height: int, packed: bool) -> None:
    documents, length = corpus
    expected = [documents.tokens[a:b].tolist() for a, b in itertools.pairwise(documents.offsets)]
    found = []
    for batch in all_batches(documents, length, height, packed):
        assert batch.tokens.shape == batch.labels.shape == batch.positions.shape == (height, length)
        assert batch.documents[0] == 0
        assert batch.documents[-1] == height * length
        for first, end in segments(batch):
            assert first < end
            assert first // length == (end - 1) // length, "a document crosses the end of a row"
            tokens = batch.tokens.view(-1)[first:end].tolist()
            assert batch.positions.view(-1)[first:end].tolist() == list(range(end - first))
            if PAD in tokens:
                assert set(tokens) == {PAD}
                assert end % length == 0, "padding is the end of a row"
            else:
                found.append(tokens)
    assert sorted(found) == sorted(expected)


@settings(deadline=None)
@given(corpora(), st.integers(1, 4), st.booleans())
def test_labels_are_the_next_supervised_token_of_the_same_document(
    corpus: tuple[Documents, int], height: int, packed: bool
) -> None:
    documents, length = corpus
    for batch in all_batches(documents, length, height, packed):
        tokens, expected = batch.tokens.view(-1).tolist(), [-100] * (height * length)
        for first, end in segments(batch):
            for position in range(first, end - 1):
                following = tokens[position + 1]
                if following != PAD and documents.supervised[following]:  # tokens are numbered
                    expected[position] = following
        assert batch.labels.view(-1).tolist() == expected
        assert batch.supervised == sum(label != -100 for label in expected)
        assert batch.size == sum(token != PAD for token in tokens)
        sizes = [end - first for first, end in segments(batch) if tokens[first] != PAD]
        assert batch.pairs == sum(size * (size + 1) // 2 for size in sizes)


def test_dtypes_and_device_of_a_batch() -> None:
    batch = all_batches(small(), 8, 2, packed=True)[0]
    assert (batch.tokens.dtype, batch.labels.dtype, batch.positions.dtype) == (torch.int64,) * 3
    assert batch.documents.dtype == torch.int32
    moved = batch.to("meta")
    assert moved.tokens.device.type == moved.labels.device.type == moved.positions.device.type == "meta"
    assert moved.documents.device.type == "cpu"
    assert (moved.supervised, moved.size) == (batch.supervised, batch.size)


def small() -> Documents:
    lengths = np.array([5, 3, 8, 2, 2, 7, 4, 6, 1, 8, 3])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    supervised = np.ones(offsets[-1], dtype=bool)
    supervised[offsets[:-1]] = False
    return Documents(np.arange(offsets[-1], dtype=np.int32), supervised, offsets)


def make_loader(documents: Documents, micro_batch_size: int = 2, seed: int = 3) -> loader.Loader:
    rows = packing.pack(documents.lengths, 8)
    return loader.Loader(documents, rows, length=8, batch_size=4, micro_batch_size=micro_batch_size, seed=seed, pad_id=PAD)


def test_an_epoch_supervises_every_target_once() -> None:
    documents = small()
    batches = make_loader(documents)
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        labels = [batch.labels[batch.labels != -100] for step in steps for batch in batches.batch(step)]
        assert sorted(torch.cat(labels).tolist()) == documents.tokens[documents.supervised].tolist()


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_a_step_holds_the_same_rows_in_any_portions(micro_batch_size: int) -> None:
    documents = small()
    whole, portions = make_loader(documents, 4), make_loader(documents, micro_batch_size)
    for step in range(2 * whole.steps_per_epoch):
        (expected,) = whole.batch(step)
        tokens = torch.cat([batch.tokens for batch in portions.batch(step)])
        assert torch.equal(tokens, expected.tokens[: len(tokens)])
        assert (expected.tokens[len(tokens) :] == PAD).all()
        assert {batch.tokens.shape for batch in portions.batch(step)} == {(micro_batch_size, 8)}


def test_resuming_in_the_middle_or_at_the_boundary_of_an_epoch_gives_the_same_batches() -> None:
    uninterrupted = make_loader(small())
    expected = [uninterrupted.batch(step) for step in range(3 * uninterrupted.steps_per_epoch)]
    for start in range(len(expected)):
        resumed = make_loader(small())
        for step in range(start, len(expected)):
            for batch, other in zip(resumed.batch(step), expected[step], strict=True):
                assert torch.equal(batch.tokens, other.tokens)
                assert torch.equal(batch.labels, other.labels)
                assert torch.equal(batch.documents, other.documents)


def test_identity_names_the_rows_of_the_source() -> None:
    documents = packing.fit(small(), np.arange(2, 11), 8, "truncate")  # document 8 has one token and is left out
    batches = make_loader(documents)
    named = " ".join(batches.identity(step) for step in range(batches.steps_per_epoch))
    assert "epoch 1, rows" in named
    numbers = {int(word.strip(",")) for word in named.split() if word.strip(",").isdigit()}
    assert numbers >= {3, 4, 5, 6, 7, 8, 10, 11}
    assert not {2, 9} & numbers
    assert batches.identity(batches.steps_per_epoch).startswith("epoch 2")
