"""Recipes for tiny models of images, tables and series: what tests train in a second."""

from pathlib import Path

import numpy as np
from PIL import Image

from trainwright.recipe import Recipe
from trainwright.recipe.file import parse


def mapping(tmp: Path, **changes) -> dict:
    """A digits MLP on the CPU in float32; changes are dotted keys with __ for the dot."""
    whole: dict = {
        "model": {"architecture": "mlp", "options": {"hidden": [16]}},
        "data": {"kind": "images", "source": "digits", "limit": 200, "held_out": 0.2},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"name": "linear", "warmup": 0},
        "precision": "fp32",
        "training": {"steps": 6, "batch_size": 32},
        "tracking": {"tensorboard": False},
        "run": {"folder": str(tmp / "run"), "device": "cpu"},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        section = whole
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return whole


def recipe(tmp: Path, **changes) -> Recipe:
    """``mapping`` as a recipe."""
    return parse(mapping(tmp, **changes))


def image_folder(folder: Path, *, classes: int = 3, each: int = 8, size: int = 12, colour: bool = True) -> Path:
    """A folder a class with noisy pictures, brighter the later the class."""
    random = np.random.default_rng(0)
    for label in range(classes):
        home = folder / f"class{label}"
        home.mkdir(parents=True)
        for number in range(each):
            shape = (size, size, 3) if colour else (size, size)
            pixels = random.integers(0, 120, shape) + 60 * label
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(home / f"{number}.png")
    return folder
