"""Augmentation against torchvision sample by sample, with the parameters that were drawn; and the same bits for any slicing."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

from trainwright.data import augment, colour, draws, geometry
from trainwright.data.augment import Augmenter
from trainwright.data.draws import SLOTS, Slot
from trainwright.recipe import Augment, InputError, Task

SEED, STEP = 5, 11
EVERYTHING = {
    "pad_crop": 2, "resized_crop": 0.5, "flip": 0.5, "flip_vertical": 0.5, "translate": 0.1, "rotate": 30.0, "scale": 0.2,
    "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1, "erase": 0.5,
}  # fmt: skip


def images(n=24, channels=3, height=14, width=19, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(n + channels)
    noise = torch.randint(0, 256, (n, channels, height, width), generator=generator, dtype=torch.uint8)
    return noise if dtype == torch.uint8 else noise.float() / 255


def labels(n=24, classes=10):
    return torch.arange(n) % classes


def source(inputs, targets):
    """A fetch, with the positions that were asked for."""
    asked = []

    def fetch(positions):
        asked.append(positions.tolist())
        index = torch.from_numpy(positions)
        return inputs[index], targets[index]

    return fetch, asked


def augmented(inputs, targets=None, classes=10, positions=None, step=STEP, seed=SEED, **settings):
    targets = labels(len(inputs)) if targets is None else targets
    positions = np.arange(len(inputs)) if positions is None else positions
    augmenter = Augmenter(Augment(**settings), seed, classes, targets.ndim == 3)
    return augmenter(step, positions, len(inputs), source(inputs, targets)[0])


def drawn(n=24, step=STEP):
    """The numbers of each sample by the name of their slot."""
    table = draws.uniform(SEED, step, n, SLOTS)
    return [{slot.name: float(row[slot]) for slot in Slot} for row in table]


def signed(number):
    return 2 * number - 1


# Exact moves: equal to the bit.


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("padding", [1, 4, 30])
def test_pad_crop_is_torchvisions(dtype, padding):
    raw = images(dtype=dtype)
    result, targets = augmented(raw, pad_crop=padding)
    for sample, mine, u in zip(raw, result, drawn(), strict=True):
        top, left = (int(u[name] * (2 * padding + 1)) for name in ("PAD_TOP", "PAD_LEFT"))
        assert torch.equal(mine, tv.crop(tv.pad(sample, [padding]), top, left, 14, 19))
    assert result.dtype == dtype
    assert torch.equal(targets, labels())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_flips_are_torchvisions(dtype):
    raw = images(dtype=dtype)
    result, _ = augmented(raw, flip=0.5, flip_vertical=0.3)
    kinds = set()
    for sample, mine, u in zip(raw, result, drawn(), strict=True):
        mirrored, inverted = u["FLIP"] < 0.5, u["FLIP_VERTICAL"] < 0.3
        sample = tv.horizontal_flip(sample) if mirrored else sample
        assert torch.equal(mine, tv.vertical_flip(sample) if inverted else sample)
        kinds.add((mirrored, inverted))
    assert len(kinds) == 4


def test_pad_crop_comes_before_flips():
    raw = images()
    result, _ = augmented(raw, pad_crop=3, flip=1.0, flip_vertical=1.0)
    assert torch.equal(result, augmented(raw, pad_crop=3)[0].flip(2, 3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_erase_is_torchvisions(dtype, channels):
    raw = images(200, channels, dtype=dtype)
    result, _ = augmented(raw, erase=0.6)
    for sample, mine, u in zip(raw, result, drawn(200), strict=True):
        area = (0.02 + 0.31 * u["ERASE_AREA"]) * 14 * 19
        low, high = (np.log(np.clip(bound, area / 14**2, 19**2 / area)) for bound in (0.3, 3.3))  # what fits
        ratio = np.exp(low + (high - low) * u["ERASE_RATIO"])
        h, w = round(np.sqrt(area / ratio)), round(np.sqrt(area * ratio))
        top, left = int(u["ERASE_TOP"] * (14 - h + 1)), int(u["ERASE_LEFT"] * (19 - w + 1))
        expected = tv.erase(sample, top, left, h, w, torch.zeros(1)) if u["ERASE"] < 0.6 else sample
        assert torch.equal(mine, expected.to(dtype))


def test_erased_areas_cover_the_range():
    result, _ = augmented(torch.full((2000, 1, 40, 40), 9, dtype=torch.uint8), erase=1.0)
    shares = (result == 0).float().mean((1, 2, 3))
    assert 0.01 < shares.min() < 0.03
    assert 0.31 < shares.max() < 0.35
    rows, columns = ((result[:, 0] == 0).any(axis) for axis in (2, 1))
    assert rows.float().mean(0).min() > 0.03, "the first and the last row too"
    assert columns.float().mean(0).min() > 0.03


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_at_least_a_pixel_is_erased(side):
    result, _ = augmented(torch.ones(300, 1, side, side, dtype=torch.uint8), erase=1.0)
    assert (result.amin((1, 2, 3)) == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.data())
def test_crop_and_flip_of_any_shape(n, channels, height, width, padding, data):
    raw = images(n, channels, height, width)
    corner = st.lists(st.integers(0, 2 * padding), min_size=n, max_size=n)
    switch = st.lists(st.booleans(), min_size=n, max_size=n)
    top, left = (np.array(data.draw(corner)) for _ in range(2))
    mirrored, inverted = (np.array(data.draw(switch)) for _ in range(2))
    moved = geometry.crop_and_flip(raw, padding, top, left, mirrored, inverted)
    for i, sample in enumerate(tv.pad(raw, [padding])):
        expected = tv.crop(sample, top[i], left[i], height, width)
        expected = expected.flip(2) if mirrored[i] else expected
        assert torch.equal(moved[i], expected.flip(1) if inverted[i] else expected)


# Resampling.


@pytest.mark.parametrize(
    "settings",
    [{"rotate": 40.0}, {"translate": 0.3}, {"scale": 0.5}, {"rotate": 180.0, "translate": 0.2, "scale": 0.3}],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_affine_is_torchvisions(dtype, settings):
    raw = images(dtype=dtype)
    result, _ = augmented(raw, **settings)
    assert result.dtype == dtype
    tolerance = 1 if dtype == torch.uint8 else 1e-4  # where a place lies halfway between two gray levels, either is right
    for sample, mine, u in zip(raw, result, drawn(), strict=True):
        expected = tv.affine(sample, *affine_of(settings, u), shear=[0.0], interpolation=InterpolationMode.BILINEAR)
        torch.testing.assert_close(mine.float(), expected.float(), rtol=0, atol=tolerance)


def affine_of(settings, u, height=14, width=19):
    share = settings.get("translate", 0)
    shift = [share * width * signed(u["TRANSLATE_X"]), share * height * signed(u["TRANSLATE_Y"])]
    return settings.get("rotate", 0) * signed(u["ROTATE"]), shift, 1 + settings.get("scale", 0) * signed(u["SCALE"])


def crop_of(least, u, height=14, width=19):
    """(top, left, height, width) in pixels."""
    area, bound = least + (1 - least) * u["CROP_AREA"], min(4 / 3, 1 / (least + (1 - least) * u["CROP_AREA"]))
    stretch = np.exp(np.log(bound) * signed(u["CROP_RATIO"]))
    h, w = height * np.sqrt(area / stretch), width * np.sqrt(area * stretch)
    return (height - h) * u["CROP_TOP"], (width - w) * u["CROP_LEFT"], h, w


@pytest.mark.parametrize("settings", [{}, {"rotate": 40.0, "translate": 0.1, "scale": 0.3}], ids=["crop", "affine and crop"])
def test_resized_crop_is_scipys_interpolation_of_the_affine_image(settings):
    raw = images(channels=1, dtype=torch.float32)
    result, _ = augmented(raw, resized_crop=0.2, **settings)
    for sample, mine, u in zip(raw, result, drawn(), strict=True):
        top, left, h, w = crop_of(0.2, u)
        y = np.clip(top + (np.arange(14) + 0.5) * h / 14, 0.5, 13.5)
        x = np.clip(left + (np.arange(19) + 0.5) * w / 19, 0.5, 18.5)
        degrees, (right, down), scale = affine_of(settings, u)
        places = np.stack(np.meshgrid(x - 9.5 - right, y - 7 - down)).reshape(2, -1)
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        across, along = np.linalg.solve(scale * np.array([[c, -s], [s, c]]), places)
        expected = ndimage.map_coordinates(
            sample[0].double().numpy(), [along + 7 - 0.5, across + 9.5 - 0.5], order=1, mode="grid-constant", cval=0
        )
        np.testing.assert_allclose(mine[0].numpy().ravel(), expected, atol=1e-4)


@pytest.mark.parametrize(("top", "left", "h", "w"), [(0, 0, 14, 19), (0, 4, 14, 9), (3, 0, 7, 19), (5, 6, 4, 5)])
def test_resized_crop_is_torchvisions(top, left, h, w):
    """Inside of the crop; along its edges torchvision repeats its outermost pixels, while ours blend with the pixels beyond."""
    raw = images(1, dtype=torch.float32)
    crop = geometry.Crop(*(np.array([float(number)]) for number in (top, left, h, w)))
    mine = geometry.resample(raw, geometry.sampling_grid(14, 19, None, crop), "bilinear")
    expected = tv.resized_crop(raw, top, left, h, w, [14, 19], antialias=False)
    y = -(-14 // (2 * h)) if h < 14 else 0
    x = -(-19 // (2 * w)) if w < 19 else 0
    torch.testing.assert_close(mine[:, :, y : 14 - y, x : 19 - x], expected[:, :, y : 14 - y, x : 19 - x], rtol=0, atol=1e-4)


def test_crops_cover_the_range():
    """Of a ramp, the differences tell the size of the crop: where it is in both directions, and how much of the area."""
    n, size = 2000, 32
    ramp = torch.arange(size).float().expand(n, 1, size, size) / size
    for axis, turned in enumerate((ramp, ramp.transpose(2, 3))):
        result, _ = augmented(turned.contiguous(), resized_crop=0.25)
        line = result[:, 0, :, size // 2] if axis else result[:, 0, size // 2]
        side = (line[:, 20] - line[:, 12]) * size / 8
        assert 0.43 < side.min() < 0.5
        assert 0.98 < side.max() < 1.0001
        assert stats.spearmanr(line[:, 16], side).pvalue > 1e-4, "the place doesn't depend on the size"


def test_masks_move_with_their_images():
    masks = torch.zeros(40, 20, 20, dtype=torch.uint8)
    masks[:, 4:15, 3:12] = 1
    masks[:, 8:11, 5:16] = 2
    raw = masks[:, None] * 100
    result, moved = augmented(raw, masks, 3, pad_crop=2, flip=0.5, flip_vertical=0.5, erase=0.5)
    kept = (result[:, 0] > 0) | (moved == 0)
    assert moved.dtype == torch.uint8
    assert torch.equal(result[:, 0][kept], (moved * 100)[kept])
    assert 0.01 < 1 - kept.float().mean() < 0.1, "what is erased stays in the mask"
    result, moved = augmented(raw, masks, 3, rotate=45.0, translate=0.2, scale=0.3, resized_crop=0.4, pad_crop=2, flip=0.5)
    assert ((result[:, 0] / 100).round() == moved).float().mean() > 0.9
    assert set(moved.unique().tolist()) == {0, 1, 2}, "no classes between classes"


def test_masks_are_torchvisions():
    masks = torch.randint(0, 5, (24, 14, 19), dtype=torch.uint8)
    settings = {"rotate": 40.0, "translate": 0.2, "scale": 0.3}
    _, moved = augmented(images(), masks, 5, **settings)
    expected = [
        tv.affine(mask[None], *affine_of(settings, u), shear=[0.0], interpolation=InterpolationMode.NEAREST)[0]
        for mask, u in zip(masks, drawn(), strict=True)
    ]
    assert (moved != torch.stack(expected)).float().mean() < 0.002, "but for ties"


# Colours.

ADJUST = {
    "brightness": (tv.adjust_brightness, 1.0), "contrast": (tv.adjust_contrast, 1.0),
    "saturation": (tv.adjust_saturation, 1.0), "hue": (tv.adjust_hue, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("size", [0.1, 0.45])
@pytest.mark.parametrize(("key", "channels"), [*((key, 3) for key in ADJUST), ("brightness", 1), ("contrast", 1)])
def test_colours_are_torchvisions(key, size, channels):
    adjust, middle = ADJUST[key]
    exact = images(channels=channels, dtype=torch.float32)
    exact[:, :, :2] = exact[:, :1, :2]  # gray ones too
    exact[:, :, 2] = 0
    exact[:, :, 3] = 1
    result, _ = augmented(exact, **{key: size})
    raw = (exact * 255).round().to(torch.uint8)
    rounded, _ = augmented(raw, **{key: size})
    assert rounded.dtype == torch.uint8
    for i, u in enumerate(drawn()):
        factor = middle + size * signed(u[key.upper()])
        torch.testing.assert_close(result[i], adjust(exact[i], factor), rtol=0, atol=2e-5)
        # torchvision cuts off fractions of bytes, and of the gray that it blends with, where ours rounds
        torch.testing.assert_close(rounded[i].int(), adjust(raw[i], factor).int(), rtol=0, atol=1)
        torch.testing.assert_close(rounded[i].float(), adjust(exact[i], factor) * 255, rtol=0, atol=0.51)


def test_colours_follow_each_other_and_round_once():
    exact = images(dtype=torch.float32)
    result, _ = augmented((exact * 255).round().to(torch.uint8), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2)
    for i, u in enumerate(drawn()):
        expected = exact[i]
        for key, (adjust, middle) in ADJUST.items():
            expected = adjust(expected, middle + (0.2 if key == "hue" else 0.4) * signed(u[key.upper()]))
        torch.testing.assert_close(result[i].float(), expected * 255, rtol=0, atol=0.51)


def test_hue_of_every_colour_and_shift():
    levels = torch.linspace(0, 1, 9)
    every = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 27, 27)
    for shift in np.linspace(-0.5, 0.5, 41):
        mine = colour.shift_hue(every, np.array([shift]), 1.0)
        torch.testing.assert_close(mine, tv.adjust_hue(every, shift), rtol=0, atol=2e-5)


def test_contrast_of_other_channels_uses_their_mean():
    two = images(channels=2, dtype=torch.float32)
    result, _ = augmented(two, contrast=0.3)
    factor = 1 + 0.3 * signed(drawn()[0]["CONTRAST"])
    torch.testing.assert_close(result[0], (two[0] * factor + two[0].mean() * (1 - factor)).clamp(0, 1), rtol=0, atol=1e-5)


def test_padding_and_the_outside_stay_black():
    white = torch.full((24, 3, 14, 19), 200, dtype=torch.uint8)
    moves = {"rotate": 45.0, "scale": 0.3, "pad_crop": 3}
    moved, coloured = augmented(white, **moves)[0], augmented(white, **moves, contrast=0.5, brightness=0.5)[0]
    assert 0.1 < (moved == 0).float().mean() < 0.5
    assert (coloured[moved == 0] == 0).all()


# Mixing.


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_mixup_is_torchvisions(dtype):
    raw = images(dtype=dtype)
    result, targets = augmented(raw, mixup=0.4)
    partners = draws.partners(np.array([u["MIX_PARTNER"] for u in drawn()]))
    oracle = v2.MixUp(num_classes=10)
    for i, u in enumerate(drawn()):
        pair = [int(partners[i]), i]  # torchvision mixes with the one before
        y = labels()[pair]
        params = {"lam": float(stats.beta(0.4, 0.4).ppf(u["MIXUP_SHARE"])), "labels": y, "batch_size": 2}
        torch.testing.assert_close(targets[i], oracle.transform(y, params)[1], rtol=0, atol=1e-6)
        expected = oracle.transform(raw[pair].float(), params)[1]
        torch.testing.assert_close(result[i].float(), expected, rtol=0, atol=0.51 if dtype == torch.uint8 else 1e-5)
    assert result.dtype == dtype
    assert targets.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_cutmix_is_torchvisions(dtype):
    raw = images(100, dtype=dtype)
    result, targets = augmented(raw, cutmix=1.0)
    numbers = drawn(100)
    partners = draws.partners(np.array([u["MIX_PARTNER"] for u in numbers]))
    oracle = v2.CutMix(num_classes=10)
    for i, u in enumerate(numbers):
        pair = [int(partners[i]), i]
        x, y = int(u["CUTMIX_LEFT"] * 19), int(u["CUTMIX_TOP"] * 14)
        reach = 0.5 * np.sqrt(1 - u["CUTMIX_SHARE"])  # Beta(1, 1) is uniform
        w, h = int(reach * 19), int(reach * 14)
        box = (max(x - w, 0), max(y - h, 0), min(x + w, 19), min(y + h, 14))
        share = 1 - (box[2] - box[0]) * (box[3] - box[1]) / (14 * 19)
        params = {"box": box, "lam_adjusted": share, "labels": labels(100)[pair], "batch_size": 2}
        assert torch.equal(result[i], oracle.transform(raw[pair], params)[1])
        torch.testing.assert_close(targets[i], oracle.transform(params["labels"], params)[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{"mixup": 0.2}, {"cutmix": 0.7}, {"mixup": 2.0, "cutmix": 1.0}], ids=str)
def test_targets_are_the_shares_of_the_pixels(settings):
    """Where every pixel of an image is its class, the mean pixel must be the mean of the targets."""
    y = labels(64, 2)
    raw = y.float()[:, None, None, None].expand(64, 1, 16, 12)
    for step in range(4):
        result, targets = augmented(raw, y, 2, step=step, **settings)
        torch.testing.assert_close(result.mean((1, 2, 3)), targets[:, 1], rtol=0, atol=1e-5)
        torch.testing.assert_close(targets.sum(1), torch.ones(64))
        assert targets.min() >= 0
        binary = augmented(raw, y, 1, step=step, **settings)[1]
        assert binary.dtype == torch.float32
        torch.testing.assert_close(binary, targets[:, 1])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_shares_are_beta(alpha):
    y = torch.arange(1500)
    _, targets = augmented(torch.zeros(1500, 1, 1, 1), y, 1500, mixup=alpha)
    assert stats.kstest(targets[y, y], stats.beta(alpha, alpha).cdf).pvalue > 1e-4


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1e4])
def test_any_alpha_gives_shares(alpha):
    _, targets = augmented(images(), mixup=alpha)
    torch.testing.assert_close(targets.sum(1), torch.ones(24))
    assert targets.min() >= 0


def test_mixup_and_cutmix_take_turns_by_batch():
    raw, both = images(8), []
    for step in range(200):
        result, _ = augmented(raw, step=step, mixup=1.0, cutmix=1.0)
        mixup, cutmix = (augmented(raw, step=step, **{key: 1.0})[0] for key in ("mixup", "cutmix"))
        assert torch.equal(result, mixup) != torch.equal(result, cutmix)
        both.append(torch.equal(result, mixup))
    assert stats.binomtest(sum(both), 200).pvalue > 1e-4


def test_a_partner_is_augmented_with_its_own_numbers():
    raw, y = images(), torch.arange(24)
    mixed, targets = augmented(raw, y, 24, mixup=0.4, **EVERYTHING)
    each = augmented(raw, y, 24, **EVERYTHING)[0].flatten(1).float()
    torch.testing.assert_close(mixed.flatten(1).float(), targets @ each, rtol=0, atol=0.51)


# Whose numbers they are.


@pytest.mark.parametrize(
    "settings",
    [
        EVERYTHING, {**EVERYTHING, "mixup": 0.3}, {"cutmix": 1.0, "flip": 0.5}, {"mixup": 0.2, "cutmix": 1.0, "rotate": 10.0},
        {"contrast": 0.5, "hue": 0.3}, {"resized_crop": 0.3},
    ],
    ids=lambda settings: "-".join(settings) if len(settings) < 5 else "everything" + " mixup" * ("mixup" in settings),
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_micro_batches_give_the_same_bits(size, dtype, settings):
    raw = images(dtype=dtype)
    whole = augmented(raw, **settings)
    parts = [augmented(raw, positions=np.arange(24)[first : first + size], **settings) for first in range(0, 24, size)]
    for together, apart in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(together, torch.cat(apart))
    shuffled = np.random.default_rng(0).permutation(24)
    for together, apart in zip(whole, augmented(raw, positions=shuffled, **settings), strict=True):
        assert torch.equal(together[shuffled], apart)


def test_a_mean_doesnt_depend_on_the_threads_that_share_it():
    """torch adds up floats in another order where one large image is all there is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        large = images(12, 1, 256, 256, torch.float32)
        factors = np.full(12, 0.3)
        whole = colour.contrast(large, factors, 1.0)
        apart = [colour.contrast(image[None], factors[:1], 1.0) for image in large]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, torch.cat(apart))


