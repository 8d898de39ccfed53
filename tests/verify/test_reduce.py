"""Smaller recipes keep what a technique could break on, and what can't be made small says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import small, tiny
from trainwright.models.decoder import Decoder
from trainwright.recipe import InputError
from trainwright.verify import command, facts, reduce
from trainwright.verify.command import Options

LLAMA = {
    "vocab_size": 320, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True, "attention_bias": True,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 64},
}  # fmt: skip


def reduced(tmp: Path, options: Options = Options(), **changes):  # noqa: B008
    tiny.tokenizer().save_pretrained(tmp / "tokenizer")
    model = {"pretrained": None, "options": LLAMA, "tokenizer": str(tmp / "tokenizer")}
    job = command.settled(tiny.recipe(tmp, model=model, **changes), options)
    smaller = reduce.reduce(job, facts.look(job), options.layers, options.width)
    return smaller, facts.look(smaller.job).built.model


def test_a_decoder_keeps_its_features(tmp_path):
    smaller, model = reduced(tmp_path, training__batch_size=64, training__micro_batch_size=8, parallel={"data": 2})
    assert isinstance(model, Decoder)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (2, 256, 16)
    assert (config.num_attention_heads, config.num_key_value_heads) == (16, 4)
    assert config.tie_word_embeddings
    assert config.attention_bias
    assert config.rotary.scaling is not None
    training = smaller.job.recipe.training
    assert (training.batch_size, training.micro_batch_size) == (8, 2), "two ranks, two micro-batches, two rows"
    assert "2 of 6 layers" in smaller.words
    assert "8 of 64 rows a step" in smaller.words


def test_as_small_as_asked_for(tmp_path):
    _, model = reduced(tmp_path, Options(layers=4, width=512))
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.head_dim) == (4, 512, 32)


def test_a_pipeline_keeps_blocks_for_its_stages(tmp_path):
    changes = {"training__batch_size": 16, "training__micro_batch_size": 1}
    smaller, model = reduced(tmp_path, parallel={"pipeline": 2, "schedule": "interleaved"}, **changes)
    assert model.config.num_hidden_layers == 4
    assert smaller.job.recipe.training.batch_size == 4


@pytest.mark.parametrize(
    "adapt",
    [
        {"method": "partial", "train": ["model.layers.3.mlp.*"]},
        {"method": "lora", "targets": ["model.layers.3.self_attn.*_proj"]},
        {"freeze": ["model.layers.[01].*", "model.layers.3.*"]},
    ],
)
def test_blocks_that_the_recipe_names_stay(adapt, tmp_path):
    _, model = reduced(tmp_path, adapt=adapt)
    assert model.config.num_hidden_layers == 4


def test_a_small_model_stays(tmp_path):
    job = command.settled(tiny.recipe(tmp_path), Options())
    assert "layers" not in reduce.reduce(job, facts.look(job)).words


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        (
            {"adapt": {"method": "partial", "train": ["model.layers.4.mlp.*"]}},
            Options(layers=2),
            r"--layers 2: .* because it names 'model\.layers\.4\.mlp\.\*'; pass --layers 5, or .*model\.layers\.1",
        ),
        ({}, Options(width=100), r"--width 100 isn't a multiple of 32"),
        ({"parallel": {"pipeline": 4}}, Options(layers=2), r"--layers 2: a pipeline of 4 stages needs at least 4 blocks"),
    ],
)
def test_what_cannot_be_reduced(changes, options, says, tmp_path):
    with pytest.raises(InputError, match=says):
        reduced(tmp_path, options, **changes)


def test_other_models_have_no_layers_to_leave_out(tmp_path):
    job = command.settled(small.recipe(tmp_path), Options())
    with pytest.raises(InputError, match=r"--layers: only decoders.*model\.options"):
        reduce.reduce(job, facts.look(job), layers=2)


def test_a_module_that_does_not_fit(tmp_path):
    job = command.settled(small.recipe(tmp_path, model={"architecture": "tests.verify.broken:huge"}), Options())
    with pytest.raises(InputError, match=r"broken:huge has [\d,]+ parameters.*GiB.*model\.options\.KEY=VALUE"):
        reduce.reduce(job, facts.look(job))
