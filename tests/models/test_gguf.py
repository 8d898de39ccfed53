"""GGUF files against transformers and gguf's own quantisation: files of tiny models, and broken files."""

import math
import struct
from contextlib import suppress

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import GgufConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trainwright.models import gguf as ours
from trainwright.recipe import InputError

NAMES = {  # written down once more, so that a mistake in the module's table shows
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    "attention_bias", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
LAYERS, HEADS, KV_HEADS = 2, 4, 2


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256}
    config = LlamaConfig(**{
        **sizes, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5, "rope_theta": 12345.0, "bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5, **changes,
    })  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # norms start at one, biases at zero: that would hide mistakes
        torch.nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0.0, 0.2)
    return model


def gguf_name(name):
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, leaf = name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{leaf}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{leaf}"


def permuted(weights, heads):
    """What llama.cpp's convert_hf_to_gguf does to queries and keys."""
    pairs = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def metadata(writer, config):
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(4)
    writer.add_pad_token_id(5)


def write(path, model, kind=Kind.F32, *, tensors=None, extra=lambda writer: None, arch="llama", vocabulary=0):
    """A GGUF file of a transformers model as llama.cpp makes it; matrices in ``kind``, vectors in F32."""
    writer = gguf.GGUFWriter(path, arch)
    metadata(writer, model.config)
    if vocabulary:
        writer.add_token_list([f"token-{number}" for number in range(vocabulary)])
        writer.add_token_types([1] * vocabulary)
    extra(writer)
    for name, value in stored(model).items():
        plain = value.detach().float().numpy()
        if "q_proj" in name or "k_proj" in name:
            plain = permuted(plain, HEADS if "q_proj" in name else KV_HEADS)
        used = kind if plain.ndim > 1 else Kind.F32
        writer.add_tensor(gguf_name(name), quantize(np.ascontiguousarray(plain), used), raw_dtype=used)
    for name, (data, raw) in (tensors or {}).items():
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(model):
    """Names and values as a file has them: a tied head once."""
    tied = model.config.tie_word_embeddings
    return {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}


KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_tensor_is_the_dequantised_original(tmp_path, kind, tied):
    model = llama(tie_word_embeddings=tied)
    weights = ours.GGUFWeights(write(tmp_path / "m.gguf", model, kind))
    assert sorted(weights.names()) == sorted(stored(model))
    for name, value in stored(model).items():
        plain = value.numpy()
        expected = dequantize(quantize(plain, kind), kind) if plain.ndim > 1 else plain
        loaded = weights.load(name)
        assert weights.shape(name) == tuple(value.shape) == tuple(loaded.shape)
        assert weights.dtype(name) == loaded.dtype
        np.testing.assert_array_equal(loaded.float().numpy(), expected.reshape(plain.shape), err_msg=name)
        assert torch.equal(weights.load(name, torch.bfloat16), loaded.to(torch.bfloat16))
        assert torch.equal(weights.load(name, torch.float32), loaded.float())


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
def test_half_precision_is_kept_exactly(tmp_path, kind):
    weights = ours.GGUFWeights(write(tmp_path / "m.gguf", llama(), kind))
    half = torch.float16 if kind == Kind.F16 else torch.bfloat16
    assert weights.load("model.layers.1.self_attn.q_proj.weight").dtype == half
    assert weights.load("model.norm.weight").dtype == torch.float32


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q4_1], ids=lambda kind: kind.name)
def test_transformers_reads_the_same_from_the_file(tmp_path, kind):
    path = write(tmp_path / "m.gguf", llama(), kind)
    theirs = LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    weights = ours.GGUFWeights(path)
    for name, value in theirs.state_dict().items():
        assert torch.equal(weights.load(name, torch.float32), value), name


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K, Kind.Q5_K, Kind.IQ4_XS], ids=lambda kind: kind.name)
def test_blocks_that_only_llama_cpp_can_write(tmp_path, kind):
    """Random blocks with finite scales, against gguf's dequantisation of the whole tensor at once."""
    model = llama(intermediate_size=512)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    raw = np.random.default_rng(0).integers(0, 60, (64, 512 // 256 * size), dtype=np.uint8)
    path = write(tmp_path / "m.gguf", model, tensors={"blk.7.ffn_down.weight": (raw, kind)})
    loaded = ours.GGUFWeights(path).load("model.layers.7.mlp.down_proj.weight")
    expected = dequantize(raw, kind)
    assert np.isfinite(expected).all()
    assert np.abs(expected).max() > 0
    np.testing.assert_array_equal(loaded.numpy(), expected)


def test_large_tensors_come_in_portions(tmp_path, monkeypatch):
    model = llama()
    weights = ours.GGUFWeights(write(tmp_path / "m.gguf", model, Kind.Q8_0))
    whole = {name: weights.load(name) for name in weights.names()}
    monkeypatch.setattr(ours, "CHUNK", 5 * 64)
    for name, value in whole.items():
        assert torch.equal(weights.load(name), value), name


def test_biases_are_read_and_their_rows_put_back(tmp_path):
    model = llama(attention_bias=True, mlp_bias=True)
    weights = ours.GGUFWeights(write(tmp_path / "m.gguf", model))
    assert weights.config()["attention_bias"]
    assert weights.config()["mlp_bias"]
    for name, value in model.state_dict().items():
        assert torch.equal(weights.load(name), value), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_config_equals_the_models(tmp_path, tied):
    model = llama(tie_word_embeddings=tied, head_dim=32)
    config = ours.GGUFWeights(write(tmp_path / "m.gguf", model)).config()
    theirs = LlamaConfig(**config)
    for key in SAME:
        assert getattr(theirs, key) == getattr(model.config, key), key
    assert config["rms_norm_eps"] == 1e-5


def test_linear_scaling(tmp_path):
    def extra(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    config = ours.GGUFWeights(write(tmp_path / "m.gguf", llama(), extra=extra)).config()
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def llama_cpp_factors(theta, size, factor):
    """rope_freqs.weight as llama.cpp's convert_hf_to_gguf computes it."""
    factors = []
    for frequency in 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4.0:
            factors.append(1.0)
        elif wavelength > 8192 / 1.0:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            factors.append(float(1 / ((1 - smooth) / factor + smooth)))
    return torch.tensor(factors, dtype=torch.float32)


@given(
    theta=st.floats(1e4, 1e7),
    size=st.sampled_from([16, 64, 128]),
    factor=st.sampled_from([2.0, 8.0, 16.0, 32.0]),
)
@example(theta=500000.0, size=128, factor=8.0)  # Llama 3.1
@example(theta=500000.0, size=64, factor=32.0)  # Llama 3.2 1B
@settings(max_examples=60, deadline=None)
def test_llama3_scaling_is_recovered_from_the_factors(theta, size, factor):
    factors = llama_cpp_factors(theta, size, factor)
    scaling = ours.llama3_scaling(factors, theta, size, "file")
    plain = 1.0 / theta ** (torch.arange(0, size, 2).float() / size)
    if scaling is None:
        assert bool((factors == 1).all())
        return
    config = LlamaConfig(hidden_size=size, num_attention_heads=1, rope_parameters={**scaling, "rope_theta": theta})
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    torch.testing.assert_close(plain / factors, theirs, rtol=2e-5, atol=0.0)


def test_factors_of_other_settings_are_refused(tmp_path):
    factors = np.linspace(1, 9, 8, dtype=np.float32)
    path = write(tmp_path / "m.gguf", llama(), tensors={"rope_freqs.weight": (factors, Kind.F32)})
    with pytest.raises(InputError, match=r"m\.gguf: rope_freqs\.weight is not Llama 3\.1's"):
        ours.GGUFWeights(path).config()


def test_the_vocabulary_is_stepped_over_and_nothing_else(tmp_path):
    path = write(tmp_path / "m.gguf", llama(), vocabulary=3000, extra=lambda w: w.add_array("llama.list", [1, 2, 3]))
    header, full = ours.read_header(path), gguf.GGUFReader(path)
    assert [(t.name, t.data_offset, t.tensor_type) for t in header.tensors] == [
        (t.name, t.data_offset, t.tensor_type) for t in full.tensors
    ]
    for key, field in full.fields.items():
        if key not in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
            assert header.fields[key].contents() == field.contents(), key


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "m.gguf", llama(), Kind.Q8_0, vocabulary=1500).read_bytes()


def fresh(folder, content):
    """A new file each time: one that is still mapped must not change."""
    path = folder / f"{len(list(folder.iterdir()))}.gguf"
    path.write_bytes(content)
    return path


def read_everything(path):
    weights = ours.GGUFWeights(path)
    weights.config()
    for name in weights.names():
        weights.load(name)


@given(cut=st.floats(0, 1, exclude_max=True))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_file_is_an_input_error(small_file, tmp_path, cut):
    """At any length; the last tensor's size is a multiple of the alignment, so that no byte of the file is padding."""
    path = fresh(tmp_path, small_file[: int(cut * len(small_file))])
    with pytest.raises(InputError, match=rf"{path.name}: "):
        read_everything(path)


@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), whole=st.booleans())
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_is_an_input_error_or_harmless(small_file, tmp_path, place, value, whole):
    data = bytearray(small_file)
    header = small_file.index(b"blk.0.attn_norm") if whole else 1000
    start = int(place * header)
    data[start : start + (8 if whole else 1)] = bytes([value]) * (8 if whole else 1)
    path = fresh(tmp_path, data)
    with suppress(InputError):
        ours.GGUFWeights(path).config()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a GGUF file"),
        (b"GGUF", "not a GGUF file"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "big-endian"),
    ],
)
def test_what_is_no_gguf_file(tmp_path, content, says):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        ours.GGUFWeights(path)


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(InputError, match="can't be read"):
            ours.GGUFWeights(path)


