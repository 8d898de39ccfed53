"""Text documents as tokens: tokenising, marking what is supervised, fitting to the length, holding out, caching.

The tokens of a prompt are the same here as when generating: a prompt and its completion are tokenised apart, and a chat
is rendered by the tokenizer's own template. Text that spells a special token (``<|im_end|>``) becomes that token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from trainwright.data import packing, sources, splitting
from trainwright.data.packing import Counts, Documents
from trainwright.data.sources import Columns, Row
from trainwright.recipe import InputError, TextData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Tokenised = tuple[list[int], np.ndarray]  # ids, and for each whether it is supervised
# The date in the system message of Llama 3.1 and later; by default it is today's, and so would differ after a resume.
LLAMA_DATE = "26 Jul 2024"
ROWS_AT_ONCE = 512  # enough to keep every core busy inside the tokenizer, small enough for a lively progress report
ARRAYS = ("tokens", "supervised", "offsets", "origins")


@dataclass(frozen=True, eq=False)
class TextSplits:
    """The documents to train on and those to measure on; ``cached``: they were read, not tokenised anew."""

    train: Documents
    held_out: Documents | None
    cached: bool


def prepare(
    section: TextData,
    tokenizer: PreTrainedTokenizerFast,
    *,
    model_length: int | None,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> TextSplits:
    """Tokenised documents of at most ``sequence_length`` tokens, from the cache if nothing that matters has changed.

    Documents are held out whole, before long ones are split. ``limit`` holds for each source.

    Args:
        model_length: the longest sequence the model takes, if it has such a limit.
        progress: called now and then with the number of rows of the current source that are tokenised.

    Raises:
        InputError: faults of the data, a tokenizer that doesn't fit it, nothing supervised in a split.
    """
    if model_length is not None and section.sequence_length > model_length:
        raise InputError(
            f"data.sequence_length is {section.sequence_length}, but the model has {model_length} positions; "
            f"set it to {model_length} or less"
        )
    encoder = Encoder(tokenizer, section.supervise == "all")
    path = _cache_folder(section) / f"text-{_key(section, encoder, seed)}.npz"
    splits = _load(path)
    if splits is None:
        splits = _make(section, encoder, seed, progress)
        _store(path, splits)
    return splits


class Encoder:
    """Turns rows into tokens and marks the supervised ones."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, supervise_all: bool) -> None:
        if not tokenizer.is_fast:
            raise InputError("the tokenizer has no tokenizer.json, which alone tells where a token lies; convert it")
        self.tokenizer = tokenizer
        self.supervise_all = supervise_all
        probe = tokenizer("a", return_special_tokens_mask=True)
        marked = zip(probe["input_ids"], probe["special_tokens_mask"], strict=True)
        self.leading = [token for token, special in itertools.takewhile(lambda pair: pair[1], marked)]
        self.special_texts = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)

    def encode(self, columns: Columns, rows: list[Row]) -> list[Tokenised]:
        """(ids, supervised) of each row; no ids where there is nothing to learn from."""
        if columns.form == "messages":
            return self._chats([self._rendered(row, columns.names[0]) for row in rows])
        texts = [sources.text_of(row, columns.names[-1]) for row in rows]
        if columns.form == "text":
            return self._completions([[]] * len(rows), texts)
        return self._completions(self._ids([sources.text_of(row, columns.names[0]) for row in rows]), texts)

    def _completions(self, prompts: list[list[int]], texts: list[str]) -> list[Tokenised]:
        """Leading special tokens (BOS), prompt, text, EOS; tokenised apart so that generating sees this very prompt."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise InputError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        documents: list[Tokenised] = []
        for prompt, text, ids in zip(prompts, texts, self._ids(texts), strict=True):
            before = [*self.leading, *prompt]
            whole = [*before, *ids, end] if text.strip() else []
            documents.append((whole, self.supervise_all | (np.arange(len(whole)) >= len(before))))
        return documents

    def _chats(self, chats: list[tuple[str, list[tuple[int, int]]]]) -> list[Tokenised]:
        """Tokens of rendered chats; supervised are those that begin inside one of the spans of characters.

        A token across the beginning of a span, such as a line break of the header and one of the answer, is not.
        """
        encoded = self._call([text for text, _ in chats], return_offsets_mapping=True)
        documents: list[Tokenised] = []
        for (_, spans), ids, offsets in zip(chats, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            starts = np.array([start for start, _ in offsets], dtype=np.int64)
            inside = [(first <= starts) & (starts < end) for first, end in spans]
            documents.append((ids, np.any([np.full(len(ids), self.supervise_all), *inside], axis=0)))
        return documents

    def _rendered(self, row: Row, name: str) -> tuple[str, list[tuple[int, int]]]:
        """The chat as the template writes it, and the spans of what the assistant has to produce."""
        messages = sources.messages_of(row, name)
        text = render(self.tokenizer, messages, row.where)
        spans = []
        for number in range(len(messages)):
            if messages[number]["role"] == "assistant":
                if number == 0:
                    raise InputError(f"{row.where}: the chat begins with the assistant; a user message must come first")
                head = render(self.tokenizer, messages[:number], row.where, add_generation_prompt=True)
                last = number == len(messages) - 1
                turn = text if last else render(self.tokenizer, messages[: number + 1], row.where)
                if not (turn.startswith(head) and text.startswith(turn)):
                    raise InputError(
                        f"{row.where}: message {number + 1}: the tokenizer's chat template writes what precedes this "
                        "answer differently once the answer or later messages are there, so that training would not "
                        "see what generating sees; end the chat with this answer, or mend the template"
                    )
                spans.append((len(head), len(self._until_end_of_turn(turn, len(head)))))
        return text, spans

    def _until_end_of_turn(self, turn: str, first: int) -> str:
        """Without the line break that templates write after the end-of-turn token: it is never generated."""
        trimmed = turn[:first] + turn[first:].rstrip()
        return trimmed if trimmed.endswith(self.special_texts) else turn

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._call(texts)["input_ids"] if texts else []

    def _call(self, texts: list[str], **options: Any) -> Any:
        # verbose: a warning about the model's length would be wrong here, the documents are cut later.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False, **options)


def render(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], where: str, add_generation_prompt: bool = False
) -> str:
    """A chat as the tokenizer's template writes it."""
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: these are chat messages, but the tokenizer has no chat template; set model.tokenizer to the "
            "model's instruct variant, put chat_template.jinja beside tokenizer.json, or use prompt and completion"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, date_string=LLAMA_DATE
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InputError(f"{where}: the tokenizer's chat template refuses the messages: {error}") from None
    assert isinstance(text, str)
    return text


