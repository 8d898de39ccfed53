"""What a twin of another make trains on: our data, a step's whole batch at a time, and a model with our run's first weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from trainwright import build, filling, language
from trainwright.data import packing, sampler
from trainwright.data.examples import Examples, Preparation
from trainwright.data.packing import Documents
from trainwright.data.text import TextSplits
from trainwright.models import pretrained
from trainwright.models.decoder import Decoder
from trainwright.recipe import Full, Parallel, Recipe
from trainwright.verify import dropping, hugging_face, plain_loop, plain_losses, techniques
from trainwright.verify.facts import Facts
from trainwright.verify.hugging_face import Document
from trainwright.verify.job import Job
from trainwright.verify.plain_loop import Work
from trainwright.verify.plain_losses import IGNORED
from trainwright.verify.tracing import BEGIN, Trace

DTYPES = dict.fromkeys(("fp32", "bf16", "fp16"), torch.float32) | {"fp64": torch.float64}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
INPUT_BOUND = 1e-5
Outputs = Callable[[list[Document]], tuple[Tensor, Tensor]]


def plain_module(
    job: Job, facts: Facts, values: Mapping[str, Tensor], precision: str = "fp32", *, adapt: bool = False
) -> nn.Module:
    """Our model alone, without any technique and dropout, with these values.

    Args:
        adapt: with the recipe's factors, too.
    """
    plain = techniques.without(job, facts, techniques.TECHNIQUES).recipe
    section = plain.adapt.model_copy(update={"start": None} if hasattr(plain.adapt, "start") else {}) if adapt else Full()
    wanted = "fp64" if precision == "fp64" else "fp32"
    plain = plain.model_copy(update={"precision": wanted, "adapt": section, "parallel": Parallel()})
    built = build.assemble_model(plain, build.shape_of(plain))
    filling.materialise(built, plain, pretrained.blank(built.model))
    dropping.off(built.model)
    hugging_face.copy_values(built.model, values)
    return built.model


def text(job: Job, facts: Facts, run: Trace, precision: str) -> tuple[Callable[[int], list[Document]], Work]:
    """The documents of each step, and the work of the plain loop on them: one document after the other, no row shared."""
    recipe, begin = job.recipe, run.tensors(BEGIN)
    splits = splits_of(recipe, facts)
    rows, documents = _rows(recipe, splits.train), documents_of(recipe, splits.train)
    if isinstance(facts.built.model, Decoder):
        model = hugging_face.decoder(recipe, facts, begin, DTYPES[precision])
        logits: Callable[[Tensor], Tensor] = lambda tokens: model(input_ids=tokens[None], use_cache=False).logits[0]  # noqa: E731
    else:
        model = hugging_face.adapted(plain_module(job, facts, begin, precision), recipe, begin)
        logits = _of_own_module(model, facts)

    def outputs(chosen: list[Document]) -> tuple[Tensor, Tensor]:
        with _autocast(precision):
            found = [logits(tokens)[labels != IGNORED] for tokens, labels in chosen]
        return torch.cat(found), torch.cat([labels[labels != IGNORED] for _, labels in chosen])

    return documents, Work(
        model=model,
        forward=lambda step: outputs(documents(step)),
        loss=(loss := plain_losses.mean_loss(recipe.loss, 0)),
        rows=lambda step: (plain_loop.number_of(*document) for document in documents(step)),
        counted=lambda step: sum(int((labels != IGNORED).sum()) for _, labels in documents(step)),
        held_out=_held_out_text(splits.held_out, outputs, loss) if run.held_out else None,
        steps_in_all=_steps_in_all(recipe, len(rows)),
    )


def _of_own_module(model: nn.Module, facts: Facts) -> Callable[[Tensor], Tensor]:
    """A user's module: tokens of one document to its logits."""
    takes_documents = "documents" in inspect.signature(type(facts.built.model).forward).parameters
    head: Callable[[], Tensor] | None = getattr(model, "head_weight", None)

    def logits(tokens: Tensor) -> Tensor:
        row, ends = tokens[None], torch.tensor([0, len(tokens)], dtype=torch.int32)
        found = model(row, torch.arange(len(tokens))[None], ends) if takes_documents else model(row)
        return (found if head is None else found @ head().T)[0]

    return logits


@torch.no_grad()
def _mean_of(chosen: list[Document], outputs: Outputs, loss: plain_losses.MeanLoss) -> float:
    """Document by document, so that no more logits exist at a time."""
    found = [(loss(*outputs([document])).item(), int((document[1] != IGNORED).sum())) for document in chosen]
    return sum(mean * count for mean, count in found) / sum(count for _, count in found)


def _held_out_text(held_out: Documents | None, outputs: Outputs, loss: plain_losses.MeanLoss) -> Callable[[], float] | None:
    if held_out is None:
        return None
    return lambda: _mean_of([_document(held_out, index) for index in range(len(held_out))], outputs, loss)


