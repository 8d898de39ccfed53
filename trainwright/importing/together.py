"""Several files as one recipe: what each says is set against the others, and contradictions are told with both values."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from trainwright.importing.accelerate import idle
from trainwright.importing.batch import settle_batch
from trainwright.importing.findings import Finding, Reading, Said, shown
from trainwright.importing.settling import AUTO, Together, settle
from trainwright.recipe import Recipe
from trainwright.recipe.types import known_paths, variants


def combine(readings: Mapping[str, Reading]) -> Together:
    """Settle every path, then look at what only shows when all is known."""
    all_ = Together(readings)
    paths = dict.fromkeys(path for reading in all_.readings.values() for path in reading.said)
    for path in paths:
        if not path.startswith(("batch.", "schedule")) and path not in ("processes", "machines"):
            settle(all_, path)
    _length(all_)
    _schedule(all_)
    _optimizer(all_)
    _precision(all_)
    _parallel(all_)
    settle_batch(all_)
    _devices(all_)
    _initialized_whole(all_)
    return all_


def _length(all_: Together) -> None:
    """Epochs of TrainingArguments against DeepSpeed's total_num_steps."""
    if "training.epochs" in all_.recipe and "training.steps" in all_.recipe:
        said = all_.all_said("training.steps")[0]
        del all_.recipe["training.steps"]
        what = f"{said.value} steps, but the training is counted in epochs: the schedule ends with the training here"
        all_.tell("warning", said, what, AUTO, "training.epochs")


def _schedule(all_: Together) -> None:
    """DeepSpeed's scheduler holds, if there is one; its peak is the rate, whatever the optimizer says."""
    found = all_.all_said("schedule")
    found.sort(key=lambda said: said.tool != "deepspeed")
    if not found:
        return
    first, *others = found
    schedule = dict(first.value)
    for other in others:
        _compare_schedules(all_, schedule, first, other)
    if schedule["warmup"] is None:
        schedule["warmup"] = 0
        all_.tell("warning", first, "no file says how long the warmup is; none here", "set schedule.warmup", "schedule.warmup")
    all_.recipe |= {f"schedule.{key}": value for key, value in schedule.items()}
    if not first.given:
        all_.tell("note", first, f"not in the file: {first.raw} is the default of {first.tool}", about="schedule.name")
    _peak(all_)
    _warmup_ends(all_, first, schedule["warmup"])


def _compare_schedules(all_: Together, schedule: dict[str, Any], first: Said, other: Said) -> None:
    if schedule["warmup"] is None:
        schedule["warmup"] = other.value["warmup"]
    elif other.value["warmup"] and other.value["warmup"] != schedule["warmup"]:
        warmups = f"{shown(other.value['warmup'])}, but {first.file} has one of {shown(schedule['warmup'])}"
        what = f"a warmup of {warmups}, which holds here"
        all_.tell("error", other, f"{what}; transformers refuses to start", AUTO, "schedule.warmup")
    if other.given and other.value["name"] != schedule["name"]:
        what = f"{shown(other.raw)}, but {first.file} has a scheduler, {shown(first.raw)}, which holds"
        all_.tell("warning", other, what, "keep one of them", "schedule.name")


def _peak(all_: Together) -> None:
    for peak in all_.all_said("schedule.peak"):
        rate = all_.recipe.get("optimizer.learning_rate")
        if rate is not None and rate != peak.value:
            said = all_.all_said("optimizer.learning_rate")[0]
            why = "" if peak.given else ", its default,"
            what = f"{shown(rate)}, but the scheduler's {peak.key.rpartition('.')[2]} {shown(peak.value)}{why} holds"
            all_.tell("warning", said, what, "write the same rate in both", "optimizer.learning_rate")
        all_.recipe["optimizer.learning_rate"] = peak.value


def _warmup_ends(all_: Together, said: Said, warmup: float) -> None:
    steps = all_.recipe.get("training.steps")
    if steps and warmup >= 1 and warmup >= steps:
        reading = next(reading for reading in all_.readings.values() if reading.file == said.file)
        key = next((key for key, path in reading.used.items() if path == "schedule.warmup"), said.key)
        what = f"a warmup of {shown(warmup)} steps in a training of {steps}: the rate never reaches its peak"
        all_.findings.append(Finding("error", said.file, key, what, f"make it less than {steps}", "schedule.warmup"))


