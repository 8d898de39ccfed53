"""Read this first: the one place where a recipe becomes a program.

``assemble`` lists what is applied, in its order. train, evaluate, inspect and generate all come here; what only text needs
stands in ``language``.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainwright import ema, language, optim, runfolder, schedules
from trainwright.adapt import full, lora, norms
from trainwright.adapt import partial as partial_tuning
from trainwright.built import Built, Part, Shape
from trainwright.data import text
from trainwright.loop import Batch, Run, accumulate
from trainwright.memory import layout, precision
from trainwright.models import catalogue, decoder, init, pretrained, user
from trainwright.models.contract import Change
from trainwright.predictor import Predictor
from trainwright.recipe import Init, InputError, Lora, Partial, Recipe, TextData, nearest

Progress = Callable[[str, int], None]


def assemble(
    recipe: Recipe,
    *,
    splits: text.TextSplits | None = None,
    progress: Progress = lambda what, done: None,
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
    if isinstance(recipe.data, TextData):
        built = assemble_model(recipe)
        documents = language.prepare(recipe, built, splits, progress)
        fill(built, recipe)
        part = language.join(recipe, built, documents, compiles(recipe, built))
    else:
        from trainwright import supervised  # NOTE: here, because text needn't wait for the libraries of images and metrics

        samples = supervised.prepare(recipe, progress)
        built = assemble_model(recipe, samples.shape)
        fill(built, recipe)
        part = supervised.join(recipe, built, samples)
    return _program(recipe, built, part)


def _program(recipe: Recipe, built: Built, part: Part) -> Run:
    """Model and data with all that makes steps of them."""
    _check_chosen(recipe, part)
    per_epoch = part.batches.steps_per_epoch
    steps = recipe.training.steps or max(1, round((recipe.training.epochs or 1) * per_epoch))
    groups = optim.parameter_groups(built.model.named_parameters(), recipe.optimizer)
    optimizer = optim.make_optimizer(groups, recipe.optimizer)
    trained = [p for p in built.model.parameters() if p.requires_grad]
    average = ema.Average(built.model, recipe.training.ema) if recipe.training.ema else None
    if average:
        optimizer.register_step_post_hook(average.update)

    def objective(batch: Batch) -> Tensor:
        return part.sums(part.forward(built.model, batch, None), batch)

    def measure(batches: Iterable[Batch], progress: Callable[[int], None]) -> dict[str, float]:
        return part.measure(((batch, part.forward(built.model, batch, None)) for batch in batches), progress)

    return Run(
        recipe=recipe,
        model=built.model,
        changes=built.changes,
        device=built.device,
        optimizer=optimizer,
        factor=schedules.factor(recipe.schedule, steps),
        steps=steps,
        steps_per_epoch=per_epoch,
        batch=part.batches.batch,
        identity=part.batches.identity,
        forward_backward=partial(accumulate, objective, part.count),
        clip=partial(optim.clip_, trained, recipe.training.clip_norm),
        splits=part.splits,
        measure=measure,
        flops=part.flops,
        save=part.save,
        compute_dtype=built.compute_dtype,
        samples=part.samples,
        pictures=part.pictures,
        unit=part.unit,
        fingerprint=part.fingerprint,
        notes=part.notes,
        averaged=average.swapped if average else nullcontext,
        extra=average,
    )


def _check_chosen(recipe: Recipe, part: Part) -> None:
    """What chooses the best, or when to stop, must be measured."""
    for key in ("best", "stop"):
        chosen = getattr(recipe.evaluation, key)
        if chosen and chosen.metric not in part.measures:
            raise InputError(
                f"evaluation.{key}.metric: {chosen.metric!r} isn't measured{nearest(chosen.metric, part.measures)}; "
                f"measured are {', '.join(part.measures)}; see the key metrics"
            )


def assemble_model(recipe: Recipe, shape: Shape | None = None, *, frozen: bool = False) -> Built:
    """The model with its techniques applied, in their order; one of ours still on the meta device, without values.

    Args:
        shape: what the data asks for; a decoder needs none.
        frozen: nothing will learn, so that everything may be stored in the compute dtype.
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
    return Built(model, changes, config, source, kind, place)


def _wished_precision(recipe: Recipe, shape: Shape | None) -> Literal["auto", "fp32", "bf16"]:
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
    materialise(built, recipe)
    built.changes.append(layout.apply(built.model))
    built.model.eval()
    return built


def fill(built: Built, recipe: Recipe) -> None:
    """Values, then what needs them to be there."""
    materialise(built, recipe)
    built.changes.append(layout.apply(built.model))
    built.changes.append(compile_blocks(built, recipe))


def materialise(built: Built, recipe: Recipe) -> None:
    """Give every parameter its values: the weights', the seed's for what they lack, those of an adapter to go on from."""
    model, device, seed = built.model, built.device, recipe.run.seed
    kept: set[str] = set()
    if built.source is not None:
        report = pretrained.load_into(
            model, pretrained.open_weights(built.source), match=recipe.model.match, device=device, ignore=lora.is_factor
        )
        built.changes.insert(0, Change("pretrained", report.describe()))
        kept = set(report.matched)
    # A user's module brings its own values.
    made = {name for name, p in model.named_parameters() if not (p.is_meta or lora.is_factor(name))}
    unmade = {name for name in pretrained.allocate(model, device) if not lora.is_factor(name)}
    model.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    if isinstance(model, decoder.Decoder):
        model.initialize(unmade, generator)
        unmade = unmade if recipe.model.init != Init() else set()
    elif recipe.model.init != Init():
        unmade |= made - kept
    if unmade or recipe.model.init != Init():
        built.changes.append(init.initialize(model, recipe.model.init, unmade, seed))
    lora.initialize(model, generator)
    start = getattr(recipe.adapt, "start", None)
    if start is not None:
        load = lora.load if isinstance(recipe.adapt, Lora) else partial_tuning.load
        load(model, Path(start), pretrained.fingerprint(built.source) if built.source else None)


def compiles(recipe: Recipe, built: Built) -> bool:
    """Whether this run compiles: as it says; else language models, where a compiler is found."""
    if recipe.run.compile == "auto":
        if not isinstance(recipe.data, TextData):
            return False
        return built.device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None
    return recipe.run.compile == "on"


def compile_blocks(built: Built, recipe: Recipe) -> Change:
    """Compile the forward of each block; equal blocks share one graph. The module and its names stay."""
    if not compiles(recipe, built):
        text = isinstance(recipe.data, TextData)
        auto = "no C++ compiler found" if text else "it takes longer than it saves; run.compile: on does it all the same"
        return Change("compile", f"not compiled: {auto if recipe.run.compile == 'auto' else 'run.compile is off'}")
    blocks = built.model.blocks() if isinstance(built.model, decoder.Decoder) else [built.model]
    # torch warns of a CUDA toolkit without a GPU, which is no news to who trains on the CPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for block in blocks:
        block.forward = torch.compile(block.forward)
    return Change("compile", f"{len(blocks)} block{'s' * (len(blocks) > 1)} compiled; equal ones share one graph")
