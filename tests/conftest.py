"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: workers share the cores, and threads that wait for others burn theirs
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of SmolLM2-135M-Instruct, with its chat template, read from the GGUF file."""
    from trainwright.models.pretrained import load_tokenizer, locate

    return load_tokenizer(locate("smollm2-135m"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each module's own with a Llama of 2 blocks, and data with ragged lengths."""
    from tests import tiny

    place = tmp_path_factory.mktemp("tiny")
    tiny.model(place / "base")
    tiny.pairs(place / "pairs.jsonl", 60)
    return place


@pytest.fixture
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizers take so few numbers at once that even tiny tensors come in several portions."""
    from trainwright.memory import portions

    monkeypatch.setattr(portions, "CHUNK", 1024)
