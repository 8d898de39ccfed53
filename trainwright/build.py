"""Read this first: the one place where a recipe becomes a program.

``assemble`` lists what is applied, in its order. train, evaluate, inspect and generate all come here; what only text needs
stands in ``language``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainwright import ema, filling, language, runfolder, schedules, spread, steps
from trainwright.adapt import full, lora, norms
from trainwright.adapt import partial as partial_tuning
from trainwright.built import Built, Part, Shape
from trainwright.data import text
from trainwright.loop import Extra, Run, Sample, finite
from trainwright.memory import layout, precision, scaling
from trainwright.models import catalogue, decoder, pretrained, user
from trainwright.models.contract import Change
from trainwright.parallel import collectives
from trainwright.parallel.mesh import Mesh, join
from trainwright.predictor import Predictor
from trainwright.recipe import InputError, Lora, Partial, Recipe, TextData, nearest
from trainwright.state import Places
from trainwright.steps import Steps

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Rehearsal:
    """How a program is built without values: what real data are prepared in, and what stands in for ``torch.compile``."""

    real: Callable[[], AbstractContextManager[object]]
    compiler: filling.Compiler


def assemble(
    recipe: Recipe,
    *,
    splits: text.TextSplits | None = None,
    progress: Progress = lambda what, done: None,
    rehearsal: Rehearsal | None = None,
    mesh: Mesh | None = None,
) -> Run:
    """The whole program of a recipe.

    Args:
        splits: documents already tokenised, instead of those that ``recipe.data`` names.
        progress: called with what is being prepared and how much of it is done.
        rehearsal: builds all but the data of tensors without values.
        mesh: what ``place`` gave, for a second program in the same groups.

    Raises:
        InputError: a setting that is wrong, or has no effect, with these data and this model.
    """
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    real, compiler = (rehearsal.real, rehearsal.compiler) if rehearsal else (nullcontext, None)
    if isinstance(recipe.data, TextData):
        with real():
            mesh = mesh or place(recipe)
        built = assemble_model(recipe, mesh=mesh)
        with real(), collectives.in_turn(built.device):  # the first process fills the cache
            documents = language.prepare(recipe, built, splits, progress)
        places = filling.fill(built, recipe, compiler)
        part = language.join(recipe, built, documents, filling.compiler_of(recipe, built, compiler))
    else:
        from trainwright import supervised  # NOTE: here, because text needn't wait for the libraries of images and metrics

        with real():
            samples = supervised.prepare(recipe, progress)
            mesh = mesh or place(recipe)
        built = assemble_model(recipe, samples.shape, mesh=mesh)
        places = filling.fill(built, recipe, compiler)
        part = supervised.join(recipe, built, samples)
    return _program(recipe, built, part, places)


def place(recipe: Recipe) -> Mesh:
    """This process's place among those that run the recipe, in groups that are made anew.

    Raises:
        InputError: they are more or fewer than the recipe says, or can't share its batches.
    """
    joined = join(recipe.parallel, choose_device(recipe.run.device))
    spread.check(recipe, joined)
    return joined


def _program(recipe: Recipe, built: Built, part: Part, places: Places) -> Run:
    """Model and data with all that makes steps of them."""
    _check_chosen(recipe, part)
    per_epoch = part.batches.steps_per_epoch
    count = recipe.training.steps or max(1, round((recipe.training.epochs or 1) * per_epoch))
    average = ema.Average(built.model, recipe.training.ema) if recipe.training.ema else None
    scaler = scaling.Scaler(built.device) if built.precision == "fp16" else None
    if scaler:
        part = replace(part, count=scaler.count(part.count))
        built.changes.append(scaling.described())
    extra = scaling.together(average, scaler)
    taken = _way(recipe, built)(recipe, built, part, places, extra)
    forward_backward = taken.forward_backward
    if scaler:
        forward_backward = scaler.forward_backward(forward_backward, places.sharing.named)
    if average:
        taken.optimizer.register_step_post_hook(average.update)
    where, alone = built.mesh, built.mesh.size == 1
    return Run(
        recipe=recipe,
        model=built.model,
        changes=built.changes,
        device=built.device,
        optimizer=taken.optimizer,
        factor=schedules.factor(recipe.schedule, count),
        steps=count,
        steps_per_epoch=per_epoch,
        batch=part.batches.batch,
        identity=part.batches.identity,
        forward_backward=forward_backward,
        clip=taken.clip,
        splits=part.splits,
        measure=taken.measure,
        flops=part.flops if alone else None,
        save=lambda folder: part.save(taken.weights(), folder),
        gradients=taken.gradients,
        weights=taken.weights,
        remember=taken.remember,
        recall=taken.recall,
        compute_dtype=built.compute_dtype,
        samples=_answering(recipe, built, part, places),
        pictures=part.pictures,
        unit=part.unit,
        fingerprint=part.fingerprint,
        notes=part.notes,
        averaged=average.swapped if average else nullcontext,
        extra=extra,
        judge=scaler.judge if scaler else finite,
        rank=where.rank,
        share=partial(collectives.gather_json, device=built.device),
        agree=spread.agreeing(where, built.device),
        together=spread.adding(where.data, built.device),
        stream=where.pipeline.index * where.data.size + where.data.index,
    )


def _answering(recipe: Recipe, built: Built, part: Part, places: Places) -> Callable[[int], list[Sample]] | None:
    """Answers to held-out prompts, where every process can walk through the whole model by itself."""
    answer = part.samples
    if answer is None or built.division.split is not None or recipe.parallel.engine == "deepspeed":
        return None

    def samples(count: int) -> list[Sample]:
        try:
            return answer(count)
        finally:
            places.sharing.rest()

    return samples


def _way(recipe: Recipe, built: Built) -> Callable[[Recipe, Built, Part, Places, Extra | None], Steps]:
    """How the processes take their steps."""
    if recipe.parallel.engine == "deepspeed":
        from trainwright.steps_deepspeed import by_deepspeed  # NOTE: here, because it is an extra

        return by_deepspeed
    return steps.pipelined if built.division.split else steps.sharing_data


def _check_chosen(recipe: Recipe, part: Part) -> None:
    """What chooses the best, or when to stop, must be measured."""
    for key in ("best", "stop"):
        chosen = getattr(recipe.evaluation, key)
        if chosen and chosen.metric not in part.measures:
            raise InputError(
                f"evaluation.{key}.metric: {chosen.metric!r} isn't measured{nearest(chosen.metric, part.measures)}; "
                f"measured are {', '.join(part.measures)}; see the key metrics"
            )


def assemble_model(recipe: Recipe, shape: Shape | None = None, *, frozen: bool = False, mesh: Mesh | None = None) -> Built:
    """The model with its techniques applied, in their order; one of ours still on the meta device, without values.

    Args:
        shape: what the data asks for; a decoder needs none.
        frozen: nothing will learn, so that everything may be stored in the compute dtype.
        mesh: the processes that share it; of the model only this one's part is left.
    """
    place = choose_device(recipe.run.device)
    source = pretrained.locate(recipe.model.pretrained) if recipe.model.pretrained else None
    model, config = _make(recipe, source, shape)
    kind = precision.choose(_wished_precision(recipe, shape), place)
    changes = [_adapt(model, recipe)]  # which parameters learn; new ones (LoRA) appear here
    if frozen:
        model.requires_grad_(False)
    if held := norms.hold_frozen(model):
        changes.append(held)
    changes.append(precision.apply(model, kind))  # after it, because frozen parameters are stored in less
    division, more = spread.divide(model, recipe, mesh or Mesh())
    return Built(model, [*changes, *more], config, source, kind, place, mesh or Mesh(), division)


def _wished_precision(recipe: Recipe, shape: Shape | None) -> precision.Wished:
    """Numbers as answers would lose digits in bf16, and models of tables are too small to gain from it."""
    digits = shape is not None and (shape.task.kind == "values" or recipe.data.kind == "table")
    return "fp32" if recipe.precision == "auto" and digits else recipe.precision


def _make(recipe: Recipe, source: pretrained.Source | None, shape: Shape | None) -> tuple[nn.Module, dict[str, Any]]:
    """The plain model and its config.json; ours on the meta device, a user's module where it makes itself."""
    section = recipe.model
    if section.architecture in catalogue.NAMES:
        if shape is None:
            raise InputError(f"model.architecture: {section.architecture} is no language model")
        with torch.device("meta"):
            return catalogue.make(section.architecture, section.options, shape.inputs, shape.task), {}
    if section.architecture != "decoder":
        inputs, outputs = (shape.inputs, shape.task.outputs) if shape else (None, None)
        return user.make(section.architecture, section.options, recipe.run.seed, inputs=inputs, outputs=outputs), {}
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


