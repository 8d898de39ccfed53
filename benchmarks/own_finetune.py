"""Our side of the fine-tuning benchmark: trainwright on SmolLM2-135M, one run a process; see ``peer_finetune``.

    python -m benchmarks.own_finetune --case dense --steps 20 --warmup 4 --data FILE

The same data, settings and measures as the peer's. Ragged examples are packed, as they are by default.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import peak_resident_bytes, resident_bytes
from trainwright import build, loop
from trainwright.data import loader
from trainwright.data.packing import Counts, Documents
from trainwright.data.text import TextSplits
from trainwright.recipe import Recipe
from trainwright.recipe.file import parse

LENGTH = 512
ROWS = {"dense": 2, "full": 2, "ragged": 3}  # ragged: three packed rows hold about the peer's eight examples


def recipe(case: str, steps: int, base: str) -> Recipe:
    """What the peer does, as a recipe."""
    lora = {"method": "lora", "rank": 16, "alpha": 32}
    return parse(
        {
            "model": {"pretrained": base},
            "adapt": {"method": "full"} if case == "full" else lora,
            "data": {"source": "the benchmark's own", "sequence_length": LENGTH, "held_out": None},
            "optimizer": {"name": "adamw", "learning_rate": 1e-4, "weight_decay": 0.0},
            "schedule": {"name": "constant", "warmup": 0},
            "precision": "auto",
            "training": {"steps": steps, "batch_size": ROWS[case], "clip_norm": 1.0},
        }
    )


def documents(data: dict[str, np.ndarray]) -> Documents:
    """The benchmark's data: dense rows, or flat tokens with lengths and prompt lengths."""
    tokens = data["tokens"].reshape(-1).astype(np.int32)
    lengths = data.get("lengths", np.full(len(tokens) // LENGTH, LENGTH))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    prompts = np.maximum(data.get("prompt_lengths", np.zeros_like(lengths)), 1)  # nothing predicts the first token
    positions = np.arange(len(tokens)) - np.repeat(offsets[:-1], lengths)
    supervised = positions >= np.repeat(prompts, lengths)
    return Documents(tokens, supervised, offsets, counts=Counts(len(lengths), tokens=len(tokens)))


def in_order(run: loop.Run, content: Documents, rows: int) -> None:
    """Take dense rows in the order of the file, as the peer does."""
    ids = [np.array([i]) for i in range(len(content))]
    batches = loader.in_order(content, ids, rows, length=LENGTH, pad_id=0)
    run.batch = lambda step: [next(batches)]


def count_examples(run: loop.Run) -> list[int]:
    """A list that fills with each step's number of documents."""
    counts: list[int] = []
    batch_of = run.batch

    def counted(step: int) -> Any:
        batches = batch_of(step)
        counts.append(sum(examples_of(batch) for batch in batches if isinstance(batch, loader.TextBatch)))
        return batches

    run.batch = counted
    return counts


def summary(results: list[loop.StepResult], examples: list[int], warmup: int, memory_before: int) -> dict[str, Any]:
    """The peer's measures, and ours: operations a second."""
    counted = results[warmup:]
    seconds = sum(result.seconds for result in counted)
    return {
        "tokens_per_second": sum(result.size for result in counted) / seconds,
        "examples_per_second": sum(examples[warmup:]) / seconds,
        "flops_per_second": sum(result.flops for result in counted) / seconds,
        "supervised_tokens": sum(result.supervised for result in counted),
        "losses": [result.loss for result in results],
        "memory_growth_bytes": peak_resident_bytes() - memory_before,
        "seconds_per_step": [result.seconds for result in results],
        "first_step_seconds": results[0].seconds,
    }


def examples_of(batch: loader.TextBatch) -> int:
    """Documents with anything to learn: padding has none."""
    owners = np.searchsorted(batch.documents.numpy(), np.flatnonzero(batch.labels.numpy() != -100), side="right")
    return len(np.unique(owners))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=list(ROWS), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    before = resident_bytes()
    with np.load(options.data) as file:
        content = documents(dict(file))
    run = build.assemble(recipe(options.case, options.steps, options.base), splits=TextSplits(content, None, cached=True))
    if options.case != "ragged":
        in_order(run, content, ROWS[options.case])
    examples = count_examples(run)
    results = list(loop.train(run))
    print(json.dumps(summary(results, examples, options.warmup, before)))


if __name__ == "__main__":
    main()
