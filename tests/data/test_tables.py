"""Tables against pandas and scikit-learn, and what is said about wrong ones."""

import datetime
import math
import random
import re

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import datasets
from sklearn.compose import ColumnTransformer
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from trainwright.data import columns, frames, tables
from trainwright.data.examples import Preparation
from trainwright.recipe import InputError, TableData

PEOPLE = "age,city,income\n" + "".join(f"{20 + n},{'ABC'[n % 3]},{1000 + 7 * n * n}\n" for n in range(30))


def prepare(source, target="values", seed=0, **settings):
    return tables.prepare(TableData(kind="table", source=str(source), **settings), target, seed, lambda what, count: None)


@pytest.fixture
def people(tmp_path):
    path = tmp_path / "people.csv"
    path.write_text(PEOPLE)
    return path


def written(folder, text, name="t.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def rows_of(examples):
    """The lines of the file that a split holds."""
    return [int(name.removeprefix("row ")) for name in examples.names]


def normalised(splits, examples):
    return splits.preparation.inputs_on(torch.device("cpu"))(examples.inputs.take(np.arange(len(examples))))


@pytest.mark.parametrize(
    ("name", "load"),
    [("breast-cancer", datasets.load_breast_cancer), ("wine", datasets.load_wine), ("iris", datasets.load_iris)],
)
def test_built_in_classes(name, load):
    bundle = load()
    splits = prepare(name, "classes", held_out=0.2, test=0.2)
    assert splits.preparation.labels == tuple(bundle.target_names)
    for part in (splits.train, splits.held_out, splits.test):
        ids = np.array(rows_of(part)) - 1
        torch.testing.assert_close(part.inputs.tensor, torch.from_numpy(bundle.data[ids]).float())
        assert part.targets.tolist() == bundle.target[ids].tolist()
        assert part.targets.dtype == torch.int64
        shares = np.bincount(part.targets) - np.bincount(bundle.target) * len(part) / len(bundle.target)
        assert (np.abs(shares) < 1.5).all()


def test_built_in_values():
    bundle = datasets.load_diabetes()
    splits = prepare("diabetes", test=0.2)
    ids = np.array(rows_of(splits.train)) - 1
    scaler = StandardScaler().fit(bundle.data[ids])
    np.testing.assert_allclose(normalised(splits, splits.train), scaler.transform(bundle.data[ids]), atol=1e-5)
    assert splits.train.targets.flatten().tolist() == bundle.target[ids].tolist()
    np.testing.assert_allclose(splits.preparation.target_mean, bundle.target[ids].mean())
    np.testing.assert_allclose(splits.preparation.target_std, bundle.target[ids].std())
    assert (len(splits.train), len(splits.held_out), len(splits.test)) == (319, 35, 88)


def test_features_are_those_of_scikit_learn(people):
    splits = prepare_income(people, held_out=0.3)
    frame = pd.read_csv(people)
    transform = ColumnTransformer([("n", StandardScaler(), ["age"]), ("c", OneHotEncoder(handle_unknown="ignore"), ["city"])])
    train, held_out = (frame.iloc[np.array(rows_of(part)) - 2] for part in (splits.train, splits.held_out))
    transform.fit(train)
    np.testing.assert_allclose(normalised(splits, splits.train), transform.transform(train), atol=1e-5)
    np.testing.assert_allclose(normalised(splits, splits.held_out), transform.transform(held_out), atol=1e-5)
    assert splits.preparation.mean[1:] == (0.0, 0.0, 0.0)
    assert splits.preparation.std[1:] == (1.0, 1.0, 1.0)
    np.testing.assert_allclose(splits.preparation.target_mean, train["income"].mean())
    raw = prepare_income(people, normalize=False).preparation
    assert (raw.mean, raw.std, raw.target_mean, raw.target_std) == (None, None, None, None)


def prepare_income(source, **settings):
    return tables.prepare(
        TableData(kind="table", source=str(source), target="income", **settings), "values", 0, lambda what, count: None
    )


def prepare_class(source, column, **settings):
    section = TableData(kind="table", source=str(source), target=column, **settings)
    return tables.prepare(section, "classes", 0, lambda what, count: None)


@pytest.mark.parametrize(("separator", "encoding"), [(";", "utf-8"), ("\t", "utf-8"), (",", "utf-8-sig"), (";", "utf-8-sig")])
def test_dialects_give_the_same(people, tmp_path, separator, encoding):
    other = tmp_path / "other.csv"
    other.write_bytes(PEOPLE.replace(",", separator).replace("\n", "\r\n").encode(encoding))
    ours, theirs = prepare_income(people), prepare_income(other)
    assert ours.preparation == theirs.preparation
    assert torch.equal(ours.train.inputs.tensor, theirs.train.inputs.tensor)


def test_parquet_and_npz_give_the_same(people, tmp_path):
    frame = pd.read_csv(people)
    frame["city"] = frame["city"].astype("category")
    frame.to_parquet(tmp_path / "p.parquet")
    ours, theirs = prepare_income(people), prepare_income(tmp_path / "p.parquet")
    assert ours.preparation == theirs.preparation
    assert torch.equal(ours.train.inputs.tensor, theirs.train.inputs.tensor)
    assert [row - 1 for row in rows_of(ours.train)] == rows_of(theirs.train)
    np.savez(tmp_path / "p.npz", x=frame[["age"]], y=frame["income"])
    arrays = prepare(tmp_path / "p.npz")
    assert torch.equal(arrays.train.inputs.tensor, prepare_income(people, columns=["age"]).train.inputs.tensor)
    np.savez(tmp_path / "c.npz", inputs=frame[["age"]], targets=frame["city"].to_numpy(dtype=str))
    assert prepare(tmp_path / "c.npz", "classes").preparation.labels == ("A", "B", "C")


def test_parquet_types(tmp_path):
    frame = pd.DataFrame({"yes": [True, False] * 4, "n": pd.array([1, None] * 4, dtype="Int64"), "y": np.arange(8.0)})
    frame["day"] = [datetime.date(2020, 1, 1 + n % 2) for n in range(8)]
    frame["list"] = [[1]] * 8
    frame.to_parquet(tmp_path / "p.parquet")
    section = TableData(kind="table", source=str(tmp_path / "p.parquet"), target="y", missing="mean", held_out=None)
    with pytest.raises(InputError, match=r"column 'list': neither numbers nor text, but list; leave it out"):
        tables.prepare(section, "values", 0, lambda what, count: None)
    chosen = section.model_copy(update={"columns": ["yes", "n", "day"]})
    splits = tables.prepare(chosen, "values", 0, lambda what, count: None)
    assert splits.train.inputs.tensor[:2].tolist() == [[1, 1, 1, 0], [0, 1, 0, 1]]
    assert splits.preparation.details["columns"][2]["categories"] == ["2020-01-01", "2020-01-02"]


@pytest.mark.parametrize("seed", range(5))
def test_any_number_is_read_as_python_reads_it(tmp_path, seed):
    draw = random.Random(seed)
    values = [
        draw.choice([draw.gauss(0, 1), draw.randint(-99, 99), draw.gauss(0, 1) * 10 ** draw.randint(-20, 20)])
        for _ in range(50)
    ]
    path = written(tmp_path, "x,y\n" + "".join(f" {value!r} ,1\n" for value in values))
    read = columns.parse(frames.read_whole(path)["x"], "number", path)
    assert read.tolist() == [float(value) for value in values]


def test_rows_are_counted_as_lines(tmp_path):
    """A blank line, and a cell over three lines."""
    path = written(tmp_path, 'a,b,y\n1,"x\ny\nz",1\n\n2,x,2\n3,x,3\n')
    assert frames.read_whole(path).index.tolist() == [2, 6, 7]


def test_pieces_are_one_table(people, monkeypatch, tmp_path):
    pd.read_csv(people).to_parquet(tmp_path / "p.parquet")
    whole = [frames.read_whole(path) for path in (people, tmp_path / "p.parquet")]
    monkeypatch.setattr(frames, "ROWS_AT_ONCE", 7)
    pieces = [list(frames.read(path)) for path in (people, tmp_path / "p.parquet")]
    for one, many in zip(whole, pieces, strict=True):
        assert len(many) == 5
        pd.testing.assert_frame_equal(pd.concat(many), one)


def test_columns_without_a_name_are_left_out(tmp_path):
    frame = pd.DataFrame({"a": [1.0, 2, 3], "y": [1.0, 2, 4]}, index=[5, 6, 7])
    frame.to_csv(tmp_path / "i.csv")
    frame.to_parquet(tmp_path / "i.parquet")
    for name in ("i.csv", "i.parquet"):
        assert list(frames.read_whole(tmp_path / name).columns) == ["a", "y"]


@pytest.mark.parametrize(
    ("header", "cells", "labels"),
    [
        ("number", ["10", "9", "10.0"], ("9", "10")),
        ("text", ["b", "a", "b"], ("a", "b")),
        ("bool", ["True", "False"] * 2, ("False", "True")),
    ],
)
def test_labels_are_sorted(tmp_path, header, cells, labels):
    path = written(tmp_path, "x,y\n" + "".join(f"1,{cell}\n" for cell in cells * 4))
    splits = prepare_class(path, "y", held_out=None)
    assert splits.preparation.labels == labels
    assert [labels[number] for number in splits.train.targets] == [cell.removesuffix(".0") for cell in cells * 4]


def test_a_class_that_training_lacks(tmp_path):
    path = written(tmp_path, "x,y\n1,a\n2,a\n3,b\n4,b\n")
    other = written(tmp_path, "y,x\nc,1\na,2\n", "held.csv")
    splits = prepare_class(path, "y", held_out=str(other))
    assert splits.preparation.labels == ("a", "b", "c")
    assert splits.held_out.targets.tolist() == [2, 0]
    assert any("not in the training split, so never learned: c" in note for note in splits.notes)
    assert (len(splits.train), list(splits.held_out.names)) == (4, ["row 2", "row 3"])


def test_unknown_categories_count_as_none(tmp_path):
    path = written(tmp_path, "x,y\na,1\nb,2\n")
    other = written(tmp_path, "x,y\nc,1\na,2\n", "held.csv")
    splits = tables.prepare(
        TableData(kind="table", source=str(path), target="y", held_out=str(other)), "values", 0, lambda what, count: None
    )
    assert splits.held_out.inputs.tensor.tolist() == [[0, 0], [1, 0]]
    assert "x: 2 categories; 1 held-out or test rows hold others, which count as none of them" in splits.notes


def test_a_fraction_held_out_tells_nothing(tmp_path):
    """Neither its categories nor its numbers are known: each row has its own."""
    path = written(tmp_path, "x,n,income\n" + "".join(f"c{n:02},{n * n or ''},{n}\n" for n in range(20)))
    splits = prepare_income(path, held_out=0.4, missing="mean")
    city, number = splits.preparation.details["columns"]
    assert city["categories"] == [f"c{row - 2:02}" for row in rows_of(splits.train)]
    assert splits.held_out.inputs.tensor[:, :-1].abs().sum() == 0
    assert number["fill"] == pytest.approx(np.mean([(row - 2) ** 2 for row in rows_of(splits.train) if row > 2]))


def holes(folder):
    return written(folder, "age,city,income\n1,A,1\n,B,2\n5,,3\n12,B,4\nNA,A,5\n")


def test_missing_cells_count_as_the_mean(tmp_path):
    splits = prepare_income(holes(tmp_path), missing="mean", held_out=None)
    assert splits.train.inputs.tensor.tolist() == [[1, 1, 0], [6, 0, 1], [5, 0, 0], [12, 0, 1], [6, 1, 0]]
    scaler = StandardScaler().fit(np.array([[1], [np.nan], [5], [12], [np.nan]]))
    np.testing.assert_allclose(splits.preparation.std[0], scaler.scale_)
    assert splits.preparation.mean == (6.0, 0.0, 0.0)
    assert splits.notes[1:] == [
        "age: 2 empty cells count as the mean, 6",
        "city: 2 categories",
        "city: 1 empty cells count as none of the categories",
    ]


def test_rows_with_missing_cells_are_dropped(tmp_path):
    splits = prepare_income(holes(tmp_path), missing="drop", held_out=None)
    assert rows_of(splits.train) == [2, 5]
    assert "3 rows with empty cells dropped" in splits.notes


def test_the_mean_is_that_of_the_training_split(tmp_path):
    path = written(tmp_path, "x,y\n1,1\n3,2\n")
    other = written(tmp_path, "x,y\n,1\n100,2\n", "held.csv")
    section = TableData(kind="table", source=str(path), target="y", held_out=str(other), missing="mean")
    splits = tables.prepare(section, "values", 0, lambda what, count: None)
    assert splits.held_out.inputs.tensor.tolist() == [[2], [100]]
    assert splits.preparation.mean == (2.0,)


def test_limit_and_seed(people):
    few = prepare_income(people, limit=5)
    assert len(few.train) == 5
    ages = few.train.inputs.tensor[:, 0].double()
    assert math.isclose(few.preparation.mean[0], ages.mean())
    assert rows_of(prepare_income(people).held_out) == rows_of(few.held_out)
    section = TableData(kind="table", source=str(people), target="income")
    other = tables.prepare(section, "values", 1, lambda what, count: None)
    assert rows_of(other.held_out) != rows_of(few.held_out)


def test_new_files(people, tmp_path):
    splits = prepare_income(people, held_out=None)
    preparation = Preparation.load(splits.preparation.dump())
    new = written(tmp_path, "note,city,age\nhi,B,33\n,Z,-1\n", "new.csv")
    pd.read_csv(people).to_parquet(tmp_path / "p.parquet")
    found = list(tables.read_new([new, tmp_path / "p.parquet"], preparation))
    assert [name for name, _ in found[:3]] == ["new.csv row 2", "new.csv row 3", "p.parquet row 1"]
    assert found[0][1].tolist() == [33, 0, 1, 0]
    assert found[1][1].tolist() == [-1, 0, 0, 0]
    assert found[0][1].dtype == torch.float32
    assert torch.equal(torch.stack([sample for _, sample in found[2:]]), splits.train.inputs.tensor)


def test_new_files_are_read_in_pieces(people, tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "ROWS_AT_ONCE", 2)
    preparation = prepare_income(people).preparation
    new = written(tmp_path, "city,age\nA,1\nA,2\nA,three\n", "new.csv")
    found = tables.read_new([new], preparation)
    assert [next(found)[0], next(found)[0]] == ["new.csv row 2", "new.csv row 3"]
    with pytest.raises(InputError, match=r"new\.csv, row 4, column 'age': 'three' isn't a number; correct it \(rows"):
        next(found)


def test_new_empty_cells(tmp_path, people):
    new = written(tmp_path, "city,age\nA,\n,4\n", "new.csv")
    filled = prepare_income(holes(tmp_path), missing="mean", held_out=None).preparation
    assert [sample.tolist() for _, sample in tables.read_new([new], filled)] == [[6, 1, 0], [4, 0, 0]]
    with pytest.raises(InputError, match=r"row 2, column 'age': the cell is empty; fill it; the model was trained without"):
        list(tables.read_new([new], prepare_income(people).preparation))
    lacking = written(tmp_path, "town,age\nA,1\n", "lacking.csv")
    with pytest.raises(InputError, match=r"lacking\.csv has no column 'city'; there are town, age"):
        list(tables.read_new([lacking], filled))


MANY = "".join(f"{n},1\n" for n in range(20))
FAULTS = {
    "a word among numbers": ("x,y\n1,1\noops,2\n" + MANY, {}, "t.csv, row 3, column 'x': 'oops' isn't a number; correct it, "
        "empty it, or say data.types: {x: category} (rows are the lines of the file; the header is row 1)"),
    "declared": ("x,y\na,1\nb,2\n", {"types": {"x": "number"}}, "row 2, column 'x': 'a' isn't a number (nor are 1 below it)"),
    "infinite": ("x,y\n1,1\ninf,2\n" + MANY, {}, "row 3, column 'x': 'inf' isn't finite"),
    "too large": ("x,y\n1,1\n1e39,2\n" + MANY, {}, "row 3, column 'x': '1e39' is too large for float32"),
    "bad target": ("x,y\n" + MANY + "1,q\n", {}, "row 22, column 'y': 'q' isn't a number"),
    "text target": ("x,y\n1,a\n2,b\n", {}, "column 'y': values are to be predicted, but these are categories such "
        "as 'a'; set loss.name to cross_entropy"),
    "empty": ("x,y\n1,1\n,2\n", {}, "row 3, column 'x': the cell is empty; fill it, or set data.missing to mean or drop"),
    "nan": ("x,y\n1,1\nnan,2\n", {}, "row 3, column 'x': the cell is empty"),
    "empty target": ("x,y\n1,1\n2,\n", {"missing": "mean"}, "row 3, column 'y': the cell is empty; nothing can be learned"),
    "all dropped": ("x,y\n1,\n,2\n", {"missing": "drop"}, "each row has an empty cell"),
    "empty column": ("x,z,y\n1,,1\n2,,2\n", {"missing": "mean"}, "column 'z': empty in the whole training split; leave it out"),
    "no target": ("x,yy\n1,1\n", {}, "data.target: t.csv has no column 'y' (did you mean 'yy'?); there are x, yy"),
    "unknown column": ("x,y\n1,1\n", {"columns": ["xx"]}, "data.columns: t.csv has no column 'xx'"),
    "unknown type": ("x,y\n1,1\n", {"types": {"xx": "number"}}, "data.types: t.csv has no column 'xx'"),
    "idle type": ("x,z,y\n1,1,1\n", {"types": {"z": "number"}, "columns": ["x"]}, "data.types: 'z' has no effect"),
    "target as input": ("x,y\n1,1\n", {"columns": ["x", "y"]}, "data.columns: 'y' is what to predict"),
    "only a target": ("y\n1\n", {}, "has no column to predict 'y' from"),
    "ragged": ("x,y\n1,1\n2\n", {}, "t.csv, row 3: 1 cells for 2 columns"),
    "same name": ("x,x,y\n1,1,1\n", {}, "two columns are named 'x'"),
    "no rows": ("x,y\n", {}, "t.csv holds no rows"),
    "nothing": ("", {}, "no header"),
    "open quote": ('x,y\n1,"1\n', {}, "malformed CSV"),
    "commas": ('x;y\n"1,5";1\n"2,5";2\n', {}, "column 'x': numbers with decimal commas; write points"),
    "one row": ("x,y\n1,1\n", {}, "data.held_out is 0.1, but there is only one sample or document"),
    "too many categories": ("x,y\n" + "".join(f"c{n},{n}\n" for n in range(1200)), {},
        "column 'x': 1,080 categories in 1,080 training rows"),
    "no file": (None, {}, "data: no such file: t.csv"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_tables(tmp_path, monkeypatch, fault):
    text, settings, message = FAULTS[fault]
    monkeypatch.chdir(tmp_path)
    if text is not None:
        written(tmp_path, text)
    section = TableData(kind="table", source="t.csv", **{"target": "y", **settings})
    with pytest.raises(InputError, match=re.escape(message)):
        tables.prepare(section, "values", 0, lambda what, count: None)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["a"] * 5, "one class only, 'a'; there is nothing to tell apart"),
        (["1.5", "2", "1.5"], "1.5 is no class; to predict values set loss.name to mse, l1 or huber"),
        ([str(n) for n in range(40)], "40 different numbers in 40 samples are values rather than classes"),
    ],
)
def test_faults_of_classes(tmp_path, cells, message):
    path = written(tmp_path, "x,y\n" + "".join(f"1,{cell}\n" for cell in cells))
    with pytest.raises(InputError, match=re.escape(f"column 'y': {message}")):
        prepare_class(path, "y")


