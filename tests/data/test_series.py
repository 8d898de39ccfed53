"""Series against NumPy's sliding windows: what a split may see, and what it may not."""

import re
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from trainwright.data import series
from trainwright.data.examples import Preparation
from trainwright.recipe import InputError, SeriesData


def prepare(source="sunspots", read_as="values", **settings):
    return series.prepare(SeriesData(kind="series", source=str(source), **settings), read_as, 0, lambda what, count: None)


def saved(folder, rows, **arrays):
    path = folder / "s.npz"
    np.savez(path, **({"x": rows} if rows is not None else arrays))
    return path


def everything(examples):
    return examples.inputs.take(np.arange(len(examples))).numpy()


def test_sunspots():
    splits = prepare(test=0.2)
    assert (len(splits.train), len(splits.held_out), len(splits.test)) == (205, 23, 57)
    assert splits.preparation.shape == (24, 1)
    assert splits.preparation.labels == ("sunspots +1",)
    assert (splits.train.names[0], splits.test.names[-1]) == ("after 1723", "after 2007")
    assert splits.test.names[-2:][1] == "after 2007"
    assert splits.test.targets[-1].item() == pytest.approx(2.9)
    assert splits.train.inputs.take(np.array([0]))[0, :2, 0].tolist() == [5.0, 11.0]
    assert splits.notes[:2] == [
        "sunspots: 309 steps; 24 steps of sunspots (left out: year) forecast 1 of sunspots",
        "205 training samples, which forecast 1724 to 1928",
    ]


PARTS = st.none() | st.floats(0.05, 0.9)


@given(
    st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), PARTS, PARTS, st.integers(0, 60), st.none() | st.integers(1, 30)
)
@settings(max_examples=80, deadline=None)
def test_windows_and_splits(tmp_path_factory, window, horizon, width, held_out, test, more, limit):
    steps = window + 3 * horizon + more
    rows = np.random.default_rng(steps).normal(size=(steps, width)).astype(np.float32)
    path = saved(tmp_path_factory.mktemp("s"), rows)
    splits = prepare(path, window=window, horizon=horizon, held_out=held_out, test=test, limit=limit)
    past = sliding_window_view(rows, window, axis=0).transpose(0, 2, 1)
    future = sliding_window_view(rows, horizon, axis=0).transpose(0, 2, 1).reshape(-1, horizon * width)
    end = steps
    for part in (splits.test, splits.held_out, splits.train):  # backwards in time, each where the one after begins
        if part is None:
            continue
        first = end - len(part) - horizon + 1
        assert len(part) > 0
        np.testing.assert_array_equal(part.targets, future[first : end - horizon + 1])
        np.testing.assert_array_equal(everything(part), past[first - window : end - horizon - window + 1])
        assert list(part.names) == [f"after row {row}" for row in range(first, first + len(part))]
        end = first
    trained = len(splits.train) + horizon - 1
    possible = end + trained - window - horizon + 1
    assert len(splits.train) == min(limit or possible, possible)
    seen = rows[end - window : end + trained].astype(np.float64)
    np.testing.assert_allclose(splits.preparation.mean, seen.mean(0), atol=1e-6)
    np.testing.assert_allclose(splits.preparation.std, seen.std(0), atol=1e-6)
    np.testing.assert_allclose(splits.preparation.target_mean, np.tile(seen.mean(0), horizon), atol=1e-6)
    np.testing.assert_allclose(splits.preparation.target_std, np.tile(seen.std(0), horizon), atol=1e-6)
    if test is not None:
        wanted = round(test * (steps - window))
        left = 1 + (held_out is not None)
        assert len(splits.test) + horizon - 1 == min(max(wanted, horizon), steps - window - left * horizon)


