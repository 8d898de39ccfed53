"""Gives a model that was divided its values, and what needs them: layout, statistics, compiling, what data ranks share."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainwright import frozen, spread
from trainwright.adapt import lora
from trainwright.adapt import partial as partial_tuning
from trainwright.built import Built
from trainwright.memory import checkpointing, heap, layout, precision
from trainwright.models import decoder, init, pretrained
from trainwright.models.contract import Change
from trainwright.parallel import sharing
from trainwright.pieces import local
from trainwright.recipe import Init, InputError, Lora, Recipe, TextData
from trainwright.state import Places

Compiler = Callable[[Any], Any]  # of a forward
RECOMPILE_LIMIT = 64  # blocks of several shapes share code, and beyond the limit torch runs them uncompiled without a word


def fill(built: Built, recipe: Recipe, compiler: Compiler | None = None) -> Places:
    """Values for what this process has of the model, then what needs them to be there; with another compiler memory alone."""
    model, device, values = built.model, built.device, compiler is None
    blank = pretrained.blank(model)
    ours = recipe.parallel.engine == "torch"
    if device.type == "cpu":
        layout.thin(model)  # before the layers of a block are shared
    early = spread.share(model, recipe, built.mesh, device) if recipe.parallel.zero == 3 and ours else None
    _mark(model, blank)
    places = Places(built.mesh, early or sharing.alone(model), built.division.pieces, built.division.copies)
    if values:
        here = (precision.slow(built.precision, device), heap.use(recipe.run.allocator, device))
        built.changes.extend(change for change in here if change)
        materialise(built, recipe, blank, places)
    else:
        frozen.hold(built, recipe)
        pretrained.allocate(model, device)
    if early is None and ours:  # parts of divided parameters stay contiguous
        built.changes.append(layout.apply(model))
    built.changes.extend(spread.join_statistics(model, built.mesh))
    if recipe.run.kernels == "off":
        built.changes.append(_plain_operations(model))
    built.changes.extend(checkpointing.apply(model, recipe.memory, device, recipe.parallel, values=values))
    _check_compiled(built, recipe)
    built.changes.append(compile_blocks(built, recipe, torch.compile if compiler is None else compiler))
    shared = early or (spread.share(model, recipe, built.mesh, device) if ours else sharing.alone(model))
    built.changes.extend(spread.described(recipe, built.mesh))
    return dataclasses.replace(places, sharing=shared)


@torch.no_grad()
def _mark(model: nn.Module, blank: set[str]) -> None:
    """Fill memory that has no values with NaN: what is forgotten must not look like a weight."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in blank and not tensor.is_meta and tensor.is_floating_point():
            local(tensor).fill_(torch.nan)


def materialise(built: Built, recipe: Recipe, blank: set[str], places: Places | None = None) -> None:
    """Give every parameter its values: the weights', the seed's for what they lack, those of an adapter to go on from.

    Args:
        blank: the parameters and buffers that have none.
        places: which part of the whole model is here.
    """
    model, device, seed, division = built.model, built.device, recipe.run.seed, built.division
    boxes = places.boxes(model) if places else {}
    held = frozen.hold(built, recipe)
    made = {name for name, _ in model.named_parameters() if not lora.is_factor(name)} - blank  # a user's module starts itself
    kept: set[str] = set()
    if built.source is not None:
        report = pretrained.load_into(
            model,
            pretrained.open_weights(built.source),
            match=recipe.model.match,
            device=device,
            ignore=lambda name: lora.is_factor(name) or name in held.inner,
            pieces=division.pieces,
            aliases=division.copies,
            absent=division.absent(model),
            instead=held.instead,
        )
        built.changes.insert(0, Change("pretrained", report.describe()))
        built.changes.extend(held.changes())
        kept = set(report.matched)
    pretrained.allocate(model, device)
    model.to(device)
    unmade = {name for name in blank - kept if not lora.is_factor(name)}
    if recipe.model.init != Init():
        unmade |= made - kept
    if unmade or recipe.model.init != Init():
        built.changes.append(init.initialize(model, recipe.model.init, unmade, seed, boxes, division.copies))
    lora.initialize(model, seed, boxes)
    start = getattr(recipe.adapt, "start", None)
    if start is not None:
        load = lora.load if isinstance(recipe.adapt, Lora) else partial_tuning.load
        base = pretrained.fingerprint(built.source) if built.source else None
        load(model, Path(start), base, boxes, division.absent(model))


def _plain_operations(model: nn.Module) -> Change:
    """Compute by PyTorch's own operations.

    Raises:
        InputError: there is nothing else.
    """
    if not isinstance(model, decoder.Decoder):
        raise InputError("run.kernels: off has no effect: only decoders have kernels of our own; leave it out")
    model.without_kernels()
    return Change("kernels", "off: attention and loss by PyTorch's plain operations")


def _check_compiled(built: Built, recipe: Recipe) -> None:
    """Raises InputError where a graph that computes a block again would also take its statistics again."""
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in built.model.modules())
    if norms and recipe.memory.checkpointing != "none" and compiles(recipe, built):
        raise InputError(
            f"memory.checkpointing: {recipe.memory.checkpointing} of a compiled model with BatchNorm would take its statistics "
            "twice; set run.compile: off, or checkpointing: none"
        )


def compiles(recipe: Recipe, built: Built) -> bool:
    """Whether this run compiles: as it says; else language models, where a compiler is found."""
    if recipe.run.compile == "auto":
        if not isinstance(recipe.data, TextData):
            return False
        return built.device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None
    return recipe.run.compile == "on"


def compiler_of(recipe: Recipe, built: Built, other: Compiler | None) -> Compiler | None:
    """What compiles functions for tensors of any size, if anything is compiled."""
    if not compiles(recipe, built):
        return None
    return partial(torch.compile, dynamic=True) if other is None else other


def compile_blocks(built: Built, recipe: Recipe, compiler: Compiler) -> Change:
    """Compile the forward of each block; equal blocks share one graph. The module and its names stay."""
    if not compiles(recipe, built):
        text = isinstance(recipe.data, TextData)
        auto = "no C++ compiler found" if text else "it takes longer than it saves; run.compile: on does it all the same"
        return Change("compile", f"not compiled: {auto if recipe.run.compile == 'auto' else 'run.compile is off'}")
    blocks = built.model.blocks() if isinstance(built.model, decoder.Decoder) else [built.model]
    # torch warns of a CUDA toolkit without a GPU, which is no news to who trains on the CPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    for block in blocks:
        block.forward = compiler(block.forward)
    return Change("compile", f"{len(blocks)} block{'s' * (len(blocks) > 1)} compiled; equal ones share one graph")
