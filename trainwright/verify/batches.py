"""Batches under proof: which rows a step trains on, whoever has them; and packed documents in rows of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from trainwright.data.batches import SampleBatch
from trainwright.data.loader import IGNORED, TextBatch
from trainwright.loop import Batch, Run

BITS = 40  # of a row's number: sums of thousands are exact in float64


def watch(run: Run) -> tuple[list[int], list[str]]:
    """Lists that each batch of ``run`` adds to from now on: the sum of its rows' numbers; and its faults."""
    found: list[int] = []
    wrong: list[str] = []
    batch = run.batch

    def watched(step: int) -> Sequence[Batch]:
        batches = batch(step)
        found.append(sum(number for one in batches for number in _numbers(one)))
        wrong.extend(fault for one in batches for fault in faults(one))
        return batches

    run.batch = watched
    return found, wrong


def separate(run: Run) -> None:
    """From now on, every packed document of a training batch has a row of its own."""
    batch = run.batch

    def separated(step: int) -> list[Any]:
        return [apart(one) if isinstance(one, TextBatch) else one for one in batch(step)]

    run.batch = separated


def apart(batch: TextBatch) -> TextBatch:
    """The documents of a batch that predict something, one a row."""
    return replace(stacked(list(documents(batch))), size=batch.size, pairs=batch.pairs)


def stacked(found: Sequence[tuple[Tensor, Tensor]]) -> TextBatch:
    """Documents (tokens and labels), one a row, with the positions that follow from that."""
    length = max(len(tokens) for tokens, _ in found)
    offsets = [0]
    for row, (tokens, _) in enumerate(found):
        offsets += [row * length + len(tokens)] * (len(tokens) < length) + [(row + 1) * length]
    order = torch.arange(length).expand(len(found), length)
    ends = torch.tensor([len(tokens) for tokens, _ in found])[:, None]
    return TextBatch(
        tokens=torch.stack([pad(tokens, (0, length - len(tokens))) for tokens, _ in found]),
        labels=torch.stack([pad(labels, (0, length - len(labels)), value=IGNORED) for _, labels in found]),
        positions=torch.where(order < ends, order, order - ends),
        documents=torch.tensor(offsets, dtype=torch.int32),
    )


def documents(batch: TextBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels of each document that predicts anything."""
    tokens, labels = batch.tokens.flatten(), batch.labels.flatten()
    offsets = batch.documents.tolist()
    for first, end in pairwise(offsets):
        if (labels[first:end] != IGNORED).any():
            yield tokens[first:end], labels[first:end]


def faults(batch: Any) -> Iterator[str]:
    """What is wrong with a batch of text by itself."""
    if not isinstance(batch, TextBatch):
        return
    tokens, labels, positions = batch.tokens.flatten(), batch.labels.flatten(), batch.positions.flatten()
    for first, end in pairwise(batch.documents.tolist()):
        target = torch.cat([tokens[first + 1 : end], tokens.new_tensor([IGNORED])])
        wrong = (labels[first:end] != IGNORED) & (labels[first:end] != target)
        if wrong.any():
            yield f"labels of the document at token {first} aren't its next tokens ({int(wrong.sum())} of {end - first})"
        if not torch.equal(positions[first:end], torch.arange(end - first)):
            yield f"positions of the document at token {first} don't count from 0"


def _numbers(batch: Any) -> Iterator[int]:
    """Of each row or document."""
    if isinstance(batch, TextBatch):
        rows: Iterator[tuple[Tensor, Tensor]] = documents(batch)
    elif isinstance(batch, SampleBatch):
        rows = zip(batch.inputs, batch.targets, strict=True)
    else:
        raise TypeError(f"no rows are known of {type(batch).__name__}")
    for row in rows:
        digest = hashlib.sha256()
        for tensor in row:
            digest.update(tensor.contiguous().numpy().tobytes())
        yield int.from_bytes(digest.digest()[: BITS // 8], "big")
