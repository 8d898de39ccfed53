"""Losses of classes, masks and numbers as sums and the counts that divide them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from trainwright.losses.tasks import task_for, terms_of, wanted
from trainwright.recipe import (
    L1,
    BinaryCrossEntropy,
    CrossEntropy,
    CustomLoss,
    Dice,
    Focal,
    Huber,
    InputError,
    Loss,
    Mse,
    Task,
)  # fmt: skip
from trainwright.recipe.imports import import_function
from trainwright.recipe.learning import Term

__all__ = ["Criterion", "make", "task_for", "wanted"]


@dataclass(frozen=True)
class Criterion:
    """A loss of k terms. Over any number of micro-batches and ranks, the loss of the whole batch is

        (sum of all ``sums`` / sum of all ``counts``).sum()

    sums      (outputs, targets) -> (k,) float32 or wider, differentiable in the outputs; the weights of a sum are in them
    counts    targets -> (k,) float64 on the CPU; known before the forward; 0 where nothing counts (ignored classes)

    Shapes are those of ``Task``. Masks may be of any integer type. Mixed targets have an axis of probabilities after the first:
    (n, classes), or for one output also (n,) floats, the probability of class 1.
    """

    sums: Callable[[Tensor, Tensor], Tensor]
    counts: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Part:
    """One term: (wide outputs, targets) -> 0-dim sum, and targets -> its count."""

    total: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor], float]


def make(section: Loss, task: Task, train_targets: Tensor | None) -> Criterion:
    """The loss that a section describes.

    Args:
        train_targets: all targets of the training split, for balanced weights; needed for nothing else.

    Raises:
        InputError: weights can't be balanced because a class never occurs; a custom function that isn't there or doesn't take
            its options. Later, from ``sums``: outputs that haven't the task's shape.
    """
    weights, terms = zip(*terms_of(section), strict=True)
    parts = [_part(term, task, train_targets) for term in terms]

    def sums(outputs: Tensor, targets: Tensor) -> Tensor:
        _check_shape(outputs, targets, task)
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        return torch.stack([weight * part.total(wide, targets) for weight, part in zip(weights, parts, strict=True)])

    def counts(targets: Tensor) -> Tensor:
        return torch.tensor([part.count(targets) for part in parts], dtype=torch.float64)

    return Criterion(sums, counts)


def _part(term: Term, task: Task, train_targets: Tensor | None) -> _Part:
    match term:
        case CrossEntropy():
            return _cross_entropy(term, task, train_targets)
        case BinaryCrossEntropy():
            return _binary_cross_entropy(term, task, train_targets)
        case Focal():
            return _focal(term, task, train_targets)
        case Dice():
            return _dice(term, task)
        case CustomLoss():
            return _custom(term)
        case Mse():
            return _of_values(functional.mse_loss)
        case L1():
            return _of_values(functional.l1_loss)
        case Huber():
            return _of_values(functional.huber_loss, delta=term.delta)


def _cross_entropy(section: CrossEntropy, task: Task, train_targets: Tensor | None) -> _Part:
    """torch's, with its division by the summed weights of hard targets. z_loss is weighted as its sample is.

    An ignored class takes its share of mixed targets with it.
    """
    weights = _class_weights(section.weights, task, train_targets, section.ignore_index)
    smoothing, ignored = section.label_smoothing, -100 if section.ignore_index is None else section.ignore_index

    def total(outputs: Tensor, targets: Tensor) -> Tensor:
        logits, weight = _class_logits(outputs, task), weights.to(outputs)
        if _is_mixed(targets, task):
            shares = _shares(targets, logits, section.ignore_index)
            smooth = (1 - smoothing) * shares + smoothing / logits.shape[1] * shares.sum(1, keepdim=True)
            found = -(_along_classes(weight, logits) * smooth * logits.log_softmax(1)).sum()
            per_place = (_along_classes(weight, logits) * shares).sum(1)
        else:
            hard = targets.long()
            options: dict[str, Any] = {"label_smoothing": smoothing, "ignore_index": ignored, "reduction": "sum"}
            found = functional.cross_entropy(logits, hard, weight if section.weights else None, **options)
            per_place = weight[hard] * (hard != ignored) if section.z_loss else weight
        if section.z_loss:
            found = found + section.z_loss * (per_place * logits.logsumexp(1).square()).sum()
        return found

    if section.weights is None and section.ignore_index is None:
        return _Part(total, lambda targets: _places(targets, task))
    return _Part(total, lambda targets: _weight_of(targets, task, weights, section.ignore_index))


def _focal(section: Focal, task: Task, train_targets: Tensor | None) -> _Part:
    """-(1 - p)^gamma log p of the target's class (Lin et al. 2017, section 3.2), softmaxed; divided as cross-entropy is."""
    weights = _class_weights(section.weights, task, train_targets, None)

    def weighed(log_p: Tensor, share: Tensor) -> Tensor:
        # NOTE: 1 - p by expm1, and never 0: the gradient of 0^gamma is infinite below gamma = 1.
        rest = (-log_p.expm1()).clamp(min=torch.finfo(log_p.dtype).tiny)
        return -(share * rest**section.gamma * log_p).sum()

    def total(outputs: Tensor, targets: Tensor) -> Tensor:
        log_p, weight = _class_logits(outputs, task).log_softmax(1), weights.to(outputs)
        if _is_mixed(targets, task):
            return weighed(log_p, _along_classes(weight, log_p) * _shares(targets, log_p, None))
        hard = targets.long()
        return weighed(log_p.gather(1, hard[:, None]).squeeze(1), weight[hard])

    return _Part(total, lambda targets: _weight_of(targets, task, weights, None))


