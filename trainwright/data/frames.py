"""Tables from files, in pieces: pandas frames with text or float64 columns, whose index numbers the rows as people do.

.csv      with a header; separated by comma, semicolon or tab, whichever the header has most of; UTF-8 with or without a byte
          order mark. A row's number is its line in the file, so the first one below the header is row 2.
.parquet  whole numbers, floats, decimals and booleans become float64; text, dates and times become text; the first row is 1.
.npz      arrays as ``npz.PAIRS`` has them, or one alone: its columns are x0, x1, ...; the targets, if there, are y

A column without a name (the index that pandas writes) is left out.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from trainwright.data import npz
from trainwright.recipe import InputError, nearest

SUFFIXES = (".csv", ".parquet", ".npz")
DELIMITERS = ",;\t"
ROWS_AT_ONCE = 16_384
PANDAS_INDEX = "__index_level_0__"


def locate(source: str, built_in: Iterable[str] = ()) -> Path:
    """The existing file, or an InputError with the nearest name in its folder or among the built-in sources."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise InputError(f"data: {source} is a folder; name a file")
    files = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    known = f"; built in are {', '.join(built_in)}" if built_in else ""
    raise InputError(f"data: no such file: {source}{nearest(path.name, [*built_in, *files])}{known}")


def read(path: Path) -> Iterator[pd.DataFrame]:
    """The rows of a file, some thousands at a time.

    Raises:
        InputError: while iterating: another suffix, malformed, or no rows.
    """
    readers = {".csv": _csv, ".parquet": _parquet, ".npz": _npz}
    if path.suffix.lower() not in readers:
        raise InputError(f"data: {path} has none of the suffixes {' '.join(SUFFIXES)}")
    try:
        frames = (frame for frame in readers[path.suffix.lower()](path) if len(frame))
        first = next(frames, None)
        if first is None:
            raise InputError(f"data: {path} holds no rows")
        yield first
        yield from frames
    except OSError as error:
        raise InputError(f"data: cannot read {path}: {error}") from None


def read_whole(path: Path) -> pd.DataFrame:
    """All rows of a file, as ``read`` gives them."""
    return pd.concat(list(read(path)))


def require(wanted: Iterable[str], frame: pd.DataFrame, source: object, key: str = "") -> None:
    """That the frame has these columns, or an InputError with the nearest names."""
    known = [str(name) for name in frame.columns]
    absent = [name for name in wanted if name not in known]
    if absent:
        near = ", ".join(f"{name!r}{nearest(name, known)}" for name in absent)
        words = "no column" if len(absent) == 1 else "no columns"
        raise InputError(f"{key + ': ' if key else ''}{source} has {words} {near}; there are {', '.join(known)}")


def place(source: object, row: object, column: str) -> str:
    """'rows.csv, row 17, column 'age'': begins messages about a cell."""
    return f"{source}, row {row}, column {column!r}"


def counting(source: object) -> str:
    """How the rows of a source are numbered, to end a message with."""
    header = str(source).lower().endswith(".csv")
    return "(rows are the lines of the file; the header is row 1)" if header else "(the first row is row 1)"


def _csv(path: Path) -> Iterator[pd.DataFrame]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        delimiter = _delimiter(file)
        file.seek(0)
        records = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(records, [])]
            _check_header(header, path)
            numbered = _records(records, header, path)
            while chunk := list(itertools.islice(numbered, ROWS_AT_ONCE)):
                rows = [row for _, row in chunk]
                yield _named(pd.DataFrame(rows, [line for line, _ in chunk], header, dtype=str))
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path}, after line {records.line_num}: malformed CSV: {error}") from None


def _delimiter(file: Any) -> str:
    """Whichever parts the header into most names; a comma where none does."""
    try:
        header = file.readline()
        return max(DELIMITERS, key=lambda delimiter: len(next(csv.reader([header], delimiter=delimiter), [])))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{file.name}, line 1: malformed CSV: {error}; it must be UTF-8 text with a header") from None


def _records(records: Any, header: list[str], path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each record that isn't blank; a record may go over several lines, the first one counts."""
    line = records.line_num + 1
    for record in records:
        if record and len(record) != len(header):
            raise InputError(
                f"{path}, row {line}: {len(record)} cells for {len(header)} columns; put cells that hold the separator "
                f"in quotes {counting(path)}"
            )
        if record:
            yield line, [cell.strip() for cell in record]
        line = records.line_num + 1


def _check_header(header: list[str], path: Path) -> None:
    named = [name for name in header if name]
    if not named:
        raise InputError(f"{path}: no header; its first line must name the columns")
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path}: two columns are named {twice!r}; rename one")


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[[name for name in frame.columns if name and name != PANDAS_INDEX]]


def _parquet(path: Path) -> Iterator[pd.DataFrame]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_header(list(file.schema_arrow.names), path)
            first = 1
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                columns = {name: _arrow(batch.column(name)) for name in batch.schema.names}
                yield _named(pd.DataFrame(columns)).set_axis(range(first, first + len(batch)))
                first += len(batch)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from None


def _arrow(cells: Any) -> pd.Series:
    """float64 or text; anything else stays what it is, and is refused if the column is wanted."""
    import pyarrow as pa

    kind = cells.type
    if pa.types.is_dictionary(kind):
        cells, kind = cells.dictionary_decode(), kind.value_type
    if pa.types.is_boolean(kind):
        cells = cells.cast(pa.uint8())
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return pd.Series(cells.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_temporal(kind):
        return pd.Series(cells.cast(pa.string()).to_pylist(), dtype=str).str.strip()
    return pd.Series(cells.to_pylist(), dtype=object)


def _npz(path: Path) -> Iterator[pd.DataFrame]:
    arrays = npz.load(path)
    name = npz.inputs_name(arrays, path)
    inputs = arrays[name]
    inputs = inputs[:, None] if inputs.ndim == 1 else inputs
    if inputs.ndim != 2:
        raise InputError(f"{path}: {name!r} has the shape {inputs.shape}; a table has rows and columns: use data.kind: arrays")
    columns = {f"x{number}": _plain(inputs[:, number], path) for number in range(inputs.shape[1])}
    if any(pair[0] == name and pair[1] in arrays for pair in npz.PAIRS):
        targets = arrays[npz.pair_names(arrays, path)[1]]
        if targets.ndim > 2 or (targets.ndim == 2 and targets.shape[1] != 1):
            raise InputError(f"{path}: targets of the shape {targets.shape}; a table has one: use data.kind: arrays")
        columns["y"] = _plain(targets.reshape(-1), path)
    yield pd.DataFrame(columns).set_axis(range(1, len(inputs) + 1))


def _plain(array: np.ndarray, path: Path) -> pd.Series:
    """Float64 or text."""
    if array.dtype.kind not in "biufU":
        raise InputError(f"{path}: arrays of {array.dtype} can't be used; save numbers or text")
    if array.dtype.kind == "U":
        return pd.Series(array.tolist(), dtype=str).str.strip()
    return pd.Series(array.astype(np.float64))
