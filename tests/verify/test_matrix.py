"""The matrix: which pairs it says are verified, refused or failing, that it goes on where it was, and its page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import combinations as combinations_of

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainwright.recipe import InputError
from trainwright.verify import combinations, covering, matrix, page, store, tracing
from trainwright.verify.running import Runner
from trainwright.verify.store import Outcome


def technique(job) -> set[str]:
    """What a job has switched on, from its recipe alone."""
    recipe, section = job.recipe, job.recipe.parallel
    found = {
        "DP": section.data == 2 and not section.zero,
        "ZeRO-3": section.zero == 3,
        "TP": section.tensor > 1,
        "PP 1F1B": section.pipeline > 1,
        "bf16": recipe.precision == "bf16",
        "accumulation": recipe.training.micro_batch_size is not None,
        "resume": job.resume,
        "clipping": recipe.training.clip_norm is not None,
        "compile": recipe.run.compile == "on",
        "DeepSpeed": section.engine == "deepspeed",
    }
    return {name for name, on in found.items() if on}


@pytest.fixture
def pretend(monkeypatch):
    """``pretend(rule)``: nothing runs; a rule makes an outcome of the techniques that are on, or none: then it passes."""
    ran = []

    def use(rule):
        def prove(job, runner):
            ran.append(technique(job))
            return rule(technique(job)) or Outcome("passed", exact=ran[-1] <= {"resume", "PP 1F1B", "clipping"}, worst=0.5)

        monkeypatch.setattr(matrix, "prove", prove)
        monkeypatch.setattr(store, "_sources", lambda: "")
        return ran

    return use


def mlp(folder, **arguments):
    with Runner() as runner:
        return matrix.run(folder, models=["mlp"], runner=runner, **arguments)


def cell(result, *levels):
    """Of a pair."""
    return next(one for pair, one in result.models[0].cells.items() if {level for _, level in pair} == set(levels))


@pytest.mark.parametrize("small", [True, False])
def test_every_pair_is_verified_where_all_goes_well(small, tmp_path, pretend):
    ran = pretend(lambda on: None)
    result = mlp(tmp_path, small=small)
    counts = result.counts()
    assert counts["pairs"] == sum(counts[status] for status in matrix.COUNTED)
    assert counts["untested"] == counts["failed"] == 0
    assert (counts["refused"] > 0) is not small, "DeepSpeed with tensors isn't a recipe; it is only in the whole matrix"
    assert cell(result, "TP", "bf16") == matrix.Cell("within_bound", 0.5)
    assert all(2 ** len(on & {"DP", "ZeRO-3"} | on & {"TP"} | on & {"PP 1F1B"}) <= 4 for on in ran)
    assert len(ran) < (20 if small else 220)


def test_exact_is_what_is_exact_with_nothing_else(tmp_path, pretend):
    ran = pretend(lambda on: None)
    result = mlp(tmp_path)
    assert cell(result, "resume", "PP 1F1B").status == cell(result, "resume", "clipping").status == "exact"
    assert cell(result, "resume", "TP").status == cell(result, "resume", "EMA").status.replace("exact", "within_bound")
    assert {"resume", "PP 1F1B"} in ran, "a pair of two that are exact is run alone"
    assert result.models[0].alone["resume"].status == "exact"
    assert result.models[0].alone["bf16"].status == "within_bound"


def test_the_largest_part_of_a_bound_is_told(tmp_path, pretend):
    ran = pretend(lambda on: Outcome("passed", worst=len(on) / 20))
    result = mlp(tmp_path, small=True)
    spread = []
    for pair in combinations_of(["TP", "bf16", "accumulation", "resume", "clipping"], 2):
        sizes = [len(on) / 20 for on in ran if set(pair) <= on]
        assert cell(result, *pair).value == max(sizes)
        spread.append(max(sizes) - min(sizes))
    assert max(spread) > 0, "there is a choice"
    assert mlp(tmp_path).models[0].alone["bf16"].value == 1 / 20, "a technique alone, and what it has with others"


def test_a_pair_that_fails_is_found_and_all_others_are_verified(tmp_path, pretend):
    pretend(lambda on: Outcome("failed", why="loss: twice") if {"TP", "bf16"} <= on else None)
    result = mlp(tmp_path, small=True)
    assert cell(result, "TP", "bf16") == matrix.Cell("failed", why="loss: twice")
    assert result.counts()["failed"] == 1
    assert not result.good
    assert result.counts()["untested"] == result.counts()["refused"] == 0
    [(model, cause)] = result.failed
    assert (model, cause.levels) == ("mlp", frozenset({("TP", "TP"), ("precision", "bf16")}))


def test_three_that_fail_together_are_a_failure_but_their_pairs_are_verified(tmp_path, pretend):
    three = {"TP", "bf16", "resume"}
    pretend(lambda on: Outcome("failed", why="odd") if three <= on else None)
    result = mlp(tmp_path)
    assert result.counts()["failed"] == result.counts()["untested"] == 0
    assert [{level for _, level in cause.levels} for _, cause in result.failed] == [three]


@pytest.mark.parametrize("small", [True, False])
def test_a_level_that_is_refused_is_refused_with_all_others(small, tmp_path, pretend):
    pretend(lambda on: Outcome("refused", why="no plan") if "TP" in on else None)
    result = mlp(tmp_path, small=small)
    mine = {pair: one for pair, one in result.models[0].cells.items() if ("TP", "TP") in pair}
    assert {one.status for one in mine.values()} == {"refused"}
    assert {one.why for pair, one in mine.items()} >= {"no plan"}
    assert result.counts()["untested"] == result.counts()["failed"] == 0
    assert not result.failed


def test_what_passed_is_not_run_again_and_what_failed_is(tmp_path, pretend):
    broken = {"yes": True}
    ran = pretend(lambda on: Outcome("failed", why="odd") if broken["yes"] and {"TP", "bf16"} <= on else None)
    first = mlp(tmp_path, small=True)
    count = len(ran)
    assert first.fresh == count > 0
    assert sum(model.combinations for model in first.models) == count
    with (tmp_path / store.RESULTS).open("a") as file:
        file.write('{"key": "half a li')  # killed
    again = mlp(tmp_path, small=True)
    assert again.counts() == first.counts()
    assert [model.combinations for model in again.models] == [model.combinations for model in first.models], (
        "what was known counts, too"
    )
    assert all({"TP", "bf16"} <= on for on in ran[count:])
    broken["yes"] = False
    assert mlp(tmp_path, small=True).good
    lines = [line for line in (tmp_path / store.RESULTS).read_text().splitlines() if line.endswith("}")]
    assert {json.loads(line)["model"] for line in lines} == {"mlp"}
    assert len(lines) == len(ran)


def test_sources_that_change_are_run_again(tmp_path, pretend, monkeypatch):
    ran = pretend(lambda on: None)
    mlp(tmp_path, small=True)
    count = len(ran)
    monkeypatch.setattr(store, "_sources", lambda: "others")
    mlp(tmp_path, small=True)
    assert len(ran) == 2 * count


def test_each_seed_must_pass(tmp_path, pretend, monkeypatch):
    pretend(lambda on: None)
    seen = []

    def prove(job, runner):
        seen.append(job.recipe.run.seed)
        bad = job.recipe.run.seed == 2 and "TP" in technique(job)
        return Outcome("failed", why="seed 2") if bad else Outcome("passed", worst=job.recipe.run.seed / 10)

    monkeypatch.setattr(matrix, "prove", prove)
    result = mlp(tmp_path, small=True, seeds=(0, 1, 2))
    assert set(seen) == {0, 1, 2}
    assert cell(result, "DP", "bf16") == matrix.Cell("within_bound", 0.2)
    assert [cause.outcome.why for _, cause in result.failed] == ["seed 2"]


def test_the_real_thing_in_one_process(tmp_path, monkeypatch):
    """An mlp's own techniques, without other processes."""
    kept = ("precision", "accumulation", "resume", "clipping")
    monkeypatch.setattr(combinations, "SMALL", {name: combinations.SMALL[name] for name in kept})
    monkeypatch.setattr(combinations, "too_many", lambda factors: set())
    said = []
    result = mlp(tmp_path, small=True, say=said.append)
    counts = result.counts()
    assert (counts["pairs"], counts["exact"] + counts["within_bound"], counts["within_bound"] > 0) == (21, 21, True)
    parts = [one.value for one in result.models[0].cells.values() if one.status == "within_bound"]
    assert all(0 < part < 1 for part in parts), "a bound is used, but not all of it"
    assert any("bf16" in line and "accumulation: passed" in line for line in said)


