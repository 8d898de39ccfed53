"""Time series as samples: windows of the past, and what followed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from trainwright.data import columns, frames, splitting, targets
from trainwright.data.examples import Examples, Preparation, Splits, Target, moments
from trainwright.recipe import InputError, SeriesData

BUILT_IN = {"sunspots": Path(__file__).with_name("sunspots.csv")}  # yearly, 1700-2008; NGDC/NOAA, public domain
ADVICE = "correct it, or leave the column out with data.columns"
TIMES = ("date", "datetime", "time", "timestamp", "year")  # a column of such a name tells when, whatever it holds


@dataclass(frozen=True)
class Windows:
    """All windows of so many steps, none of them stored: (time, columns) float32 rows, a sample (window, columns)."""

    rows: Tensor
    window: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.window, self.rows.shape[1])

    def __len__(self) -> int:
        return len(self.rows) - self.window + 1

    def take(self, ids: np.ndarray) -> Tensor:
        """(len(ids), window, columns) float32, a copy."""
        return _windows(self.rows, self.window).index_select(0, torch.from_numpy(ids)).view(len(ids), *self.shape)


@dataclass(frozen=True)
class After(Sequence[str]):
    """'after 1999': each sample by the last time that it sees; made when asked for."""

    times: np.ndarray

    def __len__(self) -> int:
        return len(self.times)

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> After: ...
    def __getitem__(self, key: int | slice) -> str | After:
        return After(self.times[key]) if isinstance(key, slice) else f"after {self.times[key]}"


@dataclass(frozen=True)
class _Series:
    """What was read: (time, columns) and (time, targets) float32, and the name of each step ('1999', or 'row 17')."""

    inputs: Tensor
    wanted: Tensor
    times: np.ndarray

    def between(self, first: int, end: int) -> _Series:
        return _Series(self.inputs[first:end], self.wanted[first:end], self.times[first:end])


def prepare(section: SeriesData, target: Target, seed: int, progress: Callable[[str, int], None]) -> Splits:
    """Windows (n, window, columns) float32, and the next steps of the target columns (n, horizon * targets), step after step.

    The splits follow each other: training, held-out, test. What one split forecasts no other does, nor are its means and
    deviations those of any row but the training period's. The first windows of a later split do look back into the period
    before it, as anybody does who forecasts. ``section.limit`` keeps the training windows nearest to the held-out ones.
    A split that is a file is a series of its own. ``seed`` has no effect: time divides.

    A column of text or dates, or one named as in ``TIMES``, names the steps and is no number, unless the recipe names it.

    Raises:
        InputError: classes are wanted; a series that is too short or not in order of time; a column or cell that is wrong.
    """
    if target == "classes":
        raise InputError(f"loss: a series forecasts values; set loss.name to {targets.VALUE_LOSSES}")
    path = BUILT_IN.get(section.source) or frames.locate(section.source, BUILT_IN)
    frame = _read(path, progress)
    names, wanted = _columns(section, frame)
    files = splitting.files(section, section.source)
    parts = _divided(section, _series(frame, names, wanted, path))
    for key, file in files.items():
        other = BUILT_IN.get(file) or frames.locate(file, BUILT_IN)
        parts[key] = _series(_read(other, progress), names, wanted, other)
        _check_length(len(parts[key].times), section, f"data.{key}: {file}")
    examples = {key: _examples(part, section.window, section.horizon) for key, part in parts.items()}
    normalize = section.normalize
    mean, std = moments(parts["train"].inputs, -1) if normalize else (None, None)
    target_mean, target_std = moments(parts["train"].wanted, -1) if normalize else (None, None)
    labels = tuple(f"{name} +{step}" for step in range(1, section.horizon + 1) for name in wanted)
    preparation = Preparation(
        "series",
        (section.window, len(names)),
        labels,
        mean,
        std,
        None if target_mean is None else target_mean * section.horizon,
        None if target_std is None else target_std * section.horizon,
        {"columns": names, "target": wanted, "window": section.window, "horizon": section.horizon},
    )
    return Splits(
        examples["train"],
        examples.get("held_out"),
        examples.get("test"),
        target,
        preparation,
        [_what(section, frame, names, wanted), *(_period(key, part, section) for key, part in parts.items())],
    )


def read_new(paths: Sequence[Path], preparation: Preparation) -> Iterator[tuple[str, Tensor]]:
    """('rows.csv after 2008', its last rows (window, columns) float32, not normalised): what is to be forecast from each file.

    Raises:
        InputError: a file or a cell that is wrong, or fewer rows than a window.
    """
    window, names = preparation.details["window"], preparation.details["columns"]
    for path in paths:
        frame = _read(frames.locate(str(path)), lambda words, count: None)
        if len(frame) < window:
            raise InputError(f"{path}: {len(frame)} rows, but the model looks at the last {window}; give it more of the past")
        series = _series(frame, names, [], path)
        yield f"{path.name} after {series.times[-1]}", series.inputs[-window:]


def _read(path: Path, progress: Callable[[str, int], None]) -> pd.DataFrame:
    pieces, count = [], 0
    for piece in frames.read(path):
        pieces.append(piece)
        count += len(piece)
        progress(f"reading {path.name}", count)
    return pd.concat(pieces)


def _columns(section: SeriesData, frame: pd.DataFrame) -> tuple[list[str], list[str]]:
    """(columns that are looked at, columns that are forecast)."""
    wanted = [section.target] if isinstance(section.target, str) else section.target
    frames.require(section.columns or [], frame, section.source, "data.columns")
    frames.require(wanted or [], frame, section.source, "data.target")
    named = {*(section.columns or []), *(wanted or [])}
    numbers = [name for name in map(str, frame.columns) if name in named or not _tells_time(frame[name])]
    names = list(dict.fromkeys(numbers if section.columns is None else section.columns))
    if not names:
        raise InputError(f"data.columns: {section.source} has no column of numbers; there are {', '.join(frame.columns)}")
    return names, list(dict.fromkeys(wanted or names))


def _tells_time(cells: pd.Series) -> bool:
    """Whether a column is text, or named as a time; some words among numbers are left for ``parse`` to refuse."""
    return str(cells.name).lower() in TIMES or columns.share_of_numbers(cells) < columns.SUSPICIOUS


def _series(frame: pd.DataFrame, names: Sequence[str], wanted: Sequence[str], source: object) -> _Series:
    """The numbers, each checked."""
    used = list(dict.fromkeys([*names, *wanted]))
    frames.require(used, frame, source)
    parsed = {name: columns.parse(frame[name], "number", source, ADVICE).to_numpy() for name in used}
    for name, values in parsed.items():
        if np.isnan(values).any():
            where = frames.place(source, frame.index[int(np.isnan(values).argmax())], name)
            raise InputError(f"{where}: the cell is empty; a series needs every step: fill it {frames.counting(source)}")

    def stacked(chosen: Sequence[str]) -> Tensor:
        arrays = [parsed[name].astype(np.float32) for name in chosen]
        return torch.from_numpy(np.stack(arrays, axis=1) if arrays else np.empty((len(frame), 0), dtype=np.float32))

    return _Series(stacked(names), stacked(wanted), _times(frame, used, source))


def _times(frame: pd.DataFrame, used: Sequence[str], source: object) -> np.ndarray:
    """What each step is called, (time,) text: by the first column that tells the time, else by its row."""
    others = [str(name) for name in frame.columns if name not in used]
    name = next((name for name in others if _tells_time(frame[name])), None)
    if name is None:
        return np.array([f"row {row}" for row in frame.index], dtype=object)
    cells = frame[name]
    _check_order(cells, source)
    return columns.parse(cells, "category", source).to_numpy(dtype=object)


def _check_order(cells: pd.Series, source: object) -> None:
    """That numbers or ISO 8601 dates never go back; other words tell nothing of their order."""
    times = pd.to_numeric(cells, errors="coerce")
    if times.isna().any():
        times = pd.to_datetime(cells, format="ISO8601", errors="coerce", utc=True).dt.tz_localize(None)
    instants = times.to_numpy()
    back = np.flatnonzero(instants[1:] < instants[:-1])  # false where a time isn't known
    if len(back):
        at = int(back[0]) + 1
        where = frames.place(source, cells.index[at], str(cells.name))
        raise InputError(
            f"{where}: {str(cells.iloc[at])!r} comes after {str(cells.iloc[at - 1])!r}, back in time; sort the file, oldest "
            f"first {frames.counting(source)}"
        )


def _divided(section: SeriesData, whole: _Series) -> dict[str, _Series]:
    """The periods of the splits; those after the first begin a window early, to look back."""
    window, horizon = section.window, section.horizon
    fractions = {key: part for key in ("test", "held_out") if (part := splitting.fraction(section, key)) is not None}
    _check_length(len(whole.times), section, f"data: {section.source}", 1 + len(fractions))
    end, found = len(whole.times), {}
    for left, (key, part) in zip(reversed(range(len(fractions))), fractions.items(), strict=True):
        # Steps to forecast: at least a horizon in this split, and in each of those that come before.
        steps = min(max(round(part * (end - window)), horizon), end - window - (left + 1) * horizon)
        found[key] = whole.between(end - steps - window, end)
        end -= steps
    first = 0 if section.limit is None else max(0, end - (section.limit + window + horizon - 1))
    return {"train": whole.between(first, end), **dict(reversed(found.items()))}


def _check_length(count: int, section: SeriesData, where: str, splits: int = 1) -> None:
    least = section.window + splits * section.horizon
    if count < least:
        each = f" in each of {splits} splits" if splits > 1 else ""
        raise InputError(
            f"{where} has {count} steps, but a window of {section.window} and a horizon of {section.horizon}{each} need "
            f"{least}; give a longer series, or lower data.window or data.horizon"
        )


def _examples(part: _Series, window: int, horizon: int) -> Examples:
    """Views of the rows: a forecast of the last window is known, too."""
    known = len(part.inputs) - horizon
    return Examples(
        Windows(part.inputs[:known], window), _windows(part.wanted[window:], horizon), After(part.times[window - 1 : known])
    )


def _windows(rows: Tensor, length: int) -> Tensor:
    """(n, length * columns): each ``length`` rows that follow each other, a view."""
    width = rows.shape[1]
    return rows.reshape(-1).unfold(0, length * width, width)


def _what(section: SeriesData, frame: pd.DataFrame, names: Sequence[str], wanted: Sequence[str]) -> str:
    """The note about the source."""
    rest = [str(name) for name in frame.columns if name not in {*names, *wanted}]
    left_out = f" (left out: {', '.join(rest)})" if rest else ""
    return (
        f"{section.source}: {len(frame)} steps; {section.window} steps of {', '.join(names)}{left_out} forecast "
        f"{section.horizon} of {', '.join(wanted)}"
    )


def _period(key: str, part: _Series, section: SeriesData) -> str:
    """The note about a split."""
    count = len(part.times) - section.window - section.horizon + 1
    return f"{splitting.counts({key: count})}, which forecast {part.times[section.window]} to {part.times[-1]}"
