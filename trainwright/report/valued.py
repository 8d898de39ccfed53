"""Pictures of predicted values: against the actual ones, their residuals, and a forecast in the order of time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import r2_score

from trainwright.report import mistakes, style

PANELS = 6  # values that are drawn
LAST = 500  # samples of a forecast that a line can show
ROWS = 1000  # of the table of worst residuals


def against(predicted: np.ndarray, actual: np.ndarray, labels: Sequence[str], split: str, note: str) -> Figure:
    """Predicted against actual values with the diagonal; arrays (n, values)."""
    made, grid = _figure(f"Predicted against actual, {split} data: {len(actual):,} samples", note, labels, square=True)
    alpha = float(np.clip(300 / len(actual), 0.1, 0.8))
    for place, axes in enumerate(grid):
        x, y = actual[:, place], predicted[:, place]
        low, high = _limits(np.r_[x, y])
        axes.plot([low, high], [low, high], color=style.GREY, linestyle=":")
        axes.plot(x, y, ".", color=style.BLUE, alpha=alpha, markersize=6, markeredgewidth=0)
        axes.set(xlim=(low, high), ylim=(low, high), xlabel="actual", ylabel="predicted")
        fit = f"   R² {r2_score(x, y):.3f}" if len(x) > 1 and np.ptp(x) > 0 else ""
        axes.set_title(f"{style.short(labels[place], 30)}{fit}")
        axes.grid(True)
    return made


def residuals(predicted: np.ndarray, actual: np.ndarray, labels: Sequence[str], split: str) -> Figure:
    """How far off the values are, and to which side; arrays (n, values)."""
    made, grid = _figure(f"Residuals, {split} data: predicted minus actual", "", labels)
    for place, axes in enumerate(grid):
        off = predicted[:, place] - actual[:, place]
        bins = int(np.clip(np.sqrt(len(off)), 5, 50))
        reach = _limits(off)
        axes.hist(off, bins=bins, range=reach, color=style.BLUE, edgecolor="white", linewidth=0.5)
        axes.axvline(0, color="black", linewidth=1)
        axes.axvline(off.mean(), color=style.ORANGE, linestyle="--", label=f"mean {off.mean():.4g}")
        axes.set_title(f"{style.short(labels[place], 30)}   standard deviation {off.std():.4g}")
        axes.set(xlabel="predicted - actual", ylabel="samples")
        axes.legend(loc="upper right")
        axes.grid(True, axis="y")
        axes.set_axisbelow(True)
    return made


def forecast(predicted: np.ndarray, actual: np.ndarray, labels: Sequence[str], split: str) -> Figure:
    """The first value over the order of the samples, (n, values)."""
    start = max(0, len(actual) - LAST)
    steps = np.arange(start, len(actual))
    made = style.figure(f"Forecast of {style.short(labels[0], 40)}, {split} data", 5.0)
    axes = made.subplots()
    marker = "o" if len(steps) == 1 else ""
    axes.plot(steps, actual[start:, 0], color="black", linewidth=1, marker=marker, label="actual")
    axes.plot(steps, predicted[start:, 0], color=style.ORANGE, linestyle="--", marker=marker, label="forecast")
    axes.set(xlabel="sample, in order", ylabel=style.short(labels[0], 40))
    axes.set_title(f"the last {LAST} of {len(actual):,} samples" if start else "")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    axes.grid(True)
    axes.margins(x=0.01)
    return made


def table(predicted: np.ndarray, actual: np.ndarray, labels: Sequence[str], names: Sequence[str], path: Path) -> Path:
    """The worst residuals of all values, each measured by the standard deviation of its value; at most a thousand rows."""
    off = predicted - actual
    spread = actual.std(0)
    size = np.abs(off) / np.where(spread > 0, spread, 1)
    order = np.argsort(-size, axis=None, kind="stable")[:ROWS]
    rows = (
        (names[sample], labels[value], *(f"{array[sample, value]:.6g}" for array in (actual, predicted, off)))
        for sample, value in zip(*np.unravel_index(order, off.shape), strict=True)
    )
    return mistakes.write(path, ("name", "value", "actual", "predicted", "residual"), rows)


def _figure(title: str, note: str, labels: Sequence[str], square: bool = False) -> tuple[Figure, list]:
    """A figure with a panel for each of the first values."""
    count = min(len(labels), PANELS)
    across = {1: 1, 2: 2, 4: 2}.get(count, 3)
    made = style.figure(title, 0.6 + {1: 6.4, 2: 4.2, 3: 2.9}[across] * (1 if square else 0.8) * -(-count // across))
    notes = [note, f"the first {PANELS} of {len(labels)} values" if len(labels) > PANELS else ""]
    made.supxlabel("\n".join(filter(None, notes)), x=0.01, ha="left", fontsize=9)
    return made, style.panels(made, count, across, square)


def _limits(values: np.ndarray) -> tuple[float, float]:
    """A little more than the range; never empty."""
    low, high = float(values.min()), float(values.max())
    margin = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
    return low - margin, high + margin
