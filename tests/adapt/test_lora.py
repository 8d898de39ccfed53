"""LoRA against PEFT: the same adapter gives the same logits and gradients in both, in both directions."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests import tiny
from trainwright import build, export, filling, fit, loop, saving
from trainwright.adapt import lora
from trainwright.models import pretrained
from trainwright.models.decoder import Decoder
from trainwright.recipe import InputError, Lora
from trainwright.runfolder import finished

LENGTH = 48


def shake(model):
    """Move B off zero, where it hides A."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.2)


def logits(model, tokens):
    rows, length = tokens.shape
    positions = torch.arange(length).expand(rows, length)
    return model.logits(model(tokens, positions, torch.arange(0, rows * length + 1, length, dtype=torch.int32)))


@pytest.fixture
def tokens():
    return torch.randint(0, 320, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("tied", [True, False])
def test_peft_loads_our_adapter(tmp_path, tokens, scaling, tied):
    tiny.model(tmp_path / "base", tie_word_embeddings=tied)
    recipe = tiny.recipe(tmp_path, adapt__method="lora", adapt__rank=4, adapt__alpha=6, adapt__scaling=scaling)
    run = build.assemble(recipe)
    shake(run.model)
    run.save(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    mine = logits(run.model.eval(), tokens)
    torch.testing.assert_close(theirs(tokens).logits, mine, rtol=1e-5, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert not torch.allclose(plain(tokens).logits, mine, atol=1e-2)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_pefts_adapter_and_learn_the_same(tmp_path, tokens, targets, rslora):
    tiny.model(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM")
    theirs = get_peft_model(base, config)
    shake(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    section = lora.read_section(tmp_path / "adapter")
    recipe = tiny.recipe(tmp_path).model_copy(update={"adapt": section.model_copy(update={"start": str(tmp_path / "adapter")})})
    run = build.assemble(recipe)
    mine = logits(run.model, tokens)
    other = theirs(tokens).logits
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    mine.square().mean().backward()
    other.square().mean().backward()
    grads = {n: p.grad for n, p in run.model.named_parameters() if p.requires_grad}
    stored = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(grads) == len(stored) > 0
    for name, gradient in stored.items():
        ours = grads[name.removeprefix("base_model.model.").replace(".default.weight", "")]
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_starts_as_the_base_and_the_base_is_frozen(tmp_path, tokens):
    recipe = tiny.recipe(tmp_path, adapt__method="lora")
    run = build.assemble(recipe)
    base = build.assemble(tiny.recipe(tmp_path))
    assert torch.equal(logits(run.model, tokens), logits(base.model, tokens))
    factors = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
    assert all(lora.is_factor(n) for n in factors)
    assert all((p == 0).all() == n.endswith("lora_B") for n, p in factors.items())
    for name, parameter in factors.items():
        if name.endswith("lora_A"):  # Kaiming-uniform with a = sqrt(5), as PEFT: bound 1/sqrt(in)
            bound = parameter.shape[1] ** -0.5
            assert 0.9 * bound < parameter.abs().max() <= bound
    before = {n: p.clone() for n, p in run.model.named_parameters()}
    list(loop.train(run))
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) != lora.is_factor(name), name


def test_names_of_the_base_stay(tmp_path):
    run = build.assemble(tiny.recipe(tmp_path, adapt__method="lora"))
    plain = build.assemble(tiny.recipe(tmp_path))
    names = {n for n, _ in run.model.named_parameters()}
    assert {n for n in names if not lora.is_factor(n)} == {n for n, _ in plain.model.named_parameters()}
    assert {n for n, _ in run.model.named_modules()} == {n for n, _ in plain.model.named_modules()}


def test_merged_equals_adapted_in_transformers(tmp_path, tokens):
    recipe = tiny.recipe(tmp_path, adapt__method="lora", training__steps=4)
    fit.train(recipe, quiet=True)
    result = export.export(tmp_path / "run", "merged", tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(result["folder"], dtype=torch.float32)
    done = finished(tmp_path / "run")
    built = build.assemble_model(done)
    filling.materialise(built, done, pretrained.blank(built.model))
    adapted = logits(built.model.eval(), tokens)
    torch.testing.assert_close(theirs(tokens).logits, adapted, rtol=1e-5, atol=1e-5)


def test_a_head_may_be_adapted_too(tmp_path, tokens):
    """The loss takes the head's weight, not its forward: the adapter must not be lost there, nor the tied embedding change."""
    recipe = tiny.recipe(tmp_path, adapt__method="lora", adapt__targets=["lm_head", "q_proj"])
    run = build.assemble(recipe)
    shake(run.model)
    batch = run.batch(0)[0]
    mean = run.forward_backward([batch])
    hidden = run.model(batch.tokens, batch.positions, batch.documents)
    plain = torch.nn.functional.cross_entropy(run.model.logits(hidden).flatten(0, 1), batch.labels.flatten(), reduction="sum")
    torch.testing.assert_close(mean, plain / batch.supervised, rtol=1e-5, atol=1e-6)
    factors = [run.model.lm_head.lora_A, run.model.lm_head.lora_B]
    theirs = torch.autograd.grad(plain / batch.supervised, factors)
    torch.testing.assert_close(tuple(factor.grad for factor in factors), theirs, rtol=1e-4, atol=1e-6)
    merged = saving.plain_tensors(run.model)
    embedding, head = merged["model.embed_tokens.weight"], merged["lm_head.weight"]
    assert not torch.equal(embedding, head)


def test_dropout_only_while_training(tmp_path, tokens):
    run = build.assemble(tiny.recipe(tmp_path, adapt__method="lora", adapt__dropout=0.5))
    shake(run.model)
    run.model.eval()
    assert torch.equal(logits(run.model, tokens), logits(run.model, tokens))
    still = logits(run.model, tokens)
    run.model.train()
    assert not torch.allclose(logits(run.model, tokens), still, atol=1e-3)
    with torch.no_grad():  # scaled by 1/(1-p): the mean over masks is the value without
        mean = torch.stack([run.model.model.layers[0].mlp.up_proj(torch.ones(1, 64)) for _ in range(4000)]).mean(0)
    run.model.eval()
    torch.testing.assert_close(mean, run.model.model.layers[0].mlp.up_proj(torch.ones(1, 64)), rtol=0.1, atol=0.1)


def test_another_base_is_refused(tmp_path):
    recipe = tiny.recipe(tmp_path, adapt__method="lora")
    build.assemble(recipe).save(tmp_path / "adapter")
    tiny.model(tmp_path / "other", seed=1)
    other = tiny.recipe(
        tmp_path,
        model__pretrained=str(tmp_path / "other"),
        adapt__method="lora",
        adapt__start=str(tmp_path / "adapter"),
    )
    with pytest.raises(InputError, match="another base"):
        build.assemble(other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ],
)
def test_adapters_of_another_kind_are_refused(tmp_path, change, words):
    build.assemble(tiny.recipe(tmp_path, adapt__method="lora")).save(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=words):
        lora.read_section(tmp_path / "adapter")


def test_a_pattern_that_matches_nothing_names_the_nearest(tmp_path):
    with pytest.raises(InputError, match=r"q_prj.*q_proj"):
        build.assemble(tiny.recipe(tmp_path, adapt__method="lora", adapt__targets=["q_prj"]))


def test_a_rank_that_differs_from_the_file(tmp_path):
    build.assemble(tiny.recipe(tmp_path, adapt__method="lora", adapt__rank=4)).save(tmp_path / "adapter")
    again = tiny.recipe(tmp_path, adapt__method="lora", adapt__rank=8, adapt__start=str(tmp_path / "adapter"))
    with pytest.raises(InputError, match="rank"):
        build.assemble(again)


def test_truncated_adapter(tmp_path):
    build.assemble(tiny.recipe(tmp_path, adapt__method="lora")).save(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        build.assemble(tiny.recipe(tmp_path, adapt__method="lora", adapt__start=str(tmp_path / "adapter")))


def test_a_user_module_takes_lora(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    change = lora.apply(model, Lora(method="lora", rank=2), head=None)
    lora.initialize(model, 0)
    assert len(change.names) == 2
    assert not isinstance(model, Decoder)
    model(torch.ones(1, 4)).sum().backward()
    assert model[0].weight.grad is None
    assert model[2].lora_B.grad.abs().max() > 0
