"""All combinations of techniques for one model and machine: their memory, speed and accuracy, and those that none beats.

A decoder's blocks are alike, so that memory and time grow by the same for each: a combination is rehearsed with few blocks,
twice, and continued to all. What no other beats is then rehearsed whole.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainwright import build
from trainwright.plan import command, page, pareto
from trainwright.plan.command import Options, Planned
from trainwright.plan.compiling import Compiler
from trainwright.plan.devices import Device
from trainwright.plan.once import prepared_once
from trainwright.plan.pareto import Choice
from trainwright.recipe import InputError, Lora, Recipe, TextData
from trainwright.recipe.file import changed

Keys = dict[str, Any]
Say = Callable[[str], None]
DEPTHS = (2, 4)  # blocks of a stage that are rehearsed
MOST = 600
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
    """Try all combinations of ``axes``, and write what was found as a page, a picture and JSON into a folder.

    Raises:
        InputError: the recipe itself is refused, or nothing can be written.
    """
    device = command.find_device(options.device)
    count = options.count or command.least(recipe)
    budget = options.budget or device.memory
    refused: dict[str, int] = {}
    found: dict[str, tuple[Choice, Keys]] = {}
    with prepared_once():
        pricing = Pricing(recipe, device, count, budget)
        pricing.whole({})  # the recipe as it is must be possible
        grid = list(combinations(recipe, count))
        for number, keys in enumerate(grid, 1):
            say(f"{number} of {len(grid)}: {words(keys)}") if number % 20 == 1 else None
            try:
                for choice, more in pricing.choices(keys):
                    found[choice.name] = (choice, more)
            except InputError as error:
                reason = str(error).partition(":")[0]
                refused[reason] = refused.get(reason, 0) + 1
        chosen = pareto.front([choice for choice, _ in found.values()])
        for choice in chosen:
            say(f"whole: {choice.name}")
            found[choice.name] = (pricing.confirmed(choice, found[choice.name][1]), found[choice.name][1])
    choices = [choice for choice, _ in found.values()]
    best = pareto.front(choices)
    files = write(out, choices, best, f"{_title(recipe)} on {count} x {device.name}", pricing.unit, options.budget)
    return Swept(choices, best, pricing.unit, device.name, count, budget, refused, files)


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


# --- the combinations ----------------------------------------------------------


def combinations(recipe: Recipe, count: int) -> Iterator[Keys]:
    """Keys of the recipe that are changed, at most ``MOST`` of them."""
    axes = [_precisions(recipe), _methods(recipe), _checkpointings(), list(_shapes(recipe, count)), _micro_batches(recipe)]
    for parts in itertools.islice(itertools.product(*axes), MOST):
        yield {key: value for part in parts for key, value in part.items()}


def _precisions(recipe: Recipe) -> list[Keys]:
    known = dict.fromkeys(["fp32", "bf16", "pure_bf16"])
    return [{"precision": name} for name in known]


def _methods(recipe: Recipe) -> list[Keys]:
    if isinstance(recipe.adapt, Lora) or not isinstance(recipe.data, TextData):
        return [{}]
    return [{}, {"adapt": {"method": "lora", "rank": 16}}]


def _checkpointings() -> list[Keys]:
    return [{"memory.checkpointing": name} for name in ("none", "selective", "full", "offload")]


def _shapes(recipe: Recipe, count: int) -> Iterator[Keys]:
    """ZeRO stages with all products of the axes that make ``count``."""
    wide = isinstance(recipe.data, TextData)
    for tensor in _powers(count, 8 if wide else 1):
        for pipeline in _powers(count // tensor, 16 if wide else 1):
            data = count // tensor // pipeline
            for zero in (0, 1, 2, 3) if data > 1 else (0,):
                yield {"parallel.tensor": tensor, "parallel.pipeline": pipeline, "parallel.data": data, "parallel.zero": zero}


def _powers(most: int, limit: int) -> list[int]:
    return [2**power for power in range(11) if 2**power <= limit and most % 2**power == 0]


def _micro_batches(recipe: Recipe) -> list[Keys]:
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if recipe.training.batch_size % n == 0]
    return [{"training.micro_batch_size": n} for n in sizes[:: max(1, len(sizes) // 3)]]


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
        self.compiler = Compiler()
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
        few, more = (_price(self.whole(keys, depth)) for depth in DEPTHS)
        return few.continued(more, (self.blocks / pipeline - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]))

    def states(self, keys: Keys, price: Price) -> Iterator[tuple[Keys, Price]]:
        """States live through the whole step: in fewer bytes, or elsewhere, they make the peak smaller by the same."""
        if self.recipe.memory.optimizer_states != "plain" or not price.states:
            return
        short = price.states / 4
        yield {"memory.optimizer_states": "8bit"}, replace(price, bytes=price.bytes - price.states + short, states=short)
        travel = price.seconds + 2 * price.states / DISK
        where = "disk" if self.device.curves else "cpu"
        yield {"memory.optimizer_offload": where}, replace(price, bytes=price.bytes - price.states, states=0, seconds=travel)

    def _choice(self, keys: Keys, price: Price) -> Choice:
        rate = price.units / price.seconds
        size = round(price.bytes)
        return Choice(settings(keys), size, price.seconds, rate, accuracy(self.recipe, keys), size <= self.budget)


@dataclass(frozen=True)
class Price:
    """Bytes at the peak, those of them that are optimizer states, seconds of a step, and units of work in it."""

    bytes: float
    states: float
    seconds: float
    units: float

    def continued(self, other: Price, times: float) -> Price:
        """As far beyond this one as ``times`` the way to the other."""
        return Price(
            self.bytes + times * (other.bytes - self.bytes),
            self.states + times * (other.states - self.states),
            self.seconds + times * (other.seconds - self.seconds),
            self.units,
        )


def _price(planned: Planned) -> Price:
    memory, seconds = planned.plan.memory, planned.plan.timing.seconds
    return Price(memory.peak, memory.parts["optimizer states"], seconds, planned.units_per_second * seconds)


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
    return {**keys, "memory.every": 1, "memory.blocks": None if mode == "none" else recipe.memory.blocks}


def accuracy(recipe: Recipe, keys: Keys) -> str:
    """What a combination gives up, the most of it: of ``pareto.ACCURACY``."""
    adapt = keys.get("adapt", {"method": recipe.adapt.method})["method"]
    if adapt != "full":
        return "fewer trained parameters"
    if keys.get("memory.optimizer_states", recipe.memory.optimizer_states) == "8bit":
        return "quantized"
    return ACCURACY.get(keys.get("precision", recipe.precision), "bf16")
