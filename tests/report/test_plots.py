"""The pictures of ``evaluate``: which are drawn for what, and that degenerate data only leaves pictures out."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import datasets
from sklearn.linear_model import LogisticRegression

from trainwright.recipe import InputError, RunError, Task
from trainwright.report import plots, style

CLASSES = ["confusion.png", "roc.png", "precision_recall.png", "calibration.png", "mistakes.csv"]
GALLERIES = ["mistakes.png", "uncertain.png"]
LABELS = ("cat", "$dog$", "_a very long name of an animal that nobody has ever seen")


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    """Fewer pixels take less time."""
    monkeypatch.setattr(style, "DPI", 25)


def write(folder, task, outputs, targets, pictures=None, split="held_out", names=None, **options):
    def shown(ids):
        return None if pictures is None else pictures[ids]

    names = names or [f"row {index}" for index in range(len(targets))]
    return plots.write(folder, task, outputs, targets, names, shown, {"accuracy": 0.5}, split, **options)


def names_of(paths):
    assert all(path.is_file() for path in paths)
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width == style.WIDTH * style.DPI
                assert len(image.convert("L").getcolors()) > 10, "an empty picture"
    return [path.name for path in paths]


def rows(folder):
    with (folder / "mistakes.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def classes(count=60, outputs=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, outputs, (count,), generator=generator)
    return torch.randn(count, outputs, generator=generator) + 1.5 * torch.eye(outputs)[targets], targets


def images(count, channels=3, height=8, width=12):
    return torch.randint(0, 256, (count, channels, height, width), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def masks(count=4, outputs=3, size=10):
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(0, outputs, (count, size, size), generator=generator)
    logits = torch.randn(count, outputs, size, size, generator=generator)
    return logits + 2 * torch.eye(outputs)[targets].permute(0, 3, 1, 2), targets


def test_classes_with_images(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "DPI", 150)
    outputs, targets = classes()
    paths = write(tmp_path / "new" / "folder", Task("classes", 3, LABELS), outputs, targets, images(60))
    assert names_of(paths) == [CLASSES[0], *GALLERIES, *CLASSES[1:]]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(path.name for path in paths)


def test_classes_of_a_table(tmp_path):
    outputs, targets = classes(outputs=40, count=400)
    labels = tuple(f"_the ${index}$ class with a long name" for index in range(40))
    assert names_of(write(tmp_path, Task("classes", 40, labels), outputs, targets)) == CLASSES


def test_binary_from_a_real_model(tmp_path):
    data = datasets.load_breast_cancer()
    inputs = (data.data - data.data.mean(0)) / data.data.std(0)
    model = LogisticRegression(C=0.001).fit(inputs[::4], data.target[::4])
    logits = torch.tensor(model.decision_function(inputs)).float()[:, None]
    task = Task("binary", 1, tuple(data.target_names.tolist()))
    assert names_of(write(tmp_path, task, logits, torch.tensor(data.target))) == CLASSES
    wrong = np.flatnonzero(model.predict(inputs) != data.target)
    sure = model.predict_proba(inputs).max(1)
    found = rows(tmp_path)
    assert {row["name"] for row in found} == {f"row {index}" for index in wrong}
    assert [float(row["probability"]) for row in found] == pytest.approx(sorted(sure[wrong], reverse=True), abs=1e-5)
    first = int(found[0]["name"].removeprefix("row "))
    assert found[0]["actual"] == data.target_names[data.target[first]]
    assert found[0]["predicted"] == data.target_names[model.predict(inputs[[first]])[0]]


@pytest.mark.parametrize("values", [1, 8])
def test_values(tmp_path, values):
    outputs, targets = torch.randn(2, 50, values).unbind()
    paths = write(tmp_path, Task("values", values, tuple(f"$_{index}" for index in range(values))), outputs, targets)
    assert names_of(paths) == ["predicted.png", "residuals.png", "mistakes.csv"]
    found = rows(tmp_path)
    assert len(found) == 50 * values
    size = (outputs - targets).abs() / targets.std(0, correction=0)
    sample, value = divmod(int(size.argmax()), values)
    assert found[0]["name"] == f"row {sample}"
    assert found[0]["value"] == f"$_{value}"
    assert float(found[0]["actual"]) == pytest.approx(float(targets[sample, value]), rel=1e-4)
    assert float(found[0]["residual"]) == pytest.approx(float(outputs[sample, value] - targets[sample, value]), rel=1e-4)


@pytest.mark.parametrize("count", [1, 30, 700])
def test_forecast(tmp_path, count):
    targets = torch.linspace(0, 1, count)[:, None]
    paths = write(tmp_path, Task("values", 1, ("spots",)), targets + 0.1, targets, in_order=True)
    assert names_of(paths) == ["predicted.png", "forecast.png", "residuals.png", "mistakes.csv"]


@pytest.mark.parametrize("pictures", [None, images(4, 3, 10, 10), images(4, 1, 20, 20)])
def test_masks(tmp_path, pictures):
    outputs, targets = masks()
    paths = write(tmp_path, Task("classes", 3, LABELS, dense=True), outputs, targets, pictures)
    assert names_of(paths) == ["masks.png", "iou.png", "mistakes.csv"]
    share = (outputs.argmax(1) != targets).float().mean((1, 2))
    assert rows(tmp_path)[0] == {"name": f"row {share.argmax()}", "wrong": f"{share.max():.6f}"}


def test_binary_masks(tmp_path):
    outputs, targets = masks(outputs=2)
    difference = outputs[:, 1:] - outputs[:, :1]
    write(tmp_path / "one", Task("binary", 1, ("ground", "stroke"), dense=True), difference, targets)
    write(tmp_path / "two", Task("classes", 2, ("ground", "stroke"), dense=True), outputs, targets)
    for name in ("masks.png", "iou.png", "mistakes.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_many_classes_of_masks(tmp_path):
    outputs, targets = masks(outputs=60, count=2, size=16)
    assert len(write(tmp_path, Task("classes", 60, dense=True), outputs, targets, images(2, 3, 16, 16))) == 3


@pytest.mark.parametrize("ignored", [-100, 255])
def test_pixels_that_do_not_count(tmp_path, ignored):
    outputs, targets = masks(count=2)
    targets[0] = ignored
    task = Task("classes", 3, LABELS, dense=True)
    assert len(write(tmp_path, task, outputs, targets)) == 3
    assert rows(tmp_path)[-1] == {"name": "row 0", "wrong": "0.000000"}
    assert [path.name for path in write(tmp_path, task, outputs, torch.full_like(targets, ignored))] == [
        "masks.png",
        "mistakes.csv",
    ]


def test_samples_that_do_not_count(tmp_path):
    outputs, targets = classes(20)
    outputs[::2], targets[::2] = torch.tensor([9.0, 0, 0]), -100
    write(tmp_path / "with", Task("classes", 3, LABELS), outputs, targets, images(20))
    names = [f"row {index}" for index in range(1, 20, 2)]
    write(tmp_path / "without", Task("classes", 3, LABELS), outputs[1::2], targets[1::2], images(20)[1::2], names=names)
    for path in (tmp_path / "with").iterdir():
        assert path.read_bytes() == (tmp_path / "without" / path.name).read_bytes(), path.name
    paths = write(tmp_path / "none", Task("classes", 3), outputs, torch.full_like(targets, -100))
    assert [path.name for path in paths] == ["mistakes.csv"]


@pytest.mark.parametrize("kind", ["classes", "binary"])
def test_one_class_only_has_no_curves(tmp_path, kind):
    outputs = torch.linspace(-2, 2, 10)[:, None]
    outputs = outputs if kind == "binary" else torch.cat([outputs, -outputs, outputs], 1)
    task = Task(kind, outputs.shape[1], ("no", "yes") if kind == "binary" else LABELS)
    paths = write(tmp_path, task, outputs, torch.zeros(10, dtype=torch.int64))
    assert names_of(paths) == ["confusion.png", "calibration.png", "mistakes.csv"]


def test_a_class_that_does_not_occur_is_left_out(tmp_path):
    outputs, targets = classes(30)
    paths = write(tmp_path, Task("classes", 3, LABELS), outputs, targets.clamp(max=1))
    assert names_of(paths) == CLASSES


def test_without_mistakes_there_is_no_picture_of_them(tmp_path):
    targets = torch.arange(9) % 3
    write(tmp_path, Task("classes", 3, LABELS), 50 * torch.eye(3)[1 - targets], targets, images(9))
    assert (tmp_path / "mistakes.png").is_file()
    (tmp_path / "mine.png").write_bytes(b"")
    paths = write(tmp_path, Task("classes", 3, LABELS), 50 * torch.eye(3)[targets], targets, images(9))
    assert "mistakes.png" not in [path.name for path in paths]
    assert not (tmp_path / "mistakes.png").exists(), "it is of an earlier call"
    assert (tmp_path / "mine.png").exists()
    assert rows(tmp_path) == []


@pytest.mark.parametrize("kind", ["classes", "binary", "values", "masks"])
def test_one_sample(tmp_path, kind):
    outputs, targets = classes(1)
    if kind == "masks":
        outputs, targets = masks(1)
    elif kind == "binary":
        outputs, targets = outputs[:, :1], targets.clamp(max=1)
    elif kind == "values":
        targets = outputs.clone()
    task = Task("classes" if kind == "masks" else kind, outputs.shape[1], dense=kind == "masks")
    assert names_of(write(tmp_path, task, outputs, targets, images(1, 3, 10, 10)))


def test_constant_values(tmp_path):
    zeros = torch.zeros(5, 1)
    assert names_of(write(tmp_path, Task("values", 1), zeros, zeros, in_order=True))
    assert names_of(write(tmp_path, Task("values", 1), zeros + 1e30, zeros - 1e30))


def test_names_that_no_font_and_no_file_likes(tmp_path):
    outputs, targets = classes(12)
    names = [f"\udcff猫\n{index},\"'🐈.png" for index in range(12)]
    labels = ("猫\n犬", "a,b", "\x1b[31m")
    write(tmp_path, Task("classes", 3, labels), outputs, targets, images(12), names=names)
    assert {row["actual"] for row in rows(tmp_path)} <= set(labels)


def test_the_look_is_ours_whatever_matplotlibrc_says(tmp_path):
    import matplotlib

    outputs, targets = classes()
    task = Task("classes", 3, LABELS)
    first = write(tmp_path / "a", task, outputs, targets)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "text.parse_math": True, "figure.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        second = write(tmp_path / "b", task, outputs, targets)
        assert dict(matplotlib.rcParams) == before
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_failing_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    outputs, targets = classes()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="full"):
        write(tmp_path, Task("classes", 3), outputs, targets)
    assert list(tmp_path.iterdir()) == []


def test_wrong_values_are_told(tmp_path):
    outputs, targets = classes()
    task = Task("classes", 3)
    with pytest.raises(InputError, match="held-out data holds no samples"):
        write(tmp_path, task, outputs[:0], targets[:0])
    outputs[[4, 9], 1] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(
        RunError, match=r"outputs of the model aren't finite for 2 of 60 samples of the test data; first: row 4"
    ):
        write(tmp_path, task, outputs, targets, split="test")
    values = torch.zeros(5, 2)
    with pytest.raises(InputError, match=r"targets aren't finite for 1 of 5 samples of the held-out data; first: row 3"):
        write(tmp_path, Task("values", 2), values, values.index_fill(0, torch.tensor([3]), torch.nan))
    assert list(tmp_path.iterdir()) == []
