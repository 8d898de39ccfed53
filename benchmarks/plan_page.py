"""The page of ``benchmarks.plan``: a section for each kind of measurement, of which only those at hand are written anew."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from benchmarks.plan_cases import CASES, SWEEP, left_out

TARGETS = {"memory": 0.03, "time": 0.20, "rss": 0.10, "ranks": 0.05}  # of the error
INTRODUCTION = """# How well plan foresees

`trainwright plan` beside the runs themselves: `python -m benchmarks.plan` makes this page. *error* is predicted / measured - 1.

- **memory**: the peak of live tensors in a step, against every allocation that PyTorch's profiler sees in the second step of
  the real run. "decoder" is one of 4 layers and width 256, 8 rows of 256 tokens; pictures have 64 x 64 pixels.
- **time**: seconds of a step on this CPU, calibrated just before, against the fastest of several steps.
- **rss**: the same peak against the growth of resident memory over the imports.
- **ranks**: the peak in each process of a run of several.
- **seconds**: how long `plan` takes, and the whole command of a sweep.

Each section names its machine: they may be of several runs.
"""


def here() -> str:
    """What the figures hold for."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def section(kind: str, rows: list[dict[str, Any]]) -> str:
    """Of the page: a table with its summary."""
    lines = [f"## {kind}", "", f"{here()}.", ""]
    if missing := [case for case in CASES[kind] if left_out(case)]:
        lines += [f"No instructions for bfloat16, so without {'; '.join(missing)}.", ""]
    if kind == "seconds":
        lines += ["| run | plan takes | resident at most | predicted peak of a device |", "|---|---|---|---|"]
        lines += [
            f"| {row['case']} | {row['seconds']:.1f} s | {row['resident_gib']:.2f} GiB | {row['peak_gib']:.1f} GiB |"
            for row in rows
            if "peak_gib" in row
        ]
        lines += [
            f"| `{' '.join(SWEEP)} --device h100 --sweep`: {row['combinations']} combinations | {row['seconds']:.0f} s | | |"
            for row in rows
            if "combinations" in row
        ]
        return "\n".join([*lines, ""])
    found = summary(kind, rows)
    shown = _seconds if kind == "time" else _mib
    within = f"{found['within']} of {found['cases']} cases within {found['target']:.0%}"
    lines += [f"{within}; the largest error is {found['largest']:.1%}.", ""]
    lines += ["| case | predicted | measured | error |", "|---|---|---|---|"]
    lines += [f"| {row['case']} | {shown(row['predicted'])} | {shown(row['measured'])} | {row['error']:+.1%} |" for row in rows]
    return "\n".join([*lines, ""])


def summary(kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``plan`` says of its own errors."""
    errors, target = [abs(row["error"]) for row in rows], TARGETS[kind]
    met = sum(error <= target for error in errors)
    return {"cases": len(rows), "within": met, "target": target, "largest": max(errors), "machine": here()}


def write_validation(path: Path, report: dict[str, list[dict[str, Any]]]) -> None:
    """The summaries of what was measured; the others stay."""
    old = json.loads(path.read_text()) if path.exists() else {}
    fresh = {kind: summary(kind, rows) for kind, rows in report.items() if kind in TARGETS}
    path.write_text(json.dumps(old | fresh, indent=1) + "\n")


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def write_page(path: Path, report: dict[str, list[dict[str, Any]]]) -> None:
    """Measured sections anew, the others as they are."""
    old = path.read_text() if path.exists() else ""
    kept = {part.partition("\n")[0]: f"## {part}" for part in old.split("\n## ")[1:]}
    fresh = {kind: section(kind, rows) for kind, rows in report.items()}
    parts = [(fresh.get(kind) or kept[kind]).strip() + "\n" for kind in CASES if kind in fresh or kind in kept]
    path.write_text("\n".join([INTRODUCTION, *parts]))
