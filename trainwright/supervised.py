"""The part of ``build`` that is about samples with targets: images, tables, series, arrays."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainwright import flops, saving
from trainwright.built import Built, Forward, Part, Shape
from trainwright.data import arrays, augment, images, series, tables
from trainwright.data.batches import SampleBatch, SampleBatches, in_order
from trainwright.data.examples import Examples, Preparation, Splits
from trainwright.data.sampler import ALONE, Share
from trainwright.losses import criteria
from trainwright.memory import layout, precision
from trainwright.metrics import meter
from trainwright.parallel import collectives
from trainwright.pieces import Held
from trainwright.predictor import Predictor
from trainwright.recipe import ArrayData, ImageData, InputError, Recipe, SeriesData, TableData, Task
from trainwright.recipe.file import dump

Progress = Callable[[str, int], None]
EVALUATED_AT_ONCE = 2**22  # numbers of the inputs, where the recipe's micro-batch has fewer
NO_CLASS = -100  # a target that pictures leave out
PREPARATION, TASK = "preparation.json", "task.json"
PICTURED_MASKS = 2**26  # numbers of the outputs of samples with masks that are looked at


@dataclass(frozen=True)
class Data:
    """Prepared samples, and the task that they pose under the recipe's loss."""

    splits: Splits
    task: Task

    @property
    def shape(self) -> Shape:
        """What the model must take and give."""
        return Shape(self.splits.preparation.shape, self.task)


def prepare(recipe: Recipe, progress: Progress) -> Data:
    """Read the samples of ``recipe.data``.

    Raises:
        InputError: the data is wrong, or doesn't suit the loss.
    """
    section, seed, target = recipe.data, recipe.run.seed, criteria.wanted(recipe.loss)
    if isinstance(section, ImageData):
        splits = images.prepare(section, target, seed, progress)
    elif isinstance(section, TableData):
        splits = tables.prepare(section, target, seed, progress)
    elif isinstance(section, SeriesData):
        splits = series.prepare(section, target, seed, progress)
    else:
        assert isinstance(section, ArrayData)
        splits = arrays.prepare(section, target, seed, progress)
    return Data(splits, task_of(recipe, splits))


def task_of(recipe: Recipe, splits: Splits) -> Task:
    """What the targets mean under the loss."""
    targets = splits.train.targets
    values = targets.shape[1] if splits.target == "values" else 0
    return criteria.task_for(recipe.loss, splits.target, splits.preparation.labels, targets.ndim == 3, values)