@pytest.mark.parametrize("key", ["pad_crop", "flip", "flip_vertical", "rotate", "erase", "hue"])
def test_strides_dont_matter(key):
    raw = images()
    augmenter = Augmenter(Augment(**{key: EVERYTHING[key]}), SEED, 10, False)
    expected = augmented(raw, **{key: EVERYTHING[key]})[0]
    for strided in (raw.contiguous(memory_format=torch.channels_last), raw.repeat_interleave(2, 3)[..., ::2]):
        result, _ = augmenter(STEP, np.arange(24), 24, source_as_it_is(strided))
        assert torch.equal(result, expected)


def source_as_it_is(inputs):
    return lambda _: (inputs, labels())


@pytest.mark.parametrize("size", [1, 5])
def test_micro_batches_of_masks_give_the_same_bits(size):
    raw, masks = images(), torch.randint(0, 4, (24, 14, 19), dtype=torch.uint8)
    whole = augmented(raw, masks, 4, **EVERYTHING)
    parts = [augmented(raw, masks, 4, positions=np.arange(24)[i : i + size], **EVERYTHING) for i in range(0, 24, size)]
    for together, apart in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(together, torch.cat(apart))


def test_nothing_is_fetched_twice():
    fetch, asked = source(images(), labels())
    augmenter = Augmenter(Augment(mixup=0.2, flip=0.5), SEED, 10, False)
    augmenter(STEP, np.arange(24), 24, fetch)
    assert asked == [list(range(24))]
    augmenter(STEP, np.array([4]), 24, fetch)
    partner = draws.partners(draws.uniform(SEED, STEP, 24, SLOTS)[:, Slot.MIX_PARTNER])[4]
    assert asked[1:] == [sorted([4, int(partner)])]
    Augmenter(Augment(flip=0.5), SEED, 10, False)(STEP, np.array([7, 4]), 24, fetch)
    assert asked[2:] == [[7, 4]]


