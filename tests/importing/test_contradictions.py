"""Settings that contradict each other or mislead: each is told in its numbers, and the recipe is what it should be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.importing.files import OUTPUT, TWO, ZERO, about, imported, one

DEEP = {**TWO, "distributed_type": "DEEPSPEED"}
EVERY = {**OUTPUT, "eval_strategy": "steps", "eval_steps": 10, "save_strategy": "steps", "save_steps": 10}
BF16 = {"bf16": {"enabled": True}}


def levels(found: Any) -> set[str]:
    return {finding.level for finding in found.findings}


def at(section: Any, path: str) -> Any:
    for part in path.split("."):
        section = section[part]
    return section


@pytest.mark.parametrize(
    ("ds", "args", "key", "what", "path", "value"),
    [
        ({"fp16": {"enabled": True}}, {"bf16": True}, "bf16", "bf16, but ds.json says fp16", "precision", "bf16"),
        (BF16, {"fp16": True}, "fp16", "fp16, but ds.json says bf16", "precision", "bf16"),
        ({"gradient_clipping": 0.5}, {"max_grad_norm": 2.0}, "max_grad_norm", "2, but ds.json says 0.5",
         "training.clip_norm", 0.5),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, {"learning_rate": 2e-5}, "learning_rate",
         "2e-05, but ds.json says 0.0001 in optimizer.params.lr", "optimizer.learning_rate", 1e-4),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.2}}}, {"weight_decay": 0.1}, "weight_decay",
         "0.1, but ds.json says 0.2", "optimizer.weight_decay", 0.2),
        ({"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 4}, "gradient_accumulation_steps",
         "4, but ds.json says 2", "training.batch_size", 8),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_type": "linear"}}}, {"warmup_steps": 20},
         "warmup_steps", "", "schedule.warmup", 10),
    ],
)  # fmt: skip
def test_deepspeed_against_training_arguments(
    tmp_path: Path, ds: Any, args: Any, key: str, what: str, path: str, value: Any
) -> None:
    found = imported(tmp_path, ds={**ZERO, **ds}, args={**OUTPUT, "per_device_train_batch_size": 4, **args})
    errors = [finding for finding in found.findings if finding.level == "error"]
    assert len(errors) == 1, found.findings
    assert (errors[0].file, "transformers refuses to start" in errors[0].what) == ("args.json", True)
    assert what in errors[0].what
    assert what == "" or errors[0].key == key
    assert at(found.recipe, path) == value


MAYBE = st.one_of(st.none(), st.just("auto"), st.sampled_from([1, 2, 8]))
RATES = st.one_of(st.none(), st.just("auto"), st.sampled_from([5e-5, 1e-3, 0.0, 1.0]))
ON = st.sampled_from([None, True, False, "auto"])


@pytest.fixture(scope="module")
def theirs() -> Any:
    return pytest.importorskip("transformers.integrations.deepspeed").HfTrainerDeepSpeedConfig


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(micro=MAYBE, steps=MAYBE, clip=RATES, lr=RATES, decay=RATES, bf16=ON,
       args=st.fixed_dictionaries({}, optional={
           "per_device_train_batch_size": st.sampled_from([1, 2, 8]), "gradient_accumulation_steps": st.sampled_from([1, 2]),
           "max_grad_norm": st.sampled_from([1.0, 0.5]), "learning_rate": st.sampled_from([5e-5, 1e-3]),
           "weight_decay": st.sampled_from([0.0, 1.0]), "bf16": st.booleans(),
       }))  # fmt: skip
def test_what_transformers_refuses_is_told(
    theirs: Any, tmp_path: Path, micro: Any, steps: Any, clip: Any, lr: Any, decay: Any, bf16: Any, args: dict[str, Any]
) -> None:
    params = {key: value for key, value in (("lr", lr), ("weight_decay", decay)) if value is not None}
    ds: dict[str, Any] = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": params}}
    top = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": steps, "gradient_clipping": clip}
    ds |= {key: value for key, value in top.items() if value is not None}
    ds |= {} if bf16 is None else {"bf16": {"enabled": bf16}}
    config = theirs.__new__(theirs)
    config.config, config.mismatches, config._dtype = ds, [], None
    defaults = {
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "learning_rate": 5e-5,
        "weight_decay": 0.0, "bf16": False, "fp16": False, "bf16_full_eval": False, "fp16_full_eval": False, "world_size": 2,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "save_on_each_node": False,
    }  # fmt: skip
    found = imported(tmp_path, ds=ds, args={**OUTPUT, **args}, acc=DEEP)
    config.trainer_config_process(SimpleNamespace(**{**defaults, **args}))
    refusals = {line.split()[2].partition("=")[0] for line in config.mismatches}
    told = [finding for finding in found.findings if "transformers refuses to start" in finding.what]
    # bf16 off against on isn't told: accelerate then trains in bf16, as the recipe does.
    expected = len(refusals - {"bf16.enabled"})
    assert len([finding for finding in told if finding.about != "precision"]) == expected, (config.mismatches, told)
    if any("bf16.enabled=True" in line for line in config.mismatches):
        assert [finding for finding in told if finding.about == "precision"]


def test_deepspeed_clips_by_its_own_default(tmp_path: Path) -> None:
    found = imported(tmp_path, ds=ZERO, args={**OUTPUT, "per_device_train_batch_size": 4, "max_grad_norm": 0.3})
    assert found.recipe["training"]["clip_norm"] == 0.3
    assert "ds.json has no gradient_clipping, so DeepSpeed clips at 1" in one(found, "max_grad_norm", "warning")


@pytest.mark.parametrize(("mixed", "level"), [("fp16", "error"), ("bf16", None), ("no", None)])
def test_accelerate_against_training_arguments(tmp_path: Path, mixed: str, level: str | None) -> None:
    found = imported(tmp_path, args={**OUTPUT, "bf16": True}, acc={**TWO, "mixed_precision": mixed})
    assert found.recipe["precision"] == "bf16"
    assert [f.level for f in about(found, "mixed_precision")] == ([level] if level else [])


def test_fp16_becomes_bf16(tmp_path: Path) -> None:
    for files in ({"args": {**OUTPUT, "fp16": True}}, {"acc": {**TWO, "mixed_precision": "fp16"}}):
        found = imported(tmp_path, **files)
        assert found.recipe["precision"] == "bf16"
        assert any("fp16 becomes bf16" in f.what and f.level == "warning" for f in found.findings)
    found = imported(tmp_path, args={**OUTPUT, "fp16": True, "bf16": True})
    assert "transformers refuses" in one(found, "fp16", "error")


def test_without_mixed_precision_it_is_fp32(tmp_path: Path) -> None:
    assert imported(tmp_path, args=OUTPUT).recipe["precision"] == "fp32"
    assert imported(tmp_path, ds=ZERO).recipe["precision"] == "fp32"
    assert imported(tmp_path, args=OUTPUT, acc={**TWO, "mixed_precision": "bf16"}).recipe["precision"] == "bf16"
    assert "precision" not in imported(tmp_path, acc=TWO).recipe


def test_max_steps_overrides_epochs(tmp_path: Path) -> None:
    found = imported(tmp_path, args={**OUTPUT, "max_steps": 50, "num_train_epochs": 2})
    assert found.recipe["training"]["steps"] == 50
    assert "epochs" not in found.recipe["training"]
    assert "2 epochs, but max_steps 50 overrides them" in one(found, "num_train_epochs", "warning")
    assert imported(tmp_path, args={**OUTPUT, "max_steps": -1, "num_train_epochs": 2}).recipe["training"]["epochs"] == 2


def test_two_warmups_and_one_longer_than_the_training(tmp_path: Path) -> None:
    both = imported(tmp_path, args={**OUTPUT, "warmup_steps": 7, "warmup_ratio": 0.1, "max_steps": 100})
    assert both.recipe["schedule"]["warmup"] == 7
    assert "7 warmup_steps and a warmup_ratio of 0.1: the steps hold" in one(both, "warmup_ratio", "warning")
    assert imported(tmp_path, args={**OUTPUT, "warmup_ratio": 0.1}).recipe["schedule"]["warmup"] == 0.1
    assert imported(tmp_path, args={**OUTPUT, "warmup_steps": 0.1}).recipe["schedule"]["warmup"] == 0.1
    long = imported(tmp_path, args={**OUTPUT, "warmup_steps": 100, "max_steps": 100})
    assert "a warmup of 100 steps in a training of 100" in one(long, "warmup_steps", "error")
    assert not about(imported(tmp_path, args={**OUTPUT, "warmup_steps": 99, "max_steps": 100}), "warmup_steps")
    constant = imported(tmp_path, args={**OUTPUT, "warmup_steps": 9, "lr_scheduler_type": "constant"})
    assert constant.recipe["schedule"] == {"name": "constant", "warmup": 0}
    assert "constant_with_warmup" in one(constant, "warmup_steps", "warning")


@pytest.mark.parametrize(
    ("metric", "greater", "expected", "level"),
    [
        ("eval_F1", False, {"metric": "f1", "direction": "maximize"}, "warning"),
        ("accuracy", True, {"metric": "accuracy", "direction": "maximize"}, None),
        ("eval_loss", True, {"metric": "loss", "direction": "minimize"}, "warning"),
        ("loss", None, {"metric": "loss", "direction": "minimize"}, None),
        (None, None, {"metric": "loss", "direction": "minimize"}, None),
        ("wer", None, {"metric": "wer", "direction": "minimize"}, "warning"),
        ("Acc", None, {"metric": "accuracy", "direction": "maximize"}, None),
        ("my_metric", None, {"metric": "my_metric", "direction": "maximize"}, "warning"),
        ("my_metric", False, {"metric": "my_metric", "direction": "minimize"}, None),
    ],
)
def test_the_best_model(tmp_path: Path, metric: Any, greater: Any, expected: Any, level: str | None) -> None:
    args = {**EVERY, "load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": greater}
    found = imported(tmp_path, args=args)
    assert found.recipe["evaluation"]["best"] == expected
    told = [f.level for f in about(found, "greater_is_better") if f.what != "asks for nothing"]
    assert told == ([level] if level else [])


def test_a_best_model_without_evaluations(tmp_path: Path) -> None:
    found = imported(tmp_path, args={**OUTPUT, "load_best_model_at_end": True})
    assert "evaluation" not in found.recipe
    assert "no evaluation during the training" in one(found, "load_best_model_at_end", "error")


def test_saved_at_other_steps_than_evaluated(tmp_path: Path) -> None:
    loads = {**EVERY, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    odd = imported(tmp_path, args={**loads, "save_steps": 15})
    assert "evaluated every 10 steps, saved every 15 steps" in one(odd, "save_steps", "error")
    assert "transformers refuses" in one(odd, "save_steps", "error")
    assert "saved every 20 steps, evaluated every 10" in one(
        imported(tmp_path, args={**loads, "save_steps": 20}), "save_steps", "note"
    )
    assert not about(imported(tmp_path, args=loads), "save_steps")
    epoch = imported(tmp_path, args={**loads, "save_strategy": "epoch"})
    assert [f.level for f in about(epoch, "save_steps") if "may not have been saved" in f.what] == ["error"]


def test_gathering_at_its_right_place(tmp_path: Path) -> None:
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}
    found = imported(tmp_path, ds={**ZERO, "zero_optimization": zero})
    key = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    assert "empty weights" in one(found, key, "warning")
    gathers = imported(tmp_path, ds={**ZERO, "zero_optimization": {"stage": 3, key.rpartition(".")[2]: True}})
    assert "always gathered here" in one(gathers, key, "note")
    two = imported(tmp_path, ds={**ZERO, **BF16, "zero_optimization": {**zero, "stage": 2}})
    assert "has no effect at stage 2" in one(two, key, "note")
    acc = {**DEEP, "deepspeed_config": {"zero_stage": 3, "zero3_save_16bit_model": False, "zero3_init_flag": True}}
    found = imported(tmp_path, acc=acc)
    assert "empty weights" in one(found, "deepspeed_config.zero3_save_16bit_model", "warning")
    assert "always" in one(found, "deepspeed_config.zero3_init_flag", "warning")


def test_misplaced_and_unknown_keys(tmp_path: Path) -> None:
    found = imported(tmp_path, ds={**ZERO, "overlap_comm": True, "loss_scale": 0, "stepz_per_print": 5})
    assert "belongs under zero_optimization" in one(found, "overlap_comm", "warning")
    assert "belongs under fp16" in one(found, "loss_scale", "warning")
    assert "did you mean 'steps_per_print'?" in one(found, "stepz_per_print", "warning")
    found = imported(tmp_path, ds={**ZERO, "zero_optimization": {"stage": 1, "overlap_com": True}})
    assert "did you mean 'overlap_comm'?" in one(found, "zero_optimization.overlap_com", "warning")
    assert "did you mean 'seed'?" in one(imported(tmp_path, args={**OUTPUT, "sed": 1}), "sed", "warning")
    assert "accelerate refuses it" in one(imported(tmp_path, acc={**TWO, "gradient_accumulation_steps": 2}),
                                          "gradient_accumulation_steps", "warning")  # fmt: skip


@pytest.mark.parametrize(
    ("device", "stage", "offloaded"), [("none", 3, None), ("cpu", 2, True), ("nvme", 3, True), ("cpu", 0, None)]
)
def test_offloading(tmp_path: Path, device: str, stage: int, offloaded: bool | None) -> None:
    zero = {"stage": stage, "offload_optimizer": {"device": device, "pin_memory": True}}
    found = imported(tmp_path, ds={**ZERO, "zero_optimization": zero})
    assert found.recipe["parallel"].get("offload_optimizer") == offloaded
    assert [f.level for f in about(found, "zero_optimization.offload_optimizer.device")] == {
        ("none", 3): ["note"], ("cpu", 2): [], ("nvme", 3): ["warning"], ("cpu", 0): ["warning"],
    }[device, stage]  # fmt: skip
    params = imported(tmp_path, ds={**ZERO, "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}})
    assert "parameters aren't offloaded" in one(params, "zero_optimization.offload_param.device", "warning")


def test_machines_and_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = imported(tmp_path, acc={**TWO, "num_machines": 1, "machine_rank": 1})
    assert "1, but num_machines is 1, so ranks go from 0 to 0" in one(found, "machine_rank", "error")
    eight = imported(tmp_path, acc={**TWO, "num_processes": 5, "gpu_ids": "0,1,2,3,4,5,6,7"})
    assert "5 processes, but gpu_ids has 8 devices: 3 would idle" in one(eight, "gpu_ids", "warning")
    few = imported(tmp_path, acc={**TWO, "num_processes": 5, "gpu_ids": "0,1"})
    assert "has only 2 devices" in one(few, "gpu_ids", "error")
    assert levels(imported(tmp_path, acc={**TWO, "gpu_ids": "all"})) == {"note"}
    alone = imported(tmp_path, acc={**TWO, "distributed_type": "NO", "num_processes": 4})
    assert alone.nproc == 1
    assert "accelerate starts 1" in one(alone, "num_processes", "warning")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert not about(imported(tmp_path, acc={**TWO, "distributed_type": "MULTI_CPU"}), "num_processes")
    assert imported(tmp_path, acc={**TWO, "distributed_type": "MULTI_CPU"}).recipe["run"]["device"] == "cpu"


def test_what_accelerate_refuses_beside_a_file(tmp_path: Path) -> None:
    config = {"deepspeed_config_file": "ds.json", "zero_stage": 2, "gradient_clipping": 1.0}
    found = imported(tmp_path, ds=ZERO, acc={**DEEP, "mixed_precision": "bf16", "deepspeed_config": config})
    for key in ("mixed_precision", "deepspeed_config.zero_stage", "deepspeed_config.gradient_clipping"):
        assert "accelerate refuses it beside deepspeed_config_file" in one(found, key, "error")


def test_accelerate_alone_says_the_stage(tmp_path: Path) -> None:
    config = {"zero_stage": 3, "offload_optimizer_device": "cpu", "gradient_clipping": 0.5, "gradient_accumulation_steps": 2}
    found = imported(tmp_path, acc={**DEEP, "deepspeed_config": config}, args=OUTPUT)
    assert found.recipe["parallel"] == {"zero": 3, "engine": "deepspeed", "offload_optimizer": True}
    assert found.recipe["training"]["batch_size"] == 8 * 2 * 2
    assert imported(tmp_path, acc=DEEP).recipe["parallel"]["zero"] == 2  # accelerate's default
    assert imported(tmp_path, acc={**TWO, "distributed_type": "FSDP"}).recipe["parallel"] == {"zero": 3}
    for value, stage in ((True, 3), (False, 2), ("SHARD_GRAD_OP", 2), ("FULL_SHARD", 3), ("NO_SHARD", 0)):
        fsdp = {**TWO, "distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": value}}
        assert imported(tmp_path, acc=fsdp).recipe["parallel"]["zero"] == stage


def test_the_engine_deepspeed_shares_data_only(tmp_path: Path) -> None:
    acc = {**DEEP, "num_processes": 4, "deepspeed_config": {"zero_stage": 1, "offload_optimizer_device": "cpu"}}
    found = imported(tmp_path, acc={**acc, "parallelism_config": {"parallelism_config_tp_size": 2}})
    assert found.recipe["parallel"] == {"zero": 1, "tensor": 2, "engine": "torch"}
    assert "tensor and pipeline run on torch" in one(found, "distributed_type", "warning")


def test_parts_of_all_steps(tmp_path: Path) -> None:
    found = imported(tmp_path, args={**EVERY, "max_steps": 1001, "eval_steps": 0.1, "save_steps": 0.2})
    assert found.recipe["evaluation"]["every"] == 101
    assert found.recipe["checkpoint"]["every"] == 201
    unknown = imported(tmp_path, args={**EVERY, "eval_steps": 0.1})
    assert unknown.recipe["evaluation"]["every"] == "epoch"
    assert "becomes every epoch" in one(unknown, "eval_steps", "warning")
    assert imported(tmp_path, args={**OUTPUT, "eval_strategy": "steps", "logging_steps": 7}).recipe["evaluation"]["every"] == 7


def test_secrets_are_never_shown(tmp_path: Path) -> None:
    args = {**OUTPUT, "hub_token": "hf_abcdef", "push_to_hub": True}
    found = imported(tmp_path, args=args, ds={**ZERO, "comet": {"enabled": True, "api_key": "key_abcdef"}})
    assert "abcdef" not in str(found)


def test_the_flag_of_stage_three_at_stage_two(tmp_path: Path) -> None:
    for flag in (True, False):
        found = imported(tmp_path, acc={**DEEP, "deepspeed_config": {"zero_stage": 2, "zero3_init_flag": flag}})
        assert "has an effect at stage 3 only, and this is stage 2" in one(found, "deepspeed_config.zero3_init_flag", "note")
