"""A tiny Llama with a tiny tokenizer as a Hugging Face folder, and recipes for it: what tests train in a second."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainwright.recipe import Recipe
from trainwright.recipe.file import parse

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "box",
    "with",
    "liquid",
    "jugs",
    "of",
    "ink",
]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    return fast


def model(folder: Path, *, seed: int = 0, **changes) -> Path:
    """Write a random Llama (2 layers, GQA, tied) and its tokenizer; changes are keys of its config."""
    torch.manual_seed(seed)
    keys = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True, "eos_token_id": 2,
        "bos_token_id": None, "pad_token_id": 0, "initializer_range": 0.1,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**{**keys, **changes})).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def pairs(path: Path, count: int = 40) -> Path:
    """A JSONL file of prompts and completions of ragged lengths."""
    rows = []
    for i in range(count):
        words = [WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(3 + i * 11 % 23)]
        rows.append({"prompt": " ".join(words[: 1 + i % 4]), "completion": " " + " ".join(words)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def in_bfloat16(tmp: Path, **changes) -> Path:
    """A folder of pairs with a model whose file is in bfloat16."""
    file = model(tmp / "base", **changes) / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    pairs(tmp / "pairs.jsonl", 60)
    return tmp


def recipe(tmp: Path, **changes) -> Recipe:
    """A recipe for the tiny model on CPU in float32, uncompiled; changes are dotted keys with __ for the dot."""
    mapping: dict = {
        "model": {"pretrained": str(tmp / "base")},
        "data": {
            "source": str(tmp / "pairs.jsonl"),
            "sequence_length": 64,
            "cache": str(tmp / "cache"),
            "held_out": 0.1,
        },
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"name": "linear", "warmup": 0},
        "precision": "fp32",
        "training": {"steps": 6, "batch_size": 4},
        "tracking": {"tensorboard": False},
        "run": {"folder": str(tmp / "run"), "compile": "off", "device": "cpu"},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        section = mapping
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    if not (tmp / "base").exists() and mapping["model"]["pretrained"] == str(tmp / "base"):
        model(tmp / "base")
    if not (tmp / "pairs.jsonl").exists():
        pairs(tmp / "pairs.jsonl")
    return parse(mapping)
