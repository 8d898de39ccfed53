"""Rows of text data from files. Every fault of the data is an InputError that names the file and the line or row.

.jsonl     one JSON object a line; blank lines are skipped
.json      one list of objects
.csv       with a header line
.parquet   any columns
.txt       the whole file is ONE document (blank lines only part paragraphs): ``too_long: split`` cuts it into
           pieces, ``truncate`` keeps its beginning alone
folder     what Hugging Face ``Dataset.save_to_disk`` wrote; of a DatasetDict the split ``train``

Nothing in the data is executed. Rows come one by one; only a .json or .txt file is in memory as a whole.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainwright.data import docstrings
from trainwright.recipe import Fields, InputError, nearest

BUILT_IN = "python-docstrings"
SUFFIXES = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "txt"}
COMMON_PAIRS = (("instruction", "output"), ("question", "answer"), ("input", "output"), ("query", "response"))


@dataclass(frozen=True)
class Row:
    """One row: ``values`` by column; ``where`` ('chats.jsonl, line 3') begins every message about it."""

    where: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Which columns hold a document: (messages,), (prompt, completion) or (text,)."""

    form: Literal["messages", "completion", "text"]
    names: tuple[str, ...]


FORMS = (
    Columns("messages", ("messages",)),
    Columns("completion", ("prompt", "completion")),
    Columns("text", ("text",)),
)


def read_rows(source: str, format: str = "auto", limit: int | None = None) -> Iterator[Row]:
    """The first ``limit`` rows of a file, of a saved dataset, or of the built-in source ``python-docstrings``.

    Raises:
        InputError: at once if there is no such file or the format doesn't fit; while iterating for faults inside.
    """
    if source == BUILT_IN:
        if format != "auto":
            raise InputError(f"data.format has no effect on {BUILT_IN}: remove it")
        rows = _numbered(docstrings.chats(), f"{BUILT_IN}, function")
    else:
        path = locate(source)
        rows = READERS[_resolve_format(path, format)](path)
    return _guarded(itertools.islice(rows, limit), source)


def fingerprint(source: str) -> str:
    """A digest of the content: equal for equal data wherever it lies, different after any change."""
    if source == BUILT_IN:
        return docstrings.fingerprint()
    path = locate(source)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(str(file.relative_to(path)).encode() + _digest(file) for file in files)).hexdigest()


def locate(source: str) -> Path:
    """The existing path, or an InputError with the nearest name in its folder."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not path.parent.is_dir():
        raise InputError(f"data: no such file: {source}; there is no folder {path.parent} either")
    names = [file.name for file in path.parent.iterdir()]
    raise InputError(f"data: no such file: {source}{nearest(path.name, [*names, BUILT_IN])}")


def find_columns(fields: Fields, row: Row) -> Columns:
    """The columns named in the recipe; else messages, prompt and completion, or text, in this order."""
    if named := _named_columns(fields):
        return named
    for columns in FORMS:
        if row.values.keys() >= set(columns.names):
            return columns
    usual = (pair for pair in COMMON_PAIRS if row.values.keys() >= set(pair))
    prompt, completion = next(usual, ("COLUMN", "COLUMN"))
    raise InputError(
        f"{row.where}: neither messages, nor prompt and completion, nor text; the columns are {', '.join(row.values)}. "
        f"Say which to use, for instance data.fields: {{prompt: {prompt}, completion: {completion}}}"
    )


def text_of(row: Row, name: str) -> str:
    """The text in a column, or an InputError."""
    return _checked_text(_value(row, name), f"{row.where}: {name}")


def messages_of(row: Row, name: str) -> list[dict[str, Any]]:
    """The chat in a column as [{role, content, ...}], without keys that are null, or an InputError."""
    messages = _value(row, name)
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{row.where}: {name} must be a list of {{role, content}}, not {_described(messages)}")
    for number, message in enumerate(messages, 1):
        where = f"{row.where}: {name}, message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"{where} must be an object with role and content, not {_described(message)}")
        for key in ("role", "content"):
            _checked_text(message[key], f"{where}: {key}")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _named_columns(fields: Fields) -> Columns | None:
    """What ``data.fields`` says, which must be one form of document; None if it says nothing."""
    pair = (fields.prompt or "prompt", fields.completion or "completion")
    named = [Columns("messages", (fields.messages,))] if fields.messages else []
    named += [Columns("completion", pair)] if fields.prompt or fields.completion else []
    named += [Columns("text", (fields.text,))] if fields.text else []
    if len(named) > 1:
        forms = " and ".join(columns.form for columns in named)
        raise InputError(f"data.fields names columns of {forms}; documents have one form, remove the others")
    return named[0] if named else None


def _digest(file: Path) -> bytes:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").digest()
    except OSError as error:
        raise InputError(f"data: cannot read {file}: {error}") from None


def _value(row: Row, name: str) -> Any:
    if name not in row.values:
        raise InputError(f"{row.where}: no column {name!r}{nearest(name, row.values)}; the columns are {', '.join(row.values)}")
    return row.values[name]


def _checked_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where} must be text, not {_described(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half a surrogate pair at character {error.start}, which is no text") from None
    return value


def _described(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with the keys {', '.join(map(str, value)) or '(none)'}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "null" if value is None else f"{type(value).__name__} {value!r:.40}"


def _resolve_format(path: Path, format: str) -> str:
    """The format's name, from the suffix if it is auto; a folder is always a saved dataset."""
    found = "datasets" if path.is_dir() else SUFFIXES.get(path.suffix.lower())
    chosen = found if format == "auto" else format
    if chosen is None:
        raise InputError(f"data: {path} has none of the suffixes {' '.join(SUFFIXES)}; say what it is with data.format")
    if path.is_dir() != (chosen == "datasets"):
        raise InputError(f"data: {path} is a {'folder' if path.is_dir() else 'file'}, but data.format is {chosen}")
    return chosen


