"""The arithmetic of the batch, against DeepSpeed's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.importing.files import OUTPUT, TWO, imported, one
from trainwright.importing.batch import derive, processes_of

NUMBER = st.one_of(st.none(), st.integers(1, 6), st.sampled_from([8, 12, 40]))


@pytest.fixture(scope="module")
def deepspeed_config() -> Iterator[Any]:
    with patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):
        yield pytest.importorskip("deepspeed.runtime.config").DeepSpeedConfig


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.one_of(st.none(), st.integers(1, 60)), micro=NUMBER, steps=NUMBER, processes=st.integers(1, 6))
def test_as_deepspeed_derives(
    deepspeed_config: Any, rows: int | None, micro: int | None, steps: int | None, processes: int
) -> None:
    theirs = SimpleNamespace(
        train_batch_size=rows,
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=steps,
        world_size=processes,
    )
    ours = derive(rows, micro, steps, processes)
    try:
        deepspeed_config._set_batch_related_parameters(theirs)
    except AssertionError:
        assert ours is None
        return
    assert ours is not None
    batch, right = ours
    assert batch[:3] == (
        theirs.train_batch_size, theirs.train_micro_batch_size_per_gpu, theirs.gradient_accumulation_steps,
    )  # fmt: skip
    try:
        deepspeed_config._batch_assertion(theirs)
    except AssertionError:
        assert not right
    else:
        assert right
        assert processes_of(batch.rows, batch.micro, batch.steps) == processes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.one_of(st.none(), st.integers(1, 60)), micro=NUMBER, steps=NUMBER, processes=st.integers(1, 6))
def test_files_that_multiply_have_no_error_and_others_have_one(
    tmp_path: Path, rows: int | None, micro: int | None, steps: int | None, processes: int
) -> None:
    numbers = {"train_batch_size": rows, "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": steps}
    ds = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}} | {k: v for k, v in numbers.items() if v is not None}
    acc = {**TWO, "distributed_type": "DEEPSPEED", "num_processes": processes}
    found = imported(tmp_path, ds=ds, acc=acc)
    expected = derive(rows, micro, steps or 1, processes)  # accelerate writes 1 where the file is silent
    errors = [finding for finding in found.findings if finding.level == "error"]
    if expected is None:
        assert "training" not in found.recipe
        return
    batch, right = expected
    assert found.recipe["training"]["batch_size"] == batch.rows
    assert bool(errors) is not right
    if right:
        assert found.recipe["training"]["micro_batch_size"] == batch.micro
    assert found.nproc == processes


def test_numbers_that_do_not_multiply(tmp_path: Path) -> None:
    ds = {"zero_optimization": {"stage": 2}, "train_batch_size": 40, "train_micro_batch_size_per_gpu": 8}
    acc = {**TWO, "distributed_type": "DEEPSPEED", "num_processes": 4}
    found = imported(tmp_path, ds={**ds, "gradient_accumulation_steps": 1}, acc=acc)
    assert one(found, "train_batch_size", "error").startswith("40 isn't 8 x 4 x 1 = 32 (")
    assert "set train_batch_size to 32" in one(found, "train_batch_size", "error")
    found = imported(tmp_path, ds={**ds, "train_batch_size": 41, "gradient_accumulation_steps": 1})
    assert "no number of processes can make it" in one(found, "train_batch_size", "error")


def test_without_any_number_of_processes(tmp_path: Path) -> None:
    ds = {"zero_optimization": {"stage": 2}, "train_batch_size": 40}
    found = imported(tmp_path, ds={**ds, "train_micro_batch_size_per_gpu": 8})
    assert (found.nproc, found.recipe["training"]["batch_size"]) == (None, 40)
    assert imported(tmp_path, ds=ds).recipe["training"]["batch_size"] == 40


def test_data_parallel_multiplies(tmp_path: Path) -> None:
    found = imported(tmp_path, args={**OUTPUT, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}, acc=TWO)
    assert found.recipe["training"] | {"epochs": 3.0} == {"batch_size": 24, "micro_batch_size": 4, "epochs": 3.0}
    assert found.nproc == 2
    assert "24 = 4 x 2 x 3" in one(found, "per_device_train_batch_size", "note")


def test_tensor_and_pipeline_processes_share_a_batch(tmp_path: Path) -> None:
    config = {"megatron_lm_tp_degree": 2, "megatron_lm_pp_degree": 2}
    acc = {**TWO, "distributed_type": "MEGATRON_LM", "num_processes": 8, "megatron_lm_config": config}
    found = imported(tmp_path, args={**OUTPUT, "per_device_train_batch_size": 4}, acc=acc)
    assert found.recipe["training"]["batch_size"] == 8
    assert found.recipe["parallel"] == {"tensor": 2, "pipeline": 2}
    assert found.nproc == 8


def test_auto_is_filled_in_from_training_arguments(tmp_path: Path) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    auto = dict.fromkeys(names, "auto")
    ds = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}, **auto}
    arguments = {
        **OUTPUT,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "bf16": True,
    }
    found = imported(tmp_path, ds=ds, args=arguments, acc={**TWO, "distributed_type": "DEEPSPEED"})
    assert found.recipe["training"] == {"epochs": 3.0, "batch_size": 12, "micro_batch_size": 3, "clip_norm": 0.5}
    assert found.recipe["precision"] == "bf16"
    assert not [finding for finding in found.findings if finding.level == "error"]
    alone = imported(tmp_path, ds=ds)
    assert "training" not in alone.recipe
    assert "precision" not in alone.recipe
    assert "no TrainingArguments among the files" in one(alone, "train_batch_size", "warning")


def test_rows_of_all_processes_together(tmp_path: Path) -> None:
    arguments = {**OUTPUT, "per_device_train_batch_size": 8, "accelerator_config": {"split_batches": True}}
    found = imported(tmp_path, args=arguments, acc=TWO)
    assert found.recipe["training"]["batch_size"] == 8
    assert found.recipe["training"]["micro_batch_size"] == 4
    assert "8 rows for all processes together" in one(found, "per_device_train_batch_size", "warning")


def test_several_machines_share_the_processes(tmp_path: Path) -> None:
    found = imported(tmp_path, acc={**TWO, "num_processes": 8, "num_machines": 2, "machine_rank": 1})
    assert (found.nproc, found.machines) == (4, 2)
    odd = imported(tmp_path, acc={**TWO, "num_processes": 5, "num_machines": 2})
    assert "5 processes can't be divided among 2 machines" in one(odd, "num_processes", "error")


def test_deepspeed_divides_rows_whose_micro_batch_no_file_gives(tmp_path: Path) -> None:
    ds = {"zero_optimization": {"stage": 2}, "train_batch_size": 40}
    found = imported(tmp_path, ds=ds, args=OUTPUT, acc={**TWO, "distributed_type": "DEEPSPEED", "num_processes": 4})
    assert (found.recipe["training"]["batch_size"], found.recipe["training"]["micro_batch_size"]) == (40, 10)
    assert not [finding for finding in found.findings if finding.level == "error"]


@pytest.mark.parametrize(("said", "mode"), [(True, "full"), ("true", "full"), (False, None), (None, None)])
def test_gradient_checkpointing(said, mode, tmp_path) -> None:
    found = imported(tmp_path, args={**OUTPUT, "gradient_checkpointing": said})
    assert found.recipe.get("memory", {}).get("checkpointing") == mode
    assert not [finding for finding in found.findings if finding.key == "gradient_checkpointing" and finding.level == "warning"]
