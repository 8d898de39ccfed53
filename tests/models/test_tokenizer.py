"""Tokenizers of folders and GGUF files, read offline, in silence and without running anybody's code."""

import json
import re
import socket
import unicodedata

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainwright.models.pretrained import load_tokenizer, locate, locate_tokenizer, save_folder
from trainwright.recipe import InputError

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
CHAT = [{"role": "user", "content": "Hi"}]


def made():
    """A small byte-level tokenizer with a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the cat sat on the mat, the dog sat on the log 12345"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(locate("smollm2-135m"))


@pytest.fixture(scope="module")
def gpt2_rule():
    """transformers' own reading of the GGUF file, which cuts text as GPT-2 does."""
    path = locate("smollm2-135m").path
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_a_folder_with_nothing_but_a_tokenizer(tmp_path, capfd):
    tokenizer = made()
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again("the cat").input_ids == tokenizer("the cat").input_ids
    assert again.apply_chat_template(CHAT, tokenize=False) == "<user>Hi"
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("no_network")
def test_smollm2_offline_and_in_silence(capfd):
    tokenizer = load_tokenizer("smollm2-135m")
    assert capfd.readouterr() == ("", "")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (1, 2, 2, 49152)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_end|>").input_ids == [2]


def pieces(text):
    """SmolLM2's published rule: every digit stands alone before GPT-2's rule cuts the rest."""
    cut = re.compile("|".join(sorted({re.escape(c) for c in text if unicodedata.category(c)[0] == "N"})) or r"(?!)")
    end = 0
    for digit in cut.finditer(text):
        yield from (text[end : digit.start()], digit.group())
        end = digit.end()
    yield text[end:]


@given(
    text=st.text(
        st.one_of(st.characters(max_codepoint=0x2FFF, codec="utf-8"), st.sampled_from("\n\n  012 ab.'s½²")), max_size=40
    )
)
@example(text="a\n\n1. b")
@example(text="x  =  12\t\n\n 3rd ½")
@settings(max_examples=300, deadline=None)
def test_smollm2_takes_every_digit_alone(smollm2, gpt2_rule, text):
    if "<" in text:  # special tokens are found before any rule
        return
    expected = [token for piece in pieces(text) for token in gpt2_rule(piece).input_ids]
    assert smollm2(text).input_ids == expected
    if text.isascii() and text.isprintable():  # its vocabulary lacks some bytes, such as \x06
        assert smollm2.decode(expected) == text


def test_the_digit_rule_matters(smollm2, gpt2_rule):
    assert smollm2("\n\n1").input_ids != gpt2_rule("\n\n1").input_ids


def test_a_saved_model_folder_keeps_the_tokenizer(tmp_path, smollm2):
    save_folder(tmp_path / "out", {"w": torch.ones(2)}, {"model_type": "llama"}, smollm2)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert not {"local_files_only", "is_local", "gguf_file", "name_or_path"} & set(config)
    for again in (load_tokenizer(str(tmp_path / "out")), AutoTokenizer.from_pretrained(tmp_path / "out")):
        text = "def f(x):\n\n\n    return 12 * x  # <|im_end|> ünïcode"
        assert again(text).input_ids == smollm2(text).input_ids
        assert again.chat_template == smollm2.chat_template
        assert again.special_tokens_map == smollm2.special_tokens_map


def write_gguf(path, kind="gpt2", rule=None, tokens=(), merges=(), **extra):
    """A GGUF file with a vocabulary and one embedding, enough to be a Llama's."""
    writer = gguf.GGUFWriter(path, "llama")
    if kind:
        writer.add_tokenizer_model(kind)
        writer.add_token_list(list(tokens))
        writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
        writer.add_token_merges(list(merges))
    if rule is not None:
        writer.add_tokenizer_pre(rule)
    for key, value in extra.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_tensor("token_embd.weight", np.zeros((max(1, len(tokens)), 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def llama3_file(path, **extra):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # "cat" is a token that no merge makes: Llama 3 takes it whole all the same.
    tokens = [*alphabet, "12", "123", "\u0120a", "cat", "<|begin|>", "<|end|>"]
    merges = ["1 2", "12 3", "\u0120 a"]
    ids = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    return write_gguf(path, rule="llama-bpe", tokens=tokens, merges=merges, **ids, **extra)


def test_llama3s_rule(tmp_path):
    tokenizer = load_tokenizer(llama3_file(tmp_path / "m.gguf"))
    assert tokenizer.tokenize("cat123123 a") == ["cat", "123", "123", "\u0120a"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("123").input_ids) == ["<|begin|>", "123"]


def test_the_files_word_on_the_first_token_counts(tmp_path):
    tokenizer = load_tokenizer(llama3_file(tmp_path / "m.gguf", add_bos_token=False))
    assert tokenizer.convert_ids_to_tokens(tokenizer("123").input_ids) == ["123"]


def test_gguf_files_without_a_tokenizer_or_with_an_unknown_rule(tmp_path):
    with pytest.raises(InputError, match=r"holds no tokenizer; give one with model\.tokenizer"):
        load_tokenizer(write_gguf(tmp_path / "none.gguf", kind=None))
    with pytest.raises(InputError, match="the rule 'jais', which isn't known here"):
        load_tokenizer(write_gguf(tmp_path / "jais.gguf", rule="jais", tokens=["a", "b"]))
    with pytest.raises(InputError, match="its tokenizer can't be read"):
        load_tokenizer(write_gguf(tmp_path / "rwkv.gguf", kind="rwkv", tokens=["a", "b"]))


def test_folders_without_a_tokenizer(tmp_path):
    save_folder(tmp_path / "out", {"w": torch.ones(2)}, {"model_type": "llama"})
    with pytest.raises(InputError, match=r"holds no tokenizer \(tokenizer\.json or tokenizer\.model or vocab\.json\)"):
        load_tokenizer(str(tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no model folder"):
        load_tokenizer(str(tmp_path / "empty"))


def test_a_damaged_tokenizer(tmp_path):
    made().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(InputError, match="its tokenizer can't be read"):
        load_tokenizer(str(tmp_path))


def test_code_beside_a_tokenizer_is_never_run(tmp_path):
    made().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(InputError, match="its tokenizer can't be read"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_hub_name_fetches_the_tokenizer_alone(monkeypatch, tmp_path):
    made().save_pretrained(tmp_path)
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: None)
    assert locate_tokenizer("someone/model").path == tmp_path
    assert asked["name"] == "someone/model"
    assert "*.safetensors" not in asked["allow_patterns"]
