"""The models that a recipe names: their options, what they read, and how they are made."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import ValidationError
from torch import nn

from trainwright.models.cnn import Cnn, CnnOptions
from trainwright.models.mlp import Mlp, MlpOptions
from trainwright.models.recurrent import Recurrent, RecurrentOptions
from trainwright.models.resnet import ResNet, ResnetOptions
from trainwright.models.resnet9 import Resnet9, Resnet9Options
from trainwright.models.unet import Unet, UnetOptions
from trainwright.models.vgg import Vgg16, VggOptions
from trainwright.recipe import InputError, Section, Task, nearest
from trainwright.recipe.types import allowed, choice, shown

ANY: tuple[int, ...] = ()
IMAGES = (3,)
SEQUENCES = (2, 3)
READS = {IMAGES: "images (channels, height, width)", SEQUENCES: "sequences (time, features), or images row by row"}


@dataclass(frozen=True)
class Entry:
    """A model: the section of its options, ``make(options, inputs, outputs)``, and how many axes a sample may have."""

    options: type[Section]
    make: Callable[..., nn.Module]
    axes: tuple[int, ...]
    dense: bool = False


MODELS = {
    "mlp": Entry(MlpOptions, Mlp, ANY),
    "cnn": Entry(CnnOptions, Cnn, IMAGES),
    "vgg16": Entry(VggOptions, partial(Vgg16, norm=False), IMAGES),
    "vgg16_bn": Entry(VggOptions, partial(Vgg16, norm=True), IMAGES),
    **{name: Entry(ResnetOptions, partial(ResNet, name=name), IMAGES) for name in ("resnet18", "resnet34", "resnet50")},
    "resnet9": Entry(Resnet9Options, Resnet9, IMAGES),
    **{name: Entry(RecurrentOptions, partial(Recurrent, name=name), SEQUENCES) for name in ("rnn", "lstm", "gru")},
    "unet": Entry(UnetOptions, Unet, IMAGES, dense=True),
}
NAMES = tuple(MODELS)


def make(architecture: str, options: dict[str, Any], inputs: tuple[int, ...], task: Task) -> nn.Module:
    """The named model on torch's default device, which may be ``meta``; ``init.initialize`` gives it its published start.

    Each model has ``blocks()``: its repeated parts in order, through which ``forward`` runs.

    Args:
        inputs: one sample's shape: (channels, height, width), (time, features) or (features,).

    Returns:
        A module from (n, *inputs) float32 to (n, task.outputs), or (n, task.outputs, height, width) where the task is dense.

    Raises:
        InputError: no such model or option, a value that the option can't have, samples or a task that the model can't take.
    """
    entry = MODELS.get(architecture)
    if entry is None:
        raise InputError(
            f"model.architecture: {architecture!r} is unknown{nearest(architecture, NAMES)}; "
            f"known here: {', '.join(NAMES)}, or module:function"
        )
    section = read_options(architecture, options)
    _check_inputs(architecture, entry, inputs)
    _check_task(architecture, entry, task)
    return entry.make(section, inputs, task.outputs)


def read_options(architecture: str, options: dict[str, Any]) -> Section:
    """The options of a model of the catalogue, with its defaults.

    Raises:
        InputError: unknown keys or wrong values, all of them.
    """
    section = MODELS[architecture].options
    try:
        return section.model_validate(options)
    except ValidationError as error:
        # Items of a list, and branches of a union, complain about the same option: one line tells of it.
        lines = {fault["loc"][0]: _line(architecture, section, options, fault) for fault in error.errors(include_url=False)}
        raise InputError("\n  ".join(lines.values())) from None


def _line(architecture: str, section: type[Section], options: dict[str, Any], fault: Any) -> str:
    key = str(fault["loc"][0])
    place = f"model.options.{key}"
    known = section.model_fields
    if key not in known:
        return f"{place}: {architecture} has no such option{nearest(key, known) or '; it has ' + ', '.join(known)}"
    if fault["type"] == "value_error":  # a rule of ours, which says all there is to say
        return f"{place}: {fault['ctx']['error']}"
    field = known[key]
    literal = typing.get_origin(field.annotation) is Literal
    wanted = choice(typing.get_args(field.annotation), options[key]) if literal else allowed(Annotated[field.annotation, field])
    return f"{place}: found {shown(options[key])}; must be {wanted}"


def _check_inputs(architecture: str, entry: Entry, inputs: tuple[int, ...]) -> None:
    if entry.axes and len(inputs) not in entry.axes:
        raise InputError(
            f"model.architecture: {architecture} reads {READS[entry.axes]}; the samples of this data have the shape {inputs}; "
            f"use mlp, which reads any"
        )


def _check_task(architecture: str, entry: Entry, task: Task) -> None:
    if task.dense and not entry.dense:
        raise InputError(
            f"model.architecture: {architecture} gives one answer a sample, but the data has a target for each pixel; "
            "use unet, or a module of your own"
        )
    if entry.dense and not task.dense:
        raise InputError(
            f"model.architecture: {architecture} gives an answer for each pixel, but the data has one target a sample; "
            "use cnn or resnet18, or images with masks"
        )