@pytest.mark.parametrize(
    ("extra", "tensors", "says"),
    [
        (lambda w: w.add_expert_count(8), {}, "mixture of experts"),
        (lambda w: w.add_uint16("split.count", 3), {}, "llama-gguf-split --merge"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), {}, "rope scaling 'yarn'"),
        (lambda w: w.add_value_length(8), {}, "value_length is 8"),
        (lambda w: None, {"blk.0.ffn_gate_inp.weight": (np.zeros((2, 2), np.float32), Kind.F32)}, "blk.0.ffn_gate_inp"),
    ],
    ids=["experts", "split", "yarn", "odd heads", "unknown tensor"],
)
def test_what_no_plain_llama_has(tmp_path, extra, tensors, says):
    path = write(tmp_path / "m.gguf", llama(), extra=extra, tensors=tensors)
    with pytest.raises(InputError, match=says):
        ours.GGUFWeights(path).config()


def test_another_architecture(tmp_path):
    with pytest.raises(InputError, match="architecture 'gemma3' is not supported"):
        ours.GGUFWeights(write(tmp_path / "m.gguf", llama(), arch="gemma3"))


def test_unknown_quantisations(tmp_path):
    path = write(tmp_path / "m.gguf", llama())
    data = path.read_bytes()
    entry = data.index(b"blk.0.ffn_down.weight") + len("blk.0.ffn_down.weight") + 4 + 2 * 8  # two sizes, then the type
    assert struct.unpack_from("<I", data, entry) == (Kind.F32,)
    path.write_bytes(data[:entry] + struct.pack("<I", 99) + data[entry + 4 :])
    with pytest.raises(InputError, match=r"m\.gguf: a quantisation unknown to gguf .*99"):
        ours.GGUFWeights(path)
    path.write_bytes(data[:entry] + struct.pack("<I", Kind.I32) + data[entry + 4 :])
    with pytest.raises(InputError, match="stored as I32"):
        ours.GGUFWeights(path)
