"""Time to accuracy: a recipe from the raw files to a saved model, once for each seed, measured on its test split afterwards.

python -m benchmarks.accuracy recipes/fashion-94.yaml --seeds 5 --json
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="where the runs go")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.seeds)
    runs = [measured(options.recipe, options.overrides, seed, options.work) for seed in seeds]
    result = {"recipe": str(options.recipe), "runs": runs, **spread(runs, "accuracy"), **spread(runs, "seconds")}
    print(json.dumps(result, indent=2) if options.json else summary(result))


def measured(recipe: Path, overrides: list[str], seed: int, work: Path) -> dict[str, Any]:
    """One run in a process of its own; its seconds are those of the whole command, start and saving included."""
    folder = work / f"{recipe.stem}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    trainwright("train", str(recipe), *overrides, f"run.seed={seed}", f"run.folder={folder}")
    seconds = time.perf_counter() - started
    found = trainwright("evaluate", str(folder), "--split", "test")["test"]
    print(f"seed {seed}: accuracy {found['accuracy']:.4f} in {seconds:.0f} s", file=sys.stderr, flush=True)
    return {"seed": seed, "accuracy": found["accuracy"], "seconds": seconds}


def trainwright(verb: str, *arguments: str) -> dict[str, Any]:
    """What a verb prints with ``--json``."""
    command = [sys.executable, "-m", "trainwright", verb, *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)


def spread(runs: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Mean, standard deviation, least and most of a figure."""
    values = [run[key] for run in runs]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {
        f"{key}_mean": statistics.mean(values),
        f"{key}_std": deviation,
        f"{key}_min": min(values),
        f"{key}_max": max(values),
    }


def summary(result: dict[str, Any]) -> str:
    """One line for people."""
    return (
        f"{result['recipe']}: test accuracy {result['accuracy_mean']:.2%} +- {result['accuracy_std']:.2%} "
        f"(least {result['accuracy_min']:.2%}), {result['seconds_mean']:.0f} s +- {result['seconds_std']:.0f} s"
    )


if __name__ == "__main__":
    main()
