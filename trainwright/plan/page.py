"""The trade-off table as a page and as a picture: memory against speed of every combination, and those that none beats."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from trainwright.plan.pareto import ACCURACY, Choice, front
from trainwright.plan.show import seconds, size, speed
from trainwright.recipe import InputError
from trainwright.report import style

# A colour and a shape for each class of accuracy.
LOOKS = dict(zip(ACCURACY, zip(style.COLOURS[:3] + style.COLOURS[4:5], "osD^", strict=True), strict=True))
WIDE = 6.0  # ratio of largest to smallest from which an axis is logarithmic
GIB = 2**30
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
svg { max-width: 100%; height: auto } g[id^=point]:hover { opacity: 0.55; cursor: crosshair }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { padding: 0.25em 0.8em; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }
td:nth-child(n + 4), th:nth-child(n + 4) { text-align: left } tr.no { color: #999 }
#tip { position: fixed; display: none; white-space: pre; pointer-events: none; background: #fffd; border: 1px solid #888;
       border-radius: 4px; padding: 0.4em 0.7em; font-size: 13px; box-shadow: 0 1px 5px #0003 }
"""
# Shows at once what a browser would show after a second; without scripts the browser does.
SCRIPT = """
const tip = document.getElementById("tip");
for (const point of document.querySelectorAll("g[id^=point]")) {
  const title = point.querySelector("title"), text = title.textContent;
  title.remove();
  point.addEventListener("mousemove", event => {
    tip.textContent = text;
    tip.style.display = "block";
    tip.style.left = Math.max(0, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 4)) + "px";
    tip.style.top = Math.max(0, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4)) + "px";
  });
  point.addEventListener("mouseleave", () => { tip.style.display = "none"; });
}
"""


def write_page(
    path: Path, choices: Sequence[Choice], title: str, unit: str, measured: Sequence[Choice] = (), budget: int | None = None
) -> Path:
    """One HTML file that needs nothing else: the picture, in which a point under the mouse tells its settings, and the tables.

    Args:
        path: of the file.
        choices: all that were tried.
        title: what of: model and device.
        unit: what a run counts: "tokens" or "samples".
        measured: of some of them what was measured instead; matched by their settings.
        budget: bytes of a device.

    Raises:
        InputError: the file can't be written.
    """
    page = render(choices, title, unit, measured, budget)
    return _written(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def write_picture(
    path: Path, choices: Sequence[Choice], title: str, unit: str, measured: Sequence[Choice] = (), budget: int | None = None
) -> Path:
    """The picture alone, a .png or .svg; arguments and errors as of ``write_page``."""
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("png", "svg"):
        raise InputError(f"{path}: the picture is written as PNG or SVG; the name must end in .png or .svg")
    with style.style():
        made = draw(choices, title, unit, measured, budget)
        return _written(path, lambda temporary: made.savefig(temporary, format=kind))


def _written(path: Path, write: Callable[[Path], object]) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return style.whole(path, write)
    except OSError as error:
        raise InputError(f"{path} can't be written ({error.strerror}); choose another place") from None


# --- the picture --------------------------------------------------------------


def draw(
    choices: Sequence[Choice], title: str, unit: str, measured: Sequence[Choice] = (), budget: int | None = None
) -> Figure:
    """Memory of a device along x, speed along y; to be called and saved within ``report.style.style()``."""
    made = style.figure(title, 5.2)
    axes = made.subplots()
    best = front(choices)
    chosen = set(map(id, best))
    for index, choice in enumerate(choices):
        _point(axes, index, choice, id(choice) in chosen)
    for accuracy in ACCURACY:
        _line(axes, [choice for choice in best if choice.accuracy == accuracy], accuracy)
    for choice in measured:
        _measured(axes, choice, next((one for one in choices if one.settings == choice.settings), None))
    _axes(axes, [*choices, *measured], unit)
    if budget is not None:
        _budget(axes, budget)
    _legend(axes, choices, bool(measured), budget)
    return made


def _point(axes: Axes, index: int, choice: Choice, best: bool) -> None:
    colour, marker = LOOKS[choice.accuracy]
    made = Line2D(
        [choice.bytes / GIB], [choice.units_per_second], marker=marker, color=colour, linestyle="", gid=f"point-{index}",
        markerfacecolor="white" if choice.fits is False else colour, markeredgecolor="black" if best else colour,
        markersize=7 if best else 5, alpha=1.0 if best else 0.45, zorder=4 if best else 3,
    )  # fmt: skip
    axes.add_line(made)


def _line(axes: Axes, chosen: Sequence[Choice], accuracy: str) -> None:
    """Through what no other beats: with so much memory, this speed."""
    if chosen:
        x, y = [choice.bytes / GIB for choice in chosen], [choice.units_per_second for choice in chosen]
        axes.plot(x, y, color=LOOKS[accuracy][0], linewidth=1.2, drawstyle="steps-post", zorder=2)


def _measured(axes: Axes, choice: Choice, predicted: Choice | None) -> None:
    x, y = choice.bytes / GIB, choice.units_per_second
    if predicted is not None:
        axes.plot([predicted.bytes / GIB, x], [predicted.units_per_second, y], color="black", linewidth=0.8, zorder=5)
    axes.plot(x, y, marker="x", color="black", markersize=7, markeredgewidth=1.6, linestyle="", zorder=6)


def _axes(axes: Axes, points: Sequence[Choice], unit: str) -> None:
    axes.set_xlabel("memory of a device at the peak")
    axes.set_ylabel(f"{unit} a second")
    for axis, values in (("x", [one.bytes for one in points]), ("y", [one.units_per_second for one in points])):
        if min(values, default=1) > 0 and max(values, default=1) / min(values, default=1) > WIDE:
            _logarithmic(axes, axis)
        else:
            axes.set(**{f"{axis}lim": (0, None)})
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g} GiB" if value >= 1 else f"{value * 1024:.4g} MiB")
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.grid(True)
    axes.set_axisbelow(True)


