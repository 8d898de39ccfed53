"""Sources to splits, and new images as training saw them."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import ImageFolder

from tests.data.test_idx import write_folder
from trainwright.data import images, masks
from trainwright.data.examples import InMemory, Preparation, moments
from trainwright.data.image_decoding import LazyImages
from trainwright.recipe import ImageData, InputError


def prepare(source, target="classes", seed=0, progress=lambda what, count: None, **keys):
    return images.prepare(ImageData(kind="images", source=str(source), **keys), target, seed, progress)


def fails(message, source, target="classes", **keys):
    with pytest.raises(InputError, match=message) as caught:
        prepare(source, target, **keys)
    assert "\n" not in str(caught.value)


def draw(path, *, size=(6, 6), seed=0, colour=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size, 3) if colour else size
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


def classes(folder, counts, **options):
    """A folder for each class with so many pictures."""
    for label, count in counts.items():
        for i in range(count):
            draw(folder / label / f"{i:02}.png", seed=sum(map(ord, label)) * 100 + i, **options)
    return folder


def masked(folder, values, count=6, size=(6, 8)):
    """images/ and masks/ whose masks hold these values, the last of them last."""
    for i in range(count):
        draw(folder / "images" / f"{i}.png", size=size, seed=i)
        mask = np.array(values, np.uint8)[np.arange(size[0] * size[1]).reshape(size) % len(values)]
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    return folder


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def all_of(examples):
    return examples.inputs.take(np.arange(len(examples)))


def test_digits_are_scikit_learns():
    splits = prepare("digits", held_out=None)
    images_, targets = load_digits(return_X_y=True)
    expected = np.array([[round(v * 255 / 16) for v in row] for row in images_], np.uint8).reshape(-1, 1, 8, 8)
    np.testing.assert_array_equal(all_of(splits.train), expected)
    np.testing.assert_array_equal(splits.train.targets, targets)
    assert splits.train.targets.dtype == torch.int64
    assert splits.preparation.labels == tuple("0123456789")
    assert (splits.held_out, splits.test, splits.target) == (None, None, "classes")
    assert splits.train.names[1796] == "digits[1796]"


def test_strokes_are_a_task_that_a_threshold_does_not_solve():
    splits = prepare("digit-strokes", held_out=0.2)
    assert splits.preparation.labels == ("background", "stroke")
    assert splits.train.targets.shape == (1438, 32, 32)
    assert splits.train.targets.dtype == torch.uint8
    pixels, truth = all_of(splits.train)[:, 0], splits.train.targets.bool()
    best = max(float(((pixels > level) == truth).float().mean()) for level in range(60, 200, 5))
    assert 0.9 < best < 0.97
    again = prepare("digit-strokes", held_out=0.2)
    assert torch.equal(all_of(again.train), all_of(splits.train))
    assert int(pixels.long().sum()) == 119945654, "the noise has changed, and so has the task"


def test_class_folders_are_torchvisions(tmp_path):
    folder = classes(tmp_path / "pets", {"dog": 5, "cat": 4, "Ant": 3})
    splits = prepare(folder, held_out=None)
    theirs = ImageFolder(str(folder))
    assert list(splits.preparation.labels) == theirs.classes == ["Ant", "cat", "dog"]
    assert splits.train.targets.tolist() == theirs.targets
    expected = np.stack([np.asarray(image).transpose(2, 0, 1) for image, _ in theirs])
    np.testing.assert_array_equal(all_of(splits.train), expected)
    assert list(splits.train.names[:4]) == ["Ant/00.png", "Ant/01.png", "Ant/02.png", "cat/00.png"]


@pytest.mark.parametrize("workers", [0, 1])
def test_in_memory_or_not_gives_the_same(tmp_path, workers):
    folder = classes(tmp_path / "pets", {"dog": 30, "cat": 20}, size=(9, 12))
    keys = {"size": 8, "test": 0.2, "held_out": 0.25, "limit": 20}
    kept, lazy = prepare(folder, in_memory="yes", **keys), prepare(folder, in_memory="no", workers=workers, **keys)
    assert isinstance(kept.train.inputs, InMemory)
    assert isinstance(lazy.train.inputs, LazyImages)
    assert lazy.preparation == kept.preparation
    for name in ("train", "held_out", "test"):
        mine, other = getattr(kept, name), getattr(lazy, name)
        assert torch.equal(all_of(mine), all_of(other))
        assert torch.equal(mine.targets, other.targets)
        assert list(mine.names) == list(other.names)
        assert mine.inputs.shape == other.inputs.shape == (3, 8, 8)
    lazy.train.inputs.close()


@pytest.mark.parametrize(("available", "kind"), [(3 * 20 * 108 + 1, InMemory), (3 * 20 * 108, LazyImages)])
def test_a_third_of_memory_is_the_limit(tmp_path, monkeypatch, available, kind):
    folder = classes(tmp_path / "pets", {"dog": 10, "cat": 10})
    monkeypatch.setattr(images.psutil, "virtual_memory", lambda: type("Memory", (), {"available": available}))
    assert isinstance(prepare(folder).train.inputs, kind)


def test_moments_are_of_the_training_split_alone(tmp_path):
    folder = classes(tmp_path / "pets", {"dog": 10, "cat": 10})
    splits = prepare(folder, held_out=0.5)
    mean, std = moments(all_of(splits.train), 1)
    assert splits.preparation.mean == pytest.approx(mean, rel=1e-12)
    assert splits.preparation.std == pytest.approx(std, rel=1e-12)
    assert moments(all_of(splits.held_out), 1)[0] != pytest.approx(mean, rel=1e-4)
    flat = prepare(npz(tmp_path / "a.npz", x=np.full((4, 2, 2), 7, np.uint8), y=np.array([0, 1, 0, 1])), held_out=None)
    assert (flat.preparation.mean, flat.preparation.std) == ((7 / 255,), (1.0,))
    plain = prepare(folder, normalize=False).preparation
    assert (plain.mean, plain.std) == (None, None)


def test_fractions_are_stratified_as_scikit_learns():
    splits = prepare("digits", held_out=0.1, test=0.2)
    targets = load_digits().target
    rest, test = train_test_split(targets, test_size=0.2, stratify=targets, random_state=0)
    assert np.abs(np.bincount(splits.test.targets) - np.bincount(test)).max() <= 1
    shares = np.bincount(splits.held_out.targets) / len(splits.held_out)
    assert np.abs(shares - np.bincount(rest) / len(rest)).max() < 0.01
    names = [set(part.names) for part in (splits.train, splits.held_out, splits.test)]
    assert sum(map(len, names)) == len(set.union(*names)) == 1797
    assert list(prepare("digits", held_out=0.1, test=0.2, seed=1).test.names) != list(splits.test.names)
    without = prepare("digits", held_out=None, test=0.2)
    assert list(without.test.names) == list(splits.test.names), "drawn before held_out"
    assert all_of(splits.train).shape[0] == len(splits.train.targets)


def test_limit_caps_the_training_split_of_each_class_alike():
    splits = prepare("digits", held_out=0.1, limit=100)
    assert (len(splits.train), len(splits.held_out)) == (100, 180)
    counts = np.bincount(splits.train.targets)
    assert counts.min() >= 9
    assert counts.max() <= 11


def split_folders(tmp_path):
    folder = tmp_path / "pets"
    classes(folder / "train", {"dog": 5, "cat": 5})
    classes(folder / "valid", {"dog": 2, "cat": 1})
    classes(folder / "test", {"dog": 3})
    return folder


def test_splits_of_the_source(tmp_path):
    folder = split_folders(tmp_path)
    splits = prepare(folder)
    assert (len(splits.train), len(splits.held_out), len(splits.test)) == (10, 3, 3)
    assert splits.test.targets.tolist() == [1, 1, 1], "dog is 1, as in the training data"
    assert splits.test.names[0] == "test/dog/00.png"
    drawn = prepare(folder, held_out=0.2, test=None)
    assert (len(drawn.train), len(drawn.held_out), drawn.test) == (8, 2, None)
    assert drawn.held_out.names[0].startswith("train/")
    elsewhere = prepare(folder, held_out=str(folder / "test"), test=str(folder / "valid"))
    assert [len(part) for part in (elsewhere.held_out, elsewhere.test)] == [3, 3]
    assert elsewhere.held_out.targets.tolist() == [1, 1, 1]


def test_a_class_may_be_called_train(tmp_path):
    folder = classes(tmp_path / "vehicles", {"bus": 2, "train": 2})
    assert prepare(folder).preparation.labels == ("bus", "train")
    draw(folder / "train" / "fast" / "a.png")
    assert prepare(folder).preparation.labels == ("bus", "train")


def test_splits_that_do_not_fit(tmp_path):
    folder = split_folders(tmp_path)
    classes(folder / "test", {"dgo": 1})
    fails(r"pets, split test, has the class 'dgo' \(did you mean 'dog'\?\); the training data's are cat, dog", folder)
    fails(r"data\.held_out is .*pets, which is data\.source itself", folder, held_out=str(folder))
    assert prepare(folder, test=None).test is None, "what isn't used may be wrong"
    fails(r"data\.test '.*none': there is no such file or folder", folder, test=str(tmp_path / "none"))
    (folder / "train").rename(folder / "learn")
    fails(r"pets has test/ but no train/; put the training images into", folder)
    classes(folder / "train", {"dog": 2})
    classes(folder / "val", {"dog": 2})
    fails(r"pets has several folders for one split: .*val, valid", folder)


def test_sources_that_are_wrong(tmp_path):
    fails(r"data\.source 'digit': there is no such file or folder.*\(did you mean 'digits'\?\)", "digit")
    (tmp_path / "a.zip").write_bytes(b"")
    fails(r"a\.zip' is a file, but not a \.npz one", tmp_path / "a.zip")
    (tmp_path / "empty").mkdir()
    fails(r"empty needs a folder for each class, or images/ and masks/; it has no folders", tmp_path / "empty")
    (tmp_path / "empty" / "cat").mkdir()
    fails(r"empty holds no images", tmp_path / "empty")
    draw(tmp_path / "empty" / "dog" / "a.png")
    fails(r"empty/cat holds no images, so nothing can be learned of this class", tmp_path / "empty")
    fails(r"a single class \(cat\); nothing to tell apart", classes(tmp_path / "one", {"cat": 3}))
    fails(r"single class \(images\).*masks/ must stand beside", classes(tmp_path / "half", {"images": 3}))
    fails(r"'digits' has classes or masks, but the loss is one for values", "digits", target="values")


def test_sizes_that_differ(tmp_path):
    folder = classes(tmp_path / "pets", {"cat": 2, "dog": 2})
    draw(folder / "dog" / "big.png", size=(7, 6))
    fails(r"cat/00\.png is 6 x 6 \(height x width\), dog/big\.png is 7 x 6; set data\.size", folder, held_out=None)
    assert prepare(folder, size=4).preparation.shape == (3, 4, 4)
    stretched = prepare(folder, size=[4, 5], held_out=None)
    with Image.open(folder / "dog" / "big.png") as image:
        expected = np.asarray(image.resize((5, 4), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(all_of(stretched.train)[-1], expected)


def test_colour_is_that_of_the_first_image(tmp_path):
    folder = classes(tmp_path / "pets", {"cat": 2}, colour=False)
    classes(folder, {"dog": 2})
    assert prepare(folder, held_out=None).preparation.shape == (1, 6, 6)
    assert prepare(folder, held_out=None, colour="rgb").preparation.shape == (3, 6, 6)


@pytest.mark.parametrize("in_memory", ["yes", "no"])
def test_damaged_images(tmp_path, in_memory):
    folder = classes(tmp_path / "pets", {"cat": 12, "dog": 12})
    for i in range(7):
        (folder / "cat" / f"{i:02}.png").write_bytes(b"no image")
    fails(r"cat/\d\d\.png can't be read", folder, in_memory=in_memory)
    splits = prepare(folder, held_out=None, unreadable="skip", in_memory=in_memory, workers=0)
    assert splits.train.targets.tolist() == [0] * 5 + [1] * 12
    assert splits.train.names[0] == "cat/07.png"
    assert all_of(splits.train).shape == (17, 3, 6, 6)
    (note,) = [note for note in splits.notes if "left out" in note]
    assert note.startswith("train: 7 of 24 images can't be read and were left out: cat/00.png, ")
    assert note.endswith("cat/04.png and 2 more")
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"no image")
    fails(r"none of the 24 training images can be read, such as cat/00\.png", folder, held_out=None, unreadable="skip")


def test_progress_counts_all_splits(tmp_path):
    seen = []
    prepare(split_folders(tmp_path), progress=lambda what, count: seen.append((what, count)))
    assert seen[-1] == ("decoded", 16)
    assert [count for _, count in seen] == sorted(count for _, count in seen)


def test_masks_and_their_names(tmp_path):
    folder = masked(tmp_path / "m", [0, 1, 2])
    splits = prepare(folder, held_out=0.5)
    assert splits.preparation.labels == ("0", "1", "2")
    assert splits.train.targets.dtype == torch.uint8
    with Image.open(folder / "masks" / splits.train.names[0].removeprefix("images/")) as mask:
        np.testing.assert_array_equal(splits.train.targets[0], mask)
    (folder / "classes.txt").write_text("sky\nsea\nland\nship\n", encoding="utf-8")
    assert prepare(folder).preparation.labels == ("sky", "sea", "land", "ship")
    (folder / "classes.txt").write_text("sky\nsea\n", encoding="utf-8")
    fails(r"the mask of images/\d\.png has the values 0, 1, 2; masks number the classes from 0 to 1", folder)
    (folder / "classes.txt").write_text("sky\nsky\n", encoding="utf-8")
    fails(r"classes\.txt has the class 'sky' twice", folder)


def test_masks_are_resized_with_their_images(tmp_path):
    splits = prepare(masked(tmp_path / "m", [0, 1, 2]), size=4, held_out=None, in_memory="no", workers=0)
    with Image.open(tmp_path / "m" / "masks" / "0.png") as mask:
        wide = np.asarray(mask.resize((5, 4), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(splits.train.targets[0], wide[:, :4])
    assert all_of(splits.train).shape == (6, 3, 4, 4)


def test_masks_of_two_values(tmp_path):
    splits = prepare(masked(tmp_path / "m", [0, 255]), held_out=None)
    assert splits.preparation.labels == ("0", "1")
    assert splits.train.targets.unique().tolist() == [0, 1]
    fails(
        r"the mask of images/0\.png has the values 0, 1, 255; masks number", masked(tmp_path / "n", [0, 1, 255]), held_out=None
    )
    fails(r"a single class \(0\)", masked(tmp_path / "o", [0]))


@given(st.lists(st.sets(st.integers(0, 255), min_size=1, max_size=6), min_size=1, max_size=4))
def test_values_of_masks(sets):
    """Right exactly if all values together are 0..K-1, or 0 and 255."""
    values = np.array([[value in found for value in range(256)] for found in sets])
    raw = np.stack([np.resize(sorted(found), (2, 3)).astype(np.uint8) for found in sets])
    union = set.union(*sets)
    split = masks.RawMasks(raw, values, [f"{i}.png" for i in range(len(sets))])
    if union == set(range(len(union))) or union in ({0, 255}, {255}):
        (found,), labels = masks.number([split], ())
        assert found.max() < len(labels)
    else:
        with pytest.raises(InputError, match=r"the mask of \d\.png has the values"):
            masks.number([split], ())


def test_images_and_masks_belong_together(tmp_path):
    folder = masked(tmp_path / "m", [0, 1])
    (folder / "masks" / "3.png").rename(folder / "masks" / "x.png")
    fails(r"image .*images/3\.png has no mask; .*masks/3\.png is missing", folder)
    (folder / "masks" / "x.png").rename(folder / "masks" / "3.png")
    draw(folder / "masks" / "y.png", size=(6, 8))
    fails(r"mask .*masks/y\.png has no image of the same name", folder)
    draw(folder / "images" / "y.bmp", size=(6, 8))
    fails(r"mask .*y\.png has the mode RGB", folder)
    draw(folder / "images" / "y.png")
    fails(r"images/y\.(bmp|png) and .*y\.(bmp|png) have the same name", folder)


X, Y = np.random.default_rng(0).integers(0, 256, (12, 4, 5, 3), dtype=np.uint8), np.arange(12) % 3


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("inputs", "targets"), ("x_train", "y_train")])
def test_arrays(tmp_path, keys):
    splits = prepare(npz(tmp_path / "a.npz", **dict(zip(keys, (X, Y), strict=True))), held_out=None)
    np.testing.assert_array_equal(all_of(splits.train), X.transpose(0, 3, 1, 2))
    assert splits.train.targets.tolist() == Y.tolist()
    assert splits.preparation.labels == ("0", "1", "2")


def test_arrays_of_keras_bring_their_test_split(tmp_path):
    path = npz(
        tmp_path / "a.npz", x_train=X, y_train=Y[:, None], x_test=X[:4], y_test=Y[:4, None], classes=np.array(["a", "b", "c"])
    )
    splits = prepare(path, held_out=0.25)
    assert (len(splits.train), len(splits.held_out), len(splits.test)) == (9, 3, 4)
    assert splits.preparation.labels == ("a", "b", "c")
    assert splits.test.names[1] == "a.npz[x_test][1]"
    fails(
        r"split test, has the class '3'; the training data's are 0, 1, 2",
        npz(path, x_train=X, y_train=Y, x_test=X, y_test=Y + 1),
    )


def test_arrays_of_floats_and_of_one_channel(tmp_path):
    gray = X[..., :1]
    splits = prepare(npz(tmp_path / "a.npz", x=gray / 255, y=Y), held_out=None)
    np.testing.assert_array_equal(all_of(splits.train)[:, 0], gray[..., 0])
    resized = prepare(npz(tmp_path / "b.npz", x=gray, y=Y), held_out=None, size=[3, 2], colour="rgb")
    expected = Image.fromarray(gray[0, ..., 0]).resize((2, 3), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(all_of(resized.train)[0], [np.asarray(expected)] * 3)


def test_arrays_with_masks_and_with_values(tmp_path):
    maps = (X[..., 0] > 99).astype(np.int64)
    splits = prepare(npz(tmp_path / "a.npz", x=X, y=maps), held_out=None)
    np.testing.assert_array_equal(splits.train.targets, maps)
    values = np.random.default_rng(0).normal(5, 3, (12, 2))
    splits = prepare(npz(tmp_path / "b.npz", x=X, y=values), "values", held_out=None)
    assert splits.target == "values"
    torch.testing.assert_close(splits.train.targets, torch.tensor(values, dtype=torch.float32))
    np.testing.assert_allclose(splits.preparation.target_mean, values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(splits.preparation.target_std, values.std(0), rtol=1e-5)
    assert len(splits.preparation.labels) == 2
    one = npz(tmp_path / "c.npz", x=X, y=values[:, 0])
    fails(r"data\.test '.*c\.npz' has 1 values an image, the training data has 2", tmp_path / "b.npz", "values", test=str(one))
    assert prepare(tmp_path / "b.npz", "values", held_out=0.5).held_out.targets.shape == (6, 2)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, r"needs the arrays images and labels .*; it has x$"),
        ({"x": X, "y": Y[:5]}, r"y has 5 labels, but there are 12 images"),
        ({"x": X, "y": Y - 1}, r"y must be whole numbers from 0; found -1 to 1"),
        ({"x": X, "y": Y + 0.5}, r"whole numbers from 0; found float64; for values choose a loss such as mse"),
        ({"x": X, "y": Y * 100_000}, r"label 200000 is out of range for 12 images"),
        ({"x": X, "y": np.eye(3)[Y]}, r"found \(12, 3\); of one-hot rows take argmax\(1\)"),
        ({"x": X, "y": np.array(["a"] * 12)}, r"whole numbers from 0; found <U1"),
        ({"x": X, "y": Y * 0}, r"a single class \(0\); nothing to tell apart"),
        ({"x": X, "y": X[:, 1:, :, 0]}, r"masks are \(3, 5\), the images are \(4, 5\)"),
        ({"x": X.transpose(0, 3, 1, 2), "y": Y}, r"its channels come first: use x\.transpose\(0, 2, 3, 1\)"),
        ({"x": X / 100, "y": Y}, r"uint8, or floats from 0 to 1; found float64 from 0\S* to 2\.\d"),
        ({"x": np.full((2, 3, 3), np.nan), "y": Y[:2]}, r"found float64 from nan to nan"),
        ({"x": X.astype(np.int16) - 1, "y": Y}, r"found int16 from -1 to 25"),
        ({"x": X > 99, "y": Y}, r"found bool"),
        ({"x": X[:0], "y": Y[:0]}, r"holds no images; its shape is \(0, 4, 5, 3\)"),
        ({"x": X, "y": Y, "z": np.array([{}], dtype=object)}, r"pickle|Python objects"),
    ],
)
def test_arrays_that_are_wrong(tmp_path, arrays, message):
    fails(message, npz(tmp_path / "a.npz", **arrays), held_out=None)


def test_damaged_npz(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 and then nothing")
    fails(r"a\.npz.*can't be read", tmp_path / "a.npz")


def test_a_held_out_file_of_another_kind(tmp_path):
    path = npz(tmp_path / "a.npz", x=X, y=(X[..., 0] > 99).astype(np.int64))
    fails(r"data\.held_out '.*a\.npz' has masks, but the training data has classes", "digits", held_out=str(path))


def test_notes_tell_what_a_person_wants_to_know(tmp_path):
    splits = prepare(split_folders(tmp_path), held_out=0.2, in_memory="no", workers=1)
    notes = "\n".join(splits.notes)
    assert "8 training, 2 held-out, 3 test samples" in notes
    assert "2 classes: cat, dog" in notes
    assert "6 x 6 pixels (height x width), rgb" in notes
    assert "held_out: 0.2 of the training images" in notes
    assert "test: a split of the source itself" in notes
    assert "decoded anew each time, by 1 worker process(es)" in notes
    (tmp_path / "pets" / "train" / "cat" / "x.heic").write_bytes(b"")
    assert "not in the training split, so never learned: dog" in prepare(tmp_path / "pets", limit=1).notes
    assert re.search(r"1 file\(s\) of other kinds left out, such as .*x\.heic", "\n".join(prepare(tmp_path / "pets").notes))


def test_idx_folder(tmp_path):
    splits = prepare(write_folder(tmp_path / "m"), held_out=0.25)
    assert (len(splits.train), len(splits.held_out), len(splits.test)) == (9, 3, 6)
    assert splits.preparation.shape == (1, 5, 4)


def saved_preparation(splits):
    return Preparation.load(splits.preparation.dump())


@pytest.mark.parametrize("size", [None, 4, [4, 5]])
def test_new_images_are_as_training_saw_them(tmp_path, size):
    folder = classes(tmp_path / "pets", {"dog": 5, "cat": 4})
    splits = prepare(folder, held_out=None, size=size)
    found = list(images.read_new([folder], saved_preparation(splits), "error"))
    assert [name for name, _ in found] == [str(folder / name) for name in splits.train.names]
    assert torch.equal(torch.stack([image for _, image in found]), all_of(splits.train))
    (one,) = images.read_new([folder / "dog" / "03.png"], saved_preparation(splits), "error")
    assert torch.equal(one[1], all_of(splits.train)[7])


def test_new_images_come_one_by_one(tmp_path, monkeypatch):
    folder = classes(tmp_path / "pets", {"dog": 5, "cat": 4})
    preparation = saved_preparation(prepare(folder))
    opened, really = [], images.image_files.opened
    monkeypatch.setattr(images.image_files, "opened", lambda path: opened.append(path) or really(path))
    stream = images.read_new([folder], preparation, "error")
    next(stream)
    next(stream)
    assert len(opened) == 2


def test_new_arrays(tmp_path):
    path = npz(tmp_path / "a.npz", x=X, y=Y)
    preparation = saved_preparation(prepare(path, held_out=None))
    found = list(images.read_new([path, npz(tmp_path / "b.npz", images=X[:2])], preparation, "error"))
    assert [name for name, _ in found[-3:]] == [f"{path}[11]", f"{tmp_path / 'b.npz'}[0]", f"{tmp_path / 'b.npz'}[1]"]
    np.testing.assert_array_equal(found[11][1], X[11].transpose(2, 0, 1))
    folder = write_folder(tmp_path / "m")
    gray = saved_preparation(prepare(folder, held_out=None))
    found = list(images.read_new([folder], gray, "error"))
    assert len(found) == 18, "the labels are no images"
    assert found[0][0] == str(folder / "t10k-images-idx3-ubyte.gz[0]")


def test_new_images_that_are_wrong(tmp_path):
    folder = classes(tmp_path / "pets", {"dog": 5, "cat": 4})
    preparation = saved_preparation(prepare(folder))

    def read(path, unreadable="error"):
        return list(images.read_new([path], preparation, unreadable))

    with pytest.raises(InputError, match=r"none: there is no such file or folder"):
        read(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds no images"):
        read(tmp_path / "empty")
    with pytest.raises(InputError, match=r"what the model was trained on is 6 x 6 .*, .*big\.png is 7 x 6"):
        read(draw(tmp_path / "big.png", size=(7, 6)))
    (folder / "dog" / "02.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"02\.png can't be read"):
        read(folder)
    assert len(read(folder, "skip")) == 8
    with pytest.raises(InputError, match=r"a\.npz needs an array named images, x or inputs; it has z"):
        read(npz(tmp_path / "a.npz", z=X))


def test_preparation_is_plain(tmp_path):
    splits = prepare("digits", size=[10, 9])
    assert json.loads(splits.preparation.dump())["details"] == {"colour": "gray", "size": [10, 9]}
    assert saved_preparation(splits) == splits.preparation
