"""A user's own module trains, is saved and comes back; it starts from what matches of an existing model, and says so."""

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from trainwright import build, evaluation, fit, loop
from trainwright.recipe import InputError

BAG = {"model__architecture": "tests.userland:Bag", "data__packing": False, "adapt__method": "full"}


def bag(tmp_path, **changes):
    tiny.model(tmp_path / "base")
    return tiny.recipe(tmp_path, **BAG, model__pretrained=None, model__tokenizer=str(tmp_path / "base"), **changes)


def test_trains_saves_and_comes_back(tmp_path):
    result = fit.train(bag(tmp_path, model__options={"size": 24}, training__steps=10), quiet=True)
    after = result["held_out"]["after"]["loss"]
    assert after < result["held_out"]["before"]["loss"]
    assert evaluation.evaluate(tmp_path / "run", quiet=True)["held_out"]["loss"] == pytest.approx(after, rel=1e-6)


def test_lora_on_it(tmp_path):
    recipe = bag(tmp_path, training__steps=10)
    recipe = recipe.model_copy(update={"adapt": tiny.recipe(tmp_path, adapt__method="lora").adapt})
    run = build.assemble(recipe)
    losses = [step.loss for step in loop.train(run)]
    assert losses[-1] < losses[0]
    assert {n for n, p in run.model.named_parameters() if p.requires_grad} == {"out.lora_A", "out.lora_B"}


def test_packing_is_refused_where_it_would_leak(tmp_path):
    recipe = bag(tmp_path)
    with pytest.raises(InputError, match=r"data\.packing"):
        build.assemble(recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": True})}))


def test_starts_from_what_matches_and_says_what_is_new(tmp_path):
    recipe = tiny.recipe(tmp_path, model__architecture="tests.userland:Packed", model__match="overlap")
    run = build.assemble(recipe)
    told = run.changes[0].summary
    assert "1 of 3" in told
    assert "mix.weight" in told
    assert "model.layers.0.self_attn.q_proj.weight" in told
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert torch.equal(run.model.model.embed_tokens.weight, base["model.embed_tokens.weight"])
    losses = [step.loss for step in loop.train(run)]
    assert losses[-1] < losses[0]


def test_exact_refuses_what_overlap_takes(tmp_path):
    with pytest.raises(InputError, match=r"mix\.weight"):
        build.assemble(tiny.recipe(tmp_path, model__architecture="tests.userland:Packed"))


def test_a_decoder_with_another_width_keeps_what_fits(tmp_path):
    run = build.assemble(tiny.recipe(tmp_path, model__match="overlap", model__options={"intermediate_size": 48}))
    assert "mlp.gate_proj" in run.changes[0].summary
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert next(loop.train(run)).loss > 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:f", "nowhere"),
        ("tests.userland:Bug", "Bag"),
        ("tests.userland:no_module", "int"),
        ("bag", "module:function"),
    ],
)
def test_wrong_names(tmp_path, name, words):
    with pytest.raises(InputError, match=words):
        build.assemble(tiny.recipe(tmp_path, model__architecture=name))


def test_wrong_arguments(tmp_path):
    with pytest.raises(InputError, match="sizes"):
        build.assemble(bag(tmp_path, model__options={"sizes": 3}))


@pytest.mark.parametrize("adapt", [{"adapt__method": "lora"}, {"adapt__method": "partial", "adapt__train": ["*norm*"]}])
def test_a_base_from_the_seed_is_the_same_in_every_precision(tmp_path, adapt):
    tiny.model(tmp_path / "base")
    options = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    common = {"model__pretrained": None, "model__tokenizer": str(tmp_path / "base"), "model__options": options, **adapt}
    wide, narrow = (build.assemble(tiny.recipe(tmp_path, **common, precision=kind)).model for kind in ("fp32", "bf16"))
    for (name, left), right in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        assert torch.equal(left.to(right.dtype), right), name
