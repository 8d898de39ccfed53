"""All combinations of techniques for one model and machine: their memory, speed and accuracy, and those that none beats.

A decoder's blocks are alike, so that memory and time grow by the same for each: a combination is rehearsed with few blocks,
twice, and continued to all. Stages of a pipeline aren't alike: of these, what no other beats is then rehearsed whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainwright import build, forking
from trainwright.plan import command, page, pareto, workers
from trainwright.plan.axes import combinations
from trainwright.plan.command import Options, Planned
from trainwright.plan.compiling import Compiler
from trainwright.plan.devices import Device
from trainwright.plan.once import prepared_once
from trainwright.plan.pareto import Choice
from trainwright.recipe import InputError, Recipe, TextData
from trainwright.recipe.file import changed

Keys = dict[str, Any]
Found = tuple[Choice, Keys]
Say = Callable[[str], None]
DEPTHS = (2, 4)  # blocks of a stage that are rehearsed; even, because two may be checkpointed together
ANYHOW = ("parallel.zero", "parallel.data")  # blocks are compiled the same
ACCURACY = {"fp32": "exact", "fp64": "exact"}  # by precision; the others are "bf16"
DISK = 1.5e9  # bytes a second of a drive, each way: an assumption, told in the notes
NOTE = f"offloaded states are taken to travel at {DISK / 1e9:g} GB/s"


@dataclass(frozen=True)
class Swept:
    """What a sweep found."""

    choices: list[Choice]
    front: list[Choice]
    unit: str
    device: str
    count: int
    budget: int
    refused: dict[str, int]
    files: list[str]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "device": self.device,
            "count": self.count,
            "budget": self.budget,
            "fits": any(choice.fits for choice in self.choices),
            "unit": self.unit,
            "tried": len(self.choices),
            "front": [choice.as_json() for choice in self.front],
            "refused": self.refused,
            "files": self.files,
            "note": NOTE,
        }


def sweep(recipe: Recipe, options: Options, out: Path, say: Say = lambda text: None) -> Swept:
    """Try all ``combinations``, and write what was found as a page, a picture and JSON into a folder.

    Raises:
        InputError: the recipe itself is refused, or nothing can be written.
    """
    device = command.find_device(options.device, say)
    count = options.count or command.least(recipe)
    budget = options.budget or device.memory
    refused: dict[str, int] = {}
    found: dict[str, tuple[Choice, Keys]] = {}
    jobs = _alike(combinations(recipe, count))
    total, done = sum(map(len, jobs)), 0
    processes = 1 if total < workers.FEW else min(forking.cores(), len(jobs))
    with workers.crew(_pricing, (recipe, device, count, budget), processes) as run:
        answers = run(_answers, [[], *jobs])
        unit = next(answers)  # the recipe as it is must be possible
        for job, several in zip(jobs, answers, strict=True):
            for answer in several:
                if isinstance(answer, str):
                    refused[answer] = refused.get(answer, 0) + 1
                else:
                    found |= {choice.name: (choice, keys) for choice, keys in answer}
            done += len(job)
            say(f"{done} of {total}: {words(job[-1])}")
        chosen = pareto.front([choice for choice, keys in found.values()])
        staged = [choice for choice in chosen if found[choice.name][1].get("parallel.pipeline", 1) > 1]
        for several in run(_confirmed, _together(staged, found)):
            say("whole: " + several[0][0].name)
            found |= {choice.name: (choice, keys) for choice, keys in several}
    choices = [choice for choice, _ in found.values()]
    best = pareto.front(choices)
    files = write(out, choices, best, f"{_title(recipe)} on {count} x {device.name}", unit, options.budget)
    return Swept(choices, best, unit, device.name, count, budget, refused, files)


@contextmanager
def _pricing(recipe: Recipe, device: Device, count: int, budget: int) -> Iterator[Pricing]:
    with prepared_once():
        yield Pricing(recipe, device, count, budget)


def _alike(grid: Iterable[Keys]) -> list[list[Keys]]:
    """Combinations that one process takes, because blocks are traced for one of them and used for all."""
    found: dict[str, list[Keys]] = {}
    for keys in grid:
        same = {key: value for key, value in keys.items() if not key.startswith("memory.") and key not in ANYHOW}
        found.setdefault(json.dumps(same), []).append(keys)
    return list(found.values())


def _answers(pricing: Pricing, job: list[Keys]) -> Any:
    """Choices of each combination, or why it is refused; of no combination the unit of the recipe as it is."""
    if job:
        return [_answer(pricing, keys) for keys in job]
    pricing.priced({})
    return pricing.unit


def _answer(pricing: Pricing, keys: Keys) -> list[Found] | str:
    try:
        return list(pricing.choices(keys))
    except InputError as error:
        return str(error).partition(":")[0]


def _together(chosen: Iterable[Choice], found: dict[str, Found]) -> list[list[Found]]:
    """Those that one rehearsal confirms: of the same keys but for where the optimizer's states are."""
    alike: dict[str, list[Found]] = {}
    for choice in chosen:
        keys = found[choice.name][1]
        alike.setdefault(json.dumps({**keys, "memory.optimizer_offload": None}), []).append(found[choice.name])
    return list(alike.values())


