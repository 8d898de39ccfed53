"""Tables as samples: a row each, its columns made into features, one column to predict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from trainwright.data import columns, frames, splitting, targets
from trainwright.data.columns import Column
from trainwright.data.examples import Examples, InMemory, Preparation, Splits, Target, moments
from trainwright.recipe import InputError, TableData

BUILT_IN = {"diabetes": "progression", "breast-cancer": "diagnosis", "wine": "cultivar", "iris": "species"}  # their targets


@dataclass(frozen=True)
class _Source:
    """A file, or a built-in table, with its rows as read; ``labels`` are the classes in their usual order, if it has one."""

    name: str
    frame: pd.DataFrame
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Plan:
    """What is done with every source alike."""

    target: str
    types: dict[str, columns.Type]  # of the columns to predict from, in their order
    target_type: columns.Type
    missing: str


def prepare(section: TableData, target: Target, seed: int, progress: Callable[[str, int], None]) -> Splits:
    """Rows as float32 features (n, features), divided into splits; everything fitted is fitted on the training split.

    Numbers are normalised (``Preparation.mean`` and ``std``); categories become a feature each, 1 or 0, which are not.
    An empty cell filled with the mean leaves mean and deviation as the other cells have them.

    Args:
        target: how the loss wants the target column: classes (n,) int64, or values (n, 1) float32.
        progress: called with what is done, and the number of rows.

    Raises:
        InputError: a file, a column or a cell that is wrong.
    """
    source = _source(section.source, progress)
    plan = _plan(section, source, target)
    files = splitting.files(section, section.source)
    sources = [source, *(_source(file, progress) for file in files.values())]
    tables = [_parsed(each, plan) for each in sources]
    labels, wanted = _targets(sources, tables, plan, target)
    classes = wanted[0].numpy() if target == "classes" else None
    sizes = {key: len(table) for key, table in zip(files, tables[1:], strict=True)}
    ids = splitting.divide(section, seed, len(tables[0]), classes, sizes)
    rows = {key: tables[number].iloc[chosen] for key, (number, chosen) in ids.items()}
    fitted = _fitted(plan, rows["train"], source.name)
    examples = {
        key: Examples(InMemory(_features(fitted, rows[key])), wanted[number][torch.from_numpy(chosen)], _names(rows[key]))
        for key, (number, chosen) in ids.items()
    }
    train = examples["train"]
    mean, std = _moments(fitted, rows["train"]) if section.normalize else (None, None)
    details = {"columns": columns.to_details(fitted), "target": plan.target, "missing": plan.missing}
    scale = targets.scale(train.targets, section.normalize)
    preparation = Preparation("table", train.inputs.shape, labels, mean, std, *scale, details)
    dropped = sum(len(each.frame) for each in sources) - sum(map(len, tables))
    counts = splitting.counts({key: len(split) for key, split in examples.items()})
    notes = [
        f"{section.source}: {len(fitted)} columns make {preparation.shape[0]} features, to predict {plan.target!r}; {counts}",
        *([f"{dropped} rows with empty cells dropped"] if dropped else []),
        *_column_notes(fitted, list(rows.values())),
        *(targets.absent(labels, train.targets) if target == "classes" else []),
    ]
    return Splits(train, examples.get("held_out"), examples.get("test"), target, preparation, notes)


def read_new(paths: Sequence[Path], preparation: Preparation) -> Iterator[tuple[str, Tensor]]:
    """('rows.csv row 17', features (features,) float32, not normalised) of each row of new files, as they are read.

    The target column need not be there, and other columns are ignored. A category that training didn't have is all zeros.

    Raises:
        InputError: a file or a cell that is wrong; an empty cell, unless training filled them with the mean.
    """
    fitted = columns.from_details(preparation.details["columns"])
    for path in paths:
        for frame in frames.read(frames.locate(str(path))):
            frames.require((column.name for column in fitted), frame, path)
            parsed = pd.DataFrame(
                {c.name: columns.parse(frame[c.name], c.type, path, "correct it") for c in fitted}, frame.index
            )
            if preparation.details["missing"] != "mean":
                _refuse_empty(parsed, path, "fill it; the model was trained without data.missing: mean")
            features = _features(fitted, parsed)
            yield from ((f"{path.name} {name}", row) for name, row in zip(_names(parsed), features, strict=True))


def _source(name: str, progress: Callable[[str, int], None]) -> _Source:
    """A built-in table, or a file with all its rows."""
    if name in BUILT_IN:
        return _built_in(name)
    pieces, count = [], 0
    for piece in frames.read(frames.locate(name, BUILT_IN)):
        pieces.append(piece)
        count += len(piece)
        progress(f"reading {name}", count)
    return _Source(name, pd.concat(pieces))


def _built_in(name: str) -> _Source:
    """The tables that come with scikit-learn, their classes by name."""
    from sklearn import datasets

    load = {"diabetes": "load_diabetes", "breast-cancer": "load_breast_cancer", "wine": "load_wine", "iris": "load_iris"}
    bundle = getattr(datasets, load[name])()
    frame = pd.DataFrame(bundle.data, range(1, len(bundle.data) + 1), list(bundle.feature_names))
    labels = tuple(map(str, bundle.get("target_names", ())))
    frame[BUILT_IN[name]] = pd.Series([labels[code] for code in bundle.target], frame.index, str) if labels else bundle.target
    return _Source(name, frame.astype({BUILT_IN[name]: str if labels else float}), labels)


def _plan(section: TableData, source: _Source, target: Target) -> _Plan:
    """Which columns are used, and as what."""
    known = [str(name) for name in source.frame.columns]
    wanted = section.target or BUILT_IN.get(source.name) or ("y" if source.name.lower().endswith(".npz") else None)
    if wanted is None:
        raise InputError(f"data.target: say which column of {source.name} to predict; there are {', '.join(known)}")
    frames.require([wanted], source.frame, source.name, "data.target")
    frames.require(section.columns or [], source.frame, source.name, "data.columns")
    frames.require(section.types, source.frame, source.name, "data.types")
    names = [name for name in known if name != wanted] if section.columns is None else list(dict.fromkeys(section.columns))
    if wanted in names:
        raise InputError(f"data.columns: {wanted!r} is what to predict, so it can't be predicted from: remove it")
    if not names:
        raise InputError(f"data.columns: {source.name} has no column to predict {wanted!r} from")
    unused = next((name for name in section.types if name not in [*names, wanted]), None)
    if unused is not None:
        raise InputError(f"data.types: {unused!r} has no effect, since data.columns leaves it out: remove it")
    types = {name: section.types.get(name) or columns.type_of(source.frame[name], source.name) for name in names}
    return _Plan(wanted, types, _target_type(section, source, wanted, target), section.missing)


def _target_type(section: TableData, source: _Source, name: str, target: Target) -> columns.Type:
    """Number for values, and for classes that are numbers."""
    declared = section.types.get(name)
    if target == "classes":
        return declared or columns.type_of(source.frame[name], source.name)
    if declared == "category" or columns.type_of(source.frame[name], source.name) == "category":
        example = source.frame[name].iloc[0]
        raise InputError(
            f"{source.name}, column {name!r}: values are to be predicted, but these are categories such as {str(example)!r}; "
            f"set loss.name to {targets.CLASS_LOSSES}, or data.target to a column of numbers"
        )
    return "number"


def _parsed(source: _Source, plan: _Plan) -> pd.DataFrame:
    """The columns that are used, without rows that are dropped."""
    types = {**plan.types, plan.target: plan.target_type}
    frames.require(types, source.frame, source.name)
    table = pd.DataFrame(
        {name: columns.parse(source.frame[name], type, source.name) for name, type in types.items()}, source.frame.index
    )
    if plan.missing == "drop":
        holes = np.any([columns.empty(table[name]) for name in types], axis=0)
        if holes.all():
            raise InputError(f"{source.name}: each row has an empty cell, so data.missing: drop leaves none")
        return table[~holes]
    advice = "fill it, or set data.missing to mean or drop"
    _refuse_empty(table if plan.missing == "error" else table[[]], source.name, advice)
    _refuse_empty(table[[plan.target]], source.name, "nothing can be learned from it: set data.missing to drop")
    return table


def _refuse_empty(table: pd.DataFrame, source: object, advice: str) -> None:
    """An InputError about the first row with an empty cell."""
    holes = {name: int(np.argmax(mask)) for name in table.columns if (mask := columns.empty(table[name])).any()}
    if holes:
        name = min(holes, key=lambda name: holes[name])
        where = frames.place(source, table.index[holes[name]], name)
        raise InputError(f"{where}: the cell is empty; {advice} {frames.counting(source)}")


def _targets(
    sources: Sequence[_Source], tables: Sequence[pd.DataFrame], plan: _Plan, target: Target
) -> tuple[tuple[str, ...], list[Tensor]]:
    """Labels, and the targets of each table."""
    cells = [table[plan.target] for table in tables]
    if target == "values":
        return (plan.target,), [torch.from_numpy(part.to_numpy(dtype=np.float32)[:, None]) for part in cells]
    parts = [part.to_numpy(dtype=np.float64 if plan.target_type == "number" else np.str_) for part in cells]
    return targets.classes(parts, f"{sources[0].name}, column {plan.target!r}", sources[0].labels)


def _features(fitted: Sequence[Column], rows: pd.DataFrame) -> Tensor:
    """(n, features) float32."""
    return torch.from_numpy(np.concatenate([column.features(rows[column.name]) for column in fitted], axis=1))


def _names(rows: pd.DataFrame) -> list[str]:
    return [f"row {number}" for number in rows.index]


def _fitted(plan: _Plan, train: pd.DataFrame, source: str) -> list[Column]:
    return [columns.fit(train[name], type, plan.missing == "mean", source) for name, type in plan.types.items()]


def _moments(fitted: Sequence[Column], train: pd.DataFrame) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each feature over the cells that aren't empty; 0 and 1 for categories."""
    pairs: list[tuple[float, float]] = []
    for column in fitted:
        if column.type == "category":
            pairs += [(0.0, 1.0)] * column.width
        else:
            (mean,), (std,) = moments(torch.from_numpy(train[column.name].to_numpy(dtype=np.float32)), 0)
            pairs.append((mean, std))
    return tuple(mean for mean, _ in pairs), tuple(std for _, std in pairs)


def _column_notes(fitted: Sequence[Column], rows: Sequence[pd.DataFrame]) -> list[str]:
    """What became of categories and empty cells."""
    notes = []
    for column in fitted:
        if column.type == "category":
            unknown = sum(column.unknown(part[column.name]) for part in rows)
            beyond = f"; {unknown} held-out or test rows hold others, which count as none of them" if unknown else ""
            notes.append(f"{column.name}: {len(column.categories)} categories{beyond}")
        holes = sum(int(columns.empty(part[column.name]).sum()) for part in rows)
        if holes:
            filled = "as none of the categories" if column.fill is None else f"as the mean, {column.fill:.6g}"
            notes.append(f"{column.name}: {holes} empty cells count {filled}")
    return notes
