"""The three files of the course: the exact recipes, and all that is to be said of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from tests.importing.files import ACCELERATE, ARGUMENTS, COURSE, DEEPSPEED, course, dropped, one
from trainwright.importing.read import read
from trainwright.importing.render import render
from trainwright.recipe import yaml as recipe_yaml
from trainwright.recipe.file import parse

ENGINE = {"precision": "bf16", "parallel": {"zero": 3, "engine": "deepspeed"}}
BATCH = {"batch_size": 40, "micro_batch_size": 8}
TRAINER = {
    "optimizer": {"name": "adamw", "learning_rate": 5e-5, "weight_decay": 0.01},
    "schedule": {"name": "linear", "warmup": 400},
    "evaluation": {"every": 100, "best": {"metric": "f1", "direction": "maximize"}},
    "checkpoint": {"every": 100},
    "run": {"folder": "./output", "seed": 42},
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return course(tmp_path)


@pytest.mark.parametrize("names", [["deepspeed.json"], ["deepspeed.yaml"], ["deepspeed.yaml", "deepspeed.json"]], ids=str)
def test_the_two_files_start_five_processes_of_stage_three(files: Path, names: list[str]) -> None:
    found = read([files / name for name in names])
    assert found.recipe == {**ENGINE, "training": BATCH}
    assert found.nproc == 5
    assert "40 = 8 x 5 x 1" in one(found, "train_batch_size", "note")


def test_training_arguments_alone(files: Path) -> None:
    found = read([files / "training_arguments.json"])
    batch = {"steps": 20000, "batch_size": 32, "micro_batch_size": 32}
    assert found.recipe == {**TRAINER, "precision": "bf16", "training": batch}
    assert found.nproc is None
    assert "multiply training.batch_size by N" in one(found, "per_device_train_batch_size", "warning")


def test_all_three_contradict_themselves_in_the_batch(files: Path) -> None:
    found = read([files / name for name in COURSE])
    assert found.recipe == {**ENGINE, **TRAINER, "training": {"steps": 20000, **BATCH}}
    assert found.nproc == 5
    assert [(finding.level, finding.key) for finding in found.findings if finding.level == "error"] == [
        ("error", "per_device_train_batch_size")
    ]
    error = one(found, "per_device_train_batch_size", "error")
    assert error.startswith("32, but deepspeed.json says 8 in train_micro_batch_size_per_gpu, which holds here")


def test_every_finding_of_all_three(files: Path) -> None:
    found = read([files / name for name in COURSE])
    assert sorted((finding.level, finding.file, finding.key) for finding in found.findings) == sorted([
        ("error", "training_arguments.json", "per_device_train_batch_size"),
        ("warning", "deepspeed.json", "stage3_gather_16bit_weights_on_model_save"),
        ("warning", "deepspeed.yaml", "deepspeed_config.zero3_init_flag"),
        ("warning", "training_arguments.json", "greater_is_better"),
        ("warning", "training_arguments.json", "metric_for_best_model"),
        ("warning", "training_arguments.json", "metric_for_best_model"),
        ("note", "deepspeed.json", "train_batch_size"),
        ("note", "deepspeed.json", "zero_optimization.offload_optimizer.device"),
        ("note", "deepspeed.json", "zero_optimization.allgather_partitions"),
        ("note", "deepspeed.json", "zero_optimization.reduce_scatter"),
        *(("note", "deepspeed.yaml", key) for key in (
            "compute_environment", "debug", "downcast_bf16", "enable_cpu_affinity", "machine_rank", "main_training_function",
            "rdzv_backend", "same_network", "tpu_env", "tpu_use_cluster", "tpu_use_sudo", "use_cpu",
        )),
        *(("note", "training_arguments.json", key) for key in (
            "learning_rate", "lr_scheduler_type", "optim", "seed", "logging_dir", "logging_steps", "per_device_eval_batch_size",
            "save_total_limit",
        )),
    ])  # fmt: skip


def test_what_would_mislead_is_told_with_its_numbers(files: Path) -> None:
    found = read([files / name for name in COURSE])
    gather = one(found, "stage3_gather_16bit_weights_on_model_save", "warning")
    assert "it belongs under zero_optimization" in gather
    assert "empty weights" in gather
    assert "always gathered" in gather
    worst = one(found, "greater_is_better", "warning")
    assert "false with F1" in worst
    assert "keeps the worst model" in worst
    assert "maximize" in worst
    assert "5 processes would each hold the whole model" in one(found, "deepspeed_config.zero3_init_flag", "warning")
    best = [f.what for f in found.findings if f.key == "metric_for_best_model"]
    assert any("load_best_model_at_end isn't set" in what for what in best)
    assert "200 of them" in one(found, "save_total_limit", "note")
    assert "says the same as leaving it out" in one(found, "zero_optimization.offload_optimizer.device", "note")


def test_eight_visible_devices_of_which_three_would_idle(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    told = one(read([files / "deepspeed.yaml"]), "num_processes", "warning")
    assert "5 processes, but CUDA_VISIBLE_DEVICES has 8 devices: 3 would idle" in told
    assert "3 would idle" in one(read([files / "deepspeed.json"]), "train_batch_size", "warning")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert "only 3 devices" in one(read([files / "deepspeed.yaml"]), "num_processes", "error")
    for value in ("", "-1", "0,1,2,3,4"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert not [f for f in read([files / "deepspeed.yaml"]).findings if f.key == "num_processes"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_combination_in_any_order(files: Path, count: int) -> None:
    values = {
        "deepspeed.json": json.loads(DEEPSPEED),
        "deepspeed.yaml": recipe_yaml.read(ACCELERATE, ""),
        "training_arguments.json": json.loads(ARGUMENTS),
    }
    for names in itertools.permutations(COURSE, count):
        found = read([files / name for name in names])
        assert found.recipe == read([files / name for name in sorted(names)]).recipe
        for name in found.translated:
            assert not dropped(found, name, values[name])
        parse(recipe_yaml.read(render(found), "rendered"))


def test_the_named_file_is_beside_the_one_that_names_it(files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir("/")
    assert "deepspeed.json" in read([files / "deepspeed.yaml"]).translated
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "acc.yaml").write_text(ACCELERATE)
    monkeypatch.chdir(files)
    assert "deepspeed.json" in read([elsewhere / "acc.yaml"]).translated
