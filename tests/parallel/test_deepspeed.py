"""DeepSpeed as the engine, in real processes, against torch alone in one: losses, norms, every gradient, weight and state."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import nn

from tests import ranks
from tests.parallel import ds_worker
from tests.parallel.ds_worker import Case, Seen
from trainwright.optim import make_optimizer, parameter_groups
from trainwright.parallel import deepspeed
from trainwright.parallel.mesh import Axis
from trainwright.recipe import AdamW, InputError, Parallel

NEAR = 1e-5
MODELS = [("tied", "full"), ("untied", "full"), ("tied", "lora"), ("untied", "lora"), ("tied", "partial"), ("mlp", "full")]


@lru_cache
def _oracle(text: str) -> Seen:
    return ds_worker.alone(eval(text, vars(ds_worker)))


def oracle(case: Case) -> Seen:
    """The run alone, once for all stages."""
    return _oracle(repr(replace(case, stage=0, offload=False, settings={})))


def assert_near(mine: ds_worker.Arrays, theirs: ds_worker.Arrays, near: float = NEAR) -> None:
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert mine[name].shape == expected.shape, name
        difference = np.linalg.norm((mine[name] - expected).astype(np.float64))
        assert difference <= near * np.linalg.norm(expected.astype(np.float64)), name


def assert_same(mine: Seen, theirs: Seen, near: float = NEAR) -> None:
    assert mine.losses == pytest.approx(theirs.losses, rel=near)
    assert mine.norms == pytest.approx(theirs.norms, rel=near)
    assert mine.evaluated == pytest.approx(theirs.evaluated, rel=near)
    assert all(np.linalg.norm(gradient) > 0 for gradient in theirs.gradients.values())
    assert_near(mine.gradients, theirs.gradients, near)
    assert_near(mine.weights, theirs.weights, near)
    assert_near(mine.states, theirs.states, 10 * near)  # squares and small differences of gradients
    assert mine.groups == theirs.groups


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("model", "adapt"), MODELS)
def test_two_ranks_equal_one_process(model: str, adapt: str, stage: int) -> None:
    case = Case(model=model, adapt=adapt, stage=stage, micro=3)
    theirs = oracle(case)
    assert_same(ranks.run(2, ds_worker.together, case)[0], theirs)
    started = {name: ds_worker.numpy(p) for name, p in ds_worker.make(case).named_parameters()}
    moved = {name for name, value in theirs.weights.items() if (value != started[name]).any()}
    assert moved == set(theirs.gradients)
    assert min(theirs.norms) > 0.5, "nothing was clipped"


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("model", ["tied", "mlp"])
def test_four_ranks_without_clipping(model: str, stage: int) -> None:
    case = Case(model=model, stage=stage, clip=None)
    assert_same(ranks.run(4, ds_worker.together, case)[0], oracle(case))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("adapt", ["full", "lora"])
def test_groups_keep_their_rates_and_decay(adapt: str, stage: int) -> None:
    case = Case(adapt=adapt, stage=stage, groups=True)
    theirs = oracle(case)
    assert len({(rate, decay) for _, rate, decay in theirs.groups}) > 2
    assert_same(ranks.run(2, ds_worker.together, case)[0], theirs)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("adapt", ["full", "lora"])
def test_optimizer_in_cpu_memory(adapt: str, stage: int) -> None:
    case = Case(adapt=adapt, stage=stage, micro=3, offload=True)
    assert_same(ranks.run(2, ds_worker.together, case)[0], oracle(case))


@pytest.mark.parametrize(
    ("stage", "bucket"), [(1, 10), (2, 10), (2, 2000), (2, 10**6), (3, 10)], ids=lambda number: str(number)
)
@pytest.mark.parametrize("overlap", [False, True])
def test_overlap_and_bucket_sizes_change_nothing(stage: int, overlap: bool, bucket: int) -> None:
    settings = {"overlap_comm": overlap, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    case = Case(stage=stage, micro=3, settings=settings)
    assert_same(ranks.run(2, ds_worker.together, case)[0], oracle(case))


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "sgd", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.1},
        {"name": "rmsprop", "learning_rate": 1e-3},
        {"name": "torch", "type": "NAdam", "learning_rate": 1e-3},
    ],
    ids=lambda optimizer: optimizer["name"],
)
@pytest.mark.parametrize("stage", [1, 3])
def test_other_optimizers(stage: int, optimizer: dict) -> None:
    case = Case(model="mlp", stage=stage, optimizer=optimizer)
    assert_same(ranks.run(2, ds_worker.together, case)[0], oracle(case))


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("adapt", ["full", "lora"])
def test_bfloat16_products_keep_stored_dtypes(adapt: str, stage: int) -> None:
    """The base is frozen in bfloat16, what learns is in float32: both in the same blocks."""
    case = Case(adapt=adapt, stage=stage, bf16=True, steps=2)
    assert_same(ranks.run(2, ds_worker.together, case)[0], oracle(case), near=2e-2)


@pytest.mark.parametrize(("first", "then"), [(0, 3), (3, 2), (2, 1), (1, 0), (3, 3)])
@pytest.mark.parametrize("adapt", ["full", "partial"])
def test_goes_on_from_what_was_saved_at_another_stage(adapt: str, first: int, then: int) -> None:
    case = Case(adapt=adapt, stage=first, steps=4)
    assert_same(ranks.run(2, ds_worker.interrupted, case, then)[0], oracle(case))


@pytest.mark.parametrize("stage", [1, 3])
def test_goes_on_with_four_ranks_and_states_of_one_number(stage: int) -> None:
    case = Case(model="mlp", stage=stage, steps=4, optimizer={"name": "torch", "type": "NAdam", "learning_rate": 1e-3})
    assert_same(ranks.run(4, ds_worker.interrupted, case, stage)[0], oracle(case))


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_what_an_engine_lets_see(model: str, stage: int) -> None:
    case = Case(model=model, adapt="lora", stage=stage)
    total = sum(p.numel() for p in ds_worker.make(case).parameters())
    seen = ranks.run(2, ds_worker.watched, case)
    for one in seen:
        assert one["calls"] == [True]
        assert all(one["same"].values())
        assert one["held"] == (0 if stage == 3 else total,) * 4
        assert one["evaluated"][0] == one["evaluated"][1] == seen[0]["evaluated"][0]
        assert np.isnan(one["norm"]) or np.isinf(one["norm"])
    assert [one["speaks"] for one in seen] == [{True}, {False}]


def test_refuses_optimizers_that_need_more_than_slices() -> None:
    adagrad = {"name": "adagrad", "learning_rate": 0.1}
    message = ranks.run(2, ds_worker.refused, Case(model="mlp", stage=2, optimizer=adagrad))[0]
    assert message.startswith("optimizer: Adagrad doesn't work with deepspeed at parallel.zero 2, which makes it anew")
    adafactor = {"name": "torch", "type": "Adafactor"}
    message = ranks.run(2, ds_worker.refused, Case(model="mlp", stage=1, optimizer=adafactor))[0]
    assert message.startswith("optimizer: Adafactor doesn't work with deepspeed at parallel.zero 1, which updates slices")
    case = Case(model="mlp", optimizer=adafactor)  # whole matrices at stage 0
    assert_same(ranks.run(2, ds_worker.together, case)[0], oracle(case))


def start(model: nn.Module) -> deepspeed.Engine:
    def factory(groups: list) -> torch.optim.Optimizer:
        return make_optimizer(groups, AdamW())

    groups = parameter_groups(model.named_parameters(), AdamW())
    return deepspeed.start(model, groups, factory, Parallel(engine="deepspeed"), Axis(), torch.device("cpu"))


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(InputError) as caught:
        start(nn.Linear(2, 2))
    assert str(caught.value) == (
        "parallel.engine: deepspeed isn't installed; pip install 'trainwright[deepspeed]', or set parallel.engine: torch"
    )


def test_refuses_trained_parameters_of_other_dtypes() -> None:
    with pytest.raises(InputError, match=r"trains float32 parameters, and weight is torch.float64; set parallel.engine"):
        start(nn.Linear(2, 2).double())


@pytest.mark.parametrize("stage", [0, 3])
def test_a_process_by_itself_is_quiet_and_ends_well(stage: int) -> None:
    """Stage 3 would abort at exit, were its process group not destroyed before."""
    code = f"from tests.parallel import ds_worker; ds_worker.by_itself({stage})"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_is_not_imported_unless_asked_for() -> None:
    code = "import sys; from trainwright.parallel import deepspeed_state; assert 'deepspeed' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