def test_declared_categories_may_be_numbers(tmp_path):
    path = written(tmp_path, "x,y\n" + "".join(f"{n % 2},{n}\n" for n in range(40)))
    splits = prepare_class(path, "y", types={"x": "category", "y": "category"}, held_out=None)
    assert len(splits.preparation.labels) == 40
    assert splits.preparation.details["columns"][0]["categories"] == ["0", "1"]
    pd.read_csv(path).to_parquet(tmp_path / "p.parquet")
    same = prepare_class(tmp_path / "p.parquet", "y", types={"x": "category", "y": "category"}, held_out=None)
    assert same.preparation == splits.preparation


def test_wrong_files(tmp_path, people):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "latin.csv").write_bytes("x,y\nä,1\n".encode("latin-1"))
    for name, message in [
        ("bad.parquet", "not a readable Parquet file"),
        ("latin.csv", "malformed CSV"),
        ("people.cvs", r"no such file: .*people\.cvs \(did you mean 'people\.csv'\?\); built in are diabetes"),
        ("", "is a folder; name a file"),
    ]:
        with pytest.raises(InputError, match=message):
            prepare_income(tmp_path / name)
    with pytest.raises(
        InputError, match=r"data\.target: say which column of .*people\.csv to predict; there are age, city, income"
    ):
        prepare(people)
    with pytest.raises(InputError, match=r"has none of the suffixes \.csv \.parquet \.npz"):
        prepare_income(written(tmp_path, "x", "t.xls"))
