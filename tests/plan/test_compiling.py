"""Compiled blocks on tensors without values: fewer results are written, the same products are made."""

import pytest

from tests import tiny
from trainwright.plan.compiling import Compiler
from trainwright.plan.rehearsal import rehearse

TEXT = {"training__batch_size": 4, "training__micro_batch_size": 4}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("compiled")
    return [rehearse(tiny.recipe(tmp, **TEXT, run__compile=how)) for how in ("off", "on")]


def products(found):
    return sum(w.flops * w.calls for w in found.counts.all_works() if w.kind == "product")


def test_products_stay_and_elementwise_work_joins(pair):
    plain, compiled = pair
    assert products(compiled) == products(plain) > 0
    assert "fused" in {work.operator for work in compiled.counts.all_works()}
    assert "fused" not in {work.operator for work in plain.counts.all_works()}
    calls = [sum(work.calls for work in found.counts.all_works()) for found in pair]
    moved = [sum(work.calls * work.bytes for work in found.counts.all_works()) for found in pair]
    assert calls[1] < 0.8 * calls[0]
    assert moved[1] < moved[0]


def test_a_compiled_step_holds_less(pair):
    plain, compiled = pair
    assert compiled.parts["activations"] < plain.parts["activations"]
    assert abs(compiled.resting - plain.resting) < 2**14, "parameters and states are the same"
    assert {phase for phase, _ in compiled.timeline} >= {"forward", "backward", "optimizer"}


def test_equal_blocks_are_traced_once_and_rehearsals_share(tmp_path):
    compiler = Compiler()
    recipe = tiny.recipe(tmp_path, **TEXT, run__compile="on")
    one = rehearse(recipe, compiler=compiler)
    traced = len(compiler._functions)
    two = rehearse(recipe, compiler=compiler)
    assert len(compiler._functions) == traced
    assert one.peak.total == two.peak.total
    assert one.counts.all_works() == two.counts.all_works()


def test_what_is_computed_again_is_counted_again(tmp_path, pair):
    full = rehearse(tiny.recipe(tmp_path, **TEXT, run__compile="on", memory={"checkpointing": "full"}))
    assert products(full) > products(pair[1])
    assert full.parts["activations"] < pair[1].parts["activations"]
