"""Looks for false alarms: recipes without any bug, over many seeds."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.mutants import recipes
from tests.mutants.trying import Trials
from trainwright.recipe import InputError
from trainwright.verify.job import Job
from trainwright.verify.running import Broken

DP2 = {"parallel__data": 2}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "full, accumulation and packing": ("full", {}),
    "full, ZeRO 3 x TP 2": ("full", {**DP2, "parallel__zero": 3, "parallel__tensor": 2}),
    "LoRA, DP 2 x PP 2": ("lora", {**DP2, "parallel__pipeline": 2}),
    "partial, bf16 x compile x ZeRO 2": ("partial", {**DP2, "parallel__zero": 2, "precision": "bf16", "run__compile": "on"}),
    "LoRA, bf16 x TP 2": ("lora", {"precision": "bf16", "parallel__tensor": 2}),
    "full, DeepSpeed 2": ("full", {**DP2, "parallel__zero": 2, "parallel__engine": "deepspeed"}),
    "mlp, ZeRO 1": ("mlp", {**DP2, "parallel__zero": 1}),
    "resnet9, DP 2": ("resnet9", DP2),
}


def report(trials: Trials, folder: Path, seeds: int, names: list[str], *, as_json: bool) -> int:
    """Try each recipe with each seed; 0 where all verdicts are good."""
    started, tried, alarms = time.perf_counter(), 0, []
    worst: dict[str, float] = {}
    for seed in range(seeds):
        for name, (base, keys) in RECIPES.items():
            if names and not any(part in name for part in names):
                continue
            tried += 1
            job = Job(recipes.make(base, folder, {**keys, "run__seed": seed}))
            found, used = _alarms(trials, job)
            worst[name] = max(worst.get(name, 0.0), used)
            alarms += [{"recipe": name, "seed": seed, **alarm} for alarm in found]
            state = f"{len(found)} lines failed: {found}" if found else f"good, at most {used:.0%} of a bound"
            print(f"seed {seed}, {name}: {state}", file=sys.stderr if as_json else sys.stdout, flush=True)
    flagged = len({(alarm["recipe"], alarm["seed"]) for alarm in alarms})
    numbers = {"verdicts": tried, "flagged": flagged, "seconds": round(time.perf_counter() - started), "worst": worst}
    print(json.dumps({**numbers, "alarms": alarms}, indent=1) if as_json else numbers)
    return 1 if alarms else 0


def _alarms(trials: Trials, job: Job) -> tuple[list[dict[str, Any]], float]:
    """Each failed line, and how much of a bound the worst of the others uses."""
    try:
        verdict = trials.healthy(job)
    except (InputError, Broken) as error:
        return [{"line": type(error).__name__, "where": str(error)[:300]}], 0.0
    found = [
        {"line": line.what, "value": line.value, "bound": line.bound, "where": line.where, "why": line.why}
        for line in verdict.failed
    ]
    return found, verdict.worst