def _binary_cross_entropy(section: BinaryCrossEntropy, task: Task, train_targets: Tensor | None) -> _Part:
    """torch's, with logits; smoothing moves targets towards 0.5."""
    balanced = section.pos_weight == "balanced"
    pos_weight = torch.tensor(_negatives_by_positives(task, train_targets) if balanced else section.pos_weight or 1.0)
    smoothing = section.label_smoothing

    def total(outputs: Tensor, targets: Tensor) -> Tensor:
        smooth = (1 - smoothing) * _positive(targets, task).to(outputs) + smoothing / 2
        logits, weight = outputs.squeeze(1), pos_weight.to(outputs)
        return functional.binary_cross_entropy_with_logits(logits, smooth, pos_weight=weight, reduction="sum")

    return _Part(total, lambda targets: _places(targets, task))


def _of_values(function: Callable[..., Tensor], **options: float) -> _Part:
    """A mean over all elements."""

    def total(outputs: Tensor, targets: Tensor) -> Tensor:
        return function(outputs, targets.to(outputs), reduction="sum", **options)

    return _Part(total, lambda targets: targets.numel())


def _dice(section: Dice, task: Task) -> _Part:
    """Soft dice (Milletari et al. 2016, without the squares), a term for each image and class; one output is one class."""
    first = 1 if task.outputs > 2 and not section.background else 0

    def total(outputs: Tensor, targets: Tensor) -> Tensor:
        if task.kind == "binary":
            found, true = outputs.sigmoid(), _positive(targets, task).to(outputs)[:, None]
        else:
            found, true = outputs.softmax(1)[:, first:], _shares(targets, outputs, None)[:, first:]
        both, sizes = (found * true).sum((2, 3)), (found + true).sum((2, 3))
        tiny = torch.finfo(outputs.dtype).tiny  # without smooth, nothing found in an empty mask would be 0 / 0
        return (1 - (2 * both + section.smooth) / (sizes + section.smooth).clamp(min=tiny)).sum()

    return _Part(total, lambda targets: len(targets) * (task.outputs - first))


def _custom(section: CustomLoss) -> _Part:
    """The user's own: one value a sample."""
    function = import_function(section.function, "loss.function")
    _check_options(function, section)

    def total(outputs: Tensor, targets: Tensor) -> Tensor:
        found = function(outputs, targets, **section.options)
        if not isinstance(found, Tensor) or found.shape != (len(targets),):
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"loss.function: {section.function} returned {what} for {len(targets)} samples; "
                f"it must return one value for each, ({len(targets)},)"
            )
        return found.to(torch.promote_types(found.dtype, torch.float32)).sum()

    return _Part(total, lambda targets: len(targets))


def _check_options(function: Callable[..., Any], section: CustomLoss) -> None:
    try:
        inspect.signature(function).bind(None, None, **section.options)
    except TypeError as error:
        raise InputError(
            f"loss.options don't fit {section.function}: {error}; it is called as function(outputs, targets, **options)"
        ) from None
    except ValueError:  # compiled functions have no signature
        return


