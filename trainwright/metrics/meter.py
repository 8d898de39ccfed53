"""Metrics of classes, masks and numbers by torchmetrics: exact over uneven batches and over ranks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional

from trainwright.metrics.language import LARGEST
from trainwright.metrics.lean import lean
from trainwright.metrics.names import check, defaults, top
from trainwright.recipe import RunError, Task

with lean():
    from torchmetrics import MeanMetric, Metric, SumMetric, classification, regression
    from torchmetrics.utilities.data import dim_zero_cat

__all__ = ["CONFUSION_AXES", "Meter", "check", "defaults"]

CONFUSION_AXES = ("actual", "predicted")
BINS = 15  # of the calibration error
THRESHOLDS = 200  # of the curves of masks
AT_ONCE = 8192  # pixels: torchmetrics spreads each over all thresholds, 1600 bytes a class

BINARY: dict[str, Callable[..., Metric]] = {
    "precision": classification.BinaryPrecision,
    "recall": classification.BinaryRecall,
    "f1": classification.BinaryF1Score,
    "iou": classification.BinaryJaccardIndex,
    "dice": classification.BinaryF1Score,
}
MULTICLASS: dict[str, Callable[..., Metric]] = {
    "accuracy": partial(classification.MulticlassAccuracy, average="micro"),
    "precision": classification.MulticlassPrecision,
    "recall": classification.MulticlassRecall,
    "f1": classification.MulticlassF1Score,
    "iou": classification.MulticlassJaccardIndex,
    "dice": classification.MulticlassF1Score,
}
SCORED: dict[tuple[str, str], Callable[..., Metric]] = {
    ("auroc", "binary"): classification.BinaryAUROC,
    ("auroc", "classes"): classification.MulticlassAUROC,
    ("average_precision", "binary"): classification.BinaryAveragePrecision,
    ("average_precision", "classes"): partial(classification.MulticlassAveragePrecision, average="none"),
    ("calibration_error", "binary"): classification.BinaryCalibrationError,
    ("calibration_error", "classes"): classification.MulticlassCalibrationError,
}


@dataclass(frozen=True)
class _Measure:
    """A metric, what of (outputs, targets) it looks at, and what its value needs besides (the targets of each class)."""

    metric: Metric
    view: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    finish: Callable[[Tensor, Tensor], Tensor] = lambda value, support: value
    at_once: int | None = None

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        seen = self.view(outputs, targets)
        for part in zip(*(tensor.split(self.at_once or max(len(tensor), 1)) for tensor in seen), strict=True):
            self.metric.update(*part)

    def prepare(self, task: Task, device: torch.device) -> None:
        """Give lists something to gather: all ranks need equal dtypes and axes, so one without samples has empty ones."""
        if not self.metric.update_called and any(isinstance(state, list) for state in self.metric.metric_state.values()):
            outputs = torch.empty(_shape(task, 0, (1, 1)), device=device)
            self.update(outputs, outputs if task.kind == "values" else outputs[:, 0])


class Meter:
    """Metrics over batches of any sizes; on several ranks over what all of them have seen.

    Outputs and targets have the shapes of ``Task``. Outputs are logits; for values both are in the user's units. A sample, or
    a pixel where dense, counts once. The values are scikit-learn's; without any sample, all are nan.

    accuracy, top_K           shares of all; of equal scores the first class is predicted, but top_K takes the last ones
    precision, recall, f1     for one output of class 1; else macro
    iou, dice                 likewise; jaccard_score and f1_score over all pixels together
    _macro, _weighted         over the classes that occur in targets or predictions; 0 where one is never predicted, or is never
                              a target. _micro: over all decisions
    auroc, average_precision  for one output of class 1; else the mean over all classes, each against the rest. If a class is
                              never a target, auroc is nan, and its average_precision is 0. Every score is kept, but of masks
                              (too many) the curves have 200 thresholds
    calibration_error         expected, in 15 bins (Guo et al. 2017, section 2); for one output of the probability of class 1
    perplexity                exp of the mean cross-entropy
    mae, rmse, r2             the mean over the values. r2 keeps every value, and is nan for a single sample
    """

    def __init__(
        self, names: list[str], task: Task, device: torch.device | str = "cpu", group: distributed.ProcessGroup | None = None
    ) -> None:
        """``names`` have gone through ``check``; ``device`` must know float64.

        The ranks of ``group`` measure together, all with the same names; None: this process alone.
        """
        self.task, self.device = task, torch.device(device)
        self._measures = {name: _measure(name, task) for name in names}
        # How many there are: of samples, or of each pair of classes.
        self._seen = _Measure(SumMetric(), _ones) if task.kind == "values" else _confusion(task)
        for measure in (self._seen, *self._measures.values()):
            # Sums of float32 stop growing at 16 million samples. NOTE: in this order: to() would forget the type.
            measure.metric.to(self.device).set_dtype(torch.float64)
            # NOTE: a rank that answers from its cache doesn't gather, and the others would wait for it.
            measure.metric.compute_with_cache = False
            measure.metric.process_group = group
            # NOTE: not sync_on_compute, which is looked at only when a metric is made.
            measure.metric.distributed_available_fn = lambda: group is not None

    @torch.no_grad()
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in a batch, on any device.

        Raises:
            RunError: an output isn't finite.
        """
        if not outputs.isfinite().all():
            raise RunError("the model's outputs are not finite (nan or infinite), so there is nothing to measure")
        found, true = outputs.to(self.device), targets.to(self.device)
        assert _shape(self.task, len(true), true.shape[-2:]) == tuple(found.shape)
        if self.task.ignored is not None:
            found, true = _counting(found, true, true != self.task.ignored)
        if not len(true):
            return
        with _quiet():
            for measure in (self._seen, *self._measures.values()):
                measure.update(found, true)

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        """The metrics by name; nan where one is undefined. Every rank must call it, and gets the same."""
        support = self._counts()
        if not support.sum():
            return dict.fromkeys(self._measures, math.nan)
        with _quiet():
            for measure in self._measures.values():
                measure.prepare(self.task, self.device)
            # + 0.0: torchmetrics has negative zeros.
            return {n: float(m.finish(m.metric.compute(), support)) + 0.0 for n, m in self._measures.items()}

    def confusion(self) -> list[list[int]] | None:
        """How often each class was taken for each, rows actual and columns predicted (``CONFUSION_AXES``); None for values.

        Every rank must call it, and gets the same.
        """
        if self.task.kind == "values":
            return None
        with _quiet():
            return [[int(count) for count in row] for row in self._seen.metric.compute().tolist()]

    def _counts(self) -> Tensor:
        """Samples, or the targets of each class."""
        with _quiet():
            counts: Tensor = self._seen.metric.compute()
        return counts if self.task.kind == "values" else counts.sum(1)


