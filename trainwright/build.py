"""Read this first: the one place where a recipe becomes a program.

``assemble`` lists the techniques in the order in which they are applied. train, evaluate, inspect and generate all come here.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainwright import losses, metrics, optim
from trainwright.adapt import full, lora
from trainwright.adapt import partial as partial_tuning
from trainwright.data import loader, packing, text
from trainwright.loop import Run, accumulate
from trainwright.memory import precision
from trainwright.models import decoder, pretrained
from trainwright.models.contract import Change
from trainwright.recipe import InputError, Lora, Partial, Recipe, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192, "mps": 4096}  # enough for efficient products on each


@dataclass(frozen=True)
class Built:
    """A model with its techniques applied, and where it came from."""

    model: nn.Module
    changes: list[Change]
    config: dict[str, Any]
    source: pretrained.Source | None
    precision: precision.Precision
    device: torch.device


def assemble(recipe: Recipe, *, progress: Callable[[str, int], None] = lambda what, done: None) -> Run:
    """The whole program of a recipe.

    Args:
        progress: called with what is being prepared and how much of it is done.

    Raises:
        InputError: a setting that is wrong, or has no effect, with these data and this model.
    """
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    built = assemble_model(recipe)
    tokenizer = find_tokenizer(recipe, built.source)
    splits = text.prepare(
        recipe.data,
        tokenizer,
        model_length=built.config.get("max_position_embeddings"),
        seed=recipe.run.seed,
        progress=partial(progress, "tokenised"),
    )
    _check_packing(recipe, built.model)
    batches = _loader(recipe, splits.train, tokenizer, built.device)
    steps = recipe.training.steps or max(1, round((recipe.training.epochs or 1) * batches.steps_per_epoch))
    rate = optim.schedule(recipe.schedule, recipe.optimizer.learning_rate, steps)
    materialise(built, recipe)
    compiled = compile_blocks(built, recipe)
    groups = optim.parameter_groups(built.model.named_parameters(), recipe.optimizer.weight_decay)
    trained = [p for p in built.model.parameters() if p.requires_grad]
    objective = text_objective(built, recipe)
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
        held_out=_held_out(recipe, splits.held_out, batches),
        metrics=metrics.language_model,
        facts={"built": built, "tokenizer": tokenizer, "splits": splits, "steps_per_epoch": batches.steps_per_epoch},
    )
