"""Every recipe that is shipped can be read, and builds its model."""

from pathlib import Path

import pytest

from trainwright import build
from trainwright.data.builtin_images import FASHION_FOLDER
from trainwright.recipe.file import load

RECIPES = sorted(Path(__file__).parents[1].glob("recipes/*.yaml"))


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_its_model(path):
    recipe = load(path)
    assert recipe.run.folder == f"runs/{path.stem}"
    if recipe.data.kind == "images" and recipe.data.source == "fashion-mnist" and not FASHION_FOLDER.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist isn't installed")
    built = build.assemble_model(recipe, build.shape_of(recipe))
    assert any(p.requires_grad for p in built.model.parameters())
    assert all(p.is_meta for p in built.model.parameters()), "a model must cost nothing before it is loaded"