def join(recipe: Recipe, built: Built, data: Data) -> Part:
    """Batches, objective and metrics of a recipe's samples.

    Raises:
        InputError: a metric or an augmentation that doesn't fit the task.
    """
    splits, task = data.splits, data.task
    _check_last_batch(recipe, built.model, len(splits.train), built.mesh.data.size)
    names = meter.check(recipe.metrics, task)
    criterion = criteria.make(recipe.loss, task, splits.train.targets)
    forward = forward_of(built, splits.preparation)
    to_loss = splits.preparation.targets

    def whole(raw: Tensor) -> Tensor:
        return forward(built.model, raw, None)

    def sums(outputs: Tensor, batch: SampleBatch) -> Tensor:
        return criterion.sums(outputs, to_loss(batch.targets.to(built.device, non_blocking=True)))

    def measure(outputs: Iterable[tuple[SampleBatch, Tensor]], progress: Callable[[int], None]) -> dict[str, float]:
        found = meter.Meter(names, task, built.device, built.mesh.data.group)
        return _measure(outputs, progress, criterion, splits.preparation, found, built)

    numbers = math.prod(splits.train.inputs.shape)
    size = max(min(EVALUATED_AT_ONCE // numbers, 1024), recipe.training.micro_batch_size or 8)
    share = Share(built.mesh.data.index, built.mesh.data.size)
    named = {"held_out": splits.held_out, "test": splits.test}
    return Part(
        batches=batches_of(recipe, data, share),
        forward=lambda module, batch, hidden: forward(module, batch.inputs, hidden),
        sums=sums,
        count=lambda batch: criterion.counts(to_loss(batch.targets)),
        splits={name: partial(in_order, examples, size, share) for name, examples in named.items() if examples is not None},
        measure=measure,
        measures=("loss", *names),
        shape=lambda batch: tuple(batch.inputs.shape),
        save=partial(save, recipe, built, data),
        unit="samples",
        fingerprint=_fingerprint(splits),
        flops=_work(built, whole, splits) if built.mesh.size == 1 else None,
        pictures=partial(_pictures, named, whole, splits.preparation, task, size),
        notes=splits.notes,
    )


def _work(built: Built, whole: Callable[[Tensor], Tensor], splits: Splits) -> Callable[[Any], float] | None:
    return flops.sample_counter(built.model, whole, splits.train.inputs.take(np.zeros(1, dtype=np.int64)))


def _fingerprint(splits: Splits) -> str:
    """SHA-256 over the names of all samples and, but for masks, their targets."""
    total = hashlib.sha256()
    for examples in filter(None, (splits.train, splits.held_out, splits.test)):
        total.update("\n".join([*examples.names, ""]).encode())
        if examples.targets.ndim < 3:
            total.update(examples.targets.contiguous().numpy().tobytes())
    return total.hexdigest()


def _check_last_batch(recipe: Recipe, model: nn.Module, samples: int, processes: int) -> None:
    """BatchNorm can't normalise by the deviation of one sample."""
    training = recipe.training
    size = training.micro_batch_size * processes if training.micro_batch_size else training.batch_size
    if samples % size == 1 and any(isinstance(module, nn.BatchNorm1d) for module in model.modules()):
        raise InputError(
            f"training.batch_size: {samples} samples in portions of {size} leave one alone, which BatchNorm can't normalise; "
            f"choose another size, or data.limit: {samples - 1}"
        )


def batches_of(recipe: Recipe, data: Data, share: Share = ALONE) -> SampleBatches:
    """What a process trains on."""
    training, seed, section = recipe.training, recipe.run.seed, recipe.data
    change = None
    if isinstance(section, ImageData) and not augment.is_identity(section.augment):
        channels = data.splits.preparation.shape[0]
        change = augment.make(section.augment, seed=seed, task=data.task, channels=channels)
    size = training.micro_batch_size or training.batch_size // share.processes
    return SampleBatches(data.splits.train, training.batch_size, size, seed, change, share)


def forward_of(built: Built, preparation: Preparation) -> Forward:
    """A model, or a later part of it, and raw samples to its outputs, on the device."""
    arrange = layout.of_inputs(built.model)
    normalised = preparation.inputs_on(built.device)
    widened = precision.of_inputs(built.precision)

    def forward(module: nn.Module, raw: Tensor, hidden: Tensor | None = None) -> Tensor:
        inputs = widened(normalised(arrange(raw.to(built.device, non_blocking=True)))) if hidden is None else hidden
        with precision.context(built.precision, built.device):
            outputs: Tensor = module(inputs)
        return outputs

    return forward


def _measure(
    batches: Iterable[tuple[SampleBatch, Tensor]],
    progress: Callable[[int], None],
    criterion: criteria.Criterion,
    preparation: Preparation,
    found: meter.Meter,
    built: Built,
) -> dict[str, float]:
    sums = counts = torch.zeros(1, dtype=torch.float64)
    for batch, output in batches:
        outputs = output.to(torch.promote_types(output.dtype, torch.float32))
        targets = preparation.targets(batch.targets.to(outputs.device))
        sums = sums + criterion.sums(outputs, targets).double().cpu()
        counts = counts + criterion.counts(preparation.targets(batch.targets))
        in_units = batch.targets if batch.targets.is_floating_point() else targets
        found.update(preparation.values(outputs), in_units.to(outputs.device))
        progress(batch.size)
    sums, counts = (collectives.sum_(total.to(built.device), built.mesh.data) for total in (sums, counts))
    return {"loss": float((sums / counts).sum()), **found.compute()}


def _pictures(
    named: Mapping[str, Examples | None],
    forward: Callable[[Tensor], Tensor],
    preparation: Preparation,
    task: Task,
    size: int,
    folder: Path,
    split: str,
    metrics: Mapping[str, float],
) -> list[Path]:
    """Draw what the model makes of a split."""
    from trainwright.report import plots  # NOTE: here, because training needn't wait for matplotlib

    examples = named[split]
    assert examples is not None
    pixels = task.outputs * math.prod(preparation.shape[1:]) if task.dense else 1
    count = min(len(examples), max(1, PICTURED_MASKS // pixels))
    outputs = torch.cat([preparation.values(forward(part).float()).cpu() for part in _portions(examples, count, size)])
    targets = examples.targets[:count] if examples.targets.is_floating_point() else examples.targets[:count].long()
    if task.ignored is not None:
        targets = targets.masked_fill(targets == task.ignored, NO_CLASS)

    def shown(ids: Any) -> Tensor | None:
        return examples.inputs.take(np.asarray(ids, dtype=np.int64)) if preparation.kind == "images" else None

    in_order = preparation.kind == "series"
    return plots.write(folder, task, outputs, targets, examples.names[:count], shown, metrics, split, in_order=in_order)


def _portions(examples: Examples, count: int, size: int) -> Iterator[Tensor]:
    for first in range(0, count, size):
        yield examples.inputs.take(np.arange(first, min(first + size, count)))


def save(recipe: Recipe, built: Built, data: Data, held: Mapping[str, Held], folder: Path) -> None:
    """The final model, with what prediction needs to know of the data."""
    config = {"architecture": recipe.model.architecture, "options": recipe.model.options, "inputs": list(data.shape.inputs)}
    files = {
        PREPARATION: data.splits.preparation.dump(),
        TASK: json.dumps(asdict(data.task), indent=1) + "\n",
        "recipe.yaml": dump(recipe),
    }
    saving.save_model(recipe, built, saving.Beside(config, files=files), held, folder)


def read_saved(folder: Path) -> tuple[Preparation, Task]:
    """What ``save`` wrote beside the weights.

    Raises:
        InputError: it isn't there, or isn't what was written.
    """
    try:
        preparation = Preparation.load((folder / PREPARATION).read_text(encoding="utf-8"))
        task = json.loads((folder / TASK).read_text(encoding="utf-8"))
        return preparation, Task(**{**task, "labels": tuple(task["labels"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder}: {PREPARATION} or {TASK} can't be read ({error}); train the model again") from None


def predictor(built: Built, preparation: Preparation, task: Task) -> Predictor:
    """A trained model, ready for new samples."""
    forward = forward_of(built, preparation)
    readers = {"images": images.read_new, "table": tables.read_new, "series": series.read_new, "arrays": arrays.read_new}

    @torch.no_grad()
    def outputs(raw: Tensor) -> Tensor:
        return preparation.values(forward(built.model, raw, None).float()).cpu()

    return Predictor(preparation, task, partial(readers[preparation.kind], preparation=preparation), outputs)