def _logarithmic(axes: Axes, name: str) -> None:
    base = 2 if name == "x" else 10
    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(base, subs=(1.0,) if base == 2 else (1.0, 2.0, 5.0), numticks=12))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(LogLocator(base, subs=(), numticks=1))


def _budget(axes: Axes, budget: int) -> None:
    left, right = axes.get_xlim()
    axes.set_xlim(left, max(right, 1.05 * budget / GIB))
    axes.axvspan(budget / GIB, axes.get_xlim()[1], color="#f3f3f3", zorder=0)
    axes.axvline(budget / GIB, color=style.RED, linewidth=1.2, linestyle="--", zorder=1)


def _legend(axes: Axes, choices: Sequence[Choice], measured: bool, budget: int | None) -> None:
    for accuracy in ACCURACY:
        if any(choice.accuracy == accuracy for choice in choices):
            colour, marker = LOOKS[accuracy]
            axes.plot([], [], marker=marker, color=colour, markeredgecolor="black", linestyle="-", label=accuracy)
    if any(choice.fits is False for choice in choices):
        axes.plot([], [], marker="o", color=style.GREY, markerfacecolor="white", linestyle="", label="doesn't fit")
    if measured:
        axes.plot([], [], marker="x", color="black", linestyle="", label="measured")
    if budget is not None:
        axes.plot([], [], color=style.RED, linestyle="--", label=f"budget {size(budget)}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), title="edged in black: none is better", alignment="left")


# --- the page -----------------------------------------------------------------


def render(choices: Sequence[Choice], title: str, unit: str, measured: Sequence[Choice] = (), budget: int | None = None) -> str:
    """The HTML of ``write_page``."""
    best = front(choices)
    within = f"; the budget is {size(budget)}" if budget is not None else ""
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
            f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>",
            _svg(choices, unit, measured, budget),
            f"<h2>{len(best)} of {len(choices)} combinations</h2>",
            f"<p>No other is better in memory, speed and accuracy at once{within}.</p>",
            _table(best, unit),
            *(["<h2>Measured</h2>", _compared(measured, choices, unit)] if measured else []),
            f"<details><summary>All {len(choices)}</summary>{_table(choices, unit)}</details>",
            f'<div id="tip"></div><script>{SCRIPT}</script></body></html>\n',
        ]
    )


def _svg(choices: Sequence[Choice], unit: str, measured: Sequence[Choice], budget: int | None) -> str:
    """The picture, in which each point carries its text."""
    buffer = io.StringIO()
    with style.style(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "trainwright"}):
        draw(choices, "", unit, measured, budget).savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]

    def told(match: re.Match[str]) -> str:
        return f"{match[0]}<title>{html.escape(_words(choices[int(match[1])], unit))}</title>"

    return re.sub(r'<g id="point-(\d+)">', told, drawn)


def _words(choice: Choice, unit: str) -> str:
    """All settings, one a line."""
    lines = [f"{key}: {value}" for key, value in choice.settings.items()]
    costs = f"{size(choice.bytes)}, {speed(choice.units_per_second)} {unit}/s, {seconds(choice.seconds)} a step"
    fits = {None: "", True: "fits", False: "doesn't fit"}[choice.fits]
    return "\n".join(filter(None, [*lines, costs, choice.accuracy, fits, choice.note]))


def _table(chosen: Sequence[Choice], unit: str) -> str:
    """A row a choice and a column for each setting."""
    keys = list(dict.fromkeys(key for choice in chosen for key in choice.settings))
    rows = []
    for choice in chosen:
        fits = {None: "", True: "yes", False: "no"}[choice.fits]
        cells = [
            size(choice.bytes), speed(choice.units_per_second), seconds(choice.seconds), choice.accuracy, fits,
            *(choice.settings.get(key, "") for key in keys), choice.note,
        ]  # fmt: skip
        rows.append((cells, "no" if choice.fits is False else ""))
    return _rows(["memory", f"{unit}/s", "a step", "accuracy", "fits", *keys, ""], rows)


def _compared(measured: Sequence[Choice], choices: Sequence[Choice], unit: str) -> str:
    """What was measured beside what was predicted."""
    rows = []
    for one in measured:
        predicted = next((choice for choice in choices if choice.settings == one.settings), None)
        errors = ("", "") if predicted is None else (_error(predicted.bytes, one.bytes), _error(predicted.seconds, one.seconds))
        rows.append(([size(one.bytes), speed(one.units_per_second), seconds(one.seconds), *errors, one.name], ""))
    return _rows(["memory", f"{unit}/s", "a step", "predicted memory", "predicted time", "settings"], rows)


def _error(predicted: float, measured: float) -> str:
    return f"{predicted / measured - 1:+.1%}" if measured else ""


def _rows(head: Sequence[str], rows: Sequence[tuple[Sequence[str], str]]) -> str:
    first = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = [
        f'<tr class="{mark}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>" for cells, mark in rows
    ]
    return f"<table><tr>{first}</tr>\n" + "\n".join(lines) + "</table>"
