"""Recipes that are right are verified, wrong ones are not, and the message tells a stranger what to mend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import small, tiny
from trainwright.recipe import InputError, Recipe
from trainwright.verify import command, facts, proof, techniques
from trainwright.verify.command import Options
from trainwright.verify.proof import Blame, Prover, Verdict
from trainwright.verify.running import Runner


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as found:
        found.warm(2)
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("proof")


def proved(runner: Runner, recipe: Recipe, **options: Any) -> tuple[Prover, Any, Verdict]:
    job = command.settled(recipe, Options(**options))
    known = facts.look(job)
    job = techniques.conditioned(job, known)
    prover = Prover(runner, known)
    return prover, job, prover.compare(job)


def blamed(runner: Runner, recipe: Recipe, **options: Any) -> Blame:
    prover, job, verdict = proved(runner, recipe, **options)
    assert not verdict.good
    return proof.bisect(prover, job, verdict)


TEXT = {"training__batch_size": 8, "training__micro_batch_size": 2, "optimizer": {"name": "adamw", "weight_decay": 0.1}}
GOOD: dict[str, tuple[Any, dict[str, Any]]] = {
    "a plain MLP": (small, {}),
    "ZeRO 3 with averages": (small, {"parallel": {"data": 2, "zero": 3}, "training__ema": {"decay": 0.9}}),
    "accumulation and packing": (tiny, TEXT),
    "LoRA in tensor parallel": (tiny, {**TEXT, "adapt": {"method": "lora", "dropout": 0.1}, "parallel": {"tensor": 2}}),
    "bf16": (tiny, {**TEXT, "precision": "bf16"}),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_right_is_verified(name, runner, folder):
    kind, changes = GOOD[name]
    _, _, verdict = proved(runner, kind.recipe(folder, **changes))
    assert verdict.good, verdict.failed
    verdicts = {line.what: line.verdict for line in verdict.lines}
    assert verdicts["rows of the data"] == verdicts["resume"] == verdicts["living gradients"] == "exact"
    assert verdicts["gradients of step 1"] in ("exact", "within")


def test_a_recipe_without_techniques_is_exact_but_for_float64(runner, folder):
    prover, job, verdict = proved(runner, small.recipe(folder))
    assert techniques.of(job, prover.facts) == []
    assert verdict.good


MODULES = {
    "ordered": r"depends on its place in the batch.*let the module treat every row alike",
    "sociable": r"depends on the other rows of its micro-batch.*BatchNorm",
    "noisy": r"draws random numbers in its forward.*nn\.Dropout",
    "idle": r"unused\.\w+ learns by the recipe, but its gradient is zero or missing",
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_cannot_be_right(name, runner, folder):
    recipe = small.recipe(folder, model={"architecture": f"tests.verify.broken:{name}"}, training__micro_batch_size=8)
    blame = blamed(runner, recipe)
    assert blame.techniques == (), "no technique is to blame"
    assert any(pytest.importorskip("re").search(MODULES[name], line.why) for line in blame.verdict.failed)


def test_lora_that_does_not_start_as_its_base(runner, folder):
    recipe = tiny.recipe(folder, **TEXT, adapt={"method": "lora"})
    blame = blamed(runner, recipe, prepare="tests.verify.broken:random_b")
    (line,) = [line for line in blame.verdict.failed if line.what == "structure: start of the adapter"]
    assert "lora_B isn't zero before the first step" in line.why
    assert "leave lora_B zero" in line.why


def test_the_culprit_and_the_factor_are_named(runner, folder):
    recipe = small.recipe(folder, parallel={"data": 2, "zero": 1}, training__micro_batch_size=8, precision="bf16")
    blame = blamed(runner, recipe, prepare="tests.verify.broken:halved_gradients")
    assert [one.name for one in blame.techniques] in (["data parallel"], ["ZeRO"])
    assert blame.verdict.failed[0].what == "gradients of step 1"
    assert "is half of what it should be" in blame.verdict.failed[0].why


def test_what_the_model_refuses_is_refused(runner, folder):
    resnet = {"architecture": "resnet9", "options": {"stem": 4, "channels": [8, 8]}}
    with pytest.raises(InputError, match=r"parallel\.tensor"):
        proved(runner, small.recipe(folder, model=resnet, parallel={"tensor": 2}))