def splits_of(recipe: Recipe, facts: Facts) -> TextSplits:
    """The tokenised documents."""
    return language.prepare(recipe, facts.built, None, lambda what, done: None).splits


def _rows(recipe: Recipe, train: Documents) -> list[np.ndarray]:
    """Which documents stand in which row of the data."""
    section = language.text_of(recipe)
    return packing.pack(train.lengths, section.sequence_length) if section.packing else packing.one_per_row(train.lengths)


def documents_of(recipe: Recipe, train: Documents) -> Callable[[int], list[Document]]:
    """The documents that a step trains on."""
    rows = _rows(recipe, train)

    @cache
    def documents(step: int) -> list[Document]:
        chosen = sampler.global_batch(recipe.run.seed, step, len(rows), recipe.training.batch_size)
        return [_document(train, int(index)) for row in chosen for index in rows[row]]

    return documents


def _document(documents: Documents, index: int) -> Document:
    """Tokens, and for each the one that follows, if it is to be predicted."""
    place = slice(int(documents.offsets[index]), int(documents.offsets[index + 1]))
    tokens = torch.from_numpy(documents.tokens[place].astype(np.int64))
    following = torch.where(torch.from_numpy(documents.supervised[place]), tokens, IGNORED)
    return tokens, torch.cat([following[1:], torch.tensor([IGNORED])])


def _steps_in_all(recipe: Recipe, rows: int) -> int:
    per_epoch = -(-rows // recipe.training.batch_size)
    return recipe.training.steps or max(1, round((recipe.training.epochs or 1) * per_epoch))


def _autocast(precision: str) -> AbstractContextManager[object]:
    return torch.autocast("cpu", dtype=AUTOCAST[precision]) if precision in AUTOCAST else nullcontext()


def samples(job: Job, facts: Facts, run: Trace, precision: str) -> Work:
    """The plain loop's work on samples with targets: our module, whose weights are those of our run before step 1."""
    from trainwright import supervised  # NOTE: here, because text needn't wait for the libraries of images and metrics

    recipe, begin = job.recipe, run.tensors(BEGIN)
    data = supervised.prepare(recipe, lambda what, done: None)
    train, preparation = data.splits.train, data.splits.preparation
    change = supervised.batches_of(recipe, data, sampler.ALONE).augment
    model = hugging_face.adapted(plain_module(job, facts, begin, precision), recipe, begin)
    loss = plain_losses.mean_loss(recipe.loss, len(data.task.labels), preparation.targets(train.targets))

    @cache
    def batch(step: int) -> tuple[Tensor, Tensor]:
        ids = sampler.global_batch(recipe.run.seed, step, len(train), recipe.training.batch_size).copy()  # it is read-only
        if change is None:
            return _fetched(train, ids)
        return change(step, np.arange(len(ids)), len(ids), lambda positions: _fetched(train, ids[positions]))

    def outputs(raw: Tensor, size: int) -> Tensor:
        """BatchNorm's statistics are those of so many samples at a time."""
        inputs = normalised(raw, preparation).to(DTYPES[precision])
        with _autocast(precision):
            return torch.cat([model(part) for part in inputs.split(size)])

    def forward(step: int) -> tuple[Tensor, Tensor]:
        raw, targets = batch(step)
        size = facts.micro_batch(job) * int(recipe.parallel.data) if facts.batch_norm else len(raw)
        return outputs(raw, size), preparation.targets(targets)

    def held_out() -> float:
        found = data.splits.held_out
        assert found is not None
        with torch.no_grad():
            everything = outputs(found.inputs.take(np.arange(len(found))), 256)
            return loss(everything, preparation.targets(found.targets)).item()

    return Work(
        model=model,
        forward=forward,
        loss=loss,
        rows=lambda step: (plain_loop.number_of(*row) for row in zip(*batch(step), strict=True)),
        counted=lambda step: len(batch(step)[0]),
        held_out=held_out if run.held_out else None,
        steps_in_all=_steps_in_all(recipe, len(train)),
    )


def _fetched(train: Examples, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    return train.inputs.take(ids), train.targets[torch.from_numpy(ids)]


def normalised(raw: Tensor, preparation: Preparation) -> Tensor:
    """(x - mean) / std, in float64; the product's float32 numbers where they are these but for rounding.

    So a run in float64 can be compared to its last digits, and a fault of the product's formula still shows.
    """
    wide = raw.double() / 255 if raw.dtype == torch.uint8 else raw.double()
    if preparation.mean is not None and preparation.std is not None:
        place = (-1, 1, 1) if preparation.kind == "images" else (-1,)
        mean, std = (torch.tensor(values, dtype=torch.float64).view(place) for values in (preparation.mean, preparation.std))
        wide = (wide - mean) / std
    ours = preparation.inputs_on(torch.device("cpu"))(raw)
    return ours if torch.allclose(ours.double(), wide, rtol=INPUT_BOUND, atol=INPUT_BOUND) else wide