def _check_shape(outputs: Tensor, targets: Tensor, task: Task) -> None:
    """NOTE: torch would broadcast (n, 1) and (n,) to (n, n) without a word."""
    places = targets.shape[-2:] if task.dense else ()
    expected = (len(targets), task.outputs, *places)
    if tuple(outputs.shape) != expected:
        raise InputError(
            f"model: its outputs have shape {tuple(outputs.shape)}, but {task.kind} with {task.outputs} "
            f"output{'s' if task.outputs > 1 else ''} a {'pixel' if task.dense else 'sample'} need {expected}"
        )
    assert task.kind != "values" or targets.shape == outputs.shape


def _is_mixed(targets: Tensor, task: Task) -> bool:
    """Whether targets have an axis of probabilities after the first."""
    return targets.ndim > (3 if task.dense else 1)


def _places(targets: Tensor, task: Task) -> int:
    """Samples, or pixels."""
    return targets.numel() // (targets.shape[1] if _is_mixed(targets, task) else 1)


def _class_logits(outputs: Tensor, task: Task) -> Tensor:
    """A logit for each class: where there is one output, that of class 0 is 0."""
    return torch.cat([torch.zeros_like(outputs), outputs], 1) if task.kind == "binary" else outputs


def _positive(targets: Tensor, task: Task) -> Tensor:
    """The probability of class 1, (n,) or (n, height, width)."""
    return targets[:, -1] if _is_mixed(targets, task) else targets


def _shares(targets: Tensor, logits: Tensor, ignored: int | None) -> Tensor:
    """Targets as probabilities of the logits' shape and dtype; those of an ignored class are 0."""
    mixed = targets.ndim == logits.ndim
    shares = targets if mixed else functional.one_hot(targets.long(), logits.shape[1]).movedim(-1, 1)
    shares = shares.to(logits.dtype)
    if ignored is None:
        return shares
    return shares * _along_classes(torch.arange(logits.shape[1], device=logits.device) != ignored, logits)


def _along_classes(per_class: Tensor, logits: Tensor) -> Tensor:
    """(classes,) as (1, classes, 1, ...)."""
    return per_class.view(1, -1, *[1] * (logits.ndim - 2))


def _weight_of(targets: Tensor, task: Task, weights: Tensor, ignored: int | None) -> float:
    """What torch divides by: the weights of hard targets, the number of mixed ones; without the ignored class."""
    if not _is_mixed(targets, task):
        numbers = torch.bincount(targets.flatten(), minlength=len(weights)).double().cpu()
        if ignored is not None:
            numbers[ignored] = 0
        return float(numbers @ weights)
    return _places(targets, task) - (0.0 if ignored is None else float(targets[:, ignored].sum(dtype=torch.float64)))


def _class_weights(
    given: list[float] | Literal["balanced"] | None, task: Task, train_targets: Tensor | None, ignored: int | None
) -> Tensor:
    """(classes,) float64. Balanced: n / (classes * n of the class), as in scikit-learn; an ignored class isn't one."""
    if given is None:
        return torch.ones(len(task.labels), dtype=torch.float64)
    if given != "balanced":
        return torch.tensor(given, dtype=torch.float64)
    numbers = _numbers(task, train_targets)
    if ignored is not None:
        numbers[ignored] = 0
    for label, number in enumerate(numbers.tolist()):
        if not number and label != ignored:
            raise InputError(
                f"loss.weights: can't be balanced: class {task.labels[label]!r} never occurs in the training split; give a list"
            )
    classes = int((numbers > 0).sum())
    weights = numbers.sum() / (classes * numbers)
    if ignored is not None:
        weights[ignored] = 0
    return weights


def _negatives_by_positives(task: Task, train_targets: Tensor | None) -> float:
    negatives, positives = _numbers(task, train_targets).tolist()
    if not negatives or not positives:
        missing = task.labels[0 if not negatives else 1]
        raise InputError(
            f"loss.pos_weight: can't be balanced: class {missing!r} never occurs in the training split; give a number"
        )
    return negatives / positives


def _numbers(task: Task, train_targets: Tensor | None) -> Tensor:
    """How often each class occurs, (classes,) float64."""
    assert train_targets is not None, "balanced weights come from the training split"
    return torch.bincount(train_targets.flatten(), minlength=len(task.labels)).double().cpu()
