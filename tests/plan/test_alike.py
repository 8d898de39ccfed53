"""Portions of an update that count for others: nothing of a rehearsal changes but its time."""

from contextlib import nullcontext

import pytest

from tests import tiny
from trainwright.memory import portions
from trainwright.memory.updates import Updater
from trainwright.plan import rehearsal
from trainwright.plan.rehearsal import rehearse

EARLY = {"memory__optimizer_in_backward": True, "training__clip_norm": None}
CASES = {
    "rounded": {"precision": "pure_bf16"},
    "8bit": {"memory__optimizer_states": "8bit"},
    "rounded, early": {"precision": "pure_bf16", **EARLY},
    "early, disk": {"memory__optimizer_offload": "disk", **EARLY},
    "sgd": {"precision": "pure_bf16", "optimizer": {"name": "sgd", "momentum": 0.9, "learning_rate": 0.1}},
}


@pytest.mark.parametrize("case", CASES)
def test_one_portion_counts_for_those_alike(tmp_path, monkeypatch, case):
    recipe = tiny.recipe(tmp_path, training__batch_size=2, training__micro_batch_size=2, **CASES[case])
    monkeypatch.setattr(portions, "CHUNK", 2**12)
    calls = {"_update_portion": 0, "_take_back": 0}

    def counted(name):
        plain = getattr(Updater, name)

        def call(*args):
            calls[name] += 1
            return plain(*args)

        return call

    for name in calls:
        monkeypatch.setattr(Updater, name, counted(name))
    fast, few = rehearse(recipe), dict(calls)
    monkeypatch.setattr(rehearsal, "portions_once", lambda *args: nullcontext())
    every = rehearse(recipe)
    assert all(2 * few[name] < calls[name] for name in calls)
    if case == "rounded":  # slices of a portion are alike, too
        assert few["_take_back"] * calls["_update_portion"] < calls["_take_back"] * few["_update_portion"]
    assert (fast.peak.total, fast.parts, fast.resting) == (every.peak.total, every.parts, every.resting)
    assert fast.counts.all_works() == every.counts.all_works()
