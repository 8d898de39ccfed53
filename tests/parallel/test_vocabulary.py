"""Cross-entropy over a vocabulary that processes share, against torch's own over all of it: value and gradients."""

import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from tests import ranks
from trainwright.losses import Shard, split_softmax, token_cross_entropy, tokens
from trainwright.pieces import Piece
from trainwright.recipe import CrossEntropy

OPTIONS = list(itertools.product([0.0, 0.1], [0.0, 1e-2]))
VOCABULARY, SIZE, ROWS, LENGTH = 37, 8, 3, 30


def case(dtype, vocabulary):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, LENGTH, SIZE, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (ROWS, LENGTH), generator=generator)
    labels[torch.rand(ROWS, LENGTH, generator=generator) < 0.4] = -100
    return hidden.to(dtype), weight.to(dtype), labels


def plain(hidden, weight, labels, section):
    """torch's own, over all logits at once."""
    logits = (hidden @ weight.T).flatten(0, 1)
    options = {"label_smoothing": section.label_smoothing, "ignore_index": -100}
    total = cross_entropy(logits, labels.flatten(), reduction="sum", **options)
    return total + section.z_loss * logits[labels.flatten() != -100].logsumexp(-1).square().sum()


def mine(weight) -> Piece:
    return Piece.all_of(tuple(weight.shape)).chunk(dist.get_world_size(), dist.get_rank())


def sharded(hidden, weight, labels, section, **options):
    """The loss from this process's rows."""
    piece = mine(weight)
    shard = Shard(piece.start[0], len(weight), dist.group.WORLD)
    local = piece.of(weight).detach().clone().requires_grad_(options.pop("learns", True))
    total, count = token_cross_entropy(hidden, local, labels, section, shard=shard, **options)
    assert count == int((labels != -100).sum())
    return total, local


def check(section: CrossEntropy, chunk: int, vocabulary: int) -> list[float]:
    hidden, weight, labels = (x.requires_grad_() if x.is_floating_point() else x for x in case(torch.float64, vocabulary))
    expected = plain(hidden, weight, labels, section)
    theirs = torch.autograd.grad(expected / 3, (hidden, weight))
    with mock.patch.multiple(tokens, CHUNK=chunk, CHUNK_LEARNING_HEAD=chunk):
        total, local = sharded(hidden, weight, labels, section)
    ours = torch.autograd.grad(total / 3, (hidden, local))
    dist.all_reduce(ours[0])
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], mine(weight).of(theirs[1]))
    assert all(gradient.abs().max() > 0 for gradient in ours)
    return [total.item()]


@pytest.mark.parametrize(("smoothing", "z_loss"), OPTIONS)
@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("size", [2, 4])
def test_value_and_gradients_equal_torch(size, chunk, smoothing, z_loss):
    values = ranks.run(size, check, CrossEntropy(label_smoothing=smoothing, z_loss=z_loss), chunk, VOCABULARY)
    assert values == values[:1] * size


def test_a_row_for_each_process():
    ranks.run(4, check, CrossEntropy(label_smoothing=0.1, z_loss=0.1), 1000, 4)


def check_frozen() -> None:
    hidden, weight, labels = case(torch.float32, VOCABULARY)
    hidden.requires_grad_()
    total, local = sharded(hidden, weight, labels, CrossEntropy(), learns=False)
    total.backward()
    dist.all_reduce(hidden.grad)
    theirs = torch.autograd.grad(plain(hidden, weight, labels, CrossEntropy()), hidden)[0]
    torch.testing.assert_close(hidden.grad, theirs)
    assert local.grad is None
    with torch.no_grad():
        torch.testing.assert_close(sharded(hidden, weight, labels, CrossEntropy())[0], total.detach())


def test_a_frozen_head_and_no_gradient_at_all():
    ranks.run(2, check_frozen)


def check_large() -> None:
    """Logits whose exponentials overflow, and one shard that has none of the mass."""
    hidden = torch.full((1, 3, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [0.5], [-1.0], [-1.0]])
    labels = torch.tensor([[0, 3, -100]])
    total, local = sharded(hidden, weight, labels, CrossEntropy(label_smoothing=0.1))
    total.backward()
    dist.all_reduce(hidden.grad)
    reference = hidden.detach().double().requires_grad_()
    expected = plain(reference, weight.double(), labels, CrossEntropy(label_smoothing=0.1))
    torch.testing.assert_close(total.double(), expected)
    torch.testing.assert_close(hidden.grad.double(), torch.autograd.grad(expected, reference)[0])
    assert local.grad.isfinite().all()


def test_large_logits_stay_finite():
    ranks.run(2, check_large)


def check_low() -> None:
    """bfloat16: as near to the exact value as torch's own is."""
    hidden, weight, labels = case(torch.bfloat16, 503)
    exact = plain(hidden.double(), weight.double(), labels, CrossEntropy())
    ours, theirs = sharded(hidden, weight, labels, CrossEntropy())[0], plain(hidden, weight, labels, CrossEntropy())
    assert ours.dtype == torch.float32
    assert abs(ours.double() - exact) <= 2 * abs(theirs.double() - exact) + 1e-3 * exact


def test_bfloat16_is_as_close_as_torch():
    ranks.run(2, check_low)


def count(section: CrossEntropy) -> list[tuple[int, ...]]:
    """What is sent for 54 targets or so in chunks of 16, forward and backward."""
    hidden, weight, labels = case(torch.float32, VOCABULARY)
    hidden.requires_grad_()
    gather, called = dist.all_gather_single, []

    def spy(out, part, **kwargs):
        called.append(tuple(part.shape))
        return gather(out, part, **kwargs)

    with (
        mock.patch.multiple(tokens, CHUNK=16, CHUNK_LEARNING_HEAD=16),
        mock.patch.object(dist, "all_gather_single", spy),
        mock.patch.object(dist, "all_reduce", side_effect=AssertionError("too many")),
    ):
        sharded(hidden, weight, labels, section, split=split_softmax)[0].backward()
    return called


def test_one_small_collective_a_chunk():
    assert ranks.run(2, count, CrossEntropy()) == [[(2, 16)] * 4] * 2
    assert ranks.run(2, count, CrossEntropy(label_smoothing=0.1)) == [[(3, 16)] * 4] * 2
