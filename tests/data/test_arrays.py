"""Arrays against NumPy, and what is said about wrong ones."""

import io
import pickle
import re

import numpy as np
import pytest
import torch

from trainwright.data import arrays
from trainwright.data.examples import Preparation
from trainwright.recipe import ArrayData, InputError

DRAW = np.random.default_rng(0)
X, Y = DRAW.normal(3, 2, (30, 4, 2)), np.arange(30) % 3


def saved(folder, name="a.npz", **named):
    np.savez(folder / name, **named)
    return folder / name


def prepare(source, target="classes", **settings):
    return arrays.prepare(ArrayData(kind="arrays", source=str(source), **settings), target, 0, lambda what, count: None)


def ids(examples):
    return np.array([int(name.removeprefix("row ")) - 1 for name in examples.names])


@pytest.mark.parametrize(("x", "y"), [("x", "y"), ("inputs", "targets"), ("X", "y"), ("x_train", "y_train")])
def test_classes(tmp_path, x, y):
    splits = prepare(saved(tmp_path, **{x: X, y: Y}), held_out=0.2, test=0.2)
    assert [len(part) for part in (splits.train, splits.held_out, splits.test)] == [19, 5, 6]
    assert splits.preparation.labels == ("0", "1", "2")
    for part in (splits.train, splits.held_out, splits.test):
        np.testing.assert_array_equal(part.inputs.tensor, X[ids(part)].astype(np.float32))
        assert part.targets.tolist() == Y[ids(part)].tolist()
        assert part.targets.dtype == torch.int64
    assert np.bincount(splits.test.targets).tolist() == [2, 2, 2]
    seen = X[ids(splits.train)].astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(splits.preparation.mean, seen.mean((0, 1)))
    np.testing.assert_allclose(splits.preparation.std, seen.std((0, 1)))
    assert splits.preparation.shape == (4, 2)
    assert prepare(saved(tmp_path, x=X, y=Y), normalize=False).preparation.mean is None
    assert splits.notes == [
        f"{tmp_path}/a.npz: samples (4, 2) float32, to predict 3 classes; 19 training, 5 held-out, 6 test samples"
    ]


def test_one_value_and_many(tmp_path):
    values = DRAW.normal(size=30)
    splits = prepare(saved(tmp_path, x=X, y=values), "values")
    np.testing.assert_array_equal(splits.train.targets[:, 0], values[ids(splits.train)].astype(np.float32))
    assert splits.preparation.labels == ("target",)
    many = DRAW.normal(size=(30, 2))
    splits = prepare(saved(tmp_path, x=X, y=many), "values")
    assert splits.preparation.labels == ("target 1", "target 2")
    np.testing.assert_allclose(splits.preparation.target_mean, many[ids(splits.train)].mean(0), rtol=1e-6)
    np.testing.assert_allclose(splits.preparation.target_std, many[ids(splits.train)].std(0), rtol=1e-6)
    assert prepare(saved(tmp_path, x=X, y=many), "values", normalize=False).preparation.target_mean is None


@pytest.mark.parametrize(
    ("targets", "labels"),
    [
        (np.array([10, 9, 2] * 10), ("2", "9", "10")),
        (np.array([1.0, 3.0, 1.0] * 10), ("1", "3")),
        (np.array(["b", "a", "c"] * 10), ("a", "b", "c")),
        (np.array([True, False, True] * 10), ("False", "True")),
        (np.array([[2], [1], [0]] * 10, dtype=np.uint8), ("0", "1", "2")),
    ],
)
def test_labels(tmp_path, targets, labels):
    splits = prepare(saved(tmp_path, x=X, y=targets), held_out=None)
    assert splits.preparation.labels == labels
    assert [labels[number] for number in splits.train.targets] == [
        str(t) if t.dtype.kind in "Ub" else str(int(t)) for t in targets.ravel()
    ]


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [("uint8", "uint8"), ("int64", "float32"), ("bool", "float32"), ("float16", "float32"), (">f8", "float32")],
)
def test_dtypes(tmp_path, dtype, kept):
    inputs = np.asfortranarray((X > 3) * 7).astype(dtype)
    splits = prepare(saved(tmp_path, x=inputs, y=Y), held_out=None)
    assert splits.train.inputs.tensor.dtype == getattr(torch, kept)
    np.testing.assert_array_equal(splits.train.inputs.tensor, inputs.astype(np.float32))
    assert splits.preparation.details == {"dtype": kept}
    divisor = 255 if kept == "uint8" else 1
    np.testing.assert_allclose(splits.preparation.mean, inputs.astype(np.float64).mean((0, 1)) / divisor, rtol=1e-6)


