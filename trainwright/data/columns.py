"""Columns of a table: numbers or categories, read from cells and made into features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from trainwright.data.frames import counting, place
from trainwright.recipe import InputError

Type = Literal["number", "category"]
EMPTY = ("", "na", "n/a", "nan", "null", "none")  # in a column of numbers, in upper or lower case; elsewhere only ''
SUSPICIOUS = 0.9  # a column with so many numbers was meant to hold nothing else
LARGEST = float(np.finfo(np.float32).max)
MOST_CATEGORIES = 1000


@dataclass(frozen=True)
class Column:
    """A column that a model predicts from.

    categories  those of the training split, sorted; each is a feature, 1 where the cell holds it and 0 elsewhere
    fill        what an empty cell of numbers counts as; None: empty cells are errors
    """

    name: str
    type: Type
    categories: tuple[str, ...] = ()
    fill: float | None = None

    @property
    def width(self) -> int:
        """How many features it makes."""
        return len(self.categories) if self.type == "category" else 1

    def features(self, cells: pd.Series) -> np.ndarray:
        """Cells as ``parse`` gives them, none of them empty unless there is a ``fill``; (n, width) float32."""
        if self.type == "category":
            # Unknown categories get the code -1, and so no 1 anywhere.
            codes = pd.Index(self.categories, dtype=str).get_indexer(cells)
            return (codes[:, None] == np.arange(self.width)).astype(np.float32)
        values = cells.to_numpy(dtype=np.float64)
        filled = values if self.fill is None else np.where(np.isnan(values), self.fill, values)
        return filled.astype(np.float32)[:, None]

    def unknown(self, cells: pd.Series) -> int:
        """How many cells hold a category that the training split doesn't have."""
        return int((~cells.isin([*self.categories, ""])).sum()) if self.type == "category" else 0


def share_of_numbers(cells: pd.Series) -> float:
    """How many of the cells that aren't empty are numbers, 0 to 1; 1 where all are empty."""
    if cells.dtype == object:
        return 0.0
    values, empty = _numbers(cells)
    return float(_good(values).sum() / max((~empty).sum(), 1)) if not empty.all() else 1.0


def type_of(cells: pd.Series, source: object) -> Type:
    """Number where every cell that isn't empty is one, else category.

    Raises:
        InputError: almost all cells are numbers, so that the others look like faults; or neither numbers nor text.
    """
    if cells.dtype == object:
        raise _unusable(cells, source)
    values, empty = _numbers(cells)
    good, filled = int(_good(values).sum()), int((~empty).sum())
    if good == filled:
        return "number"
    if good >= SUSPICIOUS * filled:
        raise _bad(cells, values, empty, source)
    commas = cells[~empty].str.fullmatch(r"[+-]?\d+,\d+") | _good(values[~empty])
    if commas.sum() >= SUSPICIOUS * filled:
        raise InputError(f"{source}, column {cells.name!r}: numbers with decimal commas; write points")
    return "category"


def parse(cells: pd.Series, type: Type, source: object, advice: str | None = None) -> pd.Series:
    """Numbers as float64, NaN where empty; categories as text, '' where empty. The index stays.

    ``advice`` says what to do about a bad cell.

    Raises:
        InputError: a cell in a column of numbers that isn't one, is not finite, or exceeds float32.
    """
    if type == "category" and cells.dtype != object:
        return _texts(cells)
    if cells.dtype == object:
        raise _unusable(cells, source)
    values, empty = _numbers(cells)
    if (~_good(values) & ~empty).any():
        raise _bad(cells, values, empty, source, advice)
    return pd.Series(np.where(empty, np.nan, values), cells.index, name=cells.name)


def empty(cells: pd.Series) -> np.ndarray:
    """Which cells, as ``parse`` gives them, are empty; (n,) bool."""
    found: np.ndarray = (cells.isna() if cells.dtype == np.float64 else cells == "").to_numpy(dtype=bool)
    return found


def fit(cells: pd.Series, type: Type, fill: bool, source: object) -> Column:
    """A column with the categories, or the mean where empty cells are filled, of the training split's cells.

    Raises:
        InputError: nothing but empty cells; more than 1,000 categories.
    """
    name, filled = str(cells.name), cells[~empty(cells)]
    if not len(filled):
        raise InputError(f"{source}, column {name!r}: empty in the whole training split; leave it out with data.columns")
    if type == "number":
        return Column(name, type, fill=float(filled.mean()) if fill else None)
    categories = sorted(map(str, filled.unique()))
    if len(categories) > MOST_CATEGORIES:
        raise InputError(
            f"{source}, column {name!r}: {len(categories):,} categories in {len(cells):,} training rows, such as "
            f"{categories[0]!r}; a category is a feature, and more than {MOST_CATEGORIES:,} are hardly meant: leave the column "
            "out with data.columns"
        )
    return Column(name, type, tuple(categories))


def to_details(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """As plain data for ``Preparation.details``."""
    return [{"name": c.name, "type": c.type, "categories": list(c.categories), "fill": c.fill} for c in columns]


def from_details(details: Sequence[dict[str, Any]]) -> list[Column]:
    """What ``to_details`` gave."""
    return [Column(**{**entry, "categories": tuple(entry["categories"])}) for entry in details]


def _numbers(cells: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """(values float64, NaN where not a number; which cells are empty)."""
    if pd.api.types.is_numeric_dtype(cells.dtype):
        return cells.to_numpy(dtype=np.float64), cells.isna().to_numpy(dtype=bool)
    values = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64)
    nothing = cells.isna() | cells.str.lower().isin(EMPTY)
    return values, nothing.to_numpy(dtype=bool)


def _good(values: np.ndarray) -> np.ndarray:
    return np.abs(values) <= LARGEST  # false for NaN


def _texts(cells: pd.Series) -> pd.Series:
    if pd.api.types.is_numeric_dtype(cells.dtype):
        cells = cells.map(lambda value: "" if value != value else f"{value:.0f}" if value.is_integer() else repr(value))
    return cells.fillna("").astype(str)


def _unusable(cells: pd.Series, source: object) -> InputError:
    found = type(cells.iloc[0]).__name__
    return InputError(f"{source}, column {cells.name!r}: neither numbers nor text, but {found}; leave it out with data.columns")


def _bad(cells: pd.Series, values: np.ndarray, empty: np.ndarray, source: object, advice: str | None = None) -> InputError:
    """About the first cell that isn't a number."""
    bad = np.flatnonzero(~_good(values) & ~empty)
    cell, name, value = str(cells.iloc[bad[0]]), str(cells.name), values[bad[0]]
    fault = "isn't a number" if np.isnan(value) else "isn't finite" if np.isinf(value) else "is too large for float32"
    more = f" (nor are {len(bad) - 1} below it)" if len(bad) > 1 and np.isnan(value) else ""
    advice = advice or f"correct it, empty it, or say data.types: {{{name}: category}}"
    where = place(source, cells.index[bad[0]], name)
    return InputError(f"{where}: {cell!r} {fault}{more}; {advice} {counting(source)}")
