"""``trainwright plan``: what a recipe's step takes on a device, before it is run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trainwright import build, language
from trainwright.parallel import pipeline
from trainwright.parallel.mesh import axis_sizes
from trainwright.plan import devices, idle, validation
from trainwright.plan.compiling import Compiler
from trainwright.plan.devices import Device
from trainwright.plan.once import prepared_once
from trainwright.plan.rehearsal import Rehearsed, rehearse
from trainwright.plan.report import Memory, Plan
from trainwright.plan.timing import Timing, estimate, idle_share
from trainwright.recipe import Recipe, TextData
from trainwright.recipe.file import changed

Say = Callable[[str], None]
ELSEWHERE = (
    "memory is that of the CPU's code paths: FSDP2 on an accelerator gathers one more block ahead, and kernels have workspaces"
)
BY_DEEPSPEED = "parallel.engine: deepspeed isn't rehearsed; these are the figures of torch's at the same ZeRO stage"


@dataclass(frozen=True)
class Options:
    """What is asked besides the recipe: a device's name (None: this machine's), processes, and bytes of a device."""

    device: str | None = None
    count: int | None = None
    budget: int | None = None


@dataclass(frozen=True)
class Planned:
    """A plan with what it is of."""

    plan: Plan
    device: Device
    count: int
    rank: int
    units_per_second: float
    unit: str
    changes: list[tuple[str, str]]
    budget: int
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the peak lies within the device's memory, or the budget."""
        return self.plan.memory.peak <= self.budget

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "device": self.device.name,
            "count": self.count,
            "rank": self.rank,
            "fits": self.fits,
            "budget": self.budget,
            f"{self.unit}_per_second": self.units_per_second,
            **self.plan.as_json(),
            "changes": dict(self.changes),
            "plan_seconds": self.seconds,
        }


def plan(recipe: Recipe, options: Options | None = None, splits: Any = None, say: Say = lambda text: None) -> Planned:
    """What the process with the most memory takes, and how long a step of all takes; ``say`` is told what takes time.

    Raises:
        InputError: the recipe is refused, as training it would be; or an operator has no fake form.
    """
    started, asked = time.perf_counter(), options or Options()
    device = find_device(asked.device, say)
    count = asked.count or least(recipe)
    settled_, notes = settled(recipe, device, count)
    found = rehearse_stages(settled_, count, splits)
    return put_together(recipe, settled_, found, device, asked, notes, time.perf_counter() - started)


def put_together(
    recipe: Recipe, settled_: Recipe, found: list[Rehearsed], device: Device, asked: Options, notes: list[str], seconds: float
) -> Planned:
    """A plan from the rehearsals of a run's processes."""
    count = asked.count or least(recipe)
    largest = max(found, key=lambda one: one.peak.total)
    timings = [_timing(one, settled_, device, count) for one in found]
    timing = max(timings, key=lambda one: one.seconds)
    phase, module = largest.peak.moment
    copies = axis_sizes(settled_.parallel, count)[1]
    made = Plan(
        Memory(largest.peak.total, largest.parts, module or "the step", phase, largest.timeline),
        largest.counts.all_works(),
        largest.counts.all_messages(),
        timing,
        notes,
        {name: round(calls) for name, calls in largest.counts.unknown.items()},
        idle.options(recipe, largest, on_cpu=device.curves is not None),
        validation.sentences(on_cpu=device.curves is not None, several=count > 1),
    )
    rate = largest.units * copies / timing.seconds
    budget = asked.budget or device.memory
    return Planned(made, device, count, largest.rank, rate, largest.unit, largest.changes, budget, seconds)


def find_device(name: str | None, say: Say = lambda text: None) -> Device:
    """By its name; None is what this machine trains on."""
    if name is not None:
        return devices.find(name, say)
    here = build.choose_device("auto")
    return devices.find(torch.cuda.get_device_name(here) if here.type == "cuda" else here.type, say)


def least(recipe: Recipe) -> int:
    """The processes that a recipe needs at least."""
    section = recipe.parallel
    return (1 if section.data == "auto" else section.data) * section.tensor * section.pipeline


def settled(recipe: Recipe, device: Device, count: int) -> tuple[Recipe, list[str]]:
    """The recipe as this machine's CPU can rehearse it, with everything chosen as the device would; and what is to be said.

    Raises:
        InputError: so many processes don't suit the section parallel.
    """
    keys: dict[str, Any] = {"parallel.data": axis_sizes(recipe.parallel, count)[1], "run.device": "cpu"}
    notes = []
    if recipe.parallel.engine == "deepspeed":
        keys["parallel.engine"] = "torch"
        notes.append(BY_DEEPSPEED)
    if device.curves is None:
        notes.append(ELSEWHERE)
        keys |= _chosen_elsewhere(recipe, device, keys["parallel.data"])
    return changed(recipe, keys), notes


def _chosen_elsewhere(recipe: Recipe, device: Device, copies: int) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if recipe.precision == "auto" and recipe.data.kind == "text":
        keys["precision"] = "bf16" if "bfloat16" in device.flops else "fp32"
    if isinstance(recipe.data, TextData):
        keys["training.micro_batch_size"] = language.micro_batch_size(recipe, torch.device("cuda"), copies)
    return keys


def rehearse_stages(recipe: Recipe, count: int, splits: Any = None, compiler: Compiler | None = None) -> list[Rehearsed]:
    """Of each kind of process: the first, the second and the last of a pipeline hold the most, each of its own."""
    stages, data, tensor = axis_sizes(recipe.parallel, count)
    hops: dict[int, Any] = {}
    looked_at = sorted({0, min(1, stages - 1), stages - 1})
    shared = compiler or Compiler()
    with prepared_once():
        return [
            rehearse(recipe, count, stage * data * tensor, splits=splits, hops=hops, compiler=shared) for stage in looked_at
        ]


def _timing(one: Rehearsed, recipe: Recipe, device: Device, count: int) -> Timing:
    stages = recipe.parallel.pipeline
    chunks = pipeline.CHUNKS if recipe.parallel.schedule == "interleaved" else 1
    bubble = idle_share(stages, one.micro_batches, chunks) if stages > 1 else 0.0
    return estimate(one.counts.all_works(), one.counts.all_messages(), device, count, bubble)
