"""Play with a language model: one prompt or a chat, a base model, a run or an adapter, or base and tuned side by side."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainwright import build, language, runfolder
from trainwright.adapt import lora
from trainwright.adapt import partial as partial_tuning
from trainwright.data.text import render
from trainwright.models.decoder import Decoder
from trainwright.recipe import InputError, Lora, Model, Partial, Recipe, TextData
from trainwright.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Speaker:
    """A model that can be spoken with."""

    name: str
    model: Decoder
    tokenizer: PreTrainedTokenizerFast
    tokens: Callable[[list[int], Sampling], Iterator[int]]


def stream(speaker: Speaker, prompt: list[int], sampling: Sampling) -> Iterator[str]:
    """The same as pieces of text; a character of several tokens comes when it is whole."""
    seen: list[int] = []
    told = ""
    for token in speaker.tokens(prompt, sampling):
        seen.append(token)
        text = str(speaker.tokenizer.decode(seen, skip_special_tokens=True))
        if not text.endswith("\ufffd"):
            yield text[len(told) :]
            told = text
    yield str(speaker.tokenizer.decode(seen, skip_special_tokens=True))[len(told) :]


def encode(speaker: Speaker, messages: list[dict[str, str]], raw: bool) -> list[int]:
    """A chat as the model's template renders it, or the last message as bare text."""
    tokenizer = speaker.tokenizer
    if raw or not tokenizer.chat_template:
        return list(tokenizer(messages[-1]["content"])["input_ids"])
    text = render(tokenizer, messages, "the prompt", add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def answer(speaker: Speaker, prompt: str, sampling: Sampling, raw: bool = False) -> str:
    """The whole answer to one prompt."""
    return "".join(stream(speaker, encode(speaker, [{"role": "user", "content": prompt}], raw), sampling))


def load(target: str, adapter: str | None = None, device: str = "auto") -> tuple[Speaker, Speaker | None]:
    """The speaker of a run, a model, or an adapter's folder; and its base, where it has one.

    Raises:
        InputError: nothing of these, or a model without a tokenizer.
    """
    recipe = _recipe(target, adapter).model_copy(update={"precision": "auto"})
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"device": device, "compile": "off"})})
    tuned = _speaker(recipe, adapter or target)
    if not getattr(recipe.adapt, "start", None):
        return tuned, None
    base = recipe.model_copy(update={"adapt": Recipe.model_fields["adapt"].get_default(call_default_factory=True)})
    return tuned, _speaker(base, recipe.model.pretrained or "base")


def _recipe(target: str, adapter: str | None) -> Recipe:
    folder = Path(adapter or target)
    if adapter is None and (folder / "recipe.yaml").is_file():
        return runfolder.finished(folder)
    data = TextData(source="python-docstrings", held_out=None)
    if (folder / "adapter_config.json").is_file():
        section: Lora | Partial = lora.read_section(folder).model_copy(update={"start": str(folder)})
        base = target if adapter else lora.base_of(folder)
    elif (folder / partial_tuning.FILE).is_file():
        section = partial_tuning.read_section(folder).model_copy(update={"start": str(folder)})
        base = target if adapter else partial_tuning.base_of(folder)
    elif adapter is not None:
        raise InputError(f"--adapter {adapter}: neither adapter_config.json nor {partial_tuning.FILE} is there")
    else:
        return Recipe(model=Model(pretrained=target), data=data)
    return Recipe(model=Model(pretrained=base), adapt=section, data=data)


def _speaker(recipe: Recipe, name: str) -> Speaker:
    built = build.load_model(recipe)
    if not isinstance(built.model, Decoder):
        raise InputError(f"{name}: only decoders can generate; this is {recipe.model.architecture}")
    tokenizer = language.find_tokenizer(recipe, built.source)
    return Speaker(name, built.model, tokenizer, language.speaking(built, tokenizer))


def main(
    target: str,
    *,
    prompt: str | None,
    chat: bool,
    sampling: Sampling,
    raw: bool = False,
    compare: bool = False,
    adapter: str | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """The verb: speak on stdout, unless ``quiet``; gives what ``--json`` prints."""
    tuned, base = load(target, adapter, device)
    if compare and base is None:
        raise InputError(f"--compare: {target} has no base to compare with; give a run or an adapter")
    if chat:
        return _chat(tuned, sampling, raw)
    if prompt is None:
        raise InputError("give --prompt TEXT or --chat")
    speakers = [base, tuned] if compare and base is not None else [tuned]
    return {"prompt": prompt, "answers": [_tell(s, prompt, sampling, raw, quiet, len(speakers) > 1) for s in speakers]}


def _tell(speaker: Speaker, prompt: str, sampling: Sampling, raw: bool, quiet: bool, headed: bool) -> dict[str, Any]:
    started, pieces = time.perf_counter(), []
    if headed and not quiet:
        print(f"--- {speaker.name}")
    for piece in stream(speaker, encode(speaker, [{"role": "user", "content": prompt}], raw), sampling):
        pieces.append(piece)
        if not quiet:
            print(piece, end="", flush=True)
    if not quiet:
        print()
    return {"model": speaker.name, "text": "".join(pieces), "seconds": time.perf_counter() - started}


def _chat(speaker: Speaker, sampling: Sampling, raw: bool) -> dict[str, Any]:
    """Read a line, answer it, remember both; an empty line or end of input ends it."""
    messages: list[dict[str, str]] = []
    print(f"Chat with {speaker.name}; an empty line ends it.", file=sys.stderr)
    while line := _read_line():
        messages.append({"role": "user", "content": line})
        pieces = []
        for piece in stream(speaker, encode(speaker, messages, raw), sampling):
            pieces.append(piece)
            print(piece, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": "".join(pieces)})
    return {"messages": messages}


def _read_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
