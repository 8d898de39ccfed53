"""How far plans were from the runs themselves, as ``python -m benchmarks.plan`` found it last and wrote it beside this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("validation.json")
WHAT = {
    "memory": "peak of tensors", "rss": "growth of resident memory", "ranks": "peak in each process", "time": "time of a step"
}  # fmt: skip
ELSEWHERE = "time of a step: never measured on this device; it comes from published rates"


def sentences(*, on_cpu: bool, several: bool) -> list[str]:
    """What of it concerns a plan for a CPU or another device, for one process or several."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    kinds = ["memory", *(["ranks"] if several else []), *(["rss", "time"] if on_cpu else [])]
    said = [f"{WHAT[kind]}: {_sentence(**found[kind])}" for kind in kinds]
    return said if on_cpu else [*said, ELSEWHERE]


def _sentence(*, cases: int, within: int, target: float, largest: float, machine: str) -> str:
    return f"{within} of {cases} cases within {target:.0%}, the largest error {largest:.1%} ({machine})"
