"""load_into: what matches is copied exactly, everything else is named. transformers' models give the names."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainwright.models import decoder
from trainwright.models.weights import LoadReport, allocate, check, load_into
from trainwright.recipe import InputError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


class Stored:
    """Weights in memory."""

    def __init__(self, tensors, shown="somewhere"):
        self.tensors, self.shown = dict(tensors), shown

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def dtype(self, name):
        return self.tensors[name].dtype

    def load(self, name, dtype=None):
        return self.tensors[name].to(dtype or self.tensors[name].dtype, copy=True)


def config(**changes):
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaConfig(**{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **changes})


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(**changes))


def on_meta(**changes):
    with torch.device("meta"):
        return decoder.Decoder(decoder.read_config(config(**changes).to_dict()))


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20).view(2, 10)).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_exact_fills_a_decoder_on_the_meta_device(tied):
    source = llama(tie_word_embeddings=tied)
    model = on_meta(tie_word_embeddings=tied)
    report = load_into(model, Stored(source.state_dict()))
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not report.uninitialized
    assert report.describe() == f"{20 if tied else 21} of {20 if tied else 21} parameters and buffers come from somewhere"


def test_the_loaded_model_computes_the_same():
    source, other = llama(0), llama(1)
    assert not torch.equal(logits(source), logits(other))
    load_into(other, Stored(source.state_dict()))
    assert torch.equal(logits(source), logits(other))


def test_dtypes_are_the_models_own_or_those_of_the_rule():
    source = Stored(llama().state_dict())
    model = on_meta()
    model.model.norm.weight.data = model.model.norm.weight.data.to(torch.bfloat16)
    load_into(model, source)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    load_into(model, source, dtype=lambda name: torch.float64 if "norm" in name else torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float64 if "norm" in name else torch.bfloat16), name
        assert torch.equal(parameter, source.tensors[name].to(parameter.dtype)), name
    load_into(model, source, dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_what_was_frozen_stays_frozen_and_memory_is_not_shared_with_the_file():
    source = Stored(llama().state_dict())
    model = on_meta()
    model.model.requires_grad_(False)
    load_into(model, source)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [HEAD]
    before = model.lm_head.weight.clone()
    source.tensors[HEAD].zero_()
    assert torch.equal(model.lm_head.weight, before)


def test_one_tensor_at_a_time(monkeypatch):
    """When a tensor is read, those before it already are in the model."""
    model, source = on_meta(), Stored(llama().state_dict())
    left = []
    monkeypatch.setattr(
        source, "load", lambda name, dtype=None, load=source.load: left.append(unfilled(model)) or load(name, dtype)
    )
    load_into(model, source)
    assert left == list(range(len(source.names()), 0, -1))


def unfilled(model):
    return sum(parameter.is_meta for parameter in model.parameters())


def test_exact_names_every_fault_at_once():
    tensors = llama().state_dict()
    tensors["model.layers.0.self_attn.q_prj.weight"] = tensors.pop(Q)
    tensors["model.norm.weight"] = torch.ones(31)
    model = on_meta()
    with pytest.raises(InputError) as caught:
        load_into(model, Stored(tensors))
    message = str(caught.value)
    assert "somewhere doesn't fit the model" in message
    assert f"missing in the file: {Q} (did you mean 'model.layers.0.self_attn.q_prj.weight'?)" in message
    assert "not in the model: model.layers.0.self_attn.q_prj.weight" in message
    assert "model.norm.weight is [31] in the file but [32] in the model" in message
    assert "overlap" in message
    assert unfilled(model) == 21, "nothing is loaded before everything is checked"


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_no_name_is_ever_silent(data):
    """Whatever is dropped, added or reshaped: exact names it, overlap reports it and copies the rest."""
    source = llama().state_dict()
    names = sorted(source)
    dropped = data.draw(st.sets(st.sampled_from(names), max_size=3))
    reshaped = data.draw(st.sets(st.sampled_from(names), max_size=3)) - dropped
    added = data.draw(st.sets(st.sampled_from(["extra", "model.layers.9.mlp.up_proj.weight", "head.bias"]), max_size=2))
    tensors = {name: value for name, value in source.items() if name not in dropped}
    tensors |= {name: torch.zeros(7) for name in reshaped | added}
    if dropped | reshaped | added:
        with pytest.raises(InputError) as caught:
            load_into(on_meta(), Stored(tensors))
        for name in dropped | reshaped | added:
            assert name in str(caught.value)
    model = on_meta()
    report = load_into(model, Stored(tensors), match="overlap")
    assert set(report.new) == dropped
    assert set(report.reshaped) == reshaped
    assert set(report.unused) == added
    assert set(report.matched) == set(names) - dropped - reshaped
    for name in dropped | reshaped | added:
        assert name in report.describe()
    for name, parameter in model.named_parameters():
        assert parameter.is_meta == (name in report.uninitialized), name
        assert name in report.uninitialized or torch.equal(parameter, source[name]), name


def test_overlap_leaves_the_rest_as_the_model_made_it():
    source, model = llama(0), llama(1, vocab_size=60)
    before = copy.deepcopy(model)
    report = load_into(model, Stored(source.state_dict()), match="overlap")
    assert report.reshaped == {EMBEDDING: ((50, 32), (60, 32)), HEAD: ((50, 32), (60, 32))}
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert torch.equal(model.model.norm.weight, source.model.norm.weight)
    assert "another shape, to be initialised: lm_head.weight is [50, 32] in the file, [60, 32]" in report.describe()


def test_overlap_with_nothing_in_common_is_an_error():
    with pytest.raises(InputError, match=r"nothing matches the model; its names look like h\.0\.w, the model's like lm_"):
        load_into(on_meta(), Stored({"h.0.w": torch.ones(3)}), match="overlap")


@pytest.mark.parametrize("match", ["exact", "overlap"])
def test_an_adapters_parameters_are_none_of_the_files(match):
    model = on_meta()
    model.model.layers[0].mlp.up_proj.lora_A = nn.Parameter(torch.empty(4, 32, device="meta"))
    report = load_into(
        model, Stored(llama().state_dict()), match=match, ignore=lambda name: name.endswith((".lora_A", ".lora_B"))
    )
    assert report.new == ()
    assert unfilled(model) == 1
    assert allocate(model, "cpu") == {"model.layers.0.mlp.up_proj.lora_A"}
    assert model.model.layers[0].mlp.up_proj.lora_A.isnan().all()
    assert allocate(model, "cpu") == set()


def test_allocating_keeps_tied_parameters_tied():
    model = on_meta(tie_word_embeddings=True)
    assert EMBEDDING in allocate(model, "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert unfilled(model) == 0


def test_a_tied_model_and_a_file_with_a_head():
    tensors = llama(tie_word_embeddings=True).state_dict()
    model = on_meta(tie_word_embeddings=True)
    load_into(model, Stored(tensors))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    load_into(on_meta(tie_word_embeddings=True), Stored({k: v for k, v in tensors.items() if k != EMBEDDING}))
    tensors[HEAD] = tensors[HEAD] + 1
    with pytest.raises(InputError, match=r"lm_head\.weight differ, but the model ties them; set tie_word_embeddings: f"):
        load_into(on_meta(tie_word_embeddings=True), Stored(tensors))


def test_an_untied_model_and_a_file_without_a_head():
    tensors = {name: value for name, value in llama().state_dict().items() if name != HEAD}
    with pytest.raises(InputError, match=r"missing in the file: lm_head\.weight .*set tie_word_embeddings: t"):
        load_into(on_meta(), Stored(tensors))


WRAPPED = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "ddp": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "blocks compiled": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "fsdp": lambda name: f"_fsdp_wrapped_module.{name}",
    "checkpointed": lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "body only": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("rename", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_prefixes_are_seen_through_and_reported(rename):
    source = llama().state_dict()
    model = on_meta()
    report = load_into(model, Stored({rename(name): value for name, value in source.items()}))
    for name, value in source.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert "names differ by a wrapper's prefix, as " in report.describe()


def test_two_names_for_one_parameter():
    source = llama().state_dict()
    with pytest.raises(InputError, match=f"'{Q}' and '_orig_mod.{Q}' both mean '{Q}'"):
        load_into(on_meta(), Stored({**source, f"_orig_mod.{Q}": source[Q]}))


@pytest.mark.parametrize("child", ["module", "_orig_mod"])
def test_a_users_module_may_have_a_child_called_like_a_wrapper(child):
    model, source = nn.ModuleDict({child: nn.Linear(2, 3)}), nn.ModuleDict({child: nn.Linear(2, 3)})
    report = load_into(model, Stored(source.state_dict()))
    assert report.notes == ()
    assert torch.equal(model[child].weight, source[child].weight)


def test_buffers_and_integers_of_any_module():
    def make():
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))

    source = make()
    source[1](torch.randn(4, 2, 3, 3))
    with torch.device("meta"):
        model = make()
    load_into(model, Stored(source.state_dict()), dtype=torch.bfloat16)
    assert model[1].num_batches_tracked.dtype == torch.int64
    assert model[1].num_batches_tracked == 1
    assert torch.equal(model[1].running_mean, source[1].running_mean.to(torch.bfloat16))


def test_derived_names_are_left_out_and_said():
    tensors = {**llama().state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    report = load_into(on_meta(), Stored(tensors))
    assert "follows from the config: model.layers.0.self_attn.rotary_emb.inv_freq" in report.describe()


def test_buffers_that_are_never_stored_are_said():
    with torch.device("meta"):
        model = LlamaForCausalLM(config())
    report = load_into(model, Stored(llama().state_dict()))
    assert "never stored, still without values: model.rotary_emb.inv_freq" in report.describe()


def test_integers_for_a_weight_are_refused():
    tensors = {**llama().state_dict(), Q: torch.zeros(32, 32, dtype=torch.uint8)}
    with pytest.raises(InputError, match=rf"{Q} is stored as torch\.uint8, the model has torch\.float32"):
        load_into(on_meta(), Stored(tensors))


def test_threads_are_as_before_even_after_an_error(monkeypatch):
    before, source, seen = torch.get_num_threads(), Stored(llama().state_dict()), []

    def fail(name, dtype=None):
        seen.append(torch.get_num_threads())
        raise OSError("disk")

    monkeypatch.setattr(source, "load", fail)
    with pytest.raises(OSError, match="disk"):
        load_into(on_meta(), source)
    assert seen == [1]
    assert torch.get_num_threads() == before


def test_long_lists_are_cut_in_errors_and_whole_in_reports():
    report = LoadReport("file", ("a",), tuple(f"n{i}" for i in range(9)), (), {})
    with pytest.raises(InputError, match=r"missing in the file: n0, n1, n2, n3, n4 and 4 more"):
        check(report, "exact")
    assert all(f": n{i}" in report.describe() for i in range(9))
