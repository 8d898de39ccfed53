"""Files to bytes, against Pillow and torchvision; and batches on demand by any number of workers."""

import gc
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from trainwright.data import image_files
from trainwright.data.image_decoding import LazyImages, Workers, decode_all, sums_of
from trainwright.data.image_files import Form, UnreadableImage, form_for
from trainwright.data.pictures import Pictures
from trainwright.recipe import InputError, RunError


def picture(width=9, height=7, mode="RGB", seed=0):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "LA": (2,)}[mode]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8), mode=None)


def saved(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


KEEP = Form("rgb", 7, 9, "keep", "a.png")


@pytest.mark.parametrize("end", sorted(image_files.SUFFIXES - {".pgm"}))
def test_formats_equal_pillow(tmp_path, end):
    path = saved(tmp_path / f"a{end}", picture())
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(image_files.decode(path, KEEP), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.sampled_from(["BILINEAR", "NEAREST"]), st.booleans())
def test_resizing_equals_torchvision(width, height, side, how, square):
    image = picture(width, height, "L")
    mine = image_files.fitted(
        image, form_for(side if square else [side, side + 3], "gray", (1, 1), ""), "a", Image.Resampling[how]
    )
    mode = InterpolationMode[how]
    theirs = F.resize(image, side, mode) if square else F.resize(image, [side, side + 3], mode)
    np.testing.assert_array_equal(mine, F.center_crop(theirs, side) if square else theirs)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_respected(tmp_path, orientation):
    upright = picture(4, 3)
    # How to store the image so that a viewer who follows the tag sees it upright: by the tag's definition in EXIF 2.3.
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", stored, exif=exif)
    np.testing.assert_array_equal(image_files.opened(path), upright)


def test_transparency_over_white(tmp_path):
    image = np.zeros((7, 9, 4), np.uint8)
    image[:, :4] = (10, 20, 30, 255)
    image[:, 4:8] = (10, 20, 30, 0)
    image[:, 8] = (0, 0, 0, 51)
    found = image_files.decode(saved(tmp_path / "a.png", Image.fromarray(image)), KEEP)
    assert found[:, 0, 0].tolist() == [10, 20, 30]
    assert found[:, 0, 5].tolist() == [255, 255, 255]
    assert found[:, 0, 8].tolist() == [204, 204, 204]
    indexed = picture().quantize(4)
    indexed.info["transparency"] = indexed.getpixel((0, 0))
    found = image_files.decode(saved(tmp_path / "b.png", indexed), KEEP)
    assert found[:, 0, 0].tolist() == [255, 255, 255]
    gray = Image.fromarray(np.array([[[7, 255], [7, 0]]], np.uint8))
    assert np.asarray(image_files.opened(saved(tmp_path / "c.png", gray))).tolist() == [[7, 255]]


@pytest.mark.parametrize("end", [".png", ".tif"])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, end):
    wide = np.array([[0, 257, 12850, 65535]], np.uint16)
    image = image_files.opened(saved(tmp_path / f"a{end}", Image.fromarray(wide)))
    assert image.mode == "L"
    assert np.asarray(image).tolist() == [[0, 1, 50, 255]]


def test_colour(tmp_path):
    gray, bit, rgb = picture(mode="L"), picture(mode="L").convert("1"), picture()
    assert [image_files.colour_of(image_files.plain(image), "auto") for image in (gray, bit, rgb)] == ["gray", "gray", "rgb"]
    assert image_files.colour_of(gray, "rgb") == "rgb"
    path = saved(tmp_path / "a.png", rgb)
    assert image_files.decode(path, Form("gray", 7, 9, "keep")).shape == (1, 7, 9)
    np.testing.assert_array_equal(image_files.decode(path, Form("gray", 7, 9, "keep"))[0], rgb.convert("L"))
    assert np.ptp(image_files.decode(saved(tmp_path / "b.png", gray), KEEP), axis=0).max() == 0


def test_another_size_names_both(tmp_path):
    path = saved(tmp_path / "b.png", picture(8, 7))
    with pytest.raises(InputError, match=r"a\.png is 7 x 9 \(height x width\), .*b\.png is 7 x 8; set data\.size"):
        image_files.decode(path, KEEP)


@pytest.mark.parametrize("end", [".jpg", ".png", ".bmp", ".gif", ".webp", ".tif", ".ppm"])
@pytest.mark.parametrize("kept", [0, 20, 0.6])
def test_truncated_files_are_named(tmp_path, end, kept):
    path = saved(tmp_path / f"a{end}", picture(64, 64))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(UnreadableImage, match=rf"a{end} can't be read: .*data\.unreadable to skip"):
        image_files.opened(path)


def test_walks_in_order_without_hidden_and_loops(tmp_path):
    for name in ("b/2.png", "b/10.png", "a/x.PNG", "a/.hidden.png", ".git/y.png", "z.png", "a/readme.txt"):
        saved(tmp_path / name, picture(), format="PNG")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    found = [path.relative_to(tmp_path).as_posix() for path in image_files.listed(tmp_path)]
    assert found == ["z.png", "a/x.PNG", "b/10.png", "b/2.png"]


def test_masks_keep_indices_of_a_palette(tmp_path):
    values = np.array([[0, 1, 2]], np.uint8)
    mask = Image.fromarray(values).convert("P")
    mask.putdata(values.ravel().tolist())
    mask.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image = picture(3, 1)
    assert np.asarray(image_files.mask_of(saved(tmp_path / "a.png", mask), image, "a")).tolist() == values.tolist()
    with pytest.raises(InputError, match=r"mask .*b\.png has the mode RGB"):
        image_files.mask_of(saved(tmp_path / "b.png", image), image, "a")
    with pytest.raises(InputError, match=r"mask .*a\.png is 1 x 3, its image big\.png is 7 x 9"):
        image_files.mask_of(tmp_path / "a.png", picture(), "big.png")


