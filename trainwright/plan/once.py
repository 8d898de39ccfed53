"""Data and tokenizers that several rehearsals share: prepared once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from trainwright import language, supervised
from trainwright.built import Built
from trainwright.recipe import Recipe


@contextmanager
def prepared_once() -> Iterator[None]:
    """While recipes with the same section ``data`` get the same data."""
    if getattr(language.prepare, "known", None) is not None:  # within another one
        yield
        return
    known: dict[str, Any] = {}
    plain_text, plain_samples = language.prepare, supervised.prepare

    def text(recipe: Recipe, built: Built, splits: Any, progress: Any) -> language.Data:
        key = _key(recipe)
        if key not in known:
            known[key] = plain_text(recipe, built, splits, progress)
        language.check_packing(recipe, built.model)
        return known[key]

    def samples(recipe: Recipe, progress: Any) -> supervised.Data:
        key = _key(recipe)
        if key not in known:
            known[key] = plain_samples(recipe, progress)
        return known[key]

    text.known = known  # type: ignore[attr-defined]
    with mock.patch.object(language, "prepare", text), mock.patch.object(supervised, "prepare", samples):
        yield


def _key(recipe: Recipe) -> str:
    return f"{recipe.data.model_dump_json()} {recipe.loss.model_dump_json()} {recipe.model.tokenizer} {recipe.run.seed}"