def test_raw_images_and_targets_are_left_alone():
    for dtype, dense, (key, value) in itertools.product([torch.uint8, torch.float32], [False, True], EVERYTHING.items()):
        raw, targets = images(dtype=dtype), torch.ones(24, 14, 19, dtype=torch.uint8) if dense else labels()
        before = raw.clone(), targets.clone()
        Augmenter(Augment(**{key: value}), SEED, 10, dense)(STEP, np.arange(24), 24, lambda _, both=(raw, targets): both)
        assert torch.equal(raw, before[0])
        assert torch.equal(targets, before[1])


@pytest.mark.parametrize("change", [{"step": STEP + 1}, {"seed": SEED + 1}])
def test_other_steps_and_seeds_give_other_images(change):
    raw = images(1).expand(24, -1, -1, -1)
    one, other = augmented(raw, **EVERYTHING)[0], augmented(raw, **EVERYTHING, **change)[0]
    assert len(torch.cat((one, other)).unique(dim=0)) == 48


def test_switching_one_on_leaves_the_others():
    raw = images() // 2 + 1  # no zeros
    moved = augmented(raw, pad_crop=3, flip=0.5, flip_vertical=0.5)[0]
    erased = augmented(raw, pad_crop=3, flip=0.5, flip_vertical=0.5, erase=0.5)[0]
    assert torch.equal(erased[erased > 0], moved[erased > 0])
    darker = augmented(raw, pad_crop=3, flip=0.5, flip_vertical=0.5, erase=0.5, brightness=0.4)[0]
    assert torch.equal(darker == 0, erased == 0)


