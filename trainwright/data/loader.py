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
from trainwright.data.sampler import ALONE, Share

IGNORED = -100  # the label of a position that predicts nothing, as torch's cross entropy has it
NAMED = 24  # how many rows a message names


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
    """number of labels that aren't -100"""
    size: int = -1
    """number of tokens that aren't padding; by default all"""
    pairs: int = 0
    """number of pairs of a token and one it attends to (itself included), without padding: the work of attention"""

    # All are counted once, on the CPU, so that no step has to wait for a device.
    def __post_init__(self) -> None:
        if self.size < 0:
            object.__setattr__(self, "size", self.tokens.numel())
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
    size = pairs = 0
    for row in range(height):
        filled = 0
        for document in rows[row] if row < len(rows) else ():
            first, end = documents.offsets[document], documents.offsets[document + 1]
            place = slice(filled, filled + int(end - first))
            tokens[row, place] = documents.tokens[first:end]
            targets[row, place] = documents.supervised[first:end]
            lengths.append(place.stop - place.start)
            filled = place.stop
            pairs += lengths[-1] * (lengths[-1] + 1) // 2
        assert filled <= length, "packed for a greater length"
        size += filled
        lengths += [length - filled] if filled < length else []
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    positions = (np.arange(tokens.size) - np.repeat(offsets[:-1], lengths)).reshape(tokens.shape)
    labels = _shifted(np.where(targets & (positions > 0), tokens, IGNORED))
    return TextBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy(positions),
        torch.from_numpy(offsets),
        size=size,
        pairs=pairs,
    )


def _shifted(targets: np.ndarray) -> np.ndarray:
    """Each position gets the target of the next one, the last of each row none; (rows, length)."""
    return np.pad(targets[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)


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
        share: Share = ALONE,
    ) -> None:
        """``rows`` are arrays of document ids, from ``packing.pack`` or ``one_per_row``; sizes are in rows.

        ``batch_size`` is that of all processes together, ``micro_batch_size`` that of one.
        """
        self.documents = documents
        self.rows = rows
        self.length = length
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.pad_id = pad_id
        self.share = share
        self.steps_per_epoch = sampler.steps_per_epoch(len(rows), batch_size)

    @property
    def micro_batches(self) -> int:
        return len(sampler.micro_batches(self.batch_size, self.micro_batch_size, self.share))

    def batch(self, step: int) -> list[TextBatch]:
        """The micro-batches of an optimizer step (from 0), fewer at the end of an epoch, all of the same shape."""
        ids = self._row_ids(step)
        return [
            collate(self.documents, [self.rows[row] for row in ids[part]], self.length, self.micro_batch_size, self.pad_id)
            for part in sampler.micro_batches(len(ids), self.micro_batch_size, self.share)
        ]

    def identity(self, step: int) -> str:
        """What a step trains on, to be found in the source: for the message that a loss isn't finite."""
        ids = np.concatenate([self.rows[row] for row in self._row_ids(step)])
        origins = ids if self.documents.origins is None else self.documents.origins[ids]
        numbers = (np.unique(origins) + 1).tolist()
        more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
        listed = ", ".join(map(str, numbers[:NAMED]))
        return f"epoch {step // self.steps_per_epoch + 1}, rows {listed}{more} of the data (the first is 1)"

    def _row_ids(self, step: int) -> np.ndarray:
        return sampler.global_batch(self.seed, step, len(self.rows), self.batch_size)


def in_order(
    documents: Documents,
    rows: list[np.ndarray],
    micro_batch_size: int,
    *,
    length: int,
    pad_id: int,
    share: Share = ALONE,
) -> Iterator[TextBatch]:
    """Batches for evaluation: every row, and so every document, once over all processes and in order."""
    for part in sampler.micro_batches(len(rows), micro_batch_size, share):
        yield collate(documents, rows[part], length, micro_batch_size, pad_id)