def _make(section: TextData, encoder: Encoder, seed: int, progress: Callable[[int], None]) -> TextSplits:
    """Reads, tokenises and divides the data."""

    def tokenised(source: str, format: str) -> Documents:
        return _tokenise(sources.read_rows(source, format, section.limit), section, encoder, progress)

    train = tokenised(section.source, section.format)
    train_ids = np.arange(len(train))
    if section.held_out is None:
        return TextSplits(_fit(train, train_ids, section, "training"), None, cached=False)
    if isinstance(section.held_out, str):
        held_out = tokenised(section.held_out, "auto")
        held_out_ids = np.arange(len(held_out))
    else:
        held_out = train
        train_ids, held_out_ids = splitting.split(
            seed, splitting.DOCUMENTS, None, len(train), section.held_out, "data.held_out"
        )
    return TextSplits(
        _fit(train, train_ids, section, "training"), _fit(held_out, held_out_ids, section, "held-out"), cached=False
    )


def _tokenise(rows: Iterator[Row], section: TextData, encoder: Encoder, progress: Callable[[int], None]) -> Documents:
    """All rows as documents of any length, empty ones included."""
    first = next(rows)
    columns = sources.find_columns(section.fields, first)
    rows = itertools.chain([first], rows)
    tokens, supervised, lengths = [], [], [0]
    while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
        for ids, mask in encoder.encode(columns, chunk):
            tokens.append(np.array(ids, dtype=np.int32))
            supervised.append(mask)
            lengths.append(len(ids))
        progress(len(lengths) - 1)
    return Documents(np.concatenate(tokens), np.concatenate(supervised), np.cumsum(lengths, dtype=np.int64))


