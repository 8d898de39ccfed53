"""The same recipe alone and on many processes: losses, norms, every gradient, every weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ranks, tiny
from tests.parity import together
from trainwright import build, loop
from trainwright.recipe import InputError

SGD = {"optimizer": {"name": "sgd", "momentum": 0.9, "learning_rate": 0.05}}
# eps is large because Adam makes a whole step of the rounding of a tiny gradient
ADAM = {"optimizer": {"name": "adamw", "learning_rate": 0.01, "eps": 1e-3, "weight_decay": 0.1}}
TEXT = {"training__steps": 3, "training__batch_size": 16, "training__micro_batch_size": 2, "evaluation__before": False}
DECODERS: dict[str, dict[str, Any]] = {
    "full": {**ADAM},
    "untied": {**SGD, "model__options": {"tie_word_embeddings": False}, "model__match": "overlap"},
    "lora": {"optimizer": {**ADAM["optimizer"], "eps": 1e-2}, "adapt": {"method": "lora", "rank": 4}},
    "partial": {**ADAM, "adapt": {"method": "partial", "train": ["*layers.[0123].mlp*", "*norm*", "*embed*"]}},
}
SAMPLES: dict[str, dict[str, Any]] = {
    "mlp": {"model__options": {"hidden": [32, 24, 16], "dropout": 0.0}, **SGD},
    "resnet": {"model": {"architecture": "resnet9", "options": {"stem": 4, "channels": [8, 8]}}, **SGD},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "DP4": (4, {}),
    **{f"ZeRO{stage} on {count}": (count, {"parallel__zero": stage}) for stage in (1, 2, 3) for count in (2, 4)},
    "TP2": (2, {"parallel__tensor": 2}),
    "TP4": (4, {"parallel__tensor": 4}),
    "PP2": (2, {"parallel__pipeline": 2}),
    "PP4": (4, {"parallel__pipeline": 4}),
    "PP2 gpipe": (2, {"parallel__pipeline": 2, "parallel__schedule": "gpipe"}),
    "PP2 interleaved": (2, {"parallel__pipeline": 2, "parallel__schedule": "interleaved"}),
    "DP2 x TP2": (4, {"parallel__tensor": 2}),
    "ZeRO3 x TP2": (4, {"parallel__tensor": 2, "parallel__zero": 3}),
    "DP2 x PP2": (4, {"parallel__pipeline": 2}),
    "ZeRO2 x PP2": (4, {"parallel__pipeline": 2, "parallel__zero": 2}),
    "TP2 x PP2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama of 4 blocks with 8 heads over 4 KV heads, and data with ragged lengths."""
    place = tmp_path_factory.mktemp("parity")
    tiny.model(place / "base", num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
    tiny.pairs(place / "pairs.jsonl", 90)
    return place


@pytest.fixture(scope="module")
def alone(folder):
    """Of a kind of data and changes, the trace of one process."""
    known: dict[str, together.Trace] = {}

    def trace(kind: str, changes: dict[str, Any]) -> together.Trace:
        key = repr((kind, changes))
        if key not in known:
            known[key] = together.trace(kind, str(folder), changes)
        return known[key]

    return trace


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name, layout, folder, alone):
    count, parallel = LAYOUTS[layout]
    changes = {**TEXT, **DECODERS[name]}
    first, *others = together.many(count, "text", folder, {**changes, **parallel})
    together.agree(first, alone("text", changes))
    for other in others:
        assert (other.losses, other.norms, other.held_out) == (first.losses, first.norms, first.held_out)


def _draw(folder: str, parallel: dict[str, Any]) -> tuple[list[float], list[str]]:
    run = build.assemble(tiny.recipe(Path(folder), training__micro_batch_size=1, **parallel))
    loop.seed(run, 0)
    return torch.rand(4).tolist(), run.notes


def test_random_numbers_differ_where_the_data_does(folder):
    """Dropout has other masks for other samples and stages, and the same for the parts of one product."""
    assert _draw(str(folder), {})[0] == ranks.run(2, _draw, str(folder), {})[0][0], "the first process's are those of one alone"
    for parallel, same in (({}, False), ({"parallel__tensor": 2}, True), ({"parallel__pipeline": 2}, False)):
        (first, _), (second, notes) = ranks.run(2, _draw, str(folder), parallel)
        assert (first == second) is same
    assert any("processes idle 20.0% of a step of 4 micro-batches" in note for note in notes)


def _answers(folder: str, parallel: dict[str, Any]) -> list[str]:
    run = build.assemble(tiny.recipe(Path(folder), **parallel))
    assert run.samples is not None
    before = [sample.answer for sample in run.samples(2)]
    list(loop.train(run))
    return [*before, *(sample.answer for sample in run.samples(2))]


@pytest.mark.parametrize("parallel", [{}, {"parallel__zero": 3}, {"parallel__tensor": 2}], ids=str)
def test_prompts_are_answered_as_by_one_process(parallel, folder):
    expected = _answers(str(folder), {})
    assert expected[:2] != expected[2:]
    for answers in ranks.run(2, _answers, str(folder), parallel):
        assert answers == expected


REFUSED = ("parallel__tensor", "parallel__pipeline")  # for models with BatchNorm, or without a plan


@pytest.mark.parametrize("key", REFUSED)
def test_a_resnet_is_not_cut(key, folder):
    with pytest.raises(AssertionError, match=r"InputError: parallel\.(tensor|pipeline): "):
        together.many(2, "samples", folder, {**SAMPLES["resnet"], key: 2})


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, key) for name in SAMPLES for key in LAYOUTS if name == "mlp" or not LAYOUTS[key][1].keys() & set(REFUSED)],
)
def test_samples(name, layout, folder, alone):
    count, parallel = LAYOUTS[layout]
    changes = {**SAMPLES[name], "training__steps": 3, "training__batch_size": 16, "evaluation__before": False}
    if layout == "PP2 interleaved":
        changes["training__micro_batch_size"] = 4
    first, *_ = together.many(count, "samples", folder, {**changes, **parallel})
    together.agree(first, alone("samples", changes), tolerance=2e-5 if name == "resnet" else 1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["full", "lora", "mlp"])
def test_deepspeed(name, stage, folder, alone):
    kind = "samples" if name == "mlp" else "text"
    shared = {"training__steps": 3, "training__batch_size": 16, "evaluation__before": False}
    changes = {**SAMPLES["mlp"], **shared} if name == "mlp" else {**TEXT, **DECODERS[name]}
    first, other = together.many(2, kind, folder, {**changes, "parallel__engine": "deepspeed", "parallel__zero": stage})
    together.agree(first, alone(kind, changes))
    assert (other.losses, other.norms, other.held_out) == (first.losses, first.norms, first.held_out)


def test_all_three(folder, alone):
    changes = {**TEXT, **DECODERS["full"]}
    first, *_ = together.many(
        8, "text", folder, {**changes, "parallel__tensor": 2, "parallel__pipeline": 2, "parallel__zero": 1}
    )
    together.agree(first, alone("text", changes))


def test_a_process_more_than_the_recipe_says(folder):
    with pytest.raises(InputError, match=r"parallel: .*tensor 2 doesn't divide the 1 process.*--nproc 2"):
        together.trace("text", str(folder), {"parallel__tensor": 2})