def test_windows_take_no_memory(tmp_path):
    path = saved(tmp_path, np.zeros((200_000, 2), dtype=np.float32))
    tracemalloc.start()
    splits = prepare(path, window=1000, horizon=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(splits.train) > 150_000
    assert splits.train.targets.untyped_storage().nbytes() == 200_000 * 2 * 4
    assert splits.train.inputs.take(np.array([5, 6])).shape == (2, 1000, 2)
    assert peak < 100e6


def test_some_columns_forecast_others(tmp_path):
    frame = pd.DataFrame({"a": np.arange(40.0), "b": np.arange(40.0) * 2, "c": np.arange(40.0) * 3})
    frame.to_parquet(tmp_path / "s.parquet")
    splits = prepare(tmp_path / "s.parquet", columns=["b", "a"], target="c", window=2, horizon=2, held_out=None)
    assert splits.preparation.labels == ("c +1", "c +2")
    assert everything(splits.train)[1].tolist() == [[2, 1], [4, 2]]
    assert splits.train.targets[1].tolist() == [9, 12]
    both = prepare(tmp_path / "s.parquet", target=["c", "a"], window=2, horizon=2, held_out=None)
    assert both.preparation.labels == ("c +1", "a +1", "c +2", "a +2")
    assert both.train.targets[1].tolist() == [9, 3, 12, 4]
    np.testing.assert_allclose(both.preparation.target_mean, [58.5, 19.5] * 2)
    values = both.preparation.values(both.preparation.targets(both.train.targets))
    torch.testing.assert_close(values, both.train.targets)
    assert prepare(tmp_path / "s.parquet", normalize=False).preparation.mean is None


@pytest.mark.parametrize("name", ["s.csv", "s.parquet"])
def test_dates_are_names(tmp_path, name):
    days = pd.date_range("2020-01-30", periods=30)
    frame = pd.DataFrame({"when": days if name == "s.parquet" else days.strftime("%Y-%m-%d"), "x": np.arange(30), "note": "n"})
    frame.to_csv(tmp_path / name, index=False) if name == "s.csv" else frame.to_parquet(tmp_path / name)
    splits = prepare(tmp_path / name, window=3)
    assert splits.preparation.details["columns"] == ["x"]
    assert splits.train.names[0].startswith("after 2020-02-01")


def test_a_named_year_is_a_number():
    frame = pd.read_csv(series.BUILT_IN["sunspots"])
    splits = prepare(columns=["year", "sunspots"], target="sunspots", held_out=None)
    assert everything(splits.train)[0, :, 0].tolist() == frame["year"][:24].tolist()
    assert splits.train.names[0] == "after row 25"  # line 25 of the file: nothing tells the time any more


def test_files_are_series_of_their_own(tmp_path):
    for name, start in [("a.csv", 0), ("b.csv", 100)]:
        (tmp_path / name).write_text("x\n" + "".join(f"{start + n}\n" for n in range(10)))
    splits = prepare(tmp_path / "a.csv", test=str(tmp_path / "b.csv"), window=4, held_out=None)
    assert (len(splits.train), len(splits.test)) == (6, 6)
    assert everything(splits.test)[0].flatten().tolist() == [100, 101, 102, 103]
    assert splits.preparation.mean == (4.5,)


def test_new_files(tmp_path):
    preparation = Preparation.load(prepare().preparation.dump())
    new = tmp_path / "new.csv"
    new.write_text("sunspots,year\n" + "".join(f"{n},{1900 + n}\n" for n in range(30)))
    [(name, sample)] = series.read_new([new], preparation)
    assert name == "new.csv after 1929"
    assert sample.flatten().tolist() == list(range(6, 30))
    assert (sample.dtype, sample.shape) == (torch.float32, preparation.shape)
    new.write_text("sunspots,year\n1,1900\n")
    with pytest.raises(InputError, match=r"new\.csv: 1 rows, but the model looks at the last 24"):
        list(series.read_new([new], preparation))
    new.write_text("sun,year\n1,1900\n" * 1)
    with pytest.raises(InputError, match=r"new\.csv"):
        list(series.read_new([new], preparation))


LINES = "".join(f"2020-01-{day:02},{day}\n" for day in range(1, 31))
FAULTS = {
    "short": ("t,x\n" + LINES[:65], {}, "has 5 steps, but a window of 24 and a horizon of 1 in each of 2 splits need 26; give"),
    "backwards": ("t,x\n2020-01-02,1\n2020-01-01,2\n", {}, "row 3, column 't': '2020-01-01' comes after '2020-01-02', back in"),
    "years": ("year,x\n2000,1\n1999,2\n", {}, "row 3, column 'year': '1999' comes after '2000', back in time; sort"),
    "empty": ("t,x\n" + LINES + "2020-02-01,\n", {}, "row 32, column 'x': the cell is empty; a series needs every step"),
    "word": ("t,x\n" + LINES + "2020-02-01,?\n", {}, "s.csv, row 32, column 'x': '?' isn't a number; correct it, or leave"),
    "no numbers": ("t,x\na,b\n", {}, "data.columns: s.csv has no column of numbers; there are t, x"),
    "text": ("t,x\n" + LINES, {"columns": ["t"]}, "column 't': '2020-01-01' isn't a number"),
    "unknown": ("t,x\n" + LINES, {"target": "xx"}, "data.target: s.csv has no column 'xx'"),
    "no file": ("x\n1\n", {"source": "sunspot"}, "no such file: sunspot (did you mean 'sunspots'?); built in are sunspots"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_series(tmp_path, monkeypatch, fault):
    text, settings, message = FAULTS[fault]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        prepare(**{"source": "s.csv", **settings})


def test_classes_are_refused():
    with pytest.raises(InputError, match=r"loss: a series forecasts values; set loss\.name to mse, l1 or huber"):
        prepare(read_as="classes")
