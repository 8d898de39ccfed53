"""``predict`` over files and folders, with a reader and a model of our own."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainwright import build
from trainwright import predict as verb
from trainwright.data.examples import Preparation
from trainwright.predictor import Predictor
from trainwright.recipe import InputError, RunError, Task
from trainwright.report.style import palette

ANIMALS = ("ant", "bee", "cat", "dog", "eel", "fly", "gnu")


class Log(list):
    """What the predictor was asked for, in order."""


def fake(task, outputs, kind="images", log=None):
    """A predictor whose samples are the numbers that the files hold; a file without one is bad."""
    log = Log() if log is None else log

    def read(paths):
        for path in paths:
            log.append(path.name)
            if not path.read_text().lstrip("-").isdigit():
                raise InputError(f"{path} is damaged")
            yield str(path), torch.tensor([float(path.read_text())])

    def counted(raw):
        log.append(len(raw))
        return outputs(raw)

    return Predictor(Preparation(kind, (1,), task.labels), task, read, counted)


def one_hot(task):
    """Logits that say class = number."""
    return lambda raw: 9 * torch.eye(task.outputs)[raw[:, 0].long()]


@pytest.fixture
def use(monkeypatch):
    """Make a predictor the one of every run."""

    def use(predictor):
        monkeypatch.setattr(build, "load_predictor", lambda folder: predictor, raising=False)
        return predictor

    return use


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder as people have them, and the working directory beside it."""
    files = {"b.png": 1, "a.JPG": 0, "sub/c.jpeg": 2, "sub/.hidden.png": "x", ".git/d.png": "x", "notes.txt": "x"}
    for name, number in files.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    (tmp_path / "other.png").write_text("3")
    (tmp_path / "rows.csv").write_text("4")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return Path("photos")


TASK = Task("classes", 7, ANIMALS)
RUN = Path("run")


def test_folders_and_files_in_the_order_given_each_once(use, photos):
    use(fake(TASK, one_hot(TASK)))
    inputs = [Path("other.png"), photos, photos / "b.png", Path("photos/../other.png"), Path.cwd() / "photos" / "a.JPG"]
    result = verb.predict(RUN, inputs)
    expected = ["other.png", "photos/a.JPG", "photos/b.png", "photos/sub/c.jpeg"]
    assert [record["input"] for record in result["predictions"]] == expected
    assert [record["class"] for record in result["predictions"]] == ["dog", "ant", "bee", "cat"]
    assert (result["folder"], result["count"]) == ("run", 4)
    json.dumps(result, allow_nan=False)


def test_records_come_as_soon_as_their_batch_is_done(use, photos):
    log = Log()
    use(fake(TASK, one_hot(TASK), log=log))
    result = verb.predict(RUN, [photos, Path("other.png")], batch_size=2, emit=lambda record: log.append(record["class"]))
    assert log == ["a.JPG", "b.png", 2, "ant", "bee", "c.jpeg", "other.png", 2, "cat", "dog"]
    assert result == {"folder": "run", "count": 4}


def test_what_is_before_a_bad_file_comes_before_its_error(use, photos):
    use(fake(TASK, one_hot(TASK)))
    Path("photos/c.png").write_text("damaged")
    told = []
    with pytest.raises(InputError, match=r"photos/c.png is damaged"):
        verb.predict(RUN, [photos], emit=told.append)
    assert [record["class"] for record in told] == ["ant", "bee"]


@given(st.integers(0, 30), st.integers(1, 10))
def test_batches(count, size):
    samples = [(str(index), torch.tensor(index)) for index in range(count)]
    batches = list(verb.batched(iter(samples), size))
    assert [sample for batch in batches for sample in batch] == samples
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(0 < len(batch) <= size for batch in batches)


def test_classes_are_softmax_and_top_five(use, photos):
    logits = torch.randn(1, 7, generator=torch.Generator().manual_seed(0))
    use(fake(TASK, lambda raw: logits))
    (record,) = verb.predict(RUN, [Path("other.png")])["predictions"]
    values, places = logits.softmax(1)[0].sort(descending=True)
    assert [one["class"] for one in record["top"]] == [ANIMALS[place] for place in places[:5]]
    assert [one["probability"] for one in record["top"]] == pytest.approx(values[:5].tolist(), abs=1e-6)
    assert {"class": record["class"], "probability": record["probability"]} == record["top"][0]


