"""A few silent bugs, seeded on purpose: ``verify`` catches each and names the culprit. All: ``python -m tests.mutants``."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest

from tests import ranks
from tests.mutants import catalogue
from tests.mutants.mutant import Mutant
from tests.mutants.trying import Trials

SAMPLE = {
    "mean of means of smoothed labels": "loss of step 1",
    "smoothing without its gradient": "gradients of step 1",
    "labels one off": "structure: labels",
    "gradient averaged over ranks": "gradients of step 1",
    "only the last micro-batch is shared": "gradients of step 1",
}


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    ranks.run(2, int)  # starts two processes, unless other tests have
    with Trials(tmp_path_factory.mktemp("mutants"), ranks._pools) as made:
        yield made


@pytest.mark.parametrize("name", SAMPLE)
def test_a_mutant_is_caught_and_named(name, trials):
    [result] = trials.all([catalogue.named(name)])
    assert result.healthy, "flagged without the bug"
    assert result.caught
    assert SAMPLE[name] in result.lines
    assert result.rightly, result


def test_names_are_unlike():
    names = [mutant.name for mutant in catalogue.MUTANTS]
    assert len(set(names)) == len(names) >= 24


def test_what_changes_nothing_is_not_caught(trials):
    [result] = trials.all([Mutant("", 0, nullcontext, "mlp")])
    assert result.healthy
    assert not result.caught
    assert not result.rightly


def test_a_wrong_name_is_not_right(trials):
    [result] = trials.all([replace(catalogue.named("gradient averaged over ranks"), blamed=("ZeRO",))])
    assert result.caught
    assert not result.rightly
