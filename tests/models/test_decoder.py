"""The decoder against transformers' LlamaForCausalLM: logits and gradients, with transformers' weights copied by name."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainwright.models.decoder import Decoder, KVCache, check_options, read_config
from trainwright.recipe import InputError

SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
KINDS = {
    "llama2": {"num_key_value_heads": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "llama3": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama3.1": {"rope_parameters": LLAMA3},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 16},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
}


@pytest.fixture(params=KINDS)
def pair(request):
    torch.manual_seed(0)
    config = LlamaConfig(**{**SMALL, **KINDS[request.param]}, attn_implementation="eager")
    theirs = LlamaForCausalLM(config).float()
    for parameter in theirs.parameters():  # biases and norms start at constants that would hide mistakes
        torch.nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0.0, 0.2)
    ours = Decoder(read_config(config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(rows=2, length=40):
    tokens = torch.randint(0, SMALL["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(length).expand(rows, length)
    return tokens, positions, torch.arange(0, rows * length + 1, length, dtype=torch.int32)


def test_logits_equal_transformers(pair):
    ours, theirs = pair
    tokens, positions, documents = inputs()
    torch.testing.assert_close(ours.logits(ours(tokens, positions, documents)), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_every_gradient_equals_transformers(pair):
    ours, theirs = pair
    tokens, positions, documents = inputs()
    weight = torch.randn(2, 40, SMALL["vocab_size"])
    (ours.logits(ours(tokens, positions, documents)) * weight).sum().backward()
    (theirs(tokens).logits * weight).sum().backward()
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(mine[name].grad / scale, parameter.grad / scale, rtol=1e-4, atol=2e-5, msg=name)


def test_packed_documents_are_separate_documents(pair):
    ours, _ = pair
    lengths = [13, 1, 26, 17, 23]
    tokens, _, _ = inputs()
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 40)
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    packed = ours(tokens, positions, offsets).flatten(0, 1)
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        alone = tokens.flatten()[start:end][None]
        n = end - start
        single = ours(alone, torch.arange(n)[None], torch.tensor([0, n], dtype=torch.int32))
        torch.testing.assert_close(packed[start:end], single[0], rtol=1e-5, atol=1e-5)


def test_cached_steps_equal_the_whole_sequence(pair):
    ours, _ = pair
    tokens, positions, documents = inputs()
    whole = ours(tokens, positions, documents)
    cache = KVCache(ours.config, 2, 40, dtype=torch.float32, device=torch.device("cpu"))
    parts = [ours.extend(part, cache) for part in tokens.split([7, 1, 1, 20, 11], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_tied_head_is_one_parameter():
    with torch.device("meta"):
        model = Decoder(read_config({**SMALL, "tie_word_embeddings": True}))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, ["gpt2", "llama"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"hidden_act": "gelu"}, ["gelu", "silu"]),
        ({"num_key_value_heads": 4}, ["6", "4"]),
        ({"rope_scaling": {"rope_type": "yarn"}}, ["yarn", "llama3"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, ["low_freq_factor"]),
        ({"attention_dropout": 0.1}, ["attention_dropout"]),
    ],
)
def test_configs_that_are_refused(change, words):
    with pytest.raises(InputError) as caught:
        read_config({**SMALL, **change})
    assert all(word in str(caught.value) for word in words)


def test_unknown_option_names_the_nearest():
    with pytest.raises(InputError, match="hidden_size"):
        check_options({"hiden_size": 3})