def _fit(documents: Documents, ids: np.ndarray, section: TextData, split: str) -> Documents:
    """The documents with these ids, fitted to the length; an InputError if there is nothing to learn from them."""
    fitted = packing.fit(documents, ids, section.sequence_length, section.too_long)
    if fitted.counts.supervised_tokens == 0:
        counts = fitted.counts
        raise InputError(
            f"data: every label of the {split} data is masked, there is nothing to learn: of {counts.documents} "
            f"documents {counts.empty} are empty, {counts.dropped} were dropped as longer than sequence_length "
            f"{section.sequence_length}, and {counts.masked} hold no supervised token within it. Raise "
            "data.sequence_length or set too_long: split if prompts fill it; set supervise: all; or look whether the "
            "completions, or messages of the role 'assistant', are there"
        )
    return fitted


def _cache_folder(section: TextData) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(section.cache).expanduser() if section.cache else home / "trainwright"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"data: cannot make the cache folder: {error}; set data.cache to another one") from None
    return folder


def _key(section: TextData, encoder: Encoder, seed: int) -> str:
    """Changes with everything that the result depends on: data, tokenizer, settings, and the code that makes it."""
    settings = {"format", "fields", "supervise", "sequence_length", "too_long", "limit"}
    parts: dict[str, Any] = {
        "settings": section.model_dump(include=settings),
        "source": sources.fingerprint(section.source),
        "suffixes": [Path(str(name)).suffix for name in (section.source, section.held_out)],  # what format: auto looks at
        "held_out": [section.held_out, seed],
        # With the padding and truncation of the latest call, which is the encoder's: none.
        "tokenizer": encoder.tokenizer.backend_tokenizer.to_str(),
        "special": (encoder.tokenizer.chat_template, encoder.tokenizer.special_tokens_map),
        "code": [Path(file).read_text() for file in (__file__, packing.__file__, splitting.__file__, sources.__file__)],
    }
    if isinstance(section.held_out, str):
        parts["held_out"] = sources.fingerprint(section.held_out)
        if parts["held_out"] == parts["source"]:
            raise InputError(f"data.held_out {section.held_out} holds the same as data.source; nothing is held out")
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _store(path: Path, splits: TextSplits) -> None:
    """Writes the splits; another process that does the same at this moment does no harm."""
    arrays: dict[str, Any] = {}
    for name, documents in (("train", splits.train), ("held_out", splits.held_out)):
        if documents is not None:
            arrays |= {f"{name}.{key}": getattr(documents, key) for key in ARRAYS}
            arrays[f"{name}.counts"] = np.array(dataclasses.astuple(documents.counts), dtype=np.int64)
    temporary = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"data: cannot write {path}: {error}; set data.cache to another folder") from None
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path) -> TextSplits | None:
    """What was stored, or None if it is missing or damaged, whatever the damage is: it is then made anew."""
    try:
        # A zip file: every array is checked against its CRC.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            names = {name.partition(".")[0] for name in stored}
            train, held_out = (_stored(stored, name) if name in names else None for name in ("train", "held_out"))
        return TextSplits(train, held_out, cached=True) if train else None
    except Exception:
        return None


def _stored(stored: Any, name: str) -> Documents:
    arrays = {key: stored[f"{name}.{key}"] for key in ARRAYS}
    return Documents(**arrays, counts=Counts(*stored[f"{name}.counts"].tolist()))
