"""The learning-rate schedules of transformers and DeepSpeed as ours."""

from __future__ import annotations

from typing import Any

from trainwright.importing.findings import Reading, as_number, shown

HUGGING_FACE = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
)  # fmt: skip
# What stands in for a schedule that isn't offered, and how it differs.
STAND_INS = {
    "reduce_lr_on_plateau": ("constant", "the rate doesn't look at the evaluations here"),
    "greedy": ("constant", "the rate doesn't look at the evaluations here"),
    "warmup_stable_decay": ("constant", "a rate that stays and then falls isn't offered; it stays here"),
}
DEEPSPEED = ("lrrangetest", "onecycle", "warmuplr", "warmupdecaylr", "warmupcosinelr")
WARMUP_KEYS = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type", "total_num_steps", "last_batch_iteration")
COSINE_KEYS = (
    "warmup_min_ratio",
    "cos_min_ratio",
    "warmup_num_steps",
    "warmup_type",
    "total_num_steps",
    "last_batch_iteration",
)
CYCLE_KEYS = (
    "cycle_min_lr", "cycle_max_lr", "decay_lr_rate", "cycle_first_step_size", "cycle_second_step_size",
    "cycle_first_stair_count", "cycle_second_stair_count", "decay_step_size", "cycle_momentum", "cycle_min_mom",
    "cycle_max_mom", "decay_mom_rate", "last_batch_iteration",
)  # fmt: skip
TEST_KEYS = (
    "lr_range_test_min_lr", "lr_range_test_step_size", "lr_range_test_step_rate", "lr_range_test_staircase",
    "last_batch_iteration",
)  # fmt: skip
KEYS_OF = {"lrrangetest": TEST_KEYS, "onecycle": CYCLE_KEYS, "warmupcosinelr": COSINE_KEYS}
DEFAULT_WARMUP = 1000  # of DeepSpeed's schedulers
LARGEST = 0.001  # WarmupDecayLR's warmup_max_lr where none is given


def of_arguments(reading: Reading) -> None:
    """``lr_scheduler_type`` with its options, ``warmup_steps`` and ``warmup_ratio`` become ``schedule``."""
    warmup, warmup_key = _warmup(reading)
    name = reading.word("lr_scheduler_type", HUGGING_FACE)
    options = reading.section("lr_scheduler_kwargs")
    schedule = _shape(reading, name or "linear", options)
    if name == "constant" and warmup:
        reading.tell("warning", warmup_key, "the schedule constant ignores it in transformers", _named("constant_with_warmup"))
        warmup = 0
    reading.say(
        "schedule", {**schedule, "warmup": warmup or 0}, "lr_scheduler_type", raw=name or "linear", given=name is not None
    )
    for key in ("warmup_steps", "warmup_ratio"):
        if reading.get(key) is not None:
            reading.used[key] = "schedule.warmup"


def _warmup(reading: Reading) -> tuple[float | int | None, str]:
    """Below 1 a part of all steps, else steps, as the recipe counts too; and the key that says so."""
    steps, ratio = reading.number("warmup_steps"), reading.number("warmup_ratio")
    if steps is not None and steps >= 1:
        steps = int(steps)
    if steps and ratio:
        what = f"{shown(steps)} warmup_steps and a warmup_ratio of {shown(ratio)}: the steps hold"
        reading.tell("warning", "warmup_ratio", what, "keep one of them", "schedule.warmup")
    if ratio is not None and ratio >= 1:
        reading.fault("warmup_ratio", ratio, "a part of all steps, below 1")
    return (steps, "warmup_steps") if steps or ratio is None else (ratio, "warmup_ratio")


def _named(name: str) -> str:
    return f"write {name} if it is meant"


def _shape(reading: Reading, name: str, options: Any) -> dict[str, Any]:
    """The schedule without its warmup; what its options say, and every option accounted for."""
    taken: dict[str, Any] = {}
    if name in STAND_INS:
        stand_in, why = STAND_INS[name]
        reading.tell("warning", "lr_scheduler_type", f"{name} isn't offered: {why}", "choose another schedule", "schedule.name")
        taken = {"name": stand_in}
    elif name == "cosine_with_restarts":
        cycles = reading.whole("lr_scheduler_kwargs.num_cycles") or 1
        taken = {"name": "cosine_restarts", "cycles": cycles}
    elif name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        taken = {"name": "cosine", "final": _floor(reading, "min_lr", "min_lr_rate")}
    elif name == "polynomial":
        taken = _polynomial(reading)
    else:
        taken = {"name": {"constant_with_warmup": "constant"}.get(name, name)}
    used = {"cosine_with_restarts": {"num_cycles"}, "polynomial": {"lr_end", "power"}}.get(name, set())
    used = used | ({"min_lr", "min_lr_rate"} if "min_lr" in name else set())
    for option, value in options.items():
        key = f"lr_scheduler_kwargs.{option}"
        if option in used:
            reading.used.setdefault(key, "schedule")
        else:
            reading.tell("warning", key, f"{shown(value)}: {name} has no such option here", about="schedule")
    return taken


def _floor(reading: Reading, rate: str, part: str) -> float:
    """The last rate as a part of the peak."""
    direct = reading.number(f"lr_scheduler_kwargs.{part}")
    if direct is not None:
        return min(direct, 1.0)
    lowest = reading.number(f"lr_scheduler_kwargs.{rate}") or 0.0
    return min(1.0, lowest / (reading.number("learning_rate") or 5e-5))


