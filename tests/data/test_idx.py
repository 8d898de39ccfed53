"""IDX files against torchvision's reader, Fashion-MNIST's published numbers, and damage of every kind."""

import gzip
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

from trainwright.data import builtin_images, idx, image_sources
from trainwright.recipe import InputError

CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}


def idx_bytes(array):
    code = CODES[array.dtype.str[1:]]
    head = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write(path, array):
    content = idx_bytes(array)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_folder(folder, *, train=12, test=6, end=".gz", classes=3, size=(5, 4)):
    """The four files of a small MNIST."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        images = random.integers(0, 256, (count, *size), dtype=np.uint8)
        write(folder / f"{part}-images-idx3-ubyte{end}", images)
        write(folder / f"{part}-labels-idx1-ubyte{end}", np.arange(count, dtype=np.uint8) % classes)
    return folder


@given(
    st.sampled_from(sorted(CODES)).flatmap(
        lambda kind: arrays.arrays(np.dtype(kind), arrays.array_shapes(min_dims=0, max_dims=4, max_side=4))
    ),
    st.booleans(),
)
def test_what_is_written_is_read(tmp_path_factory, array, zipped):
    path = tmp_path_factory.mktemp("idx") / ("a.gz" if zipped else "a")
    read = idx.read(write(path, array))
    assert read.dtype == array.dtype
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("kind", sorted(CODES))
def test_equals_torchvision(tmp_path, kind):
    array = np.arange(24).reshape(2, 3, 4).astype(kind)
    path = write(tmp_path / "a", array)
    theirs = read_sn3_pascalvincent_tensor(str(path), strict=False)
    assert torch.equal(torch.from_numpy(idx.read(path)), theirs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a is not an IDX file.*found nothing"),
        (b"\x89PNG\r\n", r"not an IDX file.*found 89 50 4e 47"),
        (b"\0\0\x07\x01\0\0\0\x01a", r"not an IDX file.*found 00 00 07 01"),
        (b"\0\0\x08\x03\0\0\0\x01", r"a is truncated: its head names 3 axes, but the file ends after 8 bytes"),
        (idx_bytes(np.zeros((2, 3), np.uint8))[:-1], r"a is truncated: 2 x 3 of 1 bytes are 6 bytes, found 5"),
        (idx_bytes(np.zeros((2, 3), np.int32)) + b"x", r"longer than its head says: 2 x 3 of 4 bytes are 24 bytes, found 25"),
        (gzip.compress(idx_bytes(np.zeros(300, np.uint8)), mtime=0)[:-9], r"a is a damaged or truncated gzip file"),
        (b"\x1f\x8b\x08\0garbage-garbage", r"a is a damaged or truncated gzip file"),
    ],
)
def test_damage_is_named(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match=message):
        idx.read(tmp_path / "a")


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"b can't be read: No such file"):
        idx.read(tmp_path / "b")


@pytest.mark.parametrize("end", [".gz", ""])
def test_a_folder_brings_its_test_split(tmp_path, end):
    found = image_sources.find(str(write_folder(tmp_path / "m", end=end)), "classes", "data.source")
    assert {name: len(part) for name, part in found.splits.items()} == {"train": 12, "test": 6}
    train = found.splits["train"]
    assert train.labels == ("0", "1", "2")
    assert train.names[3] == "train-images-idx3-ubyte[3]"
    assert train.images.shape == (12, 5, 4)
    assert train.targets.tolist() == [0, 1, 2] * 4


def test_a_folder_with_faults(tmp_path):
    folder = write_folder(tmp_path / "m")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match="m has no t10k-labels-idx1-ubyte"):
        image_sources.find(str(folder), "classes", "data.source")
    write(folder / "t10k-labels-idx1-ubyte", np.zeros(5, np.uint8))
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte has 5 labels, but there are 6 images"):
        image_sources.find(str(folder), "classes", "data.source")


def test_names_of_classes(tmp_path):
    folder = write_folder(tmp_path / "m")
    (folder / "classes.txt").write_text("ant\nbee\ncat\n")
    assert image_sources.find(str(folder), "classes", "data.source").splits["train"].labels == ("ant", "bee", "cat")
    (folder / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(InputError, match=r"label 2 is out of range: there are 2 class names"):
        image_sources.find(str(folder), "classes", "data.source")


@pytest.mark.skipif(not builtin_images.FASHION_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_as_published():
    splits = image_sources.find("fashion-mnist", "classes", "data.source").splits
    assert (len(splits["train"]), len(splits["test"])) == (60000, 10000)
    assert np.bincount(splits["train"].targets).tolist() == [6000] * 10
    # The first image is an ankle boot, and the mean of the training pixels is well known.
    assert splits["train"].labels[splits["train"].targets[0]] == "Ankle boot"
    assert splits["train"].images.mean() / 255 == pytest.approx(0.2860, abs=5e-5)


def test_fashion_mnist_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(builtin_images, "FASHION_FOLDER", tmp_path / "none")
    with pytest.raises(InputError, match="apt install dataset-fashion-mnist, or give a folder with its four IDX files"):
        image_sources.find("fashion-mnist", "classes", "data.source")
