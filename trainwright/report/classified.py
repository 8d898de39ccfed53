"""Pictures of a classifier: confusion matrix, ROC, precision-recall and calibration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn import metrics
from sklearn.calibration import calibration_curve

from trainwright.report import style
from trainwright.report.scored import Scored

NUMBERS = 25  # classes up to which a confusion matrix has numbers in its cells
TICKS = 50  # names that an axis has room for
LINES = 10  # curves that can be told apart
BINS = 15  # of the calibration (Guo et al. 2017, section 4)


def confusion(scored: Scored, note: str = "") -> Figure:
    """Counts of actual class (rows) by predicted class (columns), coloured by the share of the row."""
    classes = len(scored.labels)
    counts = metrics.confusion_matrix(scored.actual, scored.predicted, labels=np.arange(classes))
    sums = counts.sum(1, keepdims=True)
    shares = np.ma.masked_array(counts / np.maximum(sums, 1), mask=np.broadcast_to(sums == 0, counts.shape))
    made = style.figure(f"Confusion matrix, {scored.split} data: {len(scored):,} samples", 7.2 if classes > 5 else 6.0)
    axes = made.subplots()
    shown = axes.imshow(shares, cmap=style.SHARES, vmin=0, vmax=1, interpolation="nearest")
    axes.set_facecolor("#d9d9d9")
    absent = "Grey rows: the class doesn't occur." if (sums == 0).any() else ""
    axes.set_title("\n".join(filter(None, [note, absent])))
    axes.set(xlabel="predicted", ylabel="actual")
    _name_ticks(axes, scored.labels)
    if classes <= NUMBERS:
        _numbers(axes, counts, shares.filled(0))
    bar = made.colorbar(shown, ax=axes, shrink=0.8, label="share of the actual class")
    bar.outline.set_visible(False)
    return made


def _name_ticks(axes: Axes, labels: tuple[str, ...]) -> None:
    """Names along both axes, every k-th where there is no room for all."""
    places = np.arange(0, len(labels), -(-len(labels) // TICKS))
    names = [style.short(labels[place], 24 if len(labels) <= NUMBERS else 20) for place in places]
    size = 9 if len(labels) <= 12 else 7 if len(labels) <= NUMBERS else 6
    level = max(map(len, names)) * len(names) <= 50
    axes.set_xticks(places, names, fontsize=size, rotation=0 if level else 90)
    axes.set_yticks(places, names, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _numbers(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    """The counts in the cells, zeros only where there are few classes."""
    texts = [[_count(count, len(counts)) for count in row] for row in counts.tolist()]
    longest = max(len(text) for row in texts for text in row)
    size = min(11.0, 330 / len(counts) / (0.65 * max(longest, 2)))
    for row, column in np.ndindex(*counts.shape):
        if counts[row, column] or len(counts) <= 10:
            colour = "white" if shares[row, column] > 0.55 else "black" if counts[row, column] else "#909090"
            axes.text(column, row, texts[row][column], ha="center", va="center", fontsize=size, color=colour)


def _count(count: int, classes: int) -> str:
    return f"{count:,}" if classes <= 5 else str(count) if count < 10_000 else f"{count // 1000}k"


def roc(scored: Scored) -> Figure | None:
    """True against false positives at every threshold; None where no class has both members and others."""
    found = _rated(scored, metrics.roc_auc_score)
    if not found:
        return None
    made = style.figure(f"ROC curve{'' if scored.binary else 's, each class against the rest'}, {scored.split} data")
    axes = made.subplots()
    grid, rates = np.linspace(0, 1, 1001), []
    for name in found:
        false, true, _ = metrics.roc_curve(scored.actual == name, scored.probabilities[:, name])
        rates.append(np.interp(grid, false, true))
        if name in _drawn(scored, found):
            axes.plot(false, true, **_line(scored, found, name))
    if not scored.binary:
        mean = np.r_[0, np.mean(rates, axis=0)]
        axes.plot(np.r_[0, grid], mean, color="black", linewidth=2, label=f"macro average  {np.mean([*found.values()]):.4f}")
    axes.plot([0, 1], [0, 1], color=style.GREY, linestyle=":", linewidth=1)
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    _finish_curves(axes, scored, found, "AUROC")
    return made


def precision_recall(scored: Scored) -> Figure | None:
    """Precision against recall at every threshold, with the average precision; None as for ``roc``."""
    found = _rated(scored, metrics.average_precision_score)
    if not found:
        return None
    made = style.figure(f"Precision and recall, {scored.split} data")
    axes = made.subplots()
    for name in _drawn(scored, found):
        precision, recall, _ = metrics.precision_recall_curve(scored.actual == name, scored.probabilities[:, name])
        axes.plot(recall, precision, drawstyle="steps-post", **_line(scored, found, name))
    if scored.binary:
        axes.axhline((scored.actual == 1).mean(), color=style.GREY, linestyle=":", linewidth=1, label="chance")
    else:
        axes.plot([], [], " ", label=f"mean of {len(found)} classes  {np.mean([*found.values()]):.4f}")
    axes.set(xlabel="recall", ylabel="precision")
    _finish_curves(axes, scored, found, "AP")
    return made


def _rated(scored: Scored, rate: Callable[..., float]) -> dict[int, float]:
    """Each class that has both members and others, with its area under a curve; of a binary task the positive one."""
    classes = [1] if scored.binary else range(len(scored.labels))
    members = {name: scored.actual == name for name in classes}
    return {
        name: float(rate(member, scored.probabilities[:, name]))
        for name, member in members.items()
        if member.any() and not member.all()
    }


def _drawn(scored: Scored, found: dict[int, float]) -> list[int]:
    """The classes whose curves are drawn: all, or the hardest."""
    return list(found) if len(found) <= LINES else sorted(sorted(found, key=lambda name: found[name])[:LINES])


def _line(scored: Scored, found: dict[int, float], name: int) -> dict[str, Any]:
    """How the curve of a class looks; beside colours, dashes tell neighbours apart."""
    place = _drawn(scored, found).index(name)
    dashes = ("-", "--", "-.")[place % 3] if not scored.binary else "-"
    return {
        "color": style.COLOURS[place],
        "linestyle": dashes,
        "label": f"{style.key(scored.labels[name])}  {found[name]:.4f}",
    }


def _finish_curves(axes: Axes, scored: Scored, found: dict[int, float], what: str) -> None:
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
    axes.set_box_aspect(1)
    axes.grid(True)
    axes.legend(title=what, loc="upper left", bbox_to_anchor=(1.02, 1.0), alignment="left")
    notes = [f"{scored.labels[1]} is the positive class"] if scored.binary else []
    if len(found) > LINES:
        notes.append(f"the {LINES} classes with the lowest {what} of {len(found)}")
    if missing := 0 if scored.binary else len(scored.labels) - len(found):
        notes.append(f"{missing} of {len(scored.labels)} classes left out: they don't occur")
    axes.set_title("\n".join(style.short(note, 100) for note in notes))


def calibration(scored: Scored) -> Figure:
    """How often the model is right where it is so sure, and how often it is so sure.

    Binary: the probability of the positive class against its share. Classes: that of the predicted class against accuracy.
    The expected calibration error is that of Guo et al. 2017, equation 3, over 15 bins of equal width.
    """
    chance = scored.probabilities[:, 1] if scored.binary else scored.confidence
    happened = (scored.actual == 1) if scored.binary else ~scored.wrong
    share, mean, counts, error = reliability(happened, chance)
    made = style.figure(f"Calibration, {scored.split} data: expected calibration error {error:.4f}", 7.0)
    upper, lower = made.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=style.GREY, linestyle=":", label="perfect")
    upper.plot(mean, share, color=style.BLUE, marker="o", markersize=5, label="model")
    upper.set(ylabel=f"share of {style.short(scored.labels[1])}" if scored.binary else "accuracy", ylim=(-0.02, 1.02))
    upper.set_title("Below the diagonal the model is too sure, above it not sure enough." if not scored.binary else "")
    upper.grid(True)
    upper.legend(loc="upper left")
    edges = np.linspace(0, 1, BINS + 1)
    lower.bar((edges[:-1] + edges[1:]) / 2, counts, width=0.9 / BINS, color=style.BLUE)
    what = style.short(scored.labels[1]) if scored.binary else "the predicted class"
    lower.set(xlabel=f"probability of {what}", ylabel="samples", xlim=(-0.02, 1.02))
    lower.grid(True, axis="y")
    lower.set_axisbelow(True)
    return made


def reliability(happened: np.ndarray, chance: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """(share that happened, mean probability) of each bin that isn't empty, counts of all bins, expected calibration error."""
    share, mean = calibration_curve(happened.astype(np.int64), chance, n_bins=BINS)
    # The same rule as calibration_curve's own.
    bins = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], chance)
    counts = np.bincount(bins, minlength=BINS)
    error = float(np.abs(share - mean) @ counts[counts > 0] / len(chance))
    return share, mean, counts, error