def _optimizer(all_: Together) -> None:
    """Numbers that the optimizer doesn't have are left out; a section that says anything says its name."""
    name = all_.recipe.get("optimizer.name", "adamw")
    if not any(path.startswith("optimizer.") for path in all_.recipe):
        return
    known = variants(Recipe.model_fields["optimizer"])[name].model_fields
    for path in [path for path in all_.recipe if path.startswith("optimizer.")]:
        if path.partition(".")[2] not in known:
            said = all_.all_said(path)[0]
            all_.tell("note", said, f"{shown(said.raw)}: {name} has no such number", about="optimizer.name")
            del all_.recipe[path]
    all_.recipe["optimizer.name"] = name
    decay = all_.recipe.get("optimizer.weight_decay")
    decayed = next(iter(all_.all_said("optimizer.weight_decay")), None)
    if decay and decayed and decayed.tool == "deepspeed" and "transformers" not in all_.readings:
        what = f"{shown(decay)}: DeepSpeed decays whatever it is given; norms and biases aren't decayed here"
        all_.tell("note", decayed, what, "optimizer.groups decays them too", "optimizer.weight_decay")


def _precision(all_: Together) -> None:
    said = next(iter(all_.all_said("precision")), None)
    if said and said.raw == "fp16":
        what = "fp16 becomes bf16, which needs no scaling of the loss; precision: fp16 keeps it"
        all_.tell("warning", said, what, about="precision")


def _parallel(all_: Together) -> None:
    """DeepSpeed shares data only, and offloads nothing without a stage."""
    recipe = all_.recipe
    if recipe.get("parallel.engine") != "deepspeed":
        return
    said = all_.all_said("parallel.engine")[0]
    if recipe.get("parallel.tensor", 1) > 1 or recipe.get("parallel.pipeline", 1) > 1:
        recipe["parallel.engine"] = "torch"
        all_.tell("warning", said, "DeepSpeed shares data only here; tensor and pipeline run on torch", about="parallel.engine")
        if recipe.pop("parallel.offload_optimizer", None):
            offloaded = all_.all_said("parallel.offload_optimizer")[0]
            all_.tell("warning", offloaded, "optimizer states are offloaded by DeepSpeed only", about="parallel.engine")


def _devices(all_: Together) -> None:
    """CUDA_VISIBLE_DEVICES of the environment against the number of processes."""
    visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip() not in ("", "-1")]
    reading = all_.readings.get("accelerate")
    if not visible or all_.processes is None or all_.recipe.get("run.device") == "cpu":
        return
    if reading and reading.get("gpu_ids") not in (None, "all"):
        return
    told = reading or next(iter(all_.readings.values()))
    if reading and reading.get("distributed_type") == "NO":
        return
    key = "num_processes" if reading and reading.has("num_processes") else "train_batch_size"
    idle(told, key, len(visible), all_.processes // all_.machines, "CUDA_VISIBLE_DEVICES")


def _initialized_whole(all_: Together) -> None:
    """zero3_init_flag belongs to stage 3, and to it alone."""
    reading, key = all_.readings.get("accelerate"), "deepspeed_config.zero3_init_flag"
    flag = reading.flag(key) if reading else None
    if reading is None or flag is None or key not in reading.used:
        return
    stage = all_.recipe.get("parallel.zero", 0)
    if stage == 3 and not flag:
        count = f"{all_.processes} processes would each hold" if all_.processes else "each process would hold"
        what = f"false at stage 3: {count} the whole model before dividing it"
        fix = "so it is here with engine: deepspeed; with engine: torch no process ever holds more than its part and a block"
        reading.tell("warning", key, what, fix, "parallel.zero")
    elif stage == 3:
        what = "true: here only with engine: torch, always; with engine: deepspeed each process holds the whole model at first"
        reading.tell("warning", key, what, "set parallel.engine: torch", about="parallel.zero")
    else:
        reading.tell("note", key, f"{shown(flag)}: has an effect at stage 3 only, and this is stage {stage}")


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}, in the order of the recipe's own keys."""
    order = {path: place for place, path in enumerate(known_paths())}
    recipe: dict[str, Any] = {}
    tags = ("name", "kind", "method")

    def place(path: str) -> tuple[int, bool, int]:
        _, _, last = path.rpartition(".")
        return order[path.partition(".")[0]], last not in tags, order.get(path, len(order))

    for path in sorted(flat, key=place):
        *sections, last = path.split(".")
        section = recipe
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = flat[path]
    return recipe
