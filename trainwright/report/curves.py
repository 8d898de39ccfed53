"""Pictures of a training over its steps: the course of a run, its schedule, and the learning-rate range test."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from trainwright.recipe import InputError
from trainwright.report.style import BLUE, COLOURS, GREY, ORANGE, RED, figure, key, save, style

Curve = tuple[np.ndarray, np.ndarray]  # steps and values
POINTS = 4000  # that a line of 1200 pixels needs
COLUMNS = 2
MOST_PANELS = 8
NOT_METRICS = {"step", "split", "non_finite", "loss"}


def training(metrics_file: Path, out: Path) -> Path:
    """Draw what a run measured: loss, held-out values, learning rate and gradient norm over the steps.

    Args:
        metrics_file: a run's metrics.jsonl; a line without ``split`` is a training step.
        out: the picture, a .png of 1200 pixels across.

    Raises:
        InputError: there is no such file, a line isn't one of a run, nothing is in it, or ``out`` can't be written.
    """
    lines = _read(metrics_file)
    if not lines:
        raise InputError(f"{metrics_file}: no steps yet")
    steps = [line for line in lines if "split" not in line]
    splits = {name: [line for line in lines if line.get("split") == name] for name in dict.fromkeys(_splits(lines))}
    measured = _measured(splits)
    extra = [(name, label) for name, label in (("learning_rate", "learning rate"), ("grad_norm", "gradient norm")) if steps]
    with style():
        rows = 1 + math.ceil((len(measured) + len(extra)) / COLUMNS)
        made = figure(f"training of {key(metrics_file.absolute().parent.name, 60)}", height=3.2 + 2.3 * (rows - 1))
        top, *others = _panels(made, rows, len(measured) + len(extra))
        _draw_loss(top, steps, splits)
        for axes, names in zip(others, measured, strict=False):
            _draw_metrics(axes, names, splits)
        for axes, (name, label) in zip(others[len(measured) :], extra, strict=True):
            _draw_of_steps(axes, steps, name, label)
        _align(made.axes)
        return _write(made, out)


def _panels(made: Figure, rows: int, count: int) -> list[Axes]:
    """A wide one on top, then ``count`` in rows of two; a last one that is alone is wide too."""
    grid = made.add_gridspec(rows, COLUMNS, height_ratios=[1.5] + [1.0] * (rows - 1))
    places = [(1 + place // COLUMNS, place % COLUMNS) for place in range(count)]
    alone = count - 1 if count % COLUMNS else -1
    top = made.add_subplot(grid[0, :])
    cells = [grid[row, :] if place == alone else grid[row, column] for place, (row, column) in enumerate(places)]
    return [top, *(made.add_subplot(cell) for cell in cells)]


def _align(panels: Sequence[Axes]) -> None:
    """The same steps in all panels. They don't share an axis, because narrow ones have room for fewer numbers."""
    limits = [axes.get_xlim() for axes in panels]
    for axes in panels:
        axes.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))


def schedule(steps: Sequence[int], rates: Sequence[float], title: str, out: Path) -> Path:
    """Draw learning rates over the steps, which are counted from 1; ``out`` is a .png. InputError if it can't be written."""
    with style():
        made = figure(title, height=4.0)
        axes = made.add_subplot()
        axes.plot(steps, rates, color=BLUE, marker="o" if len(steps) <= 30 else "", markersize=4)
        _label(axes, "learning rate")
        _scale_rate(axes)
        return _write(made, out)


def find_lr(result: Mapping[str, Any], out: Path) -> Path:
    """Draw the result of ``find_lr``: loss over the rate, with the suggestion; ``out`` is a .png. InputError as above."""
    rates, losses, smoothed = (result[name] for name in ("learning_rates", "losses", "smoothed"))
    with style():
        made = figure("learning-rate range test", height=4.5)
        axes = made.add_subplot()
        axes.plot(rates, losses, color=GREY, linewidth=1.0, label="loss of each step")
        axes.plot(rates, smoothed, color=BLUE, linewidth=2.0, label="smoothed")
        _mark(axes, result, "suggestion", RED, "steepest descent")
        _mark(axes, result, "at_minimum_tenth", ORANGE, "a tenth of the lowest point's")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(_short_number))
        _limit(axes, smoothed)
        axes.grid(True)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss")
        axes.legend()
        return _write(made, out)


def _mark(axes: Axes, result: Mapping[str, Any], name: str, colour: str, label: str) -> None:
    if rate := result[name]:
        loss = float(np.interp(math.log(rate), np.log(result["learning_rates"]), result["smoothed"]))
        axes.axvline(rate, color=colour, linewidth=1.0, linestyle="--")
        axes.plot([rate], [loss], "o", color=colour, label=f"{label}: {rate:.2g}")


