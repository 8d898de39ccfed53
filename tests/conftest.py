"""Fixtures that several folders of tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of SmolLM2-135M-Instruct, with its chat template, read from the GGUF file."""
    from trainwright.models.pretrained import load_tokenizer, locate

    return load_tokenizer(locate("smollm2-135m"))
