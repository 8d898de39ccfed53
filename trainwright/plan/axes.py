"""The combinations of techniques that a sweep tries, as keys of a recipe that are changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from trainwright.recipe import Lora, Recipe, TextData

Keys = dict[str, Any]
MOST = 600  # combinations, without those of where the optimizer's states are


def combinations(recipe: Recipe, count: int) -> Iterator[Keys]:
    """Keys of the recipe that are changed: all, or where they are more, ``MOST`` of them from everywhere."""
    shapes = [{**shape, **rows} for shape in _shapes(recipe, count) for rows in _micro_batches(recipe, shape["parallel.data"])]
    axes = [_precisions(), _methods(recipe), shapes, _checkpointings()]
    grid = [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*axes)]
    yield from (grid[place * len(grid) // MOST] for place in range(MOST)) if len(grid) > MOST else grid


def _precisions() -> list[Keys]:
    return [{"precision": name} for name in ("fp32", "bf16", "pure_bf16")]


def _methods(recipe: Recipe) -> list[Keys]:
    if not isinstance(recipe.data, TextData):
        return [{}]
    if isinstance(recipe.adapt, Lora):
        return [{}, {"adapt": {"method": "full"}}]
    return [{}, {"adapt": {"method": "lora", "rank": 16}}]


def _checkpointings() -> list[Keys]:
    modes: list[Keys] = [{"memory.checkpointing": name} for name in ("none", "selective", "full", "offload")]
    return [*modes, {"memory.checkpointing": "full", "memory.every": 2}]


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


def _micro_batches(recipe: Recipe, data: int) -> list[Keys]:
    """Rows at once of each data rank's part; no key where the ranks can't share the batch, which is told as refused."""
    part = recipe.training.batch_size // data
    return [{"training.micro_batch_size": n} for n in (1, 2, 4, 8, 16, 32, 64) if part and part % n == 0] or [{}]