def test_binary_tells_both_classes(use, photos):
    use(fake(Task("binary", 1, ("no", "yes")), lambda raw: torch.tensor([[-1.0], [2.0]])))
    first, second = verb.predict(RUN, [Path("other.png"), Path("photos/a.JPG")])["predictions"]
    no, yes = torch.tensor([1.0, 2.0]).sigmoid().tolist()
    assert [(one["class"], pytest.approx(one["probability"])) for one in first["top"]] == [("no", no), ("yes", 1 - no)]
    assert [(one["class"], pytest.approx(one["probability"])) for one in second["top"]] == [("yes", yes), ("no", 1 - yes)]


def test_values_by_their_labels(use, photos):
    use(fake(Task("values", 2, ("price", "area")), lambda raw: torch.cat([raw * 1.5, -raw], 1), kind="table"))
    (record,) = verb.predict(RUN, [Path("rows.csv")])["predictions"]
    assert record == {"input": "rows.csv", "values": {"price": 6.0, "area": -4.0}}
    assert verb.render(record) == "rows.csv  price 6  area -4"


def dense(labels, binary=False):
    """Masks whose first row is the class that the file says, the rest class 0."""
    task = Task("binary" if binary else "classes", 1 if binary else len(labels), labels, dense=True)

    def outputs(raw):
        masks = torch.zeros(len(raw), 4, 5, dtype=torch.int64)
        masks[:, 0] = raw.long()
        logits = torch.eye(len(labels))[masks].permute(0, 3, 1, 2)
        return logits[:, 1:] - 0.5 if binary else logits

    return task, outputs


@pytest.mark.parametrize("binary", [False, True])
def test_masks_are_written_with_a_palette(use, photos, binary):
    labels = ("ground", "stroke") if binary else ANIMALS
    use(fake(*dense(labels, binary)))
    Path("photos/sub/c.jpeg").write_text("1")
    inputs = [photos, Path("photos/sub")]
    predictions = verb.predict(RUN, inputs)["predictions"]
    assert [record["mask"] for record in predictions] == [f"run/predictions/{name}.png" for name in ("a", "b", "sub/c")]
    assert predictions[1]["classes"] == {label: {0: 0.75, 1: 0.25}.get(index, 0) for index, label in enumerate(labels)}
    assert predictions[0]["classes"][labels[0]] == 1.0
    with Image.open("run/predictions/b.png") as mask:
        assert mask.mode == "P"
        expected = np.zeros((4, 5), dtype=int)
        expected[0] = 1
        np.testing.assert_array_equal(np.asarray(mask), expected)
        np.testing.assert_array_equal(np.asarray(mask.convert("RGB")), palette(len(labels))[expected])
    assert sorted(path.name for path in Path("run/predictions").iterdir()) == ["a.png", "b.png", "sub"]


def test_masks_of_one_name_do_not_overwrite_each_other(use, photos):
    use(fake(*dense(ANIMALS)))
    Path("photos/b.jpg").write_text("0")
    inputs = [Path("photos/b.jpg"), Path("photos/b.png"), Path("photos/sub/c.jpeg"), Path("other.png")]
    predictions = verb.predict(RUN, inputs, out=Path("out"))["predictions"]
    assert [record["mask"] for record in predictions] == ["out/b.png", "out/b-2.png", "out/c.png", "out/other.png"]
    with Image.open("out/b-2.png") as mask:
        assert np.asarray(mask).max() == 1


def test_masks_of_rows_keep_their_names(use, photos):
    task, outputs = dense(ANIMALS)
    predictor = fake(task, outputs, kind="arrays")
    rows = [(f"x.npz row {index}", torch.tensor([float(index)])) for index in (1, 2)]
    use(Predictor(predictor.preparation, task, lambda paths: iter(rows), outputs))
    Path("x.npz").touch()
    predictions = verb.predict(RUN, [Path("x.npz")])["predictions"]
    assert [record["mask"] for record in predictions] == ["run/predictions/x.npz row 1.png", "run/predictions/x.npz row 2.png"]


def test_masks_never_overwrite_inputs(use, photos):
    use(fake(*dense(ANIMALS)))
    with pytest.raises(InputError, match=r"mask of photos/b.png would overwrite the input photos/b.png; name another folder"):
        verb.predict(RUN, [photos], out=photos)
    assert Path("photos/b.png").read_text() == "1"


