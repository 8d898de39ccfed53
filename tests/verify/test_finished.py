"""A finished run's first steps, taken again: the same bits, roundings, other numbers, other data, and what can't be told."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from tests import ranks, small, tiny
from trainwright import fit
from trainwright.recipe import InputError
from trainwright.verify import finished

CHANGES = {
    "adapt": {"method": "lora", "rank": 4, "dropout": 0.2}, "training__steps": 3, "evaluation__before": False,
    "training__micro_batch_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of three steps, with dropout."""
    place = tmp_path_factory.mktemp("finished")
    fit.train(tiny.recipe(place, **CHANGES), quiet=True)
    return place / "run"


@pytest.fixture
def copied(run, tmp_path):
    """One that a test may change."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def lines(verdict):
    return {line.what: line for line in verdict.lines}


def edit(folder, step, **values):
    """Change what metrics.jsonl says of a step."""
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["step"] == step and "split" not in record:
            record |= {name: value(record[name]) for name, value in values.items()}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_same_bits_here_and_now(run):
    before = sorted(str(path) for path in run.rglob("*"))
    verdict = finished.again(run)
    assert verdict.good, verdict.failed
    assert verdict.exact
    assert [line.verdict for line in verdict.lines] == ["exact"] * 6
    assert "the same bits in 3 steps" in lines(verdict)["loss"].why
    assert sorted(str(path) for path in run.rglob("*")) == before


def test_a_rounding_is_told_from_another_number(copied):
    edit(copied, 2, loss=lambda value: value * (1 + 1e-6), tokens=lambda value: value)
    edit(copied, 3, grad_norm=lambda value: value * 1.01)
    found = lines(finished.again(copied))
    assert found["loss"].verdict == "within"
    assert found["loss"].where == "step 2"
    assert found["grad_norm"].verdict == "failed"
    assert re.fullmatch(r"step 3: [\d.]+ now, [\d.]+ then", found["grad_norm"].why)
    assert found["learning_rate"].verdict == "exact"


def test_other_rows_rates_and_machines_are_told(copied):
    edit(copied, 2, tokens=lambda value: value + 1, learning_rate=lambda value: value * 2)
    environment = json.loads((copied / "environment.json").read_text())
    (copied / "environment.json").write_text(json.dumps({**environment, "torch": "2.0.0", "memory_bytes": 1}))
    found = lines(finished.again(copied, steps=2))
    assert "then; the steps don't train on the same rows" in found["tokens"].why
    assert "step 2: " in found["learning_rate"].why
    assert found["environment"].verdict == "skipped"
    assert found["environment"].why.startswith("torch: 2.0.0 then, 2.")
    assert "memory" not in found["environment"].why


def test_as_many_threads_as_then(copied):
    before = torch.get_num_threads()
    path = copied / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "threads": before + 1}))
    assert lines(finished.again(copied, steps=1))["environment"].verdict == "exact"
    assert torch.get_num_threads() == before


def test_an_unfinished_run_without_checkpoint(copied):
    for name in ("checkpoints", "model"):
        shutil.rmtree(copied / name)
    first = (copied / "metrics.jsonl").read_text().splitlines()[0]
    (copied / "metrics.jsonl").write_text(first + "\n")
    (copied / "environment.json").unlink()
    verdict = finished.again(copied)
    assert verdict.good
    found = lines(verdict)
    assert "in 1 steps" in found["loss"].why
    assert found["data"].verdict == found["environment"].verdict == "skipped"


def test_other_data(copied, tmp_path):
    tiny.pairs(tmp_path / "other.jsonl", 50)
    path = copied / "recipe.yaml"
    path.write_text(re.sub(r"source: .*pairs.jsonl", f"source: {tmp_path / 'other.jsonl'}", path.read_text()))
    found = lines(finished.again(copied, steps=1))
    assert found["data"].verdict == "failed"
    assert "the data isn't what it was when step-00000003 was written" in found["data"].why


def _trained(folder):
    fit.train(small.recipe(small.Path(folder), training__steps=2, evaluation__before=False), quiet=True, rank=_rank())


def _rank():
    import torch.distributed as dist

    return dist.get_rank()


def test_as_many_processes_as_then(tmp_path):
    ranks.run(2, _trained, str(tmp_path))
    verdict = finished.again(tmp_path / "run")
    assert verdict.good, verdict.failed
    assert verdict.exact
    alone = finished.again(tmp_path / "run", processes=1)
    assert alone.good
    assert not alone.exact, "sums are made in another order"
    (tmp_path / "run" / "ranks").mkdir()
    (tmp_path / "run" / "ranks" / "rank-2.log").touch()
    with pytest.raises(InputError, match=r"3 logs in ranks/, 2 writers of the newest checkpoint don't agree; say how many"):
        finished.again(tmp_path / "run")


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("recipe.yaml", "is no run folder: it has no recipe.yaml"),
        ("metrics.jsonl", "no metrics.jsonl, so the run took no step; start it with: trainwright train RECIPE"),
    ],
)
def test_no_run(remove, message, copied):
    (copied / remove).unlink()
    with pytest.raises(InputError, match=re.escape(message)):
        finished.again(copied)


def test_steps_that_are_missing(copied):
    with pytest.raises(InputError, match="steps: found 0; give 1 or more"):
        finished.again(copied, steps=0)
    rest = (copied / "metrics.jsonl").read_text().splitlines()[1:]
    (copied / "metrics.jsonl").write_text("\n".join(rest) + "\n")
    with pytest.raises(InputError, match="begins with step 2; the first steps of the run are needed"):
        finished.again(copied)
    (copied / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="has no step"):
        finished.again(copied)


def test_data_that_is_gone(copied):
    path = copied / "recipe.yaml"
    path.write_text(re.sub(r"source: .*pairs.jsonl", "source: gone.jsonl", path.read_text()))
    with pytest.raises(InputError, match=r"recipe can't be run here and now: .*gone.jsonl.*relative paths of the recipe hold"):
        finished.again(copied)
