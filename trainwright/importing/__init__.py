"""Recipes out of other tools' files: ``read.read`` reads them, ``render.render`` writes the recipe with its findings."""
