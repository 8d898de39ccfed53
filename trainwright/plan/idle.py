"""Options of a recipe that change nothing in the combination at hand: told, because a reader would think otherwise.

What never has an effect is refused where recipes are read and models built. Here is what the rest of the recipe, or the way a
run is divided, makes idle, and what is no mistake: a recipe may be meant for several machines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainwright.data.builtin_images import NAMES
from trainwright.plan.rehearsal import Rehearsed
from trainwright.recipe import Init, Recipe


@dataclass(frozen=True)
class Case:
    """A recipe, what a process of it does, and whether the CPU is what it runs on."""

    recipe: Recipe
    found: Rehearsed
    on_cpu: bool


@dataclass(frozen=True)
class Rule:
    """A key of the recipe, when it has no effect, and the reason in words."""

    key: str
    idle: Callable[[Case], bool]
    why: str


def options(recipe: Recipe, found: Rehearsed, *, on_cpu: bool = False) -> list[str]:
    """Each with its value and the reason; those that the recipe leaves at their default aren't told."""
    case = Case(recipe, found, on_cpu)
    told = [rule for rule in RULES if _given(recipe, rule.key) and rule.idle(case)]
    return [f"{rule.key}: {_shown(_value(recipe, rule.key))}; {rule.why}" for rule in told]


def _value(recipe: Recipe, key: str) -> Any:
    """None where this recipe's sections have no such key."""
    found: Any = recipe
    for name in key.split("."):
        found = getattr(found, name, None)
    return found


def _given(recipe: Recipe, key: str) -> bool:
    """Whether the recipe says something other than the default."""
    path, _, name = key.rpartition(".")
    section = _value(recipe, path) if path else recipe
    fields = type(section).model_fields if section is not None else {}
    return name in fields and getattr(section, name) != fields[name].get_default(call_default_factory=True)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if hasattr(value, "model_dump"):
        return str(value.model_dump(exclude_defaults=True))
    return "null" if value is None else str(value)


# --- when ---------------------------------------------------------------------


def _arrays(case: Case) -> bool:
    """Whether images come as arrays, which are read whole."""
    source: str = _value(case.recipe, "data.source")
    return source in NAMES or source.lower().endswith(".npz")


def _raw(case: Case) -> bool:
    return _value(case.recipe, "data.format") == "txt" or str(_value(case.recipe, "data.source")).lower().endswith(".txt")


def _everyone_has(name: str) -> Callable[[Case], bool]:
    """Whether the groups give each parameter a value of its own; the first that matches counts."""

    def found(case: Case) -> bool:
        for group in case.recipe.optimizer.groups:
            if getattr(group, name) is None:
                return False
            if "*" in group.match:
                return True
        return False

    return found


def _only_at_the_end(case: Case, every: int | str | None) -> bool:
    """Whether a run is over when it would be due for the first time."""
    training = case.recipe.training
    if every == "epoch":
        return training.steps is None and (training.epochs or 1) <= 1
    return every is None or (isinstance(every, int) and training.steps is not None and every >= training.steps)


def _too_patient(case: Case) -> bool:
    evaluation, steps = case.recipe.evaluation, case.recipe.training.steps
    if evaluation.stop is None or steps is None or not isinstance(evaluation.every, int):
        return False
    return (steps - 1) // evaluation.every < evaluation.stop.patience


def _no_warmup(case: Case) -> bool:
    schedule, steps = case.recipe.schedule, case.recipe.training.steps
    short = steps is not None and 0 < schedule.warmup < 1 and round(schedule.warmup * steps) == 0
    return short and schedule.name != "one_cycle"


def _level(case: Case) -> bool:
    return _value(case.recipe, "schedule.final") == 1 and case.recipe.schedule.name != "one_cycle"  # which rises, too


def _alike(case: Case) -> bool:
    """Whether weights cancel; targets that are mixed are divided by their number alone."""
    weights = _value(case.recipe, "loss.weights")
    mixed = _value(case.recipe, "data.augment.mixup") or _value(case.recipe, "data.augment.cutmix")
    return isinstance(weights, list) and len(set(weights)) == 1 and not mixed


def _drawn_by_default(case: Case) -> bool:
    section = case.recipe.model.init
    kinds = (section.linear, section.conv, section.recurrent, section.embedding)
    return section.scheme == "default" and all(kind in (None, "default") for kind in kinds)


def _all_loaded(case: Case) -> bool:
    model = case.recipe.model
    return model.pretrained is not None and model.match == "exact" and model.init != Init()


RULES = (
    Rule("model.match", lambda case: case.recipe.model.pretrained is None, "there is no model.pretrained to be matched"),
    Rule("model.init", _all_loaded, "all weights are those of model.pretrained"),
    Rule("model.init.nonlinearity", _drawn_by_default, "no scheme is set, and the model's own start doesn't ask for it"),
    Rule("adapt.scaling", lambda case: _value(case.recipe, "adapt.rank") == 1, "the root of rank 1 is 1"),
    Rule("loss.weights", _alike, "all classes weigh the same"),
    Rule("data.workers", _arrays, "the images are arrays, which nobody decodes"),
    Rule("data.workers", lambda case: _value(case.recipe, "data.in_memory") == "yes", "the images stay in memory"),
    Rule("data.in_memory", _arrays, "the images are arrays, which are in memory anyway"),
    Rule("data.unreadable", _arrays, "the images are arrays, of which none can be damaged alone"),
    Rule("data.supervise", _raw, "raw text is always supervised whole"),
    Rule("optimizer.learning_rate", _everyone_has("learning_rate"), "optimizer.groups give every parameter its own"),
    Rule("optimizer.weight_decay", _everyone_has("weight_decay"), "optimizer.groups give every parameter its own"),
    Rule("schedule.growth", lambda case: _value(case.recipe, "schedule.cycles") == 1, "there is one cycle"),
    Rule("schedule.final", _level, "the rate doesn't fall, as that of schedule.name: constant"),
    Rule("schedule.warmup", _no_warmup, "of so few steps it is none"),
    Rule(
        "parallel.schedule",
        lambda case: case.recipe.parallel.schedule == "gpipe" and case.found.micro_batches == 1,
        "a single micro-batch has one order",
    ),
    Rule(
        "memory.optimizer_offload",
        lambda case: case.on_cpu and case.recipe.memory.optimizer_offload == "cpu",
        "the model is in the CPU's memory, too; disk would take them out of it",
    ),
    Rule("training.micro_batch_size", lambda case: case.found.micro_batches == 1, "it is the whole part of a process"),
    Rule("evaluation.before", lambda case: case.recipe.data.held_out is None, "nothing is held out"),
    Rule("evaluation.samples", lambda case: case.recipe.data.held_out is None, "no prompts are held out"),
    Rule(
        "evaluation.every",
        lambda case: _only_at_the_end(case, case.recipe.evaluation.every),
        "the run has ended by then, and is evaluated anyway",
    ),
    Rule("evaluation.stop", _too_patient, "the run has ended before its patience has"),
    Rule(
        "checkpoint.every",
        lambda case: case.recipe.checkpoint.every is not None and _only_at_the_end(case, case.recipe.checkpoint.every),
        "the run has ended by then, and is kept anyway",
    ),
    Rule(
        "checkpoint.keep",
        lambda case: _only_at_the_end(case, case.recipe.checkpoint.every) and case.recipe.evaluation.best is None,
        "there is one checkpoint, at the end",
    ),
)