def _counting(outputs: Tensor, targets: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """What isn't ignored; the pixels of masks as one image, a pixel high."""
    if targets.ndim == 1:
        return outputs[keep], targets[keep]
    count = int(keep.any())
    return outputs.movedim(1, -1)[keep].T[None, :, None][:count], targets[keep][None, None][:count]


@contextmanager
def _quiet() -> Iterator[None]:
    """torchmetrics warns of what is undefined; our values say it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _shape(task: Task, count: int, places: tuple[int, ...]) -> tuple[int, ...]:
    return (count, task.outputs, *(places if task.dense else ()))


def _confusion(task: Task) -> _Measure:
    return _Measure(classification.MulticlassConfusionMatrix(_classes(task), validate_args=False), _labels)


def _classes(task: Task) -> int:
    return 2 if task.kind == "binary" else task.outputs


def _measure(name: str, task: Task) -> _Measure:
    """The metric of a name."""
    k = top(name)
    if k is not None:
        return _Measure(MeanMetric(), partial(_hits, k))
    match name:
        case "mae":
            return _Measure(regression.MeanAbsoluteError(), _values)
        case "rmse":
            mse = regression.MeanSquaredError(squared=False, num_outputs=task.outputs)
            return _Measure(mse, _values, lambda value, support: value.mean())
        case "r2":
            return _Measure(_R2(), _values)
        case "perplexity":
            return _Measure(MeanMetric(), _surprise, lambda value, support: value.clamp(max=LARGEST).exp())
        case "auroc" | "average_precision" | "calibration_error":
            return _of_scores(name, task)
    return _of_labels(name, task)


def _of_labels(name: str, task: Task) -> _Measure:
    """Of the predicted classes: ``f1``, ``f1_weighted``."""
    if task.kind == "binary" and name in BINARY:
        return _Measure(BINARY[name](validate_args=False), _labels)
    plain, _, average = name.partition("_")
    averaged = {"average": average} if average else {}
    return _Measure(MULTICLASS[plain](num_classes=_classes(task), validate_args=False, **averaged), _labels)


def _of_scores(name: str, task: Task) -> _Measure:
    """Of the probabilities."""
    options: dict[str, Any] = {"validate_args": False} | ({} if task.kind == "binary" else {"num_classes": task.outputs})
    if name == "calibration_error":
        return _Measure(SCORED[name, task.kind](n_bins=BINS, **options), _below_one)
    metric = SCORED[name, task.kind](thresholds=THRESHOLDS if task.dense else None, **options)
    at_once = AT_ONCE if task.dense else None
    return _Measure(metric, _scores, _if_all_occur if name == "auroc" else _mean_of_all, at_once)


def _mean_of_all(value: Tensor, support: Tensor) -> Tensor:
    """Of average precisions: 0 where a class has no targets."""
    return value.nan_to_num(0.0).mean()


def _if_all_occur(value: Tensor, support: Tensor) -> Tensor:
    """nan where a class has no targets: torchmetrics would call its area 0."""
    return value.where(support.all(), math.nan)


def _values(outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return outputs.double(), targets.double()


def _ones(outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return (torch.ones(len(targets), device=targets.device),)


def _labels(outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Predicted and actual classes, one a sample or pixel."""
    found = outputs[:, 0] > 0 if outputs.shape[1] == 1 else outputs.argmax(1)
    return found.long().flatten(), targets.long().flatten()


def _logits(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """One row a sample or pixel, float64, and its target."""
    return outputs.movedim(1, -1).flatten(0, -2).double(), targets.long().flatten()


def _scores(outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Probabilities, of all classes or of class 1.

    NOTE: in float64, where confident ones are still apart; and never logits: torchmetrics takes those within 0 and 1 for
    probabilities, batch by batch.
    """
    logits, true = _logits(outputs, targets)
    return logits.squeeze(1).sigmoid() if logits.shape[1] == 1 else logits.softmax(1), true


def _below_one(outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Probabilities of at most the largest float32 below 1: torchmetrics has a sixteenth bin for 1 itself."""
    scores, true = _scores(outputs, targets)
    return scores.clamp(max=1 - 2**-24), true


def _hits(k: int, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Whether the target is among the k largest, the later one first where they are equal."""
    logits, true = _logits(outputs, targets)
    own, place = logits.gather(1, true[:, None]), torch.arange(logits.shape[1], device=logits.device)
    before = (logits > own) | ((logits == own) & (place > true[:, None]))
    return ((before.sum(1) < k).double(),)


def _surprise(outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Cross-entropy of each sample or pixel."""
    logits, true = _logits(outputs, targets)
    both = torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits
    return (functional.cross_entropy(both, true, reduction="none"),)


class _R2(Metric):
    """1 - residual / total sum of squares, the mean over the values.

    NOTE: torchmetrics subtracts sums of squares, which leaves nothing of values far from 0, and takes sums below 1e-4 for 0.
    """

    full_state_update = False
    found: list[Tensor]
    true: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("found", [], dist_reduce_fx="cat")
        self.add_state("true", [], dist_reduce_fx="cat")

    def update(self, found: Tensor, true: Tensor) -> None:
        self.found.append(found)
        self.true.append(true)

    def compute(self) -> Tensor:
        found, true = dim_zero_cat(self.found), dim_zero_cat(self.true)
        if len(true) < 2:
            return torch.tensor(math.nan)
        residual = (true - found).square().sum(0)
        total = (true - true.mean(0)).square().sum(0)
        constant = torch.where(residual == 0, 1.0, 0.0).to(total)
        return torch.where(total == 0, constant, 1 - residual / total).mean()