def test_sums_are_exact():
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 5, 4), dtype=np.uint8)
    images[0] = 255
    wide = images.astype(np.int64)
    np.testing.assert_array_equal(sums_of(images), np.stack([wide.sum((2, 3)), (wide**2).sum((2, 3))], 1))


@pytest.fixture
def files(tmp_path):
    return [saved(tmp_path / f"{i}.png", picture(seed=i)) for i in range(40)]


def test_a_pass_in_threads_equals_one_by_one(files):
    pictures = Pictures(files, np.zeros(40, np.int64), [path.name for path in files], ("a",))
    seen = []
    found = decode_all(pictures, KEEP, keep=True, skip=False, progress=seen.append, threads=2)
    np.testing.assert_array_equal(found.images, [image_files.decode(path, KEEP) for path in files])
    np.testing.assert_array_equal(found.sums, sums_of(found.images))
    assert sum(seen) == 40
    assert len(seen) > 1
    lazily = decode_all(pictures, KEEP, keep=False, skip=False, progress=seen.append)
    assert lazily.images is None
    np.testing.assert_array_equal(lazily.sums, found.sums)


def test_a_pass_over_damage(files):
    files[3].write_bytes(b"no image")
    pictures = Pictures(files, np.zeros(40, np.int64), [path.name for path in files], ("a",))
    with pytest.raises(UnreadableImage, match=r"3\.png can't be read: not an image, or damaged"):
        decode_all(pictures, KEEP, keep=True, skip=False, progress=print)
    found = decode_all(pictures, KEEP, keep=True, skip=True, progress=lambda count: None)
    assert found.damaged == ["3.png"]
    assert found.kept.tolist() == [i for i in range(40) if i != 3]
    np.testing.assert_array_equal(found.images[3], image_files.decode(files[4], KEEP))
    assert len(found.images) == len(found.sums) == 39


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_number_of_workers_gives_the_same_bits(files, workers):
    lazy = LazyImages(files, KEEP, Workers(workers))
    expected = torch.from_numpy(np.stack([image_files.decode(path, KEEP) for path in files]))
    ids = np.random.default_rng(0).permutation(40)
    try:
        assert len(lazy) == 40
        assert torch.equal(lazy.take(ids), expected[ids])
        lazy.prefetch(ids[:24])
        lazy.prefetch(ids[24:])
        for part in (ids[:7], ids[20:30], ids[:7], np.array([3, 3, 5]), np.array([], dtype=np.int64)):
            assert torch.equal(lazy.take(part), expected[part])
        for first in range(30):  # more than are kept
            lazy.prefetch(np.arange(first, first + 3))
        assert torch.equal(lazy.take(np.arange(10)), expected[:10])
    finally:
        lazy.close()


def test_prefetched_images_are_not_decoded_again(files, monkeypatch):
    lazy = LazyImages(files, KEEP, Workers(1))
    try:
        lazy.prefetch(np.arange(20))
        first = lazy.take(np.arange(5, 10))
        monkeypatch.setattr(lazy.workers, "submit", None)
        assert torch.equal(lazy.take(np.arange(5, 10)), first)
        lazy.take(np.arange(20))
    finally:
        lazy.close()


def test_an_error_in_a_worker_is_the_same_error(files):
    files[3].write_bytes(b"no image")
    for count in (0, 1):
        lazy = LazyImages(files, KEEP, Workers(count))
        lazy.prefetch(np.arange(5))
        with pytest.raises(UnreadableImage, match=r"3\.png can't be read"):
            lazy.take(np.arange(5))
        lazy.close()


def workers_of(lazy):
    return [psutil.Process(pid) for pid in lazy.workers._pool._processes]


def gone(processes, seconds=5):
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.is_running() for process in processes):
        time.sleep(0.02)
    return not any(process.is_running() for process in processes)


def test_workers_end_with_close_and_with_the_object(files):
    lazy = LazyImages(files, KEEP, Workers(2))
    lazy.take(np.arange(4))
    first = workers_of(lazy)
    lazy.close()
    assert first
    assert gone(first)
    lazy.take(np.arange(4))  # starts new ones
    second = workers_of(lazy)
    del lazy
    gc.collect()
    assert second
    assert gone(second)


def test_a_killed_worker_is_told(files):
    lazy = LazyImages(files, KEEP, Workers(1))
    lazy.take(np.arange(4))
    for process in workers_of(lazy):
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RunError, match=r"was ended, perhaps for want of memory; set data\.workers to 0"):
        lazy.take(np.arange(40))
    assert len(lazy.take(np.arange(4))) == 4
    lazy.close()


def test_workers_import_nothing_of_torch():
    code = "import sys; from trainwright.data import image_worker; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_workers_do_not_outlive_a_killed_parent(files, tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import os, sys\nfrom pathlib import Path\nfrom trainwright.data.image_decoding import Workers\n"
        "from trainwright.data.image_files import Form\n"
        "if __name__ == '__main__':\n    workers = Workers(2)\n"
        f"    workers.submit([Path({str(files[0])!r})], Form('rgb', 7, 9, 'keep')).result()\n"
        "    print(*workers._pool._processes, flush=True)\n    sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        processes = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert processes
    assert gone(processes)