def shape_of(recipe: Recipe) -> Shape | None:
    """What the data asks of the model; reads the data, unless it is text."""
    if isinstance(recipe.data, TextData):
        return None
    from trainwright import supervised

    return supervised.prepare(recipe, lambda what, done: None).shape


def saved_shape(folder: Path, recipe: Recipe) -> Shape | None:
    """The same from what a finished run saved beside its weights."""
    if isinstance(recipe.data, TextData):
        return None
    from trainwright import supervised

    preparation, task = supervised.read_saved(runfolder.model_of(folder))
    return Shape(preparation.shape, task)


def load_predictor(folder: Path) -> Predictor:
    """What a finished run of samples makes of new ones.

    Raises:
        InputError: the run hasn't finished, or is one of a language model.
    """
    recipe = runfolder.finished(folder)
    if isinstance(recipe.data, TextData):
        raise InputError(f"{folder} is the run of a language model; ask it with: trainwright generate {folder}")
    from trainwright import supervised

    preparation, task = supervised.read_saved(runfolder.model_of(folder))
    built = load_model(recipe, Shape(preparation.shape, task))
    return supervised.predictor(built, preparation, task)


def load_model(recipe: Recipe, shape: Shape | None = None) -> Built:
    """The model of a recipe with its values, for use alone: nothing learns, everything is stored in the compute dtype."""
    built = assemble_model(recipe, shape, frozen=True)
    filling.materialise(built, recipe, pretrained.blank(built.model))
    built.changes.append(layout.apply(built.model))
    built.model.eval()
    return built