def test_flips_are_as_often_as_asked():
    left = torch.zeros(3000, 1, 1, 2, dtype=torch.uint8)
    left[..., 0] = 1
    mirrored = int((augmented(left, flip=0.3)[0][..., 1] == 1).sum())
    assert stats.binomtest(mirrored, 3000, 0.3).pvalue > 1e-4


def test_angles_cover_the_range():
    """Of a single bright line through the centre."""
    n, size = 1000, 33
    line = torch.zeros(n, 1, size, size)
    line[:, 0, size // 2, size // 2 :] = 1
    result = augmented(line, rotate=60.0)[0][:, 0]
    places = torch.arange(size) - size // 2
    x, y = (result.sum(1) * places).sum(1), (result.sum(2) * places).sum(1)
    degrees = torch.rad2deg(torch.atan2(y, x))
    assert stats.kstest(degrees, "uniform", (-60, 120)).pvalue > 1e-4


# Small cases, and what is refused.


@pytest.mark.parametrize(
    "settings", [EVERYTHING, {"mixup": 1.0}, {"cutmix": 1.0, **EVERYTHING}], ids=["all", "mixup", "cutmix"]
)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 3)])
def test_tiny_images(settings, shape):
    raw = images(5, 3, *shape)
    result, targets = augmented(raw, **settings)
    assert result.shape == raw.shape
    assert len(targets) == 5


