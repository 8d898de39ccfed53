"""Read this first: the one place where a recipe becomes a program.

``assemble`` lists what is applied, in its order. train, evaluate, inspect and generate all come here; what only text needs
stands in ``language``.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainwright import flops, language, metrics, optim, saving
from trainwright.adapt import full, lora
from trainwright.adapt import partial as partial_tuning
from trainwright.built import Built
from trainwright.data import text
from trainwright.loop import Run, accumulate
from trainwright.machine import keep_freed_memory
from trainwright.memory import precision
from trainwright.models import decoder, pretrained, user
from trainwright.models.contract import Change
from trainwright.recipe import InputError, Lora, Partial, Recipe


def assemble(
    recipe: Recipe,
    *,
    splits: text.TextSplits | None = None,
    progress: Callable[[str, int], None] = lambda what, done: None,
) -> Run:
    """The whole program of a recipe.

    Args:
        splits: documents already tokenised, instead of those that ``recipe.data`` names.
        progress: called with what is being prepared and how much of it is done.

    Raises:
        InputError: a setting that is wrong, or has no effect, with these data and this model.
    """
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    built = assemble_model(recipe)
    if built.device.type == "cpu":
        keep_freed_memory()
    tokenizer = language.find_tokenizer(recipe, built.source)
    splits = splits or text.prepare(
        recipe.data,
        tokenizer,
        model_length=built.config.get("max_position_embeddings"),
        seed=recipe.run.seed,
        progress=partial(progress, "tokenised"),
    )
    language.check_packing(recipe, built.model)
    batches = language.make_loader(recipe, splits.train, tokenizer, built.device)
    steps = recipe.training.steps or max(1, round((recipe.training.epochs or 1) * batches.steps_per_epoch))
    rate = optim.schedule(recipe.schedule, recipe.optimizer.learning_rate, steps)
    materialise(built, recipe)
    compiled = compile_blocks(built, recipe)
    groups = optim.parameter_groups(built.model.named_parameters(), recipe.optimizer.weight_decay)
    trained = [p for p in built.model.parameters() if p.requires_grad]
    objective = language.objective_of(built, recipe, compiles(recipe, built.device))
    return Run(
        recipe=recipe,
        model=built.model,
        changes=[*built.changes, compiled],
        device=built.device,
        optimizer=optim.make_optimizer(groups, recipe.optimizer),
        rate=rate,
        steps=steps,
        batch=batches.batch,
        identity=batches.identity,
        objective=objective,
        forward_backward=partial(accumulate, objective),
        clip=partial(optim.clip_, trained, recipe.training.clip_norm),
        held_out=language.held_out_batches(recipe, splits.held_out, batches),
        metrics=metrics.language_model,
        flops=flops.counter(flops.decoder_work(built.model, built.model.config))
        if isinstance(built.model, decoder.Decoder)
        else None,
        save=partial(saving.save_model, recipe, built.model, built.config, built.source, tokenizer),
        compute_dtype=built.compute_dtype,
        steps_per_epoch=batches.steps_per_epoch,
        notes=language.data_notes(splits, batches),
        samples=language.samples(built, tokenizer, splits.held_out)
        if isinstance(built.model, decoder.Decoder) and splits.held_out
        else None,
    )


def assemble_model(recipe: Recipe, *, frozen: bool = False) -> Built:
    """The model with its techniques applied, in their order; a decoder still on the meta device, without values.

    Args:
        frozen: nothing will learn, so that everything may be stored in the compute dtype.
    """
    place = choose_device(recipe.run.device)
    source = pretrained.locate(recipe.model.pretrained) if recipe.model.pretrained else None
    model, config = _make(recipe, source)
    kind = precision.choose(recipe.precision, place)
    changes = [_adapt(model, recipe)]  # which parameters learn; new ones (LoRA) appear here
    if frozen:
        model.requires_grad_(False)
    changes.append(precision.apply(model, kind))  # after it, because frozen parameters are stored in less
    return Built(model, changes, config, source, kind, place)


def _make(recipe: Recipe, source: pretrained.Source | None) -> tuple[nn.Module, dict[str, Any]]:
    """The plain model and its config.json; a decoder on the meta device, a user's module where it makes itself."""
    section = recipe.model
    if section.architecture != "decoder":
        return user.make(section.architecture, section.options, recipe.run.seed), {}
    decoder.check_options(section.options)
    if source is None and not section.options:
        raise InputError("model: give model.pretrained (weights to start from) or model.options (the keys of a config.json)")
    config = {**(pretrained.read_config(source) if source else {"model_type": "llama"}), **section.options}
    with torch.device("meta"):
        return decoder.Decoder(decoder.read_config(config, source.shown if source else "model.options")), config


def _adapt(model: nn.Module, recipe: Recipe) -> Change:
    section = recipe.adapt
    if isinstance(section, Lora):
        return lora.apply(model, section)
    if isinstance(section, Partial):
        return partial_tuning.apply(model, section)
    return full.apply(model, section)


def choose_device(name: str) -> torch.device:
    """``auto`` is the accelerator that torch finds, else the CPU."""
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"run.device: {name!r} is no device; use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"run.device: {name!r}, but torch finds no CUDA device here; use auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"run.device: {name!r}, but torch finds no Metal device here; use auto or cpu")
    return device


def load_model(recipe: Recipe) -> Built:
    """The model of a recipe with its values, for use alone: nothing learns, everything is stored in the compute dtype."""
    built = assemble_model(recipe, frozen=True)
    materialise(built, recipe)
    built.model.eval()
    return built


def materialise(built: Built, recipe: Recipe) -> None:
    """Give every parameter its values: the weights', the seed's for what they lack, those of an adapter to go on from."""
    model, device = built.model, built.device
    if built.source is not None:
        report = pretrained.load_into(
            model, pretrained.open_weights(built.source), match=recipe.model.match, device=device, ignore=lora.is_factor
        )
        built.changes.insert(0, Change("pretrained", report.describe()))
    unmade = pretrained.allocate(model, device)
    model.to(device)
    generator = torch.Generator(device).manual_seed(recipe.run.seed)
    if isinstance(model, decoder.Decoder):
        model.initialize({name for name in unmade if not lora.is_factor(name)}, generator)
    lora.initialize(model, generator)
    start = getattr(recipe.adapt, "start", None)
    if start is not None:
        load = lora.load if isinstance(recipe.adapt, Lora) else partial_tuning.load
        load(model, Path(start), pretrained.fingerprint(built.source) if built.source else None)


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Whether this run compiles: as it says, or where a compiler is found."""
    if recipe.run.compile == "auto":
        return device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None
    return recipe.run.compile == "on"


def compile_blocks(built: Built, recipe: Recipe) -> Change:
    """Compile the forward of each block; equal blocks share one graph. The module and its names stay."""
    if not compiles(recipe, built.device):
        reason = "no C++ compiler found" if recipe.run.compile == "auto" else "run.compile is off"
        return Change("compile", f"not compiled: {reason}")
    blocks = built.model.blocks() if isinstance(built.model, decoder.Decoder) else [built.model]
    # torch warns of a CUDA toolkit without a GPU, which is no news to who trains on the CPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for block in blocks:
        block.forward = torch.compile(block.forward)
    return Change("compile", f"{len(blocks)} block{'s' * (len(blocks) > 1)} compiled; equal ones share one graph")
