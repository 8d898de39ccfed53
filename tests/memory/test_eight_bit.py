"""States in 8 bits: the published map, the nearest code, the same bits when stored again, and nothing boundless."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.memory import eight_bit, stores

CPU = torch.device("cpu")
CODES = {signed: eight_bit.code(signed, CPU) for signed in (True, False)}
# Every 15th value of torchao 0.18.0, optim/quant_utils.py, create_dynamic_map.
SIGNED = [
    -0.992968738,
    -0.782031238,
    -0.571093798,
    -0.360156238,
    -0.149218753,
    -0.0676562563,
    -0.0254687499,
    -0.00465624966,
    -8.87499991e-05,
    0.000156250011,
    0.00521875033,
    0.028281251,
    0.0704687461,
    0.163281247,
    0.374218762,
    0.585156262,
    0.796093762,
    1.0,
]
UNSIGNED = [
    0.0,
    0.000128125001,
    0.000971875037,
    0.00507812481,
    0.00929687452,
    0.0275781285,
    0.0486718714,
    0.0697656274,
    0.0908593759,
    0.159765631,
    0.265234381,
    0.370703101,
    0.476171851,
    0.581640601,
    0.687109351,
    0.792578101,
    0.898046851,
    1.0,
]


def through(values: torch.Tensor, signed: bool) -> torch.Tensor:
    return eight_bit.dequantize(*eight_bit.quantize(values, CODES[signed]), CODES[signed])


@pytest.mark.parametrize(("signed", "expected"), [(True, SIGNED), (False, UNSIGNED)])
def test_the_map_is_the_published_one(signed, expected):
    values = eight_bit.dynamic_map(signed)
    assert len(values.unique()) == 256
    assert values[::15].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(signed):
    torch.manual_seed(0)
    values = torch.randn(200, 256).mul(10.0 ** torch.linspace(-8, 3, 200)[:, None]).flatten()
    values = values if signed else values.square()
    found = through(values, signed)
    blocks = values.view(-1, 256)
    scales = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) if signed else blocks.amax(1, keepdim=True)
    table = eight_bit.dynamic_map(signed).double()
    parts = (blocks / scales).double()
    best = (parts.flatten()[:, None] - table).abs().amin(1) * scales.abs().double().expand(-1, 256).flatten()
    errors = (found.double() - values.double()).abs()
    smallest = (found.double() == 0) | (values == 0) | (found.double().abs() <= 4e-7 * scales.expand(-1, 256).flatten().abs())
    assert (errors <= best + values.abs().double() / 512)[signed | ~smallest].all()
    assert (errors.view(-1, 256).amax(1) / scales.abs().flatten()).max() < (0.0080 if signed else 0.0045)


@pytest.mark.parametrize("signed", [True, False])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_stored_again_it_has_the_same_bits(signed, data):
    seed, count = data.draw(st.integers(0, 10**6)), data.draw(st.integers(1, 800))
    width, size = data.draw(st.floats(0.1, 12)), data.draw(st.integers(-40, 37))
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(-1, 2, (count,), generator=generator).float() if signed else torch.ones(count)
    values = (torch.rand(count, generator=generator, dtype=torch.float64).pow(width) * 10.0**size * sign).float()
    codes, scales = eight_bit.quantize(values, CODES[signed])
    again = eight_bit.quantize(eight_bit.dequantize(codes, scales, CODES[signed]), CODES[signed])
    assert torch.equal(again[1], scales)
    assert torch.equal(again[0], codes) or scales.eq(0).any()
    assert torch.equal(eight_bit.dequantize(*again, CODES[signed]), eight_bit.dequantize(codes, scales, CODES[signed]))


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_stands_for_itself(signed):
    """Also where the product with the scale was rounded."""
    table = eight_bit.dynamic_map(signed)
    for scale in (1.0, 3.0, 0.1, 7e-20, 1e30, *([-1.0, -0.7] if signed else [])):
        for value in (
            table * scale,
            (table * scale).nextafter(torch.tensor(9e9)),
            (table * scale).nextafter(torch.tensor(-9e9)),
        ):
            value[-1], value[table == 0] = scale, 0
            assert torch.equal(through(value, signed), table * scale)


def test_the_largest_number_is_kept_exactly():
    values = torch.randn(64, 256)
    kept = through(values.flatten(), True).view(64, 256)
    most = values.abs().argmax(1, keepdim=True)
    assert (values.gather(1, most) < 0).any()
    assert torch.equal(kept.gather(1, most), values.gather(1, most))


def test_a_second_moment_is_never_rounded_to_zero():
    values = torch.full((256,), 1e-30)
    values[0] = 1.0
    values[1] = 0.0
    found = through(values, False)
    assert found[1] == 0
    assert (found[2:] > 0).all()
    assert found[2:].max() < 4e-7
    assert (through(values, True)[1:] == 0).all()  # a mean may be


def test_zeros_and_what_is_far_below_are_zero():
    assert not through(torch.zeros(700), True).any()
    assert not through(torch.full((700,), 1e-38), False).any()
    assert not through(torch.full((700,), -1e-38), True).any()


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_chunks_are_the_same_as_all_at_once(count):
    values = torch.randn(count)
    parts, whole = (eight_bit.EightBit(count, CODES[True], stores.in_memory(CPU, CPU)) for _ in range(2))
    whole.write(0, values)
    for start in range(0, count, 512):
        parts.write(start, values[start : start + 512])
    assert torch.equal(parts.read(0, count), whole.read(0, count))
    assert torch.equal(whole.read(0, count), through(values, True))
    if count > 512:
        assert torch.equal(whole.read(512, 1024), through(values, True)[512:1536])
    taken = sum(t.nbytes for t in whole.tensors())
    assert taken == eight_bit.room(count)
    assert count < 256 or taken < 1.02 * count + 4


def test_a_chunk_begins_with_a_block():
    state = eight_bit.EightBit(1000, CODES[True], stores.in_memory(CPU, CPU))
    with pytest.raises(AssertionError):
        state.write(100, torch.ones(256))
    with pytest.raises(AssertionError):
        state.write(0, torch.ones(100))
