"""The recipe's losses as means over a whole batch, by torch's functions: what the plain loop minimises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.nn import functional

from trainwright.recipe import (
    L1,
    BinaryCrossEntropy,
    CrossEntropy,
    CustomLoss,
    Focal,
    Huber,
    InputError,
    Mse,
    SumLoss,
)  # fmt: skip
from trainwright.recipe.imports import import_function
from trainwright.recipe.learning import Loss, Term

IGNORED = -100
MeanLoss = Callable[[Tensor, Tensor], Tensor]


def mean_loss(section: Loss, classes: int, train_targets: Tensor | None = None) -> MeanLoss:
    """The recipe's loss of outputs (n, classes, ...) and targets, by torch's functions.

    Args:
        classes: how many there are; of no account for numbers.
        train_targets: all of the training split, for balanced weights.

    Raises:
        InputError: a loss that isn't written anew.
    """
    terms = [(t.weight, t.loss) for t in section.terms] if isinstance(section, SumLoss) else [(1.0, section)]
    means = [(weight, _mean(term, classes, train_targets)) for weight, term in terms]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        return torch.stack([weight * mean(wide, targets) for weight, mean in means]).sum()

    return loss


def _mean(term: Term, classes: int, train_targets: Tensor | None) -> MeanLoss:
    if isinstance(term, Mse):
        return lambda outputs, targets: functional.mse_loss(outputs, targets.to(outputs))
    if isinstance(term, L1):
        return lambda outputs, targets: functional.l1_loss(outputs, targets.to(outputs))
    if isinstance(term, Huber):
        return lambda outputs, targets: functional.huber_loss(outputs, targets.to(outputs), delta=term.delta)
    if isinstance(term, CustomLoss):
        own = import_function(term.function, "loss.function")
        return lambda outputs, targets: own(outputs, targets, **term.options).mean()
    if isinstance(term, BinaryCrossEntropy):
        return _binary(term, train_targets)
    if isinstance(term, CrossEntropy | Focal):
        return _of_classes(term, classes, train_targets)
    raise InputError(f"loss.name: {term.name} isn't written anew in the plain loop; leave out --against torch")


def _binary(term: BinaryCrossEntropy, train_targets: Tensor | None) -> MeanLoss:
    weight = torch.tensor(1.0 if term.pos_weight is None else 0.0)
    if term.pos_weight == "balanced":
        assert train_targets is not None
        weight = (train_targets == 0).sum() / (train_targets == 1).sum()
    elif term.pos_weight is not None:
        weight = torch.tensor(term.pos_weight)

    def mean(outputs: Tensor, targets: Tensor) -> Tensor:
        smooth = targets.to(outputs) * (1 - term.label_smoothing) + 0.5 * term.label_smoothing
        return functional.binary_cross_entropy_with_logits(outputs[:, 0], smooth, pos_weight=weight.to(outputs))

    return mean


def _of_classes(term: CrossEntropy | Focal, classes: int, train_targets: Tensor | None) -> MeanLoss:
    ignored = IGNORED if isinstance(term, Focal) or term.ignore_index is None else term.ignore_index
    weights = _weights(term, classes, train_targets, ignored)

    def mean(outputs: Tensor, targets: Tensor) -> Tensor:
        logits = torch.cat([torch.zeros_like(outputs), outputs], 1) if outputs.shape[1] == 1 else outputs
        weight = None if weights is None else weights.to(logits)
        if targets.is_floating_point() and (weight is not None or ignored != IGNORED or isinstance(term, Focal)):
            raise InputError(f"loss: {term.name} of mixed targets with weights isn't written anew; leave out mixup and cutmix")
        if isinstance(term, Focal):
            each = functional.cross_entropy(logits, targets, reduction="none")
            share = torch.ones_like(each) if weight is None else weight[targets]
            return (share * (1 - torch.exp(-each)) ** term.gamma * each).sum() / share.sum()
        smoothing = term.label_smoothing
        loss = functional.cross_entropy(logits, targets, weight, ignore_index=ignored, label_smoothing=smoothing)
        if not term.z_loss:
            return loss
        squares = logits.logsumexp(1).square()
        if targets.is_floating_point():
            return loss + term.z_loss * squares.mean()
        share = (torch.ones_like(squares) if weight is None else weight[targets.clamp(min=0)]) * (targets != ignored)
        return loss + term.z_loss * (share * squares).sum() / share.sum()

    return mean


def _weights(term: CrossEntropy | Focal, classes: int, train_targets: Tensor | None, ignored: int) -> Tensor | None:
    """Of the classes; balanced ones as scikit-learn has them."""
    if term.weights is None:
        return None
    if term.weights != "balanced":
        return torch.tensor(term.weights)
    assert train_targets is not None
    seen = train_targets[train_targets != ignored].numpy().ravel()
    found = torch.zeros(classes, dtype=torch.float64)
    found[np.unique(seen)] = torch.from_numpy(compute_class_weight("balanced", classes=np.unique(seen), y=seen))
    return found
