"""The chunked cross-entropy against torch's, for every option: value and gradients."""

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy

from trainwright.losses import logits_cross_entropy, split_softmax, token_cross_entropy, tokens
from trainwright.recipe import CrossEntropy

OPTIONS = list(itertools.product([0.0, 0.1], [0.0, 1e-2]))


def case(dtype, vocabulary=101, size=16, rows=3, length=50):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, length, size, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, size, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.4] = -100
    return hidden, weight, labels


def plain(hidden, weight, labels, smoothing, z_loss):
    """torch's own, over all logits at once."""
    logits = (hidden @ weight.T).flatten(0, 1)
    total = cross_entropy(logits, labels.flatten(), reduction="sum", label_smoothing=smoothing, ignore_index=-100)
    kept = labels.flatten() != -100
    return total + z_loss * logits[kept].logsumexp(-1).square().sum()


@pytest.mark.parametrize(("smoothing", "z_loss"), OPTIONS)
@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_value_and_gradients_equal_torch(monkeypatch, smoothing, z_loss, chunk):
    monkeypatch.setattr(tokens, "CHUNK", chunk)
    monkeypatch.setattr(tokens, "CHUNK_LEARNING_HEAD", chunk)
    hidden, weight, labels = case(torch.float64)
    section = CrossEntropy(label_smoothing=smoothing, z_loss=z_loss)
    total, count = token_cross_entropy(hidden, weight, labels, section)
    expected = plain(hidden, weight, labels, smoothing, z_loss)
    torch.testing.assert_close(total, expected)
    assert count == int((labels != -100).sum())
    mine = torch.autograd.grad(total / 3, (hidden, weight))
    theirs = torch.autograd.grad(expected / 3, (hidden, weight))
    torch.testing.assert_close(mine, theirs)
    assert all(g.abs().max() > 0 for g in mine)


@pytest.mark.parametrize(("smoothing", "z_loss"), OPTIONS)
def test_whole_logits_give_the_same(smoothing, z_loss):
    hidden, weight, labels = case(torch.float64)
    section = CrossEntropy(label_smoothing=smoothing, z_loss=z_loss)
    total, _ = logits_cross_entropy(hidden @ weight.T, labels, section)
    torch.testing.assert_close(total, plain(hidden, weight, labels, smoothing, z_loss))


def test_a_frozen_head_costs_no_gradient():
    hidden, weight, labels = case(torch.float32)
    total, _ = token_cross_entropy(hidden, weight.detach(), labels, CrossEntropy())
    total.backward()
    assert hidden.grad.abs().max() > 0
    assert hidden.grad[labels == -100].abs().max() == 0


def test_without_gradient_only_the_value_is_made():
    hidden, weight, labels = case(torch.float32)
    with torch.no_grad():
        total, _ = token_cross_entropy(hidden, weight, labels, CrossEntropy())
    assert not total.requires_grad
    torch.testing.assert_close(total, plain(hidden, weight, labels, 0.0, 0.0).detach())


def test_gradcheck():
    hidden, weight, labels = case(torch.float64, vocabulary=11, size=3, rows=1, length=6)

    def function(hidden, weight):
        return token_cross_entropy(hidden, weight, labels, CrossEntropy(label_smoothing=0.1, z_loss=0.01))[0]

    # The gradient is made in the forward, so the numerical one perturbs a fresh forward each time.
    assert torch.autograd.gradcheck(function, (hidden, weight))


def test_bf16_is_as_close_as_torch_in_bf16():
    hidden, weight, labels = case(torch.bfloat16, vocabulary=503)
    exact = plain(hidden.double(), weight.double(), labels, 0.0, 0.0)
    ours = token_cross_entropy(hidden, weight, labels, CrossEntropy())[0]
    theirs = plain(hidden, weight, labels, 0.0, 0.0)
    assert abs(ours.double() - exact) <= 2 * abs(theirs.double() - exact) + 1e-3 * exact
    for value in (hidden, weight):
        right = torch.autograd.grad(exact, value, retain_graph=True)[0].double()
        mine, usual = (torch.autograd.grad(loss, value, retain_graph=True)[0].double() - right for loss in (ours, theirs))
        assert mine.norm() <= 2 * usual.norm()


def test_large_logits_stay_finite():
    exps = torch.tensor([[1e4, -1e4, 0.0]])
    lse, sums = split_softmax(exps)
    assert lse.item() == 1e4
    assert torch.equal(exps / sums, torch.tensor([[1.0, 0.0, 0.0]]))


def test_the_backward_can_be_taken_once_for_each_scale():
    """The gradients are kept from the forward: a second backward must not find them scaled by the first."""
    hidden, weight, labels = case(torch.float64)
    total, _ = token_cross_entropy(hidden, weight, labels, CrossEntropy())
    first = torch.autograd.grad(total, (hidden, weight), torch.tensor(2.0), retain_graph=True)
    second = torch.autograd.grad(total, (hidden, weight), torch.tensor(2.0))
    torch.testing.assert_close(first, second)
