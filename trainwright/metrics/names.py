"""Which metrics there are, and which fit a task."""

from __future__ import annotations

import re

from trainwright.recipe import InputError, Task, nearest

AVERAGED = tuple(f"{name}_{average}" for name in ("precision", "recall", "f1") for average in ("macro", "micro", "weighted"))
OF_CLASSES = (
    "accuracy", "precision", "recall", "f1", "auroc", "average_precision", "calibration_error", "iou", "dice", "perplexity",
    *AVERAGED,
)  # fmt: skip
OF_VALUES = ("mae", "rmse", "r2")
NOT_DENSE = {"calibration_error"}  # torchmetrics keeps the confidence of every pixel
TOP = re.compile(r"top_([1-9]\d*)")


def defaults(task: Task) -> list[str]:
    """What is measured where the recipe doesn't say."""
    if task.kind == "values":
        return list(OF_VALUES)
    if task.dense:
        return ["iou", "dice", "accuracy"]
    return ["accuracy", "precision", "recall", "f1", "auroc"] if task.kind == "binary" else ["accuracy", "f1"]


def check(names: list[str] | None, task: Task) -> list[str]:
    """The names, each once, or the task's defaults.

    Raises:
        InputError: a name that is unknown, or that doesn't fit the task, with all that fit.
    """
    if names is None:
        return defaults(task)
    fitting = _fitting(task)
    for name in names:
        if name not in fitting and not _top_fits(name, task):
            raise InputError(f"metrics: {_fault(name, task, fitting)}")
    return list(dict.fromkeys(names))


def top(name: str) -> int | None:
    """5 for top_5."""
    found = TOP.fullmatch(name)
    return int(found[1]) if found else None


def _fitting(task: Task) -> list[str]:
    """All but top_K."""
    if task.kind == "values":
        return list(OF_VALUES)
    return [name for name in OF_CLASSES if not (task.dense and name in NOT_DENSE)]


def _top_fits(name: str, task: Task) -> bool:
    k = top(name)
    return k is not None and task.kind == "classes" and k < task.outputs


def _fault(name: str, task: Task, fitting: list[str]) -> str:
    tops = ["top_K"] if task.kind == "classes" else []
    fit = f"what fits {_described(task)}: {', '.join([*fitting, *tops])}"
    k = top(name)
    if k is not None and tops:
        return f"{name!r} needs more than {k} classes, but there are {task.outputs}; {fit}"
    if k is not None or name in (*OF_CLASSES, *OF_VALUES):
        return f"{name!r} doesn't fit {_described(task)}; {fit}"
    return f"{name!r} is unknown{nearest(name, [*fitting, *(['top_5'] if tops else [])])}; {fit}"


def _described(task: Task) -> str:
    if task.kind == "values":
        return "numbers"
    many = "two classes with one output" if task.kind == "binary" else f"{task.outputs} classes"
    return f"masks of {many}" if task.dense else many
