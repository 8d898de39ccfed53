"""A recipe made small enough to be proved in seconds, with everything kept that a technique could break on.

Of a decoder: the ratio of query heads to KV heads, tied or untied ends, biases, RoPE's scaling, the vocabulary, what learns.
Fewer blocks, narrower ones, shorter rows, fewer rows at once. Other models keep their layers and get fewer samples at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from trainwright.models import decoder
from trainwright.recipe import DECODER, InputError, Lora, Partial, Recipe, TextData
from trainwright.verify import random_weights
from trainwright.verify.facts import Facts
from trainwright.verify.job import Job

SMALL = 4_000_000  # parameters that need no reducing
HEAD = 16  # features of a head; the least that kernels for attention take
LENGTH = 128  # tokens of a row
DOCUMENTS = 400
SAMPLES = 16  # at once in a process
STEPS = 20  # of a reduced run: what schedules are made for
BYTES = 8 * 5  # a parameter's in float64: itself, gradient, two states, a copy
ROOM = 0.5  # of the free memory may be used


@dataclass(frozen=True)
class Reduced:
    """The smaller job, and what was made smaller, in words."""

    job: Job
    words: str


def reduce(job: Job, facts: Facts, layers: int | None = None, width: int | None = None, folder: Path | None = None) -> Reduced:
    """Make a job small, or as small as asked for.

    Args:
        layers: blocks of a decoder. width: its hidden size.
        folder: where weights are written for what reads them from a file.

    Raises:
        InputError: it can't be made small enough, or not in this way; says what to pass.
    """
    keys, words = _less_data(job, facts)
    if job.recipe.model.architecture == DECODER:
        options, said = _smaller_decoder(job, facts, layers, width, folder)
        keys, words = keys | options, said + words
    elif layers or width:
        what = "--layers" if layers else "--width"
        raise InputError(
            f"{what}: only decoders can be reduced like this; make {_name(job)} smaller by model.options.KEY=VALUE"
        )
    else:
        _check_room(job, facts)
    return Reduced(job.with_keys(keys), ", ".join(words))


def check_room(job: Job, facts: Facts) -> None:
    """For a job that shall not be reduced.

    Raises:
        InputError: there isn't the memory for it.
    """
    _check_room(job, facts, "leave --no-reduce out, " if job.recipe.model.architecture == DECODER else "")


def _check_room(job: Job, facts: Facts, hint: str = "") -> None:
    count = sum(p.numel() for p in facts.built.model.parameters())
    needed, free = count * BYTES, psutil.virtual_memory().available
    if needed > ROOM * free:
        raise InputError(
            f"verify: {_name(job)} has {count:,} parameters, and a plain run in float64 needs {needed / 2**30:.1f} GiB of the "
            f"{free / 2**30:.1f} GiB that are free; {hint}make it smaller by model.options.KEY=VALUE, or take a larger machine"
        )


def _name(job: Job) -> str:
    return job.recipe.model.architecture


def _smaller_decoder(
    job: Job, facts: Facts, layers: int | None, width: int | None, folder: Path | None
) -> tuple[dict[str, Any], list[str]]:
    """Keys of a smaller decoder with weights drawn from the seed; none where it is small already."""
    config, model = facts.built.config, facts.built.model
    assert isinstance(model, decoder.Decoder)
    count = sum(p.numel() for p in model.parameters())
    if count <= SMALL and layers is None and width is None:
        return {}, []
    smaller = {**config, **_fewer_layers(job, model.config, layers), **_narrower(job, model.config, width)}
    known = {key: value for key, value in smaller.items() if key in decoder.known_options()}
    known.pop("quantization_config", None)
    tokenizer = job.recipe.model.tokenizer or job.recipe.model.pretrained
    keys = {"model.pretrained": None, "model.match": "exact", "model.tokenizer": tokenizer, "model.options": known}
    if getattr(job.recipe.adapt, "start", None):
        keys["adapt.start"] = None
    if reads_file(job):
        assert folder is not None
        written = random_weights.write(folder / "reduced", known, job.recipe.run.seed)
        keys |= {"model.pretrained": str(written), "model.options": {}}
    old, new = model.config, decoder.read_config(known)
    words = [
        f"{new.num_hidden_layers} of {old.num_hidden_layers} layers",
        f"hidden size {new.hidden_size} of {old.hidden_size}",
        "weights drawn from the seed" + (" and written to a file" if reads_file(job) else " instead of loaded"),
    ]
    return keys, words


def reads_file(job: Job) -> bool:
    """Whether a technique needs the file of weights while it trains, or to pack them."""
    return job.recipe.memory.frozen == "stream" or getattr(job.recipe.adapt, "base", "plain") != "plain"


def _fewer_layers(job: Job, config: decoder.DecoderConfig, layers: int | None) -> dict[str, Any]:
    """At least one block for each part of a pipeline."""
    section = job.recipe.parallel
    parts = section.pipeline * (2 if section.schedule == "interleaved" else 1)
    least = max(2, parts)
    if layers is not None and layers < parts:
        raise InputError(f"--layers {layers}: a pipeline of {parts} stages needs at least {parts} blocks")
    named = _named(job)
    chosen = layers or min(config.num_hidden_layers, max(least, *named.values(), 0))
    for pattern, needed in named.items():
        if needed > chosen:
            raise InputError(
                f"--layers {chosen}: the recipe can't be reduced so far, because it names "
                f"{pattern!r}; pass --layers {needed}, or name another block (model.layers.{chosen - 1}.*)"
            )
    return {"num_hidden_layers": chosen}


def _named(job: Job) -> dict[str, int]:
    """Patterns of what is adapted that name a block, and how many blocks must be there for it."""
    section = job.recipe.adapt
    targets = (
        section.targets if isinstance(section, Lora) else section.train if isinstance(section, Partial) else section.freeze
    )
    patterns = [targets] if isinstance(targets, str) else targets
    numbers = {pattern: [int(part) for part in pattern.split(".") if part.isdecimal()] for pattern in patterns}
    return {pattern: 1 + max(found) for pattern, found in numbers.items() if found}


def _narrower(job: Job, config: decoder.DecoderConfig, width: int | None) -> dict[str, Any]:
    """The same heads, of fewer features each."""
    heads = config.num_attention_heads
    if width is not None and width % (heads * 2):
        raise InputError(f"--width {width} isn't a multiple of {heads * 2}: the model has {heads} heads, of even size each")
    size = width // heads if width else min(HEAD, config.head_dim)
    hidden = width or min(config.hidden_size, heads * size)
    tensor = job.recipe.parallel.tensor
    wished = hidden * config.intermediate_size / config.hidden_size
    inner = max(1, math.ceil(wished / (8 * tensor))) * 8 * tensor
    divided = config.intermediate_size % tensor == 0
    return {"hidden_size": hidden, "head_dim": size, "intermediate_size": inner if divided else inner + 1}


def _less_data(job: Job, facts: Facts) -> tuple[dict[str, Any], list[str]]:
    """Fewer rows in a step; as often accumulated, but at most twice, or as a pipeline needs it."""
    recipe, section = job.recipe, job.recipe.parallel
    assert section.data != "auto"
    at_once = facts.micro_batch(job)
    times = recipe.training.batch_size // section.data // at_once
    text = isinstance(recipe.data, TextData)
    fewer = min(at_once, 2 if text else SAMPLES)
    often = min(times, max(2, 2 * section.pipeline if section.pipeline > 1 else 2))
    batch = fewer * often * section.data
    keys: dict[str, Any] = {
        "training.batch_size": batch,
        "training.micro_batch_size": fewer,
        "training.steps": max(STEPS, job.steps),
        "training.epochs": None,
    }
    words = [f"{batch} of {recipe.training.batch_size} rows a step"] if batch < recipe.training.batch_size else []
    return keys | _less_to_read(recipe, batch), words


def _less_to_read(recipe: Recipe, batch: int) -> dict[str, Any]:
    limit = recipe.data.limit
    if isinstance(recipe.data, TextData):
        wanted, shorter = DOCUMENTS, min(recipe.data.sequence_length, LENGTH)
        return {"data.limit": min(limit or wanted, wanted), "data.sequence_length": shorter}
    wanted = max(256, 4 * batch)
    held_out = 0.1 if recipe.data.held_out == "auto" else recipe.data.held_out
    return {"data.limit": min(limit or wanted, wanted), "data.held_out": held_out}
