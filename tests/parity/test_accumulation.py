"""However a batch is cut into micro-batches or packed into rows, the gradients are those of the whole (PITFALLS 1, 2, 22)."""

import numpy as np
import pytest
import torch

from tests import tiny
from trainwright import build, losses
from trainwright.data.loader import collate
from trainwright.data.packing import Documents, one_per_row, pack


def gradients(run, batches):
    run.optimizer.zero_grad()
    loss = run.forward_backward(batches)
    return loss, {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}


def assert_same(left, right):
    (loss, grads), (other_loss, other) = left, right
    torch.testing.assert_close(loss, other_loss, rtol=1e-6, atol=1e-6)
    assert grads.keys() == other.keys()
    for name, gradient in grads.items():
        assert gradient.abs().max() > 0, name
        scale = gradient.abs().max()
        torch.testing.assert_close(gradient / scale, other[name] / scale, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("adapt", [{}, {"adapt__method": "lora"}, {"adapt__method": "partial", "adapt__train": ["*norm*"]}])
def test_eight_times_one_is_one_times_eight(tmp_path, smoothing, adapt):
    common = {"loss__label_smoothing": smoothing, "training__batch_size": 8, "data__packing": False, **adapt}
    whole = build.assemble(tiny.recipe(tmp_path, **common, training__micro_batch_size=8))
    cut = build.assemble(tiny.recipe(tmp_path, **common, training__micro_batch_size=1))
    for run in (whole, cut):  # B = 0 gives A no gradient: move it off zero
        torch.manual_seed(3)
        for name, parameter in run.model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter.data, std=0.1)
    batches = cut.batch(0)
    assert len({b.supervised for b in batches}) > 1, "ragged, else a mean of means would pass"
    assert_same(gradients(whole, whole.batch(0)), gradients(cut, batches))


def test_last_window_of_an_epoch_is_divided_by_its_own_count(tmp_path):
    recipe = tiny.recipe(
        tmp_path, data__packing=False, data__held_out=None, training__batch_size=32, training__micro_batch_size=4
    )
    run = build.assemble(recipe)  # 40 rows: a step of eight micro-batches, then one of two
    assert [len(run.batch(step)) for step in (0, 1, 2, 3)] == [8, 2, 8, 2]
    last = run.batch(1)
    assert sum((b.labels != -100).any(1).sum().item() for b in last) == 8
    loss, grads = gradients(run, last)
    run.optimizer.zero_grad()
    total = torch.zeros(())
    for batch in last:  # the plain definition: the sum of all terms over their number
        hidden = run.model(batch.tokens, batch.positions, batch.documents)
        total = total + torch.nn.functional.cross_entropy(
            run.model.logits(hidden).flatten(0, 1), batch.labels.flatten(), reduction="sum"
        )
    mean = total / sum(b.supervised for b in last)
    mean.backward()
    assert_same((loss, grads), (mean, {n: p.grad for n, p in run.model.named_parameters()}))


@pytest.mark.parametrize("tied", [True, False])
def test_packed_documents_give_the_gradients_of_separate_ones(tmp_path, tied):
    tiny.model(tmp_path / "base", tie_word_embeddings=tied)
    run = build.assemble(tiny.recipe(tmp_path))
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 40, size=11)
    total = int(lengths.sum())
    documents = Documents(
        rng.integers(3, 320, size=total).astype(np.int32),
        rng.random(total) < 0.6,
        np.concatenate([[0], np.cumsum(lengths)]),
    )
    rows = pack(documents.lengths, 64)
    packed = [collate(documents, rows, 64, len(rows), 0)]
    apart = [collate(documents, [row], 64, 1, 0) for row in one_per_row(documents.lengths)]
    alone = [  # no padding, no neighbours: each document in a row of its own length
        collate(documents, [row], int(documents.lengths[row[0]]), 1, 0) for row in one_per_row(documents.lengths)
    ]
    alone = [batch for batch in alone if batch.supervised]
    reference = gradients(run, alone)
    assert_same(gradients(run, packed), reference)
    assert_same(gradients(run, apart), reference)


def test_a_leak_would_be_seen(tmp_path):
    """The packed gradients change when documents may see each other: the test above can fail."""
    run = build.assemble(tiny.recipe(tmp_path))
    batch = run.batch(0)[0]
    _, right = gradients(run, [batch])
    object.__setattr__(batch, "documents", torch.arange(0, batch.tokens.numel() + 1, 64, dtype=torch.int32))
    _, leaking = gradients(run, [batch])
    assert not torch.allclose(right["model.norm.weight"], leaking["model.norm.weight"], rtol=1e-3)


def test_the_loss_is_chunked(tmp_path, monkeypatch):
    run = build.assemble(tiny.recipe(tmp_path))
    expected = gradients(run, run.batch(0))
    monkeypatch.setattr(losses.tokens, "CHUNK_LEARNING_HEAD", 5)
    assert_same(gradients(run, run.batch(0)), expected)