def _guarded(rows: Iterator[Row], source: str) -> Iterator[Row]:
    """The rows; no rows at all, or a file that can't be read, is an InputError."""
    try:
        first = next(rows, None)
        if first is None:
            raise InputError(f"data: {source} holds no data")
        yield first
        yield from rows
    except OSError as error:
        raise InputError(f"data: cannot read {source}: {error}") from None


def _decoded(data: bytes, path: Path, line: int = 1) -> str:
    """UTF-8, with or without byte order mark; ``line`` is the number of the first line in ``data``."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise InputError(f"{path}, line {line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None


def _parsed(text: str, path: Path, line: int, hint: str) -> Any:
    """JSON; ``line`` is the number of the first line of ``text``."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"{where}: malformed JSON: {error.msg}{hint}") from None
    except (RecursionError, ValueError) as error:  # too deeply nested; an integer of thousands of digits
        raise InputError(f"{path}, line {line}: malformed JSON: {error}") from None


def _numbered(values: Iterable[Any], where: str) -> Iterator[Row]:
    return (_object(value, f"{where} {number}") for number, value in enumerate(values, 1))


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be an object with named columns, not {_described(value)}")
    return Row(where, value)


def _read_jsonl(path: Path) -> Iterator[Row]:
    hint = "; every line must be one whole object (a file that is one list is data.format: json)"
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if text := _decoded(line, path, number).rstrip():
                yield _object(_parsed(text, path, number, hint), f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[Row]:
    hint = "; one list of objects is expected (an object a line is data.format: jsonl)"
    items = _parsed(_decoded(path.read_bytes(), path), path, 1, hint) if path.stat().st_size else []
    if not isinstance(items, list):
        raise InputError(f"{path}: must be a list of objects, not {_described(items)}")
    yield from _numbered(items, f"{path}, item")


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents above 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        records = csv.reader(file, strict=True)
        try:
            header = next(records, [])
            if len(set(header)) < len(header):
                raise InputError(f"{path}, line 1: two columns have the same name: {', '.join(header)}")
            line = records.line_num + 1
            for record in records:
                if record and len(record) != len(header):
                    raise InputError(f"{path}, line {line}: {len(record)} values for {len(header)} columns")
                if record:
                    yield Row(f"{path}, line {line}", dict(zip(header, record, strict=True)))
                line = records.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path}, after line {records.line_num}: malformed CSV: {error}") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _arrow_rows(file.iter_batches(batch_size=1024), path)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from None


def _read_datasets(path: Path) -> Iterator[Row]:
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: not a folder written by datasets' save_to_disk: {error}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise InputError(f"{path}: no split 'train'; name the folder of one of: {', '.join(map(str, loaded))}")
        loaded = loaded["train"]
    # Arrow tables rather than decoded rows: an image column beside the text must not be decoded.
    yield from _arrow_rows(loaded.with_format("arrow").iter(batch_size=1024), path)


def _arrow_rows(batches: Iterable[Any], path: Path) -> Iterator[Row]:
    return _numbered((row for batch in batches for row in batch.to_pylist()), f"{path}, row")


def _read_txt(path: Path) -> Iterator[Row]:
    text = _decoded(path.read_bytes(), path)
    if text.strip():
        yield Row(str(path), {"text": text})


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "txt": _read_txt,
    "datasets": _read_datasets,
}
