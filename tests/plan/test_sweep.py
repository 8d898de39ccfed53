"""Sweeps: what is tried, that prices don't depend on their order or on who finds them, refusals."""

import pytest

from tests import small, tiny
from trainwright import forking
from trainwright.plan import axes, sweep
from trainwright.plan.command import Options
from trainwright.plan.devices import find
from trainwright.plan.once import prepared_once
from trainwright.recipe import InputError

FEW = [{"precision": "fp32", "memory.checkpointing": name} for name in ("none", "full")]
LORA = {"method": "lora", "rank": 4}


def prices(recipe, grid):
    with prepared_once():
        pricing = sweep.Pricing(recipe, find("h100"), 1, 2**40)
        return [pricing.priced(keys) for keys in grid]


def test_prices_do_not_depend_on_what_was_traced_before(tmp_path):
    recipe = tiny.recipe(tmp_path, adapt=LORA, run__compile="on")
    one, two, again, last = prices(recipe, [*FEW, *reversed(FEW)])
    assert (one, two) == (last, again)


def test_processes_find_what_one_does(tmp_path, monkeypatch):
    recipe = small.recipe(tmp_path)
    monkeypatch.setattr(axes, "_precisions", lambda: [{"precision": "fp32"}, {"precision": "bf16"}])
    monkeypatch.setattr(axes, "_micro_batches", lambda recipe, data: [{"training.micro_batch_size": n} for n in (8, 32)])
    monkeypatch.setattr(axes, "_checkpointings", lambda: [{"memory.checkpointing": "none"}, {"memory.checkpointing": "full"}])
    said = []
    monkeypatch.setattr(forking, "cores", lambda: 1)
    alone = sweep.sweep(recipe, Options("h100"), tmp_path / "alone", said.append)
    monkeypatch.setattr(forking, "cores", lambda: 2)
    shared = sweep.sweep(recipe, Options("h100"), tmp_path / "shared")
    assert shared.choices == alone.choices
    assert shared.front == alone.front
    assert len(alone.choices) == 2 * 2 * 2 * 3
    assert any(text.startswith("8 of 8") for text in said)


@pytest.mark.parametrize("cores", [1, 2])
def test_a_recipe_that_is_refused(tmp_path, monkeypatch, cores):
    monkeypatch.setattr(forking, "cores", lambda: cores)
    recipe = small.recipe(tmp_path, training__batch_size=6)
    with pytest.raises(InputError, match=r"training.batch_size: 6"):
        sweep.sweep(recipe, Options("h100", 4), tmp_path / "out")


def test_micro_batches_are_parts_of_a_process(tmp_path):
    recipe = tiny.recipe(tmp_path, training__batch_size=16)
    grid = list(axes.combinations(recipe, 4))
    assert len(grid) == axes.MOST
    assert {keys["precision"] for keys in grid} == {"fp32", "bf16", "pure_bf16"}
    assert all(16 // keys["parallel.data"] % keys["training.micro_batch_size"] == 0 for keys in grid)
    alike = sweep._alike(grid)
    assert sum(map(len, alike)) == len(grid)
    assert all(len({keys["precision"] for keys in job}) == 1 for job in alike)


def test_both_ways_to_adapt(tmp_path):
    found = [keys.get("adapt", {}).get("method") for keys in axes.combinations(tiny.recipe(tmp_path, adapt=LORA), 1)]
    assert set(found) == {None, "full"}
    assert sweep.settings({"memory.checkpointing": "full", "memory.every": 2}) == {"checkpointing": "full", "every": "2"}


@pytest.mark.parametrize(("how", "tried"), [("off", FEW), ("on", [{"memory.checkpointing": "selective", "adapt": LORA}])])
def test_what_is_continued_from_few_blocks_is_what_all_blocks_take(tmp_path, how, tried):
    base = tiny.model(tmp_path / "deep", num_hidden_layers=7)
    recipe = tiny.recipe(tmp_path, model__pretrained=str(base), run__compile=how)
    with prepared_once():
        pricing = sweep.Pricing(recipe, find("h100"), 1, 2**40)
        assert pricing.blocks == 7
        for keys in tried:
            few, whole = pricing.priced(keys), pricing._whole_price(keys)
            assert few.bytes == pytest.approx(whole.bytes, rel=0.005)
            assert few.states == pytest.approx(whole.states, rel=0.005)
            assert few.seconds == pytest.approx(whole.seconds, rel=0.03)
