"""Our side of the image benchmark: trainwright on one case, one run a process; see ``peer_images``.

    python -m benchmarks.own_images --case mlp_epoch --caller fit --steps 1876 --warmup 938 --work FOLDER

fit   all that ``trainwright train`` does: metrics.jsonl and the progress bar with each step
loop  ``loop.train`` alone

One JSON document on stdout (see ``images.summary``), the progress on stderr.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import trainwright.supervised  # noqa: F401 (build imports it late, and memory counts from after the imports)
from benchmarks.images import BATCH, EPOCH, LEARNING_RATE, VGG_FILE, child_parser, summary
from benchmarks.machine import peak_resident_bytes, resident_bytes
from trainwright import build, fit, loop
from trainwright.recipe import Recipe
from trainwright.recipe.file import parse
from trainwright.tracking import read_metrics

MODELS = {
    "vgg16": {"architecture": "vgg16"},
    "mlp_epoch": {"architecture": "mlp", "options": {"hidden": [512, 512]}},
    "cnn_epoch": {"architecture": "cnn", "options": {"channels": [32, 64], "norm": "none", "hidden": 128}},
}


def recipe(case: str, steps: int, work: Path, folder: Path) -> Recipe:
    """What the peers do, as a recipe. Precision, layout and the optimizer's implementation are chosen by themselves."""
    vgg16 = case == "vgg16"
    return parse(
        {
            "model": MODELS[case],
            "data": {"kind": "images", "source": str(work / VGG_FILE) if vgg16 else "fashion-mnist", "held_out": None},
            "optimizer": {"name": "sgd" if vgg16 else "adamw", "learning_rate": LEARNING_RATE[case], "weight_decay": 0.0},
            "schedule": {"name": "constant", "warmup": 0},
            "training": {"steps": steps, "batch_size": BATCH[case], "clip_norm": None},
            "checkpoint": {"every": None},
            "tracking": {"tensorboard": False},
            "run": {"folder": str(folder)},
        }
    )


def train_loop(section: Recipe, steps: int) -> tuple[loop.Run, list[float], list[float]]:
    """The run, the clock and the losses of ``loop.train`` alone."""
    run = build.assemble(section)
    clock, losses = [time.perf_counter()], []
    for result in loop.train(run):
        clock.append(time.perf_counter())
        losses.append(result.loss)
    return run, clock[: steps + 1], losses[:steps]


def train_fit(section: Recipe, steps: int) -> tuple[loop.Run, list[float], list[float]]:
    """The same of ``fit.train``, with its bar drawn as on a terminal."""
    # Before the console is made. Without a terminal it would write a few lines in place of the bar, which is cheaper.
    os.environ.update(TTY_COMPATIBLE="1", TERM="xterm-256color")
    clock: list[float] = []
    runs: list[loop.Run] = []
    with mock.patch.object(build, "assemble", clocked(build.assemble, clock, runs)):
        result = fit.train(section)
    lines = read_metrics(Path(result["folder"]) / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "split" not in line]
    return runs[0], clock, losses[:steps]


def clocked(assemble: Callable[..., loop.Run], clock: list[float], runs: list[loop.Run]) -> Callable[..., loop.Run]:
    """``assemble`` with a run that notes when each step asks for its batch: between them lies all that ``fit`` does."""

    def noted(*arguments: Any, **options: Any) -> loop.Run:
        run = assemble(*arguments, **options)
        batch = run.batch

        def batch_of(step: int) -> Any:
            clock.append(time.perf_counter())
            return batch(step)

        run.batch = batch_of
        runs.append(run)
        return run

    return noted


def main() -> None:
    parser = child_parser(__doc__)
    parser.add_argument("--caller", choices=["fit", "loop"], required=True)
    options = parser.parse_args()
    before = resident_bytes()
    train = train_fit if options.caller == "fit" else train_loop
    # With fit a step more: its batch is asked for when the last one that counts is done.
    steps = options.steps + (options.caller == "fit")
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        run, clock, losses = train(recipe(options.case, steps, options.work, Path(scratch, "run")), options.steps)
    assert options.case == "vgg16" or run.steps_per_epoch == EPOCH
    answer = {
        **summary(clock, losses, options.warmup),
        "memory_growth_bytes": peak_resident_bytes() - before,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "changes": {change.technique: change.summary for change in run.changes},
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
