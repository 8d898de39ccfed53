"""Tokenizers: of Hugging Face folders through transformers, of GGUF files with their rule for cutting text restored."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from trainwright.models.gguf import GGUFWeights
from trainwright.models.hub import TOKENIZER_FILES, is_hub_name, snapshot
from trainwright.models.source import Source, locate
from trainwright.recipe import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# tokenizer.ggml.pre, llama.cpp's name of the rule by which text is cut before the merges.
GPT2_RULES = {"", "default", "gpt-2"}
LLAMA3_RULES = {"llama3", "llama-v3", "llama-bpe"}
DIGIT_RULES = {"smollm"}
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(source: Source | str) -> PreTrainedTokenizerFast:
    """The tokenizer of a source, or of a folder, GGUF file or hub name, chat template included. No code of it is run.

    Raises:
        InputError: there is none, or it can't be read without running code, or its rule for cutting text isn't known.
    """
    place = locate_tokenizer(source) if isinstance(source, str) else source
    return from_gguf(place) if place.kind == "gguf" else from_folder(place)


def locate_tokenizer(name: str) -> Source:
    """Where the tokenizer of that name is; unlike a model, its folder needs no weights, and none are downloaded."""
    path = os.path.expanduser(name)
    if os.path.isdir(path) and has_vocabulary(Path(path)):
        return Source("folder", Path(path), name)
    if not os.path.exists(path) and is_hub_name(name):
        return Source("folder", snapshot(name, TOKENIZER_FILES), name)
    return locate(name)


def has_vocabulary(folder: Path) -> bool:
    return any((folder / name).is_file() for name in VOCABULARIES)


def from_folder(source: Source) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face folder.

    Raises:
        InputError: the folder has none, or transformers can't read it.
    """
    if not has_vocabulary(source.path):
        raise InputError(f"{source.shown}: holds no tokenizer ({' or '.join(VOCABULARIES)}); give one with model.tokenizer")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(source.path), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a file that others wrote makes transformers raise
            raise unreadable(source, error) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{source.shown}: its tokenizer has no tokenizer.json form; save it with a fast tokenizer")
    return portable(tokenizer)


def from_gguf(source: Source) -> PreTrainedTokenizerFast:
    """The tokenizer in a GGUF file's metadata.

    Raises:
        InputError: the file has none, or cuts text by a rule that isn't known.
    """
    file = GGUFWeights(source.path)
    kind, rule = file.value("tokenizer.ggml.model"), str(file.value("tokenizer.ggml.pre") or "")
    if kind is None:
        raise InputError(f"{source.shown}: holds no tokenizer; give one with model.tokenizer")
    if kind == "gpt2" and rule not in GPT2_RULES | LLAMA3_RULES | DIGIT_RULES:
        raise InputError(
            f"{source.shown}: its tokenizer cuts text by the rule {rule!r}, which isn't known here; "
            f"give the original tokenizer's folder with model.tokenizer"
        )
    from transformers import PreTrainedTokenizerFast

    with quiet(), mapped_plainly():
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                str(source.path.parent), gguf_file=source.path.name, local_files_only=True, **defaults(file, rule)
            )
        except Exception as error:  # whatever damaged metadata makes transformers raise
            raise unreadable(source, error) from error
    if kind == "gpt2":
        restore_rule(tokenizer, rule)
    return portable(tokenizer)


@contextmanager
def mapped_plainly() -> Iterator[None]:
    """While transformers reads a GGUF file as a plain array: each of the vocabulary's words is a slice, dear of a memmap."""
    from transformers.integrations.gguf import reader

    def mapped(path: str) -> np.ndarray:
        return np.memmap(path, mode="r", dtype=np.uint8).view(np.ndarray)

    with mock.patch.object(reader, "_mapped", mapped):
        yield


def defaults(file: GGUFWeights, rule: str) -> dict[str, Any]:
    """What llama.cpp assumes where the file is silent: Llama 3 starts each text with its first token."""
    silent = file.value("tokenizer.ggml.add_bos_token") is None
    return {"add_bos_token": True} if silent and rule in LLAMA3_RULES else {}


def restore_rule(tokenizer: PreTrainedTokenizerFast, rule: str) -> None:
    """Cut text as the model's own tokenizer does, where transformers falls back to GPT-2's way."""
    from tokenizers import Regex, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if rule in DIGIT_RULES:  # every digit alone, before GPT-2's rule: else "\n\n1" becomes other tokens
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif rule in LLAMA3_RULES:
        words = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, plain])
        backend.model.ignore_merges = True  # a whole word of the vocabulary is one token, whatever the merges say


def portable(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Without the arguments of its loading, which ``save_pretrained`` would write down."""
    for key in ("local_files_only", "is_local", "gguf_file"):
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def unreadable(source: Source, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(f"{source.shown}: its tokenizer can't be read ({reason}); give another one with model.tokenizer")


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without warnings and progress bars: what matters to the user is raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