def _confirmed(pricing: Pricing, job: list[Found]) -> list[Found]:
    return [(pricing.confirmed(choice, keys), keys) for choice, keys in job]


def write(
    out: Path, choices: list[Choice], best: list[Choice], title: str, unit: str, budget: int | None, measured: Any = ()
) -> list[str]:
    """plan.html, plan.png and plan.json; gives their names."""
    files = [
        page.write_page(out / "plan.html", choices, title, unit, measured, budget),
        page.write_picture(out / "plan.png", choices, title, unit, measured, budget),
    ]
    table = {"title": title, "unit": unit, "front": [c.as_json() for c in best], "choices": [c.as_json() for c in choices]}
    temporary = out / ".plan.json"
    temporary.write_text(json.dumps(table, indent=1), encoding="utf-8")
    os.replace(temporary, out / "plan.json")
    return [str(file) for file in (*files, out / "plan.json")]


def _title(recipe: Recipe) -> str:
    return Path(recipe.model.pretrained).name if recipe.model.pretrained else recipe.model.architecture


# --- words ---------------------------------------------------------------------


def words(keys: Keys) -> str:
    """'precision bf16, checkpointing full'."""
    return ", ".join(f"{name} {value}" for name, value in settings(keys).items()) or "as it is"


def settings(keys: Keys) -> dict[str, str]:
    """What people call these keys, without those that are as usual."""
    usual = {
        "parallel.tensor": 1,
        "parallel.pipeline": 1,
        "parallel.zero": 0,
        "parallel.data": 1,
        "memory.checkpointing": "none",
        "memory.every": 1,
    }
    names = {"training.micro_batch_size": "micro-batch", "adapt": "adapt"}
    shown = {key: value["method"] if isinstance(value, dict) else value for key, value in keys.items()}
    return {
        names.get(key, key.rpartition(".")[2].replace("_", " ")): str(value)
        for key, value in shown.items()
        if usual.get(key) != value
    }


# --- prices --------------------------------------------------------------------