def test_exactness_is_seen_in_every_bit(tmp_path):
    combinations.write_data(tmp_path)
    with Runner() as runner:
        rows = [{"resume": "resume"}, {"accumulation": "accumulation"}, {"precision": "bf16"}]
        outcomes = [matrix.prove(combinations.job("mlp", row, tmp_path), runner) for row in rows]
    assert [(one.verdict, one.exact) for one in outcomes] == [("passed", True), ("passed", False), ("passed", False)]


def test_one_bit_is_a_difference(tmp_path):
    combinations.write_data(tmp_path)
    with Runner() as runner:
        trace = runner.run(combinations.job("mlp", {}, tmp_path))
        tensors = load_file(trace.folder / tracing.TENSORS)
        twin = replace(trace, folder=tmp_path)
        save_file(tensors, tmp_path / tracing.TENSORS)
        assert matrix.identical(trace, twin)
        for kind in (tracing.FIRST, tracing.LAST, tracing.END, tracing.SAVED):
            name = f"{kind}/head.bias"
            nudged = torch.nextafter(tensors[name], torch.tensor(torch.inf))
            save_file({**tensors, name: nudged}, tmp_path / tracing.TENSORS)
            assert not matrix.identical(trace, twin), kind
        save_file(tensors, tmp_path / tracing.TENSORS)
        assert not matrix.identical(trace, replace(twin, losses=[*trace.losses[:-1], 0.0]))