def test_single_numbers_and_keras_names(tmp_path):
    assert prepare(saved(tmp_path, x=X[:, 0, 0], y=Y)).preparation.shape == (1,)
    keras = {"x_train": X[:20], "y_train": Y[:20], "x_test": X[20:], "y_test": Y[20:] + 1}
    splits = prepare(saved(tmp_path, **keras), held_out=0.25)
    assert [len(part) for part in (splits.train, splits.held_out, splits.test)] == [15, 5, 10]
    assert splits.preparation.labels == ("0", "1", "2", "3")
    assert splits.test.targets.tolist() == (Y[20:] + 1).tolist()
    assert "not in the training split, so never learned: 3" in splits.notes
    with pytest.raises(InputError, match=r"data\.test is 0\.5, but .* brings its own test split; set it to auto"):
        prepare(tmp_path / "a.npz", test=0.5)


def test_files_as_splits(tmp_path):
    source, other = saved(tmp_path, x=X[:20], y=Y[:20]), saved(tmp_path, "b.npz", inputs=X[20:], targets=Y[20:])
    splits = prepare(source, held_out=str(other), limit=10)
    assert (len(splits.train), len(splits.held_out)) == (10, 10)
    np.testing.assert_array_equal(splits.held_out.inputs.tensor, X[20:].astype(np.float32))
    saved(tmp_path, "b.npz", x=X[20:, :3], y=Y[20:])
    with pytest.raises(InputError, match=r"data\.held_out: samples \(3, 2\).*those of data\.source are \(4, 2\)"):
        prepare(source, held_out=str(other))
    saved(tmp_path, "b.npz", x=X[20:], y=Y[20:].astype(str))
    with pytest.raises(InputError, match="numbers in one of the files of data, text in another"):
        prepare(source, held_out=str(other))


def test_new_files(tmp_path):
    preparation = Preparation.load(prepare(saved(tmp_path, x=X, y=Y)).preparation.dump())
    np.save(tmp_path / "n.npy", X[:2])
    np.save(tmp_path / "one.npy", X[3])
    paths = [saved(tmp_path, "n.npz", x=X[5:6]), tmp_path / "n.npy", tmp_path / "one.npy"]
    found = list(arrays.read_new(paths, preparation))
    assert [name for name, _ in found] == ["n.npz row 1", "n.npy row 1", "n.npy row 2", "one.npy row 1"]
    np.testing.assert_array_equal(torch.stack([sample for _, sample in found]), X[[5, 0, 1, 3]].astype(np.float32))
    assert found[0][1].dtype == torch.float32
    X_bad = X[:4].copy()
    X_bad[2, 0, 0] = np.nan
    np.save(tmp_path / "bad.npy", X_bad)
    with pytest.raises(InputError, match=r"bad\.npy, row 3 holds NaN"):
        list(arrays.read_new([tmp_path / "bad.npy"], preparation))
    np.save(tmp_path / "bad.npy", X[:, :3])
    with pytest.raises(InputError, match=r"samples of the shape \(3, 2\); the model takes \(4, 2\)"):
        list(arrays.read_new([tmp_path / "bad.npy"], preparation))


