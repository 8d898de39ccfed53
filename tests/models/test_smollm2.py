"""The real SmolLM2-135M from its GGUF file: weights, configuration and logits as transformers gives them, in float32."""

import pytest
import torch
from transformers import GgufConfig, LlamaConfig, LlamaForCausalLM

from trainwright import build
from trainwright.models.gguf import GGUFWeights
from trainwright.models.source import locate
from trainwright.recipe.file import parse


@pytest.fixture(scope="module")
def theirs():
    """Once: transformers needs many seconds to dequantize it."""
    path = locate("smollm2-135m").path
    options = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    return LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options).eval()


def test_weights_and_configuration_equal_transformers(theirs):
    weights = GGUFWeights(locate("smollm2-135m").path)
    assert {*weights.names(), "lm_head.weight"} == set(theirs.state_dict())
    for name in weights.names():
        assert torch.equal(weights.load(name, torch.float32), theirs.get_parameter(name)), name
    config = LlamaConfig(**weights.config())
    for key in ("vocab_size", "hidden_size", "head_dim", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(config, key) == getattr(theirs.config, key), key
    assert config.rope_parameters["rope_theta"] == theirs.config.rope_parameters["rope_theta"] == 100000.0


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
