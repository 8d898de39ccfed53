"""The pictures of ``evaluate``: which ones suit a task, and in which order a person should look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from trainwright.recipe import InputError, RunError, Task
from trainwright.report import classified, masked, mistakes, style, valued
from trainwright.report.mistakes import Pictures
from trainwright.report.scored import Scored, score

Named = tuple[str, Figure | None]
TABLE = "mistakes.csv"
FILES = (
    "confusion.png", "mistakes.png", "uncertain.png", "roc.png", "precision_recall.png", "calibration.png",
    "predicted.png", "forecast.png", "residuals.png", "masks.png", "iou.png", TABLE,
)  # fmt: skip


def write(
    folder: Path,
    task: Task,
    outputs: Tensor,
    targets: Tensor,
    names: Sequence[str],
    pictures: Pictures,
    metrics: Mapping[str, float],
    split: str,
    *,
    in_order: bool = False,
) -> list[Path]:
    """Draw what a model said of the samples of a split.

    Args:
        folder: where the files go; it is made. What an earlier call left there and this one doesn't draw is deleted.
        outputs: float32 on the CPU: logits (n, outputs), where dense (n, outputs, height, width); values (n, values) in the
            user's units.
        targets: classes (n,) int64, where dense (n, height, width); values (n, values) float32. Classes that don't exist are
            left out.
        names: what the user knows the samples by, n of them.
        pictures: images of some samples, (len, channels, height, width) uint8; None: they aren't images.
        metrics: shown beneath the first title.
        split: the name of the split, for titles.
        in_order: the samples follow each other in time, so that a forecast can be drawn.

    Returns:
        The PNG files in the order in which a person should look at them, and last ``mistakes.csv``. What isn't defined (a ROC
        curve with one class) has no file, and what has no mistakes no picture of them.

    Raises:
        InputError: no samples, or targets that aren't finite. RunError: outputs that aren't.
    """
    split = split.replace("_", "-")
    _check(task, outputs, targets, names, split)
    folder.mkdir(parents=True, exist_ok=True)
    with style.style():
        drawn, write_table = _drawn(task, outputs, targets, names, pictures, style.headline(metrics), split, in_order)
        paths = [style.save(made, folder / name) for name, made in drawn if made is not None]
    paths.append(write_table(folder / TABLE))
    for name in set(FILES) - {path.name for path in paths}:
        (folder / name).unlink(missing_ok=True)
    return paths


def _check(task: Task, outputs: Tensor, targets: Tensor, names: Sequence[str], split: str) -> None:
    assert len(outputs) == len(targets) == len(names)
    assert not (task.dense and task.kind == "values")
    if not len(outputs):
        raise InputError(f"the {split} data holds no samples, so there is nothing to draw")
    for what, tensor, error in (("targets", targets, InputError), ("outputs of the model", outputs, RunError)):
        bad = (~tensor.isfinite()).flatten(1).any(1) if tensor.ndim > 1 else ~tensor.isfinite()
        if bad.any():
            first = names[int(bad.nonzero()[0])]
            raise error(f"{what} aren't finite for {int(bad.sum())} of {len(bad)} samples of the {split} data; first: {first}")


def _drawn(
    task: Task,
    outputs: Tensor,
    targets: Tensor,
    names: Sequence[str],
    pictures: Pictures,
    note: str,
    split: str,
    in_order: bool,
) -> tuple[Iterator[Named], Callable[[Path], Path]]:
    """The pictures of a task, made one by one, and what writes its table."""
    if task.dense:
        found = masked.masks(task, outputs, targets, names, split)
        return _of_masks(found, pictures, note), lambda path: masked.table(found, path)
    if task.kind == "values":
        count = outputs.shape[1]
        labels = task.labels if len(task.labels) == count else tuple(f"value {place}" for place in range(count))
        predicted, actual = outputs.double().numpy(), targets.double().numpy()
        drawn = _of_values(predicted, actual, labels, split, note, in_order)
        return drawn, lambda path: valued.table(predicted, actual, labels, names, path)
    scored = score(task, outputs, targets, names, split)
    return _of_classes(scored, pictures, note), lambda path: mistakes.table(scored, path)


def _of_classes(scored: Scored, pictures: Pictures, note: str) -> Iterator[Named]:
    if not len(scored):
        return
    wrong = mistakes.worst(scored)
    title = f"Wrong, the most confident first, {scored.split} data: {len(wrong):,} of {len(scored):,}"
    yield "confusion.png", classified.confusion(scored, note)
    yield "mistakes.png", mistakes.gallery(scored, wrong, title, pictures)
    title = f"Least certain, {scored.split} data"
    yield "uncertain.png", mistakes.gallery(scored, mistakes.uncertain(scored), title, pictures)
    yield "roc.png", classified.roc(scored)
    yield "precision_recall.png", classified.precision_recall(scored)
    yield "calibration.png", classified.calibration(scored)


def _of_values(
    predicted: np.ndarray, actual: np.ndarray, labels: Sequence[str], split: str, note: str, in_order: bool
) -> Iterator[Named]:
    yield "predicted.png", valued.against(predicted, actual, labels, split, note)
    if in_order:
        yield "forecast.png", valued.forecast(predicted, actual, labels, split)
    yield "residuals.png", valued.residuals(predicted, actual, labels, split)


def _of_masks(found: masked.Masks, pictures: Pictures, note: str) -> Iterator[Named]:
    yield "masks.png", masked.samples(found, pictures, note)
    yield "iou.png", masked.bars(found)
