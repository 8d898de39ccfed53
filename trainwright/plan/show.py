"""A plan for people: where the memory goes and when, how long a step takes and what it waits for."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainwright.plan.pareto import Choice
from trainwright.plan.report import PARTS, Memory, Plan
from trainwright.plan.timing import Timing

if TYPE_CHECKING:
    from trainwright.plan.command import Planned

WIDTH = 140  # where nobody looks
BARS = 40  # characters of the longest bar
ROWS = 24  # of the timeline
LEAST = 0.005  # of the step's time: kinds below aren't listed one by one
COLOURS = {"forward": "blue", "backward": "magenta", "optimizer": "green", "loss": "yellow"}
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def show(plan: Plan, budget: int | None = None, console: Console | None = None) -> None:
    """Print a plan; ``budget`` in bytes is marked where the memory stands."""
    out = console or _console()
    _memory(out, plan.memory, budget)
    _timeline(out, plan.memory)
    _time(out, plan.timing)
    _say(out, "without effect here", plan.idle)
    _say(out, "operators whose cost isn't known", [f"{name} ({calls:,} calls)" for name, calls in plan.unknown.items()])
    _say(out, "note", plan.notes)
    _say(out, "last validation", plan.validated)


def show_planned(planned: Planned, console: Console | None = None) -> None:
    """Print a ``command.Planned``: what it is of, its plan, and whether it fits."""
    out = console or _console()
    many = f"{planned.count} x " if planned.count > 1 else ""
    out.print(f"{many}{planned.device.name}: {planned.units_per_second:,.4g} {planned.unit}/s", style="bold")
    for technique, summary in planned.changes:
        out.print(Text(f"{technique}: {summary}"))
    show(planned.plan, planned.budget, out)
    if not planned.fits:
        out.print(f"it doesn't fit: {size(planned.plan.memory.peak)} of {size(planned.budget)}", style="bold red")


def show_front(
    chosen: Sequence[Choice], tried: int, unit: str, budget: int | None = None, console: Console | None = None
) -> None:
    """Print a Pareto front as a table; ``unit`` is what a run counts: "tokens" or "samples"."""
    out = console or _console()
    within = f"; the budget is {size(budget)}" if budget is not None else ""
    out.print(f"{len(chosen)} of {tried} combinations: no other is better in memory, speed and accuracy{within}", style="bold")
    same = common(chosen)
    if same:
        out.print(Text(f"all of them: {', '.join(f'{key} {value}' for key, value in same.items())}"))
    table = _table("memory", f"{unit}/s", "a step", "accuracy", "fits", "settings")
    for choice in chosen:
        fits = "" if choice.fits is None else "yes" if choice.fits else "no"
        named = Text(named_apart(choice, same) + (f" ({choice.note})" if choice.note else ""))
        table.add_row(
            size(choice.bytes), speed(choice.units_per_second), seconds(choice.seconds), Text(choice.accuracy), fits, named,
            style="dim" if choice.fits is False else None,
        )  # fmt: skip
    out.print(table)


def common(chosen: Sequence[Choice]) -> dict[str, str]:
    """The settings that all of several choices have."""
    if len(chosen) < 2:
        return {}
    return {key: value for key, value in chosen[0].settings.items() if all(one.settings.get(key) == value for one in chosen)}


def named_apart(choice: Choice, same: Mapping[str, str]) -> str:
    """The settings of a choice without those that all have."""
    return ", ".join(f"{key} {value}" for key, value in choice.settings.items() if key not in same) or "as it is"


def size(count: float) -> str:
    """'1.50 GiB'."""
    power = 0
    while abs(count) >= 1024 and power < len(UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.0f} {UNITS[power]}" if power == 0 else f"{count:.2f} {UNITS[power]}"


def speed(value: float) -> str:
    """'12,346' or '1.23'."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def seconds(value: float) -> str:
    """'12.3 ms'."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)


def _table(*columns: str, left: Iterable[str] = ("accuracy", "settings", "part", "moment", "kind", "phase", "")) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=name != "settings", overflow="fold")
    return table


def _memory(out: Console, memory: Memory, budget: int | None) -> None:
    where = f" in {memory.module}" if memory.module else ""
    of = f", {memory.peak / budget:.0%} of the budget of {size(budget)}" if budget else ""
    colour = "bold red" if budget and memory.peak > budget else "bold"
    out.print(Text(f"peak {size(memory.peak)}{of}: {memory.moment}{where}", style=colour))
    table = _table("part", "bytes", "share", "")
    for name in (*PARTS, *(name for name in memory.parts if name not in PARTS)):
        count = memory.parts.get(name, 0)
        table.add_row(name, size(count), _share(count, memory.peak), _bar(count, memory.peak))
    out.print(table)


def _timeline(out: Console, memory: Memory) -> None:
    if not memory.timeline:
        return
    out.print("memory over the step", style="bold")
    table = _table("moment", "bytes", "")
    before = ""
    for moment, count in thinned(memory.timeline, ROWS):
        colour = COLOURS.get(moment, "")
        table.add_row(Text("" if moment == before else moment, colour), size(count), Text(_bar(count, memory.peak), colour))
        before = moment
    out.print(table)


def thinned(timeline: Sequence[tuple[str, int]], rows: int) -> list[tuple[str, int]]:
    """About so many points, each the highest of its neighbours and of one moment: no peak and no moment is left out."""
    length = max(1, -(-len(timeline) // rows))
    kept: list[tuple[str, int]] = []
    count = 0
    for moment, live in timeline:
        if kept and kept[-1][0] == moment and count < length:
            kept[-1] = (moment, max(live, kept[-1][1]))
            count += 1
        else:
            kept.append((moment, live))
            count = 1
    return kept


def _time(out: Console, timing: Timing) -> None:
    out.print(Text(f"a step takes {seconds(timing.seconds)}; what binds: {timing.bound}", style="bold"))
    table = _table("phase", "time", "share", "")
    rows = {**timing.phases, "messages that nothing hides": timing.exposed, "waiting in the pipeline": timing.bubble}
    for name, value in rows.items():
        if value or name in timing.phases:
            table.add_row(name, seconds(value), _share(value, timing.seconds), _bar(value, timing.seconds))
    out.print(table)
    kinds = sorted(timing.kinds.items(), key=lambda pair: -pair[1])
    told = [f"{name} {seconds(value)}" for name, value in kinds if value >= LEAST * timing.seconds]
    out.print(Text(f"operators: {', '.join(told)}"))
    hidden = timing.communication - timing.exposed
    waits = {"computation": timing.compute, "memory": timing.memory, "the start of operators": timing.launching}
    out.print(Text(f"waiting for: {', '.join(f'{name} {seconds(value)}' for name, value in waits.items())}"))
    if timing.communication:
        sending = f"{size(timing.sent)} sent in {seconds(timing.communication)}, {seconds(hidden)} of it hidden"
        out.print(Text(f"messages: {sending}"))
    rate = timing.flops / timing.seconds / 1e12 if timing.seconds else 0.0
    out.print(Text(f"computed: {timing.flops:.3g} FLOP, {rate:.3g} TFLOP/s"))


def _say(out: Console, what: str, lines: Sequence[str]) -> None:
    for line in lines:
        out.print(Text(f"{what}: {line}"), soft_wrap=True)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _bar(part: float, whole: float) -> str:
    """Blocks by eighths, so that small differences are seen."""
    eighths = round(8 * BARS * part / whole) if whole else 0
    return "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")