def _limit(axes: Axes, smoothed: Sequence[float]) -> None:
    """Leave out the explosion at the end, beside which the fall before it would look flat."""
    if smoothed:
        low, first = min(smoothed), smoothed[0]
        room = max(first - low, 0.1 * abs(first), 1e-12)
        axes.set_ylim(low - 0.4 * room, max(first, low) + 0.8 * room)


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one that was cut off is left out."""
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; a run's folder has a metrics.jsonl from its first step on")
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found = []
    for number, text in enumerate(texts, 1):
        line = _parse(text)
        if line is not None:
            found.append(line)
        elif text.strip() and number < len(texts):
            raise InputError(f"{path}: line {number} is not a JSON object with a step; mend or remove it")
    return found


def _parse(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _splits(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return [line["split"] for line in lines if "split" in line]


def _measured(splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """The evaluated metrics by panels: those from 0 to 1 share one, each other has its own."""
    values: dict[str, list[float]] = {}
    for lines in splits.values():
        for name in dict.fromkeys(name for line in lines for name in line if name not in NOT_METRICS):
            values.setdefault(name, []).extend(_curve(lines, name)[1].tolist())
    shares = [name for name, seen in values.items() if all(0 <= v <= 1 for v in seen if math.isfinite(v))]
    return ([shares] if shares else []) + [[name] for name in values if name not in shares][:MOST_PANELS]


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """Steps and values of one quantity; NaN, a gap, where a line has null, since JSON has no infinity."""
    kept = [line for line in lines if name in line]
    values = [math.nan if line[name] is None else float(line[name]) for line in kept]
    return np.array([line["step"] for line in kept], dtype=float), np.array(values, dtype=float)


def _draw_loss(axes: Axes, lines: Sequence[Mapping[str, Any]], splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    steps, values = _thin(_curve(lines, "loss"))
    axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=0.8, label="training, each step", **_dots(values))
    if len(values) >= 10:
        axes.plot(*_thin(_smooth(_curve(lines, "loss"))), color=BLUE, linewidth=2.0, label="training, smoothed")
    for colour, (name, measured) in zip(COLOURS[1:], splits.items(), strict=False):
        evaluated = _curve(measured, "loss")
        axes.plot(*evaluated, color=colour, label=_plain(name), **_dots(evaluated[1]))
    _label(axes, "loss")
    _scale(axes)
    axes.legend()


def _draw_metrics(axes: Axes, names: Sequence[str], splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Colours tell metrics apart, markers splits: the final ones have a single point."""
    for colour, name in zip(COLOURS[1:] * 9, names, strict=False):
        for marker, (split, lines) in zip("oDs" * 9, splits.items(), strict=False):
            steps, values = _curve(lines, name)
            if len(steps):
                label = key(f"{_plain(split)} {_plain(name)}", 40)
                axes.plot(steps, values, color=colour, label=label, **_dots(values, marker))
    _label(axes, _plain(names[0]) if len(names) == 1 else "share")
    if len(names) == 1:
        _scale(axes)
    axes.legend(fontsize=7)


def _draw_of_steps(axes: Axes, lines: Sequence[Mapping[str, Any]], name: str, label: str) -> None:
    steps, values = _thin(_curve(lines, name))
    axes.plot(steps, values, color=BLUE, linewidth=1.0, **_dots(values))
    _label(axes, label)
    if name == "learning_rate":
        _scale_rate(axes)
    else:
        _scale(axes)


def _label(axes: Axes, what: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(what)
    axes.grid(True)
    spec = axes.get_subplotspec()
    wide = spec is None or len(spec.colspan) == spec.get_gridspec().ncols
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10 if wide else 4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:,.0f}"))


def _scale_rate(axes: Axes) -> None:
    """From zero, with the power of ten above the axis."""
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))


def _short_number(value: float, position: int) -> str:
    return f"{value:g}"


def _scale(axes: Axes) -> None:
    """Logarithmic where values are positive and the largest is more than fifty times the smallest."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]) if axes.lines else np.array([])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 50 * values.min():
        axes.set_yscale("log")
        # matplotlib's own writes powers in its mathematics, which is off so that $ in names is a dollar.
        axes.yaxis.set_major_formatter(FuncFormatter(_short_number))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _dots(values: np.ndarray, marker: str = "o") -> dict[str, Any]:
    """Few values are marked each; a single one would be no line."""
    return {"marker": marker, "markersize": 3.5} if len(values) <= 40 else {}


def _smooth(curve: Curve) -> Curve:
    """The mean over a fortieth of the steps around each, which doesn't lag behind; gaps are passed over."""
    steps, values = curve
    half = max(2, len(values) // 80)
    there = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(there)])
    low, high = np.maximum(np.arange(len(values)) - half, 0), np.minimum(np.arange(len(values)) + half + 1, len(values))
    number = counts[high] - counts[low]
    return steps, np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)


def _thin(curve: Curve) -> Curve:
    """At most ``POINTS`` evenly spread ones, with the last."""
    steps, values = curve
    if len(steps) <= POINTS:
        return curve
    chosen = np.linspace(0, len(steps) - 1, POINTS).round().astype(int)
    return steps[chosen], values[chosen]


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("held out", "held-out")


def _write(made: Figure, out: Path) -> Path:
    """The picture at its place, whole or not at all."""
    if out.suffix.lower() != ".png":
        raise InputError(f"{out}: pictures are written as PNG; the name must end in .png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return save(made, out)
    except OSError as error:
        raise InputError(f"{out} can't be written ({error.strerror}); choose another place") from None
