"""A budget of memory: what is chosen, told and refused, and what is said when memory runs out."""

import json

import pytest
import torch

from tests import tiny
from trainwright import budget, fit
from trainwright.plan import budget as planned
from trainwright.plan.command import Options
from trainwright.recipe import InputError, RunError
from trainwright.recipe.file import changed
from trainwright.recipe.sizes import bytes_of

LARGE = {"data__sequence_length": 256, "training__batch_size": 4, "training__steps": 2}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("3.5GB", 3_500_000_000),
        ("450MiB", 450 * 2**20),
        ("2g", 2**31),
        ("1e3", 1000),
        (77, 77),
        ("5 kb", 5000),
    ],
)
def test_sizes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "3GGB", "1.2.3M", "0"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="is no size"):
        bytes_of(text)


def test_the_fastest_that_fits_is_chosen_and_less_room_costs_speed(tmp_path):
    recipe = tiny.recipe(tmp_path, **LARGE)
    found = planned.offers(recipe, Options("h100"))  # nothing is measured for it
    roomy = planned.best(found, 2**40)
    assert roomy.fits
    assert roomy.keys == {}
    tight = planned.best(found, roomy.bytes // 2)
    assert tight.fits
    assert tight.keys
    assert tight.bytes <= roomy.bytes // 2
    assert tight.units_per_second <= roomy.units_per_second
    nothing = planned.best(found, 1000)
    assert not nothing.fits
    assert "the least possible is" in nothing.reason
    assert nothing.bytes <= tight.bytes


def test_a_run_takes_what_the_plan_chose(tmp_path, monkeypatch):
    recipe = tiny.recipe(tmp_path, memory__budget="1GiB", **LARGE)
    asked = []

    def answer(of, options):
        asked.append(options)
        return {"fits": True, "keys": {"memory.checkpointing": "full"}, "reason": "full fits"}, 0

    monkeypatch.setattr(budget, "_asked", answer)
    result = fit.train(recipe, quiet=True)
    assert asked == [["--choose", "--budget", "1GiB"]]
    assert "full" in result["changes"]["checkpointing"]


def test_nothing_fits(tmp_path):
    one = {"training__batch_size": 1, "memory__checkpointing": "full"}  # of which there are no others
    recipe = tiny.recipe(tmp_path, memory__budget="1KiB", **{**LARGE, **one})
    with pytest.raises(InputError, match=r"memory.budget: 1KiB isn't enough; the least possible is .*iB \("):
        fit.train(recipe, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_budget_must_be_a_size(tmp_path):
    with pytest.raises(InputError, match=r"memory.budget: 'much' is no size; write it like 24GiB"):
        tiny.recipe(tmp_path, memory__budget="much")


def test_out_of_memory_is_explained(tmp_path, monkeypatch):
    recipe = tiny.recipe(tmp_path)
    plan = {
        "memory": {
            "peak": 3 * 2**20,
            "module": "layers.1",
            "moment": "backward",
            "parts": {"activations": 2**21, "gradients": 0},
        }
    }
    monkeypatch.setattr(budget, "_asked", lambda *_: (json.loads(json.dumps(plan)), 0))
    told = r"out of memory .*the peak is 3 MiB in layers.1 \(backward\): activations 2 MiB. Set a"
    with pytest.raises(RunError, match=told), budget.explaining(recipe):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RunError, match=r"out of memory \(MemoryError\)"), budget.explaining(recipe):
        raise MemoryError
    with pytest.raises(RuntimeError, match="something else"), budget.explaining(recipe):
        raise RuntimeError("something else")


def test_resuming_may_have_another_budget(tmp_path, monkeypatch):
    recipe = tiny.recipe(tmp_path, **LARGE)
    fit.train(recipe, quiet=True)
    monkeypatch.setattr(
        budget, "_asked", lambda *_: ({"fits": True, "keys": {"memory.checkpointing": "full"}, "reason": ""}, 0)
    )
    more = changed(recipe, {"memory.budget": "1GiB", "training.steps": 3})
    assert fit.train(more, resume=True, quiet=True)["steps"] == 3
