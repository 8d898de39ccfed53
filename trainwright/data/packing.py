"""Documents of tokens, and fitting them into rows of a fixed length: long ones are cut, short ones share a row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

LengthPolicy = Literal["truncate", "drop", "split"]


@dataclass(frozen=True)
class Counts:
    """What became of the documents of a split on their way to the length that is trained on."""

    documents: int = 0
    """as read"""
    empty: int = 0
    """of these, without text; left out"""
    truncated: int = 0
    dropped: int = 0
    split: int = 0
    masked: int = 0
    """documents, or pieces of split ones, left out because no token of theirs is supervised"""
    tokens: int = 0
    """that remain"""
    supervised_tokens: int = 0
    """that remain; exactly the labels of one pass"""


@dataclass(frozen=True, eq=False)
class Documents:
    """Tokenised documents, one after the other.

    Document i is ``tokens[offsets[i]:offsets[i + 1]]``. ``supervised[k]`` says that token k counts as a target; the
    first token of a document never does, because nothing predicts it.
    """

    tokens: np.ndarray
    """(tokens,) int32"""
    supervised: np.ndarray
    """(tokens,) bool"""
    offsets: np.ndarray
    """(documents + 1,) int64"""
    origins: np.ndarray | None = None
    """(documents,) int64: the rows of the source that the documents come from; None: document i is row i"""
    counts: Counts = field(default_factory=Counts)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(documents,) int64"""
        return np.diff(self.offsets)

    def prompts(self, count: int) -> list[tuple[list[int], list[int]]]:
        """What comes before the first target, and the rest, of the first documents; text without a prompt is halved."""
        pairs = []
        for first, end in zip(self.offsets[:count].tolist(), self.offsets[1 : count + 1].tolist(), strict=False):
            targets = np.flatnonzero(self.supervised[first:end])
            cut = first + (int(targets[0]) if targets[0] > 1 else (end - first + 1) // 2)
            pairs.append((self.tokens[first:cut].tolist(), self.tokens[cut:end].tolist()))
        return pairs


def fit(documents: Documents, ids: np.ndarray, length: int, policy: LengthPolicy) -> Documents:
    """The documents with these ids, cut to the length, without the pieces that hold no supervised token."""
    starts, ends = documents.offsets[ids], documents.offsets[ids + 1]
    pieces, origins = cut(starts, ends, length, policy)
    targets_before = np.concatenate([[0], np.cumsum(documents.supervised)])
    targets = targets_before[pieces[:, 1]] - targets_before[pieces[:, 0] + 1]
    kept, origins = pieces[targets > 0], ids[origins[targets > 0]]
    counts = Counts(
        documents=len(ids),
        empty=int((ends == starts).sum()),
        masked=len(pieces) - len(kept),
        tokens=int((kept[:, 1] - kept[:, 0]).sum()),
        supervised_tokens=int(targets.sum()),
    )
    changed = {"truncate": "truncated", "drop": "dropped", "split": "split"}[policy]
    counts = dataclasses.replace(counts, **{changed: int((ends - starts > length).sum())})
    return _gathered(documents, kept, origins, counts)


def cut(starts: np.ndarray, ends: np.ndarray, length: int, policy: LengthPolicy) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of at most ``length`` tokens, in the order of the documents; empty documents give none.

    truncate keeps the first ``length`` tokens, drop leaves longer documents out. split goes on with a further piece
    that begins with the last token of the piece before it: that token is read again and not predicted again, so that
    every token but the document's first is a target exactly once.

    Args:
        starts, ends: (documents,) int64, half-open ranges in the flat array of tokens.

    Returns:
        (pieces, 2) int64 half-open ranges, and (pieces,) int64 indices of the documents they are from.
    """
    lengths = ends - starts
    stride = max(length - 1, 1)
    pieces = (lengths > 0).astype(np.int64)
    if policy == "drop":
        pieces[lengths > length] = 0
    if policy == "split":
        pieces[lengths > length] = -((1 - lengths[lengths > length]) // stride)  # ceil((tokens - 1) / stride)
    origins = np.repeat(np.arange(len(starts)), pieces)
    number = np.arange(len(origins)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = starts[origins] + number * stride
    return np.stack([first, np.minimum(ends[origins], first + length)], axis=1), origins


def _gathered(documents: Documents, pieces: np.ndarray, origins: np.ndarray, counts: Counts) -> Documents:
    """Copies of the pieces, one after the other."""
    offsets = np.concatenate([[0], np.cumsum(pieces[:, 1] - pieces[:, 0])]).astype(np.int64)
    tokens = np.concatenate([documents.tokens[:0], *(documents.tokens[first:end] for first, end in pieces)])
    supervised = np.concatenate([documents.supervised[:0], *(documents.supervised[first:end] for first, end in pieces)])
    supervised[offsets[:-1]] = False
    return Documents(tokens, supervised, offsets, origins, counts)


def pack(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Best-fit decreasing bin packing: the longest document first, each into the fullest row that still has room.

    The free space of the open rows is kept as the bits of one integer, so that the best row is the lowest set bit from
    the document's length on: O(n capacity / 64) word operations after an O(n log n) sort.

    Args:
        lengths: (documents,) integers from 1 to ``capacity``.

    Returns:
        Rows of document ids (int64 arrays). Each document is in exactly one row. Equal input gives equal rows.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert lengths.size == 0 or (lengths.min() >= 1 and lengths.max() <= capacity), "cut the documents first"
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free space; the last opened one is used first
    free_spaces = 0
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        row, free = len(rows), capacity
        if fitting := free_spaces >> length:
            free = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[free].pop()
            free_spaces ^= 0 if open_rows[free] else 1 << free
            rows[row].append(document)
        else:
            rows.append([document])
        if free > length:
            open_rows[free - length].append(row)
            free_spaces |= 1 << (free - length)
    return [np.array(row, dtype=np.int64) for row in rows]


def one_per_row(lengths: np.ndarray) -> list[np.ndarray]:
    """Rows without packing: document ``i`` alone in row ``i`` (int64 arrays)."""
    return list(np.arange(len(lengths), dtype=np.int64)[:, None])