def test_new_bytes_are_seen_as_those_trained_on(tmp_path):
    images = DRAW.integers(0, 256, (30, 5), dtype=np.uint8)
    splits = prepare(saved(tmp_path, x=images, y=Y), held_out=None)
    samples = torch.stack([sample for _, sample in arrays.read_new([tmp_path / "a.npz"], splits.preparation)])
    normalised = splits.preparation.inputs_on(torch.device("cpu"))
    torch.testing.assert_close(normalised(samples), normalised(splits.train.inputs.tensor))
    np.save(tmp_path / "f.npy", images.astype(np.float32))
    with pytest.raises(InputError, match="numbers of the type float32; the model was trained on bytes: save them as uint8"):
        list(arrays.read_new([tmp_path / "f.npy"], splits.preparation))
    trained_on_floats = prepare(saved(tmp_path, x=images.astype(float), y=Y), held_out=None).preparation
    np.save(tmp_path / "b.npy", images)
    read = torch.stack([sample for _, sample in arrays.read_new([tmp_path / "b.npy"], trained_on_floats)])
    np.testing.assert_array_equal(read, images)


NAN, INF, BIG = (X.copy() for _ in range(3))
NAN[4, 1, 1], INF[6, 0, 0], BIG[7, 0, 0] = np.nan, -np.inf, 1e300
NAN[9] = np.nan
FAULTS = {
    "NaN": ({"x": NAN, "y": Y}, "classes", "a.npz: inputs, row 5 holds NaN (so do 1 below it); fill it or"),
    "infinity": ({"x": INF, "y": Y}, "classes", "row 7 holds infinity"),
    "too large": ({"x": BIG, "y": Y}, "classes", "row 8 holds a number above float32"),
    "NaN target": ({"x": X, "y": NAN[:, 1, 1]}, "values", "targets, row 5 holds NaN"),
    "NaN class": ({"x": X, "y": NAN[:, 1, 1]}, "classes", "targets, row 5 holds NaN"),
    "lengths": ({"x": X, "y": Y[:9]}, "classes", "30 samples in 'x', but 9 in 'y'"),
    "none": ({"x": X[:0], "y": Y[:0]}, "classes", "'x' has the shape (0, 4, 2): no samples"),
    "scalar": ({"x": np.array(1), "y": Y}, "classes", "'x' has the shape (): no samples"),
    "hollow": ({"x": X[:, :, :0], "y": Y}, "classes", "the shape (30, 4, 0) holds no numbers"),
    "names": ({"a": X, "b": Y}, "classes", "neither the arrays inputs and targets nor x and y; the arrays are a, b; rename"),
    "complex": ({"x": X + 1j, "y": Y}, "classes", "inputs: arrays of complex128 can't be used"),
    "text": ({"x": X.astype(str), "y": Y}, "classes", "inputs: arrays of <U"),
    "one-hot": ({"x": X, "y": np.eye(3)[Y]}, "classes", "classes are (samples,) whole numbers or text (one-hot ones: .argmax"),
    "one class": ({"x": X, "y": Y * 0}, "classes", "one class only, '0'"),
    "halves": ({"x": X, "y": Y / 2}, "classes", "0.5 is no class; to predict values set loss.name to mse, l1 or huber"),
    "values as classes": ({"x": X, "y": np.arange(30)}, "classes", "30 different numbers in 30 samples are values"),
    "text values": ({"x": X, "y": Y.astype(str)}, "values", "to predict classes set loss.name to cross_entropy"),
    "deep values": ({"x": X, "y": X}, "values", "values are (samples,) or (samples, k) numbers"),
    "objects": ({"x": X, "y": np.array([{}] * 30)}, "classes", "holds Python objects, which are never loaded"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_arrays(tmp_path, fault):
    named, target, message = FAULTS[fault]
    with pytest.raises(InputError, match=re.escape(message)):
        prepare(saved(tmp_path, **named), target)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError, match="never loaded"):
        prepare(path)
    inner = io.BytesIO()
    np.save(inner, np.array([Trap()], dtype=object), allow_pickle=True)
    path.with_suffix(".npy").write_bytes(inner.getvalue())
    preparation = Preparation("arrays", (1,), (), details={"dtype": "float32"})
    with pytest.raises(InputError, match="never loaded"):
        list(arrays.read_new([path.with_suffix(".npy")], preparation))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\x93NUMPY\x01\x00"])
def test_damaged_files(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npz"):
        prepare(tmp_path / "a.npz")
