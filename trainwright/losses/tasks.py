"""Which task some data is under a loss, and what of a loss doesn't fit."""

from __future__ import annotations

from typing import Literal

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
    SumLoss,
    Task,
)  # fmt: skip
from trainwright.recipe.learning import Term

Target = Literal["classes", "values"]
SHOWN = 10  # names of classes in a message


def terms_of(section: Loss) -> list[tuple[float, Term]]:
    """(weight, loss) of each term of a sum; a loss alone is a sum of one."""
    return [(term.weight, term.loss) for term in section.terms] if isinstance(section, SumLoss) else [(1.0, section)]


def wanted(section: Loss) -> Target:
    """How the data's target column is to be read under this loss.

    Raises:
        InputError: a sum of losses of both.
    """
    found = {_reads(term): term.name for _, term in terms_of(section)}
    if len(found) > 1:
        raise InputError(f"loss.terms: {found['classes']} is of classes, but {found['values']} is of numbers; keep one kind")
    return next(iter(found))


def _reads(term: Term) -> Target:
    numbers = isinstance(term, Mse | L1 | Huber) or (isinstance(term, CustomLoss) and term.predicts == "values")
    return "values" if numbers else "classes"


def task_for(section: Loss, target: Target, labels: tuple[str, ...], dense: bool, values: int) -> Task:
    """The task of data with these targets under a loss.

    Args:
        target: what the data's targets are.
        labels: names of the classes, or of the values.
        dense: whether each sample has a mask of classes.
        values: how many numbers a sample has as its target; of no account for classes.

    Raises:
        InputError: the loss and the data don't fit.
    """
    if wanted(section) != target:
        raise InputError(_wrong_kind(section, target, labels))
    if target == "values":
        return Task("values", values, labels)
    terms = [term for _, term in terms_of(section)]
    if len(labels) < 2:
        raise InputError(f"data: a single class ({', '.join(map(repr, labels))}); nothing to learn")
    for term in terms:
        _check_classes(term, labels, dense)
    one_output = _one_output(terms, labels)
    ignored = next((t.ignore_index for t in terms if isinstance(t, CrossEntropy) and t.ignore_index is not None), None)
    return Task("binary" if one_output else "classes", 1 if one_output else len(labels), labels, dense, ignored)


def _wrong_kind(section: Loss, target: Target, labels: tuple[str, ...]) -> str:
    names = " + ".join(term.name for _, term in terms_of(section))
    if target == "classes":
        return f"loss: {names} is of numbers, but the targets are the classes {_some(labels)}; use cross_entropy, bce or focal"
    return f"loss: {names} is of classes, but the targets are numbers; use mse, l1 or huber"


def _one_output(terms: list[Term], labels: tuple[str, ...]) -> bool:
    """Whether one logit is enough: a term asks for it, or nothing but dice looks at two classes."""
    asks = [term.name for term in terms if _is_binary(term)]
    many = [term.name for term in terms if isinstance(term, CustomLoss) and term.predicts in ("classes", "masks")]
    if asks and many:
        raise InputError(
            f"loss.terms: {asks[0]} needs a model with one output, but {many[0]} one with an output a class; "
            "use cross_entropy, or set predicts: binary"
        )
    return bool(asks) or (len(labels) == 2 and all(isinstance(term, Dice) for term in terms))


def _is_binary(term: Term) -> bool:
    return isinstance(term, BinaryCrossEntropy) or (isinstance(term, CustomLoss) and term.predicts == "binary")


def _check_classes(term: Term, labels: tuple[str, ...], dense: bool) -> None:
    if _is_binary(term) and len(labels) > 2:
        raise InputError(
            f"loss: {term.name} is of two classes, but there are {len(labels)}: {_some(labels)}; use cross_entropy or focal"
        )
    if isinstance(term, Dice) and not dense:
        raise InputError("loss: dice compares masks, but the targets are one class a sample; use cross_entropy, bce or focal")
    if isinstance(term, CustomLoss):
        _check_custom(term, dense)
    if isinstance(term, CrossEntropy | Focal) and isinstance(term.weights, list):
        _check_weights(term.weights, labels)
    if isinstance(term, CrossEntropy) and term.ignore_index is not None:
        _check_ignored(term.ignore_index, labels)


def _check_custom(term: CustomLoss, dense: bool) -> None:
    if dense and term.predicts == "classes":
        raise InputError("loss.predicts: found 'classes', but each sample has a mask; set masks, or binary for one output")
    if not dense and term.predicts == "masks":
        raise InputError("loss.predicts: found 'masks', but the targets are one class a sample; set classes or binary")


def _check_weights(weights: list[float], labels: tuple[str, ...]) -> None:
    if len(weights) != len(labels):
        raise InputError(
            f"loss.weights: found {len(weights)}, but there are {len(labels)} classes; give one each, for {_some(labels)}"
        )
    if not any(weights):
        raise InputError("loss.weights: all are 0, so nothing would be learned")


def _check_ignored(index: int, labels: tuple[str, ...]) -> None:
    if not 0 <= index < len(labels):
        raise InputError(
            f"loss.ignore_index: found {index}, but the classes are 0 to {len(labels) - 1}: {_some(labels)}; give one of these"
        )
    if len(labels) == 2:
        raise InputError(f"data: a single class ({labels[1 - index]!r}) besides loss.ignore_index; nothing to learn")


def _some(labels: tuple[str, ...]) -> str:
    """The names of the classes, shortened."""
    more = f", ... ({len(labels)})" if len(labels) > SHOWN else ""
    return ", ".join(map(repr, labels[:SHOWN])) + more