@pytest.mark.parametrize(
    "settings", [EVERYTHING, {"mixup": 1.0}, {"cutmix": 1.0, **EVERYTHING}], ids=["all", "mixup", "cutmix"]
)
def test_no_samples_and_one_sample(settings):
    nothing, none = augmented(images(), positions=np.arange(0), **settings)
    assert nothing.shape == (0, 3, 14, 19)
    assert none.shape == ((0,) if settings is EVERYTHING else (0, 10))
    alone, target = augmented(images(1), **settings)
    assert alone.shape == (1, 3, 14, 19)
    if settings is not EVERYTHING:
        assert torch.equal(target, torch.eye(10)[:1]), "mixed with itself"


def test_identity():
    assert augment.is_identity(Augment())
    assert augment.is_identity(Augment(flip=0.0, resized_crop=None))
    for key, value in [*EVERYTHING.items(), ("mixup", 0.1), ("cutmix", 0.1)]:
        assert not augment.is_identity(Augment(**{key: value})), key
    raw = images()
    result, targets = augmented(raw)
    assert torch.equal(result, raw)
    assert torch.equal(targets, labels())


def test_every_setting_changes_something():
    raw = images()
    for key, value in [*EVERYTHING.items(), ("mixup", 0.4), ("cutmix", 1.0)]:
        assert not torch.equal(augmented(raw, **{key: value})[0], raw), key
    assert {*EVERYTHING, "mixup", "cutmix"} == set(Augment.model_fields), "a new setting needs a test"


