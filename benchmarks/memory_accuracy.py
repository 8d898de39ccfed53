"""What storing and rounding cost: the held-out loss of recipes/docstrings.yaml after a few steps, by ways of doing it.

    python -m benchmarks.memory_accuracy [--json] [--steps 40] [--ways "fp32;bf16;..."]

Each way is a process of its own, from the same weights over the same rows; ``more`` is its loss less that of fp32. Products of
float16, and of bfloat16 where the processor has no instructions for it, are made in float32 of the same numbers, not compiled.
The model comes from a file in Q4_1; NF4 rounds what that says.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.child import result_of

SHORTER = {"evaluation.samples": 0, "data.limit": 1000, "data.sequence_length": 256}
BASE = Path(tempfile.gettempdir(), "trainwright-bench", "base")  # the model's weights as safetensors, in float32
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"}, "bf16": {"precision": "bf16"}, "pure_bf16": {"precision": "pure_bf16"},
    "fp16": {"precision": "fp16"}, "8-bit states": {"precision": "fp32", "memory.optimizer_states": "8bit"},
    "4-bit base, the file's Q4_1": {"precision": "fp32", "adapt.base": "4bit"},
    "4-bit base, NF4": {"precision": "fp32", "adapt.base": "4bit", "model.pretrained": str(BASE)},
}  # fmt: skip


def measure(way: str, steps: int) -> dict[str, float]:
    """Train in this process."""
    from benchmarks.machine import WideProducts
    from trainwright import build, loop
    from trainwright.memory.precision import multiplies_bfloat16
    from trainwright.recipe.file import changed, load

    precision = WAYS[way]["precision"]
    wide = precision == "fp16" or (precision != "fp32" and not multiplies_bfloat16())
    settings = {**SHORTER, **WAYS[way], "training.steps": steps, "run.compile": "off" if wide else "auto"}
    run = build.assemble(changed(load(Path("recipes/docstrings.yaml")), settings))
    with WideProducts() if wide else nullcontext():
        before = loop.evaluate(run)["loss"]
        results = list(loop.train(run))
        after = loop.evaluate(run)["loss"]
    return {"before": before, "loss": after, "seconds": statistics.median(result.seconds for result in results)}


def case(ways: list[str] | None = None, steps: int = 40) -> dict[str, Any]:
    """The ways in turn, each as it comes on stderr."""
    from benchmarks.peer_finetune import prepare_base

    prepare_base(BASE)
    found: dict[str, Any] = {}
    for way in ways or list(WAYS):
        found[way] = result_of("memory_accuracy", "--measure", way, "--steps", str(steps))
        print(f"{way}: {found[way]}", file=sys.stderr)
    plain = found.get("fp32", {"loss": math.nan})["loss"]
    return {way: {**result, "more": result["loss"] - plain} for way, result in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ways", default=";".join(WAYS), help="some of: %(default)s")
    parser.add_argument("--measure", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.steps)))
        return
    found = case(options.ways.split(";"), options.steps)
    print(json.dumps(found, indent=2) if options.json else "\n".join(f"{way}: {result}" for way, result in found.items()))


if __name__ == "__main__":
    main()
