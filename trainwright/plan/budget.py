"""The fastest way to run a recipe within so much memory, of those that compute the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trainwright import build, language
from trainwright.models import pretrained
from trainwright.parallel.mesh import axis_sizes
from trainwright.plan import command
from trainwright.plan.once import prepared_once
from trainwright.plan.show import size
from trainwright.plan.sweep import Pricing, words
from trainwright.recipe import InputError, Lora, Recipe, TextData

Keys = dict[str, Any]
MIB = 2**20
# What a process on a CPU holds beside live tensors, measured with SmolLM2-135M (docs/memory.md): the allocator's gaps, what a
# compiler leaves behind, and what unpacking 4-bit weights does to the heap.
GAPS, COMPILER, UNPACKING = 1.05, 260 * MIB, 140 * MIB
MOST = 60  # combinations


@dataclass(frozen=True)
class Chosen:
    """Keys to set, what a run of them takes, and why; ``fits`` is false where even the least is too much."""

    keys: Keys
    bytes: int
    units_per_second: float
    unit: str
    budget: int
    fits: bool
    reason: str

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return vars(self)


@dataclass(frozen=True)
class Offer:
    """Keys, and what a run of them takes."""

    keys: Keys
    bytes: float
    units_per_second: float
    unit: str


def choose(recipe: Recipe, budget: int, options: command.Options, say: Callable[[str], None] = lambda text: None) -> Chosen:
    """The best of all ``offers``.

    Args:
        budget: bytes of one device; on a CPU what the process may grow by after its imports.

    Raises:
        InputError: the recipe itself is refused.
    """
    return best(offers(recipe, options, say), budget)


def offers(recipe: Recipe, options: command.Options, say: Callable[[str], None] = lambda text: None) -> list[Offer]:
    """Try what keeps the numbers as they are: recomputation, smaller micro-batches, offload, streaming.

    Raises:
        InputError: the recipe itself is refused.
    """
    device = command.find_device(options.device, say)
    count = options.count or command.least(recipe)
    found: list[Offer] = []
    with prepared_once():
        pricing = Pricing(recipe, device, count, device.memory)
        tries = list(itertools.islice(_combinations(recipe, count), MOST))
        for number, keys in enumerate(tries, 1):
            say(f"{number} of {len(tries)}: {words(keys)}") if number % 10 == 1 else None
            try:
                price = pricing.priced(keys)
            except InputError:
                if not keys:
                    raise
                continue
            offloaded = [(more, other) for more, other in pricing.states(keys, price) if "memory.optimizer_offload" in more]
            for more, one in [({}, price), *offloaded]:
                needs = _resident(one.bytes, recipe, keys, device.curves is not None)
                found.append(Offer({**keys, **more}, needs, one.units / one.seconds, pricing.unit))
    return found


def best(found: list[Offer], budget: int) -> Chosen:
    """The fastest that fits, and of equally fast ones that with the fewest keys; if none does, the smallest."""
    fitting = [one for one in found if one.bytes <= budget]
    least = min(found, key=lambda one: one.bytes)
    one = max(fitting, key=lambda one: (round(one.units_per_second, 1), -len(one.keys))) if fitting else least
    told = f"{words(one.keys)}: {size(round(one.bytes))}, {one.units_per_second:,.4g} {one.unit}/s"
    others = f"the fastest of {len(fitting)} of {len(found)} combinations that fit into {size(budget)}"
    reason = f"{told}; {others}" if fitting else f"the least possible is {size(round(one.bytes))} ({words(one.keys)})"
    return Chosen(one.keys, round(one.bytes), one.units_per_second, one.unit, budget, bool(fitting), reason)


def _resident(live: float, recipe: Recipe, keys: Keys, on_cpu: bool) -> float:
    """What a process grows by where so many bytes of tensors are live."""
    if not on_cpu:
        return live
    compiled = recipe.run.compile != "off" and isinstance(recipe.data, TextData)
    packed = keys.get("adapt.base", getattr(recipe.adapt, "base", "plain")) == "4bit"
    return GAPS * live + COMPILER * compiled + UNPACKING * packed


def _combinations(recipe: Recipe, count: int) -> Iterator[Keys]:
    """The recipe as it is first; where optimizer states are doesn't matter to a rehearsal."""
    memory = recipe.memory
    modes = ["none", "selective", "full", "offload"] if memory.checkpointing == "none" else [memory.checkpointing]
    for held, mode, rows in itertools.product(_bases(recipe), modes, _rows(recipe, count)):
        wanted = {"memory.checkpointing": mode, "training.micro_batch_size": rows}
        yield {**held, **{key: value for key, value in wanted.items() if value != _now(recipe, key)}}


def _now(recipe: Recipe, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)


def _bases(recipe: Recipe) -> list[Keys]:
    """Where frozen weights may be: the same numbers stay in the blocks of a GGUF file, or in a safetensors file."""
    adapt, name = recipe.adapt, recipe.model.pretrained
    if not isinstance(adapt, Lora) or name is None or adapt.base != "plain" or recipe.memory.frozen != "resident":
        return [{}]
    packed = pretrained.locate(name).kind == "gguf"
    return [{}, {"adapt.base": "4bit"} if packed else {"memory.frozen": "stream"}]


def _rows(recipe: Recipe, count: int) -> list[int | None]:
    """The recipe's micro-batch and smaller ones, of a process."""
    data = axis_sizes(recipe.parallel, count)[1]
    part = recipe.training.batch_size // data
    now = recipe.training.micro_batch_size
    if now is None and isinstance(recipe.data, TextData):
        now = language.micro_batch_size(recipe, build.choose_device("cpu"), data)
    smaller = [n for n in (1, 2, 4, 8, 16, 32, 64) if part % n == 0 and n < (now or part)]
    return [recipe.training.micro_batch_size, *reversed(smaller)]