@pytest.mark.parametrize("model", combinations.MODELS)
def test_every_level_of_every_model_is_a_recipe(model, tmp_path):
    factors = combinations.factors(model)
    jobs = {}
    for name, factor in factors.items():
        for level in factor.levels:
            jobs[level.name] = combinations.job(model, {name: level.name}, tmp_path)
    plain = combinations.job(model, {}, tmp_path)
    for name, factor in factors.items():
        for level in factor.levels:
            same = (jobs[level.name].recipe, jobs[level.name].resume) == (plain.recipe, plain.resume)
            assert same == (level is factor.levels[0]), f"{level.name} of {name}"
    assert plain.processes == 1
    assert max(one.processes for one in jobs.values()) == 2


def test_masks_are_compared_where_both_runs_draw_the_same(tmp_path):
    for chosen, compared in (
        ({"dropout": "dropout"}, True),
        ({"dropout": "dropout", "TP": "TP", "resume": "resume", "checkpointing": "ckpt full"}, True),
        ({"dropout": "dropout", "data ranks": "DP"}, False),
        ({"dropout": "dropout", "engine": "DeepSpeed"}, False),
        ({"dropout": "dropout", "accumulation": "accumulation"}, False),
        ({"dropout": "dropout", "compile": "compile"}, False),
        ({"TP": "TP"}, False),
    ):
        assert combinations.job("mlp", chosen, tmp_path).dropout == compared, chosen
    assert not combinations.job("decoder, LoRA", {"dropout": "dropout", "packing": "packing"}, tmp_path).dropout


def test_refused_recipes_keep_their_words(tmp_path):
    with pytest.raises(InputError, match="engine deepspeed shares data only"):
        combinations.job("mlp", {"TP": "TP", "engine": "DeepSpeed"}, tmp_path)


def test_no_combination_has_more_processes_than_allowed():
    factors = combinations.factors("mlp")
    forbidden = combinations.too_many(factors)
    assert frozenset({("data ranks", "DP"), ("TP", "TP"), ("pipeline", "PP 1F1B")}) in forbidden
    assert not any(covering.finished({name: [level.name for level in one.levels] for name, one in factors.items()},
                                     dict(levels), forbidden) for levels in forbidden)  # fmt: skip
    assert all(len(levels) == 3 for levels in forbidden)


def test_the_page_has_no_empty_cell_and_every_reason(tmp_path, pretend):
    pretend(lambda on: Outcome("refused", why="no plan for this") if "TP" in on else Outcome("failed", why="gone wrong")
            if {"bf16", "ZeRO-3"} <= on else None)  # fmt: skip
    result = mlp(tmp_path)
    text = page.render(result)
    tables = [line for line in text.splitlines() if line.startswith("| **") and "**all**" not in line]
    factors = result.models[0].factors.values()
    count = sum(len(factor.techniques) for factor in factors)
    assert len(tables) == count + sum(len(factor.levels) for factor in factors if factor.setting), "a line for each"
    for place, line in enumerate(tables[:count]):
        cells = [part.strip() for part in line.split("|")[2:-1]]
        assert all(cells[: place + 1]), line
        assert not any(cells[place + 1 :]), "the other half would say the same"
    assert all(all(part.strip() for part in line.split("|")[1:-1]) for line in tables[count:])
    assert "UNTESTED |" not in "".join(tables)
    number = re.search(r"^(\d+)\. no plan for this$", text, re.MULTILINE)
    assert number
    assert next(line for line in tables if line.startswith("| **TP**")).count(f"refused ({number[1]})") == 5
    assert "gone wrong" in text.partition("## What fails")[2].partition("## The levels")[0]
    counts = result.counts()
    assert f"| **all** | {result.models[0].combinations} | {counts['pairs']} | {counts['exact']} |" in text
    assert "`parallel.pipeline: 2`" in text
    assert text == page.render(result)
