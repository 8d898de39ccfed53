"""What the ledger notes of storages, on real tensors whose sizes are known."""

import pytest
import torch

from trainwright.plan.ledger import Ledger, numbers

KIB = 1024


@pytest.fixture
def ledger():
    ledger = Ledger(torch.device("cpu"), lambda: ledger.phase)
    ledger.phase = ("forward", "a")
    return ledger


def kib(count):
    return torch.zeros(count * KIB, dtype=torch.uint8)


def test_storages_count_from_their_first_operator_to_their_end(ledger):
    one = kib(1)
    ledger.see(one)
    two = kib(4)
    ledger.see([two, {"also": two[:9]}])  # a view has no memory of its own
    ledger.phase = ("backward", "b")
    del two
    three = kib(2)
    ledger.see(three)
    assert [event.change // KIB for event in ledger.events] == [1, 4, -4, 2]
    peak = ledger.peak()
    assert (peak.total, peak.moment, peak.index) == (5 * KIB, ("forward", "a"), 1)
    assert sorted(peak.live.values()) == [KIB, 4 * KIB]
    assert ledger.peak(since=2).total == 3 * KIB
    assert ledger.peak(since=2).moment == ("backward", "b")


def test_what_passes_counts_at_the_peak_alone(ledger):
    kept = kib(1)
    ledger.see(kept)
    ledger.pass_by(7 * KIB)
    ledger.pass_by(0)
    assert ledger.peak().total == 8 * KIB
    assert sum(event.change for event in ledger.events) == KIB
    assert len(ledger.events) == 3


def test_a_new_storage_at_an_old_address_is_another(ledger):
    seen = set()
    for _ in range(20):
        one = kib(1)
        seen.add(ledger.number(one))
        del one
    assert len(seen) == 20
    assert ledger.peak().total == KIB


def test_elsewhere_is_not_counted(ledger):
    meta = torch.empty(9, device="meta")
    assert ledger.number(meta) is None
    assert numbers(ledger, [meta, None]) == set()
    assert ledger.events == []


def test_storages_that_are_resized(ledger):
    plain = torch.UntypedStorage.resize_
    one = kib(3)
    ledger.see(one)
    with ledger.resizing():
        one.untyped_storage().resize_(0)
        one.untyped_storage().resize_(2 * KIB)
    assert [event.change // KIB for event in ledger.events] == [3, -3, 2]
    assert torch.UntypedStorage.resize_ is plain


def test_the_timeline_keeps_the_peak(ledger):
    held = []
    for count in (1, 5, 2, 9, 1):
        held.append(kib(count))
        ledger.see(held)
    held.clear()
    line = ledger.timeline(points=3)
    assert len(line) <= 3
    assert max(size for _, size in line) == ledger.peak().total == 18 * KIB