class Pricing:
    """Prices of combinations of one recipe on one kind of device."""

    def __init__(self, recipe: Recipe, device: Device, count: int, budget: int) -> None:
        self.recipe, self.device, self.count, self.budget = recipe, device, count, budget
        self.compiler = Compiler(any_mode=True)
        self.unit = "samples"
        self._known: dict[str, Price] = {}
        self.blocks = _blocks(recipe)

    def whole(self, keys: Keys, depth: int | None = None) -> Planned:
        """A plan of all blocks, or of so many in each stage."""
        recipe = changed(self.recipe, _fitting(self.recipe, keys))
        if depth is not None:
            options = {**recipe.model.options, "num_hidden_layers": depth * recipe.parallel.pipeline}
            recipe = changed(recipe, {"model.options": options})
        asked = Options(self.device.name, self.count, self.budget)
        ready, notes = command.settled(recipe, self.device, self.count)
        found = command.rehearse_stages(ready, self.count, compiler=self.compiler)
        planned = command.put_together(recipe, ready, found, self.device, asked, notes, 0.0)
        self.unit = planned.unit
        return planned

    def choices(self, keys: Keys) -> Iterator[tuple[Choice, Keys]]:
        """A combination with each way to keep the optimizer's states."""
        price = self.priced(keys)
        for more, change in ({}, price), *self.states(keys, price):
            yield self._choice({**keys, **more}, change), {**keys, **more}

    def confirmed(self, choice: Choice, keys: Keys) -> Choice:
        """The same from a rehearsal of all blocks, and of the states as they are kept."""
        bare = {key: value for key, value in keys.items() if key != "memory.optimizer_offload"}
        price = self._whole_price(bare)
        if keys == bare:
            return self._choice(keys, price)
        ways = [({}, price), *self.states(bare, price)]
        return self._choice(keys, next(change for more, change in ways if {**bare, **more} == keys))

    def _whole_price(self, keys: Keys) -> Price:
        known = json.dumps(keys)
        if known not in self._known:
            self._known[known] = _price(self.whole(keys))
        return self._known[known]

    def priced(self, keys: Keys) -> Price:
        """Of a combination, continued from few blocks where they are alike."""
        pipeline = keys.get("parallel.pipeline", 1)
        if self.blocks is None or self.blocks < DEPTHS[1] * pipeline:
            return _price(self.whole(keys))
        try:
            few, more = (_price(self.whole(keys, depth)) for depth in DEPTHS)
        except InputError:
            if pipeline == 1:
                raise
            return _price(self.whole(keys))  # few blocks may leave a stage with nothing but a large head
        return few.continued(more, (self.blocks / pipeline - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]))

    def states(self, keys: Keys, price: Price) -> Iterator[tuple[Keys, Price]]:
        """States live through the whole step: in fewer bytes, or elsewhere, they make the peak smaller by the same."""
        if self.recipe.memory.optimizer_states != "plain" or not price.states:
            return
        short = price.states / 4
        yield {"memory.optimizer_states": "8bit"}, replace(price, peaks=price.less(price.states - short), states=short)
        travel = price.seconds + 2 * price.states / DISK
        where = "disk" if self.device.curves else "cpu"
        yield {"memory.optimizer_offload": where}, replace(price, peaks=price.less(price.states), states=0, seconds=travel)

    def _choice(self, keys: Keys, price: Price) -> Choice:
        rate = price.units / price.seconds
        size = round(price.bytes)
        return Choice(settings(keys), size, price.seconds, rate, accuracy(self.recipe, keys), size <= self.budget)


@dataclass(frozen=True)
class Price:
    """Most bytes in each phase of a step, those that are optimizer states, seconds of a step, and units of work in it."""

    peaks: Mapping[str, float]
    states: float
    seconds: float
    units: float

    @property
    def bytes(self) -> float:
        """At the peak."""
        return max(self.peaks.values())

    def less(self, size: float) -> dict[str, float]:
        """The peaks without so many bytes that live through the whole step."""
        return {phase: peak - size for phase, peak in self.peaks.items()}

    def continued(self, other: Price, times: float) -> Price:
        """As far beyond this one as ``times`` the way to the other; each phase for itself: another may come to hold most."""
        return Price(
            {phase: peak + times * (other.peaks[phase] - peak) for phase, peak in self.peaks.items()},
            self.states + times * (other.states - self.states),
            self.seconds + times * (other.seconds - self.seconds),
            self.units,
        )


def _price(planned: Planned) -> Price:
    memory, seconds = planned.plan.memory, planned.plan.timing.seconds
    peaks = {phase: max(size for other, size in memory.timeline if other == phase) for phase, _ in memory.timeline}
    return Price(peaks, memory.parts["optimizer states"], seconds, planned.units_per_second * seconds)


def _blocks(recipe: Recipe) -> int | None:
    """Of a decoder; None where blocks aren't alike."""
    if not isinstance(recipe.data, TextData) or recipe.model.architecture != "decoder":
        return None
    built = build.assemble_model(changed(recipe, {"run.device": "cpu", "memory": {}}))
    return int(built.config.get("num_hidden_layers", 0)) or None


def _fitting(recipe: Recipe, keys: Keys) -> Keys:
    """The keys, with what goes along with them."""
    mode = keys.get("memory.checkpointing", recipe.memory.checkpointing)
    if mode == recipe.memory.checkpointing:
        return keys
    return {"memory.every": 1, "memory.blocks": None if mode == "none" else recipe.memory.blocks, **keys}


def accuracy(recipe: Recipe, keys: Keys) -> str:
    """What a combination gives up, the most of it: of ``pareto.ACCURACY``."""
    adapt = keys.get("adapt", {"method": recipe.adapt.method})["method"]
    if adapt != "full":
        return "fewer trained parameters"
    if keys.get("memory.optimizer_states", recipe.memory.optimizer_states) == "8bit":
        return "quantized"
    return ACCURACY.get(keys.get("precision", recipe.precision), "bf16")