@pytest.mark.parametrize(
    ("settings", "channels", "dense", "classes", "message"),
    [
        (
            {"hue": 0.1}, 1, False, 10,
            "data.augment.hue needs red, green and blue, but the images have 1 channel; "
            "remove it, or set data.colour to rgb if the files are coloured",
        ),
        (
            {"hue": 0.1, "saturation": 0.1}, 4, False, 10,
            "data.augment.saturation and data.augment.hue need red, green and blue, but the images have 4 channels; "
            "remove them",
        ),
        (
            {"mixup": 0.2}, 3, True, 3,
            "data.augment.mixup mixes the classes of whole images, but the targets are masks; set it to 0",
        ),
        (
            {"mixup": 0.2, "cutmix": 1.0}, 3, False, 0,
            "data.augment.mixup and data.augment.cutmix mix the classes of whole images, but the targets are values; "
            "set them to 0",
        ),
    ],
)  # fmt: skip
def test_settings_without_effect_or_meaning_are_refused(settings, channels, dense, classes, message):
    with pytest.raises(InputError) as caught:
        augment.check(Augment(**settings), channels, dense, classes)
    assert str(caught.value) == message


def test_everything_else_is_accepted():
    augment.check(Augment(**EVERYTHING), 3, True, 5)
    augment.check(Augment(mixup=0.2, cutmix=1.0, contrast=0.2, brightness=0.1), 1, False, 1)


@pytest.mark.parametrize(
    ("task", "classes"),
    [
        (Task("classes", 7), 7),
        (Task("binary", 1), 1),
        (Task("values", 3), 0),
        (Task("classes", 4, dense=True), 4),
        (Task("binary", 1, dense=True), 1),
    ],
)
def test_made_for_a_task(task, classes):
    section = Augment(**EVERYTHING)
    assert augment.make(section, seed=3, task=task, channels=3) == Augmenter(section, 3, classes, task.dense)
    with pytest.raises(InputError, match="the images have 1 channel;"):
        augment.make(section, seed=3, task=task, channels=1)
    if task.dense or task.kind == "values":
        with pytest.raises(InputError, match=r"data\.augment\.mixup mixes"):
            augment.make(Augment(mixup=0.2), seed=3, task=task, channels=3)
    else:
        augment.make(Augment(mixup=0.2), seed=3, task=task, channels=3)
