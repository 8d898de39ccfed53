"""A proof's report for people: a table of comparisons, what wasn't compared, and the verdict in a sentence."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 140  # where nobody looks
COLOURS = {"exact": "green", "within": "green", "failed": "bold red", "skipped": "dim"}


def show(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what ``Report.plain`` gives."""
    out = console or (Console() if sys.stdout.isatty() else Console(width=WIDTH))
    for key, title in (("compared", "compared"), ("reduced", "reduced")):
        if report.get(key):
            out.print(f"{title}: {report[key]}", highlight=False, markup=False)
    out.print(_table(report["lines"]))
    for text in report.get("notes", ()):
        out.print(f"note: {text}", highlight=False, markup=False)
    out.print(Text(report["sentence"], style="bold green" if report["verified"] else "bold red"))


def _table(lines: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("what", "verdict"):
        table.add_column(name, no_wrap=True)
    for name in ("value", "bound"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("where, and why", overflow="fold")
    for line in lines:
        verdict = line["verdict"]
        words = line["why"] if verdict == "failed" else ": ".join(filter(None, (line["where"], line["why"])))
        table.add_row(
            line["what"], Text(verdict, COLOURS[verdict]), _number(line["value"]), _number(line["bound"]), Text(words)
        )
    return table


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"
