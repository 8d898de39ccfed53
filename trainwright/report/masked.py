"""Pictures of predicted masks: samples with what is wrong in them, and how well each class is covered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from sklearn.metrics import confusion_matrix
from torch import Tensor

from trainwright.recipe import Task
from trainwright.report import mistakes, style
from trainwright.report.mistakes import Pictures
from trainwright.report.scored import class_labels

SAMPLES = 6
BARS = 40
KEYS = 16  # classes in the legend
IGNORED = 200  # grey of pixels that don't count


@dataclass(frozen=True)
class Masks:
    """Predicted and actual classes of pixels, (n, height, width) int64; actual ones that are no class don't count."""

    labels: tuple[str, ...]
    predicted: np.ndarray
    actual: np.ndarray
    names: Sequence[str]
    split: str

    def __len__(self) -> int:
        return len(self.actual)

    def counted(self) -> np.ndarray:
        """(n, height, width) bool."""
        return np.asarray((self.actual >= 0) & (self.actual < len(self.labels)))

    def wrong(self) -> np.ndarray:
        """(n, height, width) bool."""
        return np.asarray(self.counted() & (self.predicted != self.actual))

    def share_wrong(self) -> np.ndarray:
        """Of the pixels that count in each sample, (n,)."""
        return np.asarray(self.wrong().sum((1, 2)) / np.maximum(self.counted().sum((1, 2)), 1))


def masks(task: Task, outputs: Tensor, targets: Tensor, names: Sequence[str], split: str) -> Masks:
    """From logits (n, outputs, height, width) and targets (n, height, width)."""
    predicted = (outputs[:, 0] > 0).long() if task.kind == "binary" else outputs.argmax(1)
    return Masks(class_labels(task), predicted.numpy(), targets.long().numpy(), names, split)


def overlap(found: Masks) -> np.ndarray:
    """Intersection over union of each class over all pixels, (classes,); NaN where it neither is nor is predicted."""
    counted, classes = found.counted(), len(found.labels)
    if not counted.any():
        return np.full(classes, np.nan)
    table = confusion_matrix(found.actual[counted], found.predicted[counted], labels=np.arange(classes))
    both = np.diag(table)
    either = table.sum(0) + table.sum(1) - both
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def samples(found: Masks, pictures: Pictures, note: str) -> Figure:
    """Samples from the worst to the best: image, actual mask, predicted mask, and where they differ."""
    ranked = np.argsort(-found.share_wrong(), kind="stable")
    chosen = ranked[np.unique(np.linspace(0, len(found) - 1, SAMPLES).round().astype(int))]
    images = pictures(chosen.tolist())
    colours = style.palette(len(found.labels))
    columns = (["image"] if images is not None else []) + ["actual", "predicted", "wrong pixels in red"]
    legend = sorted(set(np.unique(found.actual[chosen])) | set(np.unique(found.predicted[chosen])))
    height = (style.WIDTH - 1.2) / len(columns) * float(np.clip(np.divide(*found.actual.shape[1:]), 0.25, 1.5))
    made = style.figure(f"Masks, {found.split} data: from the worst to the best of {len(found):,}", 1.4 + height * len(chosen))
    grid = made.subplots(len(chosen), len(columns), squeeze=False)
    for row, sample in enumerate(chosen):
        image = None if images is None else style.image(images[row])
        drawn = [_coloured(found.actual[sample], colours), _coloured(found.predicted[sample], colours)]
        drawn.append(_errors(found.wrong()[sample], image))
        for axes, pixels in zip(grid[row], drawn if image is None else [image, *drawn], strict=True):
            axes.imshow(pixels, interpolation="nearest")
            _bare(axes)
        grid[row, 0].set_ylabel(_caption(found, sample), fontsize=7, rotation=0, ha="right", va="center")
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(column, loc="center")
    _legend(made, found.labels, [int(name) for name in legend if 0 <= name < len(found.labels)], colours, note)
    return made


def _caption(found: Masks, sample: int) -> str:
    return f"{style.short(found.names[sample], 20)}\n{found.share_wrong()[sample]:.1%} wrong"


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _coloured(mask: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """(height, width) classes as (height, width, 3) uint8."""
    known = (mask >= 0) & (mask < len(colours))
    return np.where(known[..., None], colours[np.where(known, mask, 0)], np.uint8(IGNORED))


def _errors(wrong: np.ndarray, image: np.ndarray | None) -> np.ndarray:
    """The image in pale grey, (height, width, 3) uint8, with what is wrong in red; a mask of another size has no image."""
    grey = np.full(wrong.shape, 235.0) if image is None or image.shape[:2] != wrong.shape else 130 + image.mean(2) * 0.45
    red = np.array(to_rgb(style.RED)) * 255
    return np.where(wrong[..., None], red, grey[..., None]).astype(np.uint8)


def _legend(made: Figure, labels: Sequence[str], present: list[int], colours: np.ndarray, note: str) -> None:
    """The classes that can be seen, under a note."""
    handles = [Patch(color=colours[name] / 255, label=style.key(labels[name], 20)) for name in present[:KEYS]]
    if len(present) > KEYS:
        handles.append(Patch(color="none", label=f"and {len(present) - KEYS} more"))
    made.legend(handles=handles, loc="outside lower left", ncols=5, title=note or None, title_fontsize=9, alignment="left")


def bars(found: Masks) -> Figure | None:
    """Intersection over union of each class; None where no pixel counts."""
    scores = overlap(found)
    defined = np.flatnonzero(~np.isnan(scores))
    if not len(defined):
        return None
    shown = defined if len(defined) <= BARS else np.sort(defined[np.argsort(scores[defined], kind="stable")[:BARS]])
    made = style.figure(
        f"Intersection over union, {found.split} data: mean {scores[defined].mean():.4f}", 1.4 + 0.26 * max(len(shown), 4)
    )
    axes = made.subplots()
    drawn = axes.barh(np.arange(len(shown)), scores[shown], color=style.BLUE, height=0.7)
    axes.bar_label(drawn, fmt="{:.3f}", padding=3, fontsize=8)
    axes.set_yticks(np.arange(len(shown)), [style.short(found.labels[name], 30) for name in shown], fontsize=8)
    axes.set(xlim=(0, 1.08), ylim=(len(shown) - 0.4, -0.6), xlabel="intersection over union")
    axes.tick_params(axis="y", length=0)
    left = len(found.labels) - len(defined)
    notes = [f"the {BARS} lowest of {len(defined)} classes" if len(shown) < len(defined) else ""]
    notes.append(f"{left} of {len(found.labels)} classes left out: neither actual nor predicted" if left else "")
    axes.set_title("; ".join(filter(None, notes)))
    return made


def table(found: Masks, path: Path) -> Path:
    """All samples, the worst first: name and the share of its pixels that are wrong."""
    share = found.share_wrong()
    order = np.argsort(-share, kind="stable")
    return mistakes.write(path, ("name", "wrong"), ((found.names[i], f"{share[i]:.6f}") for i in order))
