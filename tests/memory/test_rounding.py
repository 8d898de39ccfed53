"""Stochastic rounding: exact in the mean, still for what needs none, and the same bits for the same place in the whole."""

from __future__ import annotations

import pytest
import torch

from trainwright.memory import rounding
from trainwright.pieces import Piece

EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)  # all bits that there are


def rounded(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    out = torch.full(values.shape, torch.nan, dtype=torch.bfloat16)
    rounding.round_(out, values, bits)
    return out


@pytest.mark.parametrize("value", [1.0039, 1.001953125, -3.3333e-5, 7.77e30, -1e-38, 1e-40, 255.0 / 257, -0.1])
def test_the_mean_over_all_bits_is_the_number(value):
    values = torch.full((2**16,), value)
    found = rounded(values, EVERY).double()
    assert found.mean().item() == pytest.approx(values[0].item(), rel=1e-12)
    assert len(found.unique()) == 2  # the one below and the one above
    nearest = values[0].to(torch.bfloat16).double()
    assert nearest in found.unique()


def test_what_bfloat16_represents_never_moves():
    numbers = EVERY.view(torch.bfloat16)
    numbers = numbers[numbers.isfinite()]
    for bits in (-(2**15), -1, 0, 1, 2**15 - 1):
        found = rounded(numbers.float(), torch.full((len(numbers),), bits, dtype=torch.int16))
        assert torch.equal(found.view(torch.int16), numbers.view(torch.int16))
    for odd in (torch.inf, -torch.inf, torch.nan):
        assert (
            torch.equal(rounded(torch.full((2**16,), odd), EVERY), torch.full((2**16,), odd, dtype=torch.bfloat16))
            or odd != odd
        )
    assert rounded(torch.full((2**16,), torch.nan), EVERY).isnan().all()


def test_the_mean_over_steps_is_the_number():
    values = torch.linspace(-2, 3, 4000) * 1.001
    whole = Piece.all_of((4000,))
    total = torch.zeros(4000, dtype=torch.float64)
    for step in range(400):
        bits = rounding.bits_of(rounding.key_of(1, step, "w"), values, whole, 0, 4000)
        total += rounded(values, bits).double()
    gap = 2.0 ** (values.abs().log2().floor() - 7)
    errors = (total / 400 - values) / gap
    assert errors.abs().max() < 0.5 * 5 / 400**0.5  # five standard deviations of a fair coin's mean
    assert abs(errors.mean()) < 0.5 * 5 / (400 * 4000) ** 0.5


def test_bits_are_evenly_distributed_and_independent():
    like = torch.empty(2**18)
    one, other, renamed, reseeded = (
        rounding.bits_of(rounding.key_of(*key), like, Piece.all_of((2**18,)), 0, 2**18).double()
        for key in ((0, 0, "a"), (0, 1, "a"), (0, 0, "b"), (1, 0, "a"))
    )
    counts = torch.histc(one, 256, -(2**15), 2**15)
    assert ((counts - 1024) ** 2 / 1024).sum() < 370  # chi squared with 255 degrees of freedom: one in 10^5
    for number in (one, other):
        for lag in (1, 2, 3, 4, 5):
            assert abs(torch.corrcoef(torch.stack([number[:-lag], number[lag:]]))[0, 1]) < 0.01
    for number in (other, renamed, reseeded):
        assert abs(torch.corrcoef(torch.stack([one, number]))[0, 1]) < 0.01


def test_the_generator_is_splitmix64():
    """Against whole numbers of Python, without a sign."""
    key, mask = -(2**62) - 12345, 2**64 - 1
    for counter in (0, 1, 77, 2**40):
        z = (counter * 0x9E3779B97F4A7C15 + key) & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        z ^= z >> 31
        found = rounding.bits_of(key, torch.empty(4), Piece((4 * counter + 4,), (4 * counter,), (4,)), 0, 4)
        assert [number & 0xFFFF for number in found.tolist()] == [z >> 16 * lane & 0xFFFF for lane in range(4)]


BOXES = {
    "rows": ((12, 10), (3, 0), (5, 10)),
    "columns": ((12, 10), (0, 4), (12, 3)),
    "both": ((12, 10), (2, 4), (7, 6)),
    "one column": ((12, 10), (0, 9), (12, 1)),
    "vector": ((37,), (11,), (13,)),
    "three": ((4, 6, 5), (1, 2, 0), (3, 3, 5)),
    "nothing": ((4, 6), (4, 0), (0, 6)),
    "number": ((), (), ()),
}


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("start", [0, 3])
def test_a_part_gets_the_bits_of_its_place(name, start):
    piece = Piece(*BOXES[name])
    key = rounding.key_of(5, 7, "weight")
    whole = rounding.bits_of(key, torch.empty(piece.shape), Piece.all_of(piece.shape), 0, torch.empty(piece.shape).numel())
    expected = whole.view(piece.shape)[piece.slices()].flatten()[start:]
    count = max(piece.numel - start, 0)
    assert torch.equal(rounding.bits_of(key, torch.empty(piece.size), piece, min(start, piece.numel), count), expected)


def test_channels_last_rows_get_theirs():
    whole = torch.empty(6, 4, 3, 3).to(memory_format=torch.channels_last)
    key = rounding.key_of(0, 0, "conv")
    everything = rounding.bits_of(key, whole, Piece.all_of((6, 4, 3, 3)), 0, whole.numel())
    part = whole[2:5]
    piece = Piece((6, 4, 3, 3), (2, 0, 0, 0), (3, 4, 3, 3))
    assert torch.equal(rounding.bits_of(key, part, piece, 0, part.numel()), everything[2 * 36 : 5 * 36])
    box = torch.empty(3, 2, 3, 3).to(memory_format=torch.channels_last)
    piece = Piece((6, 4, 3, 3), (2, 1, 0, 0), (3, 2, 3, 3))
    expected = everything.view(6, 3, 3, 4)[2:5, :, :, 1:3].flatten()
    assert torch.equal(rounding.bits_of(key, box, piece, 0, box.numel()), expected)
