"""Batches: rows of packed documents as tensors of a constant shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainwright.data import sampler
from trainwright.data.packing import Documents

IGNORED = -100  # the label of a position that predicts nothing, as torch's cross entropy has it


@dataclass(frozen=True, eq=False)
class TextBatch:
    """A micro-batch for ``Decoder.forward`` and the loss; see docs/architecture.md."""

    tokens: Tensor
    """(rows, length) int64"""
    labels: Tensor
    """(rows, length) int64, shifted: the token that this position must predict, or -100"""
    positions: Tensor
    """(rows, length) int64, from 0 in each document"""
    documents: Tensor
    """(n + 1,) int32, always on the CPU: offsets of the documents and of the paddings in the flattened tokens"""
    supervised: int = -1
    """number of labels that aren't -100; counted here, once, so that no step has to wait for a device"""

    def __post_init__(self) -> None:
        if self.supervised < 0:
            object.__setattr__(self, "supervised", int((self.labels != IGNORED).sum()))

    def to(self, device: torch.device | str) -> TextBatch:
        """The same batch with everything but ``documents`` on the device."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("tokens", "labels", "positions")}
        return dataclasses.replace(self, **moved)


def collate(documents: Documents, rows: list[np.ndarray], length: int, height: int, pad_id: int) -> TextBatch:
    """A batch of exactly (height, length): compiled code sees one shape, whatever the rows hold.

    The rest of a row is one padding document; so is each row that is missing.

    Args:
        rows: at most ``height`` arrays of document ids, each of at most ``length`` tokens together.
    """
    assert len(rows) <= height
    tokens = np.full((height, length), pad_id, dtype=np.int64)
    targets = np.zeros((height, length), dtype=bool)
    lengths: list[int] = []
    for row in range(height):
        filled = 0
        for document in rows[row] if row < len(rows) else ():
            first, end = documents.offsets[document], documents.offsets[document + 1]
            place = slice(filled, filled + int(end - first))
            tokens[row, place] = documents.tokens[first:end]
            targets[row, place] = documents.supervised[first:end]
            lengths.append(place.stop - place.start)
            filled = place.stop
        assert filled <= length, "packed for a greater length"
        lengths += [length - filled] if filled < length else []
    return _batch(tokens, targets, np.concatenate([[0], np.cumsum(lengths)]))


def _batch(tokens: np.ndarray, targets: np.ndarray, offsets: np.ndarray) -> TextBatch:
    """Labels and positions from tokens and targets (height, length) and the offsets of the documents in them."""
    positions = np.arange(tokens.size) - np.repeat(offsets[:-1], np.diff(offsets))
    following = np.where(targets & (positions.reshape(tokens.shape) > 0), tokens, IGNORED).reshape(-1)
    labels = np.append(following[1:], IGNORED)
    return TextBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels.reshape(tokens.shape)),
        torch.from_numpy(positions.reshape(tokens.shape)),
        torch.from_numpy(offsets.astype(np.int32)),
    )


class Loader:
    """The batches of a run, as a function of the step: nothing has to be saved to resume, or to use fewer processes."""

    def __init__(
        self,
        documents: Documents,
        rows: list[np.ndarray],
        *,
        length: int,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        pad_id: int,
    ) -> None:
        """``rows`` are arrays of document ids, from ``packing.pack`` or ``one_per_row``; sizes are in rows."""
        self.documents = documents
        self.rows = rows
        self.length = length
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.pad_id = pad_id
        self.steps_per_epoch = sampler.steps_per_epoch(len(rows), batch_size)

    def batch(self, step: int) -> list[TextBatch]:
        """The micro-batches of an optimizer step (from 0), fewer at the end of an epoch, all of the same shape."""
        return [
            collate(self.documents, [self.rows[row] for row in ids], self.length, self.micro_batch_size, self.pad_id)
            for ids in sampler.micro_batches(self._row_ids(step), self.micro_batch_size)
        ]

    def identity(self, step: int) -> tuple[int, list[int]]:
        """(epoch, document ids) of a step, to name what a loss that isn't finite was computed on."""
        ids = np.concatenate([self.rows[row] for row in self._row_ids(step)])
        return step // self.steps_per_epoch, ids.tolist()

    def _row_ids(self, step: int) -> np.ndarray:
        return sampler.global_batch(self.seed, step, len(self.rows), self.batch_size)


def in_order(
    documents: Documents, rows: list[np.ndarray], micro_batch_size: int, *, length: int, pad_id: int
) -> Iterator[TextBatch]:
    """Batches for evaluation: every row, and so every document, once and in order."""
    for ids in sampler.micro_batches(np.arange(len(rows)), micro_batch_size):
        yield collate(documents, [rows[row] for row in ids], length, micro_batch_size, pad_id)