def _polynomial(reading: Reading) -> dict[str, Any]:
    power = reading.number("lr_scheduler_kwargs.power")
    if power is not None and power != 1:
        what = f"a fall by the power {power:g} isn't offered; it is linear here"
        reading.tell("warning", "lr_scheduler_kwargs.power", what, "choose another schedule", "schedule.name")
    end = reading.number("lr_scheduler_kwargs.lr_end")
    return {"name": "linear", "final": min(1.0, (1e-7 if end is None else end) / (reading.number("learning_rate") or 5e-5))}


def of_deepspeed(reading: Reading) -> None:
    """``scheduler`` becomes ``schedule``, and what it says of rates and steps those."""
    if not reading.section("scheduler"):
        return
    name = reading.word("scheduler.type", DEEPSPEED)
    if name is None:
        if not reading.faults:
            reading.tell("warning", "scheduler", "no type, so DeepSpeed has no scheduler")
        return
    {"lrrangetest": _range_test, "onecycle": _cycle}.get(name, _warmups)(reading, name)
    known = KEYS_OF.get(name, WARMUP_KEYS)
    reading.rest("scheduler.params", {}, known, "DeepSpeed refuses it")
    reading.rest("scheduler", {}, ("type", "params"), "DeepSpeed ignores it")


def _warmups(reading: Reading, name: str) -> None:
    """WarmupLR stays at its peak, WarmupDecayLR falls linearly, WarmupCosineLR by a cosine."""
    steps = reading.whole("scheduler.params.warmup_num_steps")
    auto = reading.has("scheduler.params.warmup_num_steps") and steps is None
    shape: dict[str, Any] = {"name": {"warmuplr": "constant", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}[name]}
    if name == "warmupcosinelr":
        floor = reading.number("scheduler.params.cos_min_ratio")
        shape["final"] = min(1.0, 0.0001 if floor is None else floor)
        reading.used["scheduler.params.cos_min_ratio"] = "schedule.final"
    if auto:
        shape["warmup"] = None  # from TrainingArguments
    else:
        shape["warmup"] = DEFAULT_WARMUP if steps is None else steps
        reading.used["scheduler.params.warmup_num_steps"] = "schedule.warmup"
    reading.say("schedule", shape, "scheduler.type", raw=name)
    _tell_of_warmup(reading)
    largest = reading.number("scheduler.params.warmup_max_lr")
    if largest is not None:
        reading.say("schedule.peak", largest, "scheduler.params.warmup_max_lr")
    elif name == "warmupdecaylr" and not reading.has("scheduler.params.warmup_max_lr"):
        reading.say("schedule.peak", LARGEST, "scheduler.params.warmup_max_lr", given=False)
    total = reading.whole("scheduler.params.total_num_steps")
    if total is not None:
        reading.say("training.steps", total, "scheduler.params.total_num_steps")


def _tell_of_warmup(reading: Reading) -> None:
    if str(reading.get("scheduler.params.warmup_type", "log")).lower() != "linear":
        what = "DeepSpeed's warmup is logarithmic unless it says linear; here it is a straight line"
        reading.tell("warning", "scheduler.params.warmup_type", what, about="schedule.warmup")
    else:
        reading.used["scheduler.params.warmup_type"] = "schedule.warmup"
    for key in ("scheduler.params.warmup_min_lr", "scheduler.params.warmup_min_ratio"):
        if reading.number(key):
            what = f"{shown(reading.get(key))}: here the warmup rises from zero"
            reading.tell("warning", key, what, about="schedule.warmup")


def _cycle(reading: Reading, name: str) -> None:
    low, high = reading.number("scheduler.params.cycle_min_lr"), reading.number("scheduler.params.cycle_max_lr")
    first = reading.whole("scheduler.params.cycle_first_step_size") or 2000
    shape: dict[str, Any] = {"name": "one_cycle", "warmup": first}
    if low and high:
        shape |= {"start": min(1.0, low / high), "final": min(1.0, low / high)}
        reading.used["scheduler.params.cycle_min_lr"] = "schedule.start"
    reading.used["scheduler.params.cycle_first_step_size"] = "schedule.warmup"
    reading.say("schedule", shape, "scheduler.type", raw=name)
    if high is not None:
        reading.say("schedule.peak", high, "scheduler.params.cycle_max_lr")
    what = "DeepSpeed's cycle rises and falls in straight lines and then decays; here it is one cycle of cosines over the run"
    reading.tell("warning", "scheduler.type", what, "look at trainwright plot-schedule", "schedule.name")
    for option in CYCLE_KEYS:
        key = f"scheduler.params.{option}"
        if reading.has(key) and not reading.accounted(key):
            reading.tell("note", key, f"{shown(reading.get(key))}: the cycle has no such part here", about="schedule.name")


def _range_test(reading: Reading, name: str) -> None:
    what = "a search for a learning rate, not a schedule for training"
    reading.tell("warning", "scheduler.type", what, "use trainwright find-lr; the rate stays here", "schedule.name")
    reading.say("schedule", {"name": "constant", "warmup": 0}, "scheduler.type", raw=name)
    for option in TEST_KEYS:
        if reading.has(f"scheduler.params.{option}"):
            reading.tell("note", f"scheduler.params.{option}", "belongs to trainwright find-lr")


def as_part(value: Any) -> float | None:
    """A number that is a part of something, in (0, 1)."""
    number = as_number(value)
    return number if number is not None and 0 < number < 1 else None