def test_a_folder_that_can_not_be_written(use, photos):
    use(fake(*dense(ANIMALS)))
    with pytest.raises(InputError, match=r"rows.csv/other.png can't be written .*--out"):
        verb.predict(RUN, [Path("other.png")], out=Path("rows.csv"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite(use, photos, bad):
    use(fake(Task("values", 1, ("x",)), lambda raw: torch.tensor([[1.0], [bad]])))
    with pytest.raises(RunError, match=r"^photos/b.png: the model gives values that aren't finite"):
        verb.predict(RUN, [Path("photos/a.JPG"), Path("photos/b.png")])


WRONG = [
    ([], r"give files or folders .*trainwright predict RUN photo.png"),
    (["othr.png"], r"othr.png doesn't exist \(did you mean 'other.png'\?\)"),
    (["photo"], r"photo doesn't exist \(did you mean 'photos'\?\)"),
    (["nowhere/a.png"], r"nowhere/a.png doesn't exist: neither does the folder nowhere"),
    (["rows.csv"], r"rows.csv is .csv, but this run takes images \(.*\.jpeg .*\.png"),
    (["photos", "rows.csv"], r"rows.csv is .csv, but"),
    (["plain"], r"plain is a file without a suffix, but this run takes images"),
    (["empty"], r"empty holds nothing to predict: this run takes images .*, and none is in that folder or below"),
    (["photos/.git/../../empty", "photos"], r"empty holds nothing"),
]


@pytest.mark.parametrize(("inputs", "message"), WRONG, ids=[re.sub(r"\W+", "-", str(inputs)) for inputs, _ in WRONG])
def test_wrong_inputs_are_told_before_anything_is_read(use, photos, inputs, message):
    log = Log()
    use(fake(TASK, one_hot(TASK), log=log))
    Path("plain").touch()
    with pytest.raises(InputError, match=message):
        verb.predict(RUN, list(map(Path, inputs)))
    assert log == []


@pytest.mark.parametrize(
    ("kind", "file"), [("table", "r.csv"), ("series", "r.parquet"), ("arrays", "r.npz"), ("images", "r.tiff")]
)
def test_every_kind_takes_its_files(photos, kind, file):
    Path("mixed").mkdir()
    for name in ("r.csv", "r.parquet", "r.npz", "r.tiff", "README.md"):
        Path("mixed", name).touch()
    assert Path("mixed", file) in verb.find([Path("mixed")], kind)
    assert Path("mixed/README.md") not in verb.find([Path("mixed")], kind)
    with pytest.raises(InputError, match="this run takes"):
        verb.find([Path("mixed/README.md")], kind)


def test_a_whole_folder_is_not_held(use, photos):
    """The reader is never asked for more than a batch ahead."""
    log = Log()
    use(fake(TASK, one_hot(TASK), log=log))
    masks = verb.Masks(Path("out"), [], [])
    stream = verb.records(build.load_predictor(RUN), [Path("other.png")] * 100, 4, masks)
    next(stream)
    assert log == ["other.png"] * 4 + [4]


def likely(**shares):
    top = [{"class": name, "probability": share} for name, share in shares.items()]
    return {"input": "cat.png", **top[0], "top": top}


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (likely(cat=0.973, dog=0.021, eel=0.006), "cat.png  cat 97.3%  (dog 2.1%)"),
        (likely(cat=0.99999, dog=0.00001), "cat.png  cat 99.9%"),
        (likely(cat=1.0), "cat.png  cat 100.0%"),
        (likely(cat=0.0004, dog=0.0004), "cat.png  cat 0.0%"),
        ({"input": "row 17", "values": {"price": 1234567.0, "area": 0.1 + 0.2}}, "row 17  price 1.23457e+06  area 0.3"),
        (
            {"input": "a.png", "classes": {"sea": 0.2, "sun": 0.0, "sky": 0.8}, "mask": "out/a.png"},
            "a.png  sky 80.0%  sea 20.0%  out/a.png",
        ),
        ({"input": "a\nb\x1b\udcff.png", "values": {"é": 1.0}}, "a\\nb\\x1b\\udcff.png  é 1"),
    ],
)
def test_a_record_is_one_line(record, line):
    assert verb.render(record) == line


def test_emit_and_render_make_lines(use, photos, capsys):
    use(fake(TASK, one_hot(TASK)))
    verb.predict(RUN, [Path("other.png")], emit=lambda record: partial(print, flush=True)(verb.render(record)))
    assert capsys.readouterr().out == "other.png  dog 99.9%\n"
