"""Every key that the tools themselves know is known here, and no key of a file is dropped without a word."""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.importing.files import OUTPUT, TWO, ZERO, dropped, imported
from trainwright.importing import accelerate, arguments, deepspeed
from trainwright.importing.accelerate_plain import DEEPSPEED, DYNAMO_CONFIG, MEGATRON_LM, PARALLELISM
from trainwright.importing.arguments_plain import ACCELERATOR, FSDP
from trainwright.importing.deepspeed_plain import BF16, FP16, OFFLOAD_DETAILS
from trainwright.importing.deepspeed_plain import ZERO as ZERO_PLAIN
from trainwright.importing.optimizers import DEEPSPEED_OTHERS, EIGHT_BITS, OTHERS, OURS, SAME
from trainwright.importing.render import render
from trainwright.importing.schedules import CYCLE_KEYS, HUGGING_FACE, WARMUP_KEYS
from trainwright.recipe import InputError
from trainwright.recipe import yaml as recipe_yaml
from trainwright.recipe.file import parse

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 40), st.floats(0, 2), st.sampled_from(["auto", "no", "steps", "cpu", "x"]),
    st.just([]), st.just(["a"]), st.just({}), st.just({"enabled": True}), st.just({"unheard_of": 1}),
)  # fmt: skip


def test_training_arguments_are_known() -> None:
    transformers = pytest.importorskip("transformers")
    for kind in (transformers.TrainingArguments, transformers.Seq2SeqTrainingArguments):
        names = {field.name for field in dataclasses.fields(kind) if field.init}
        assert len(names) > 100
        assert not names - set(arguments.KNOWN)


def test_their_optimizers_and_schedules_are_known() -> None:
    training_args = pytest.importorskip("transformers.training_args")
    trainer_utils = pytest.importorskip("transformers.trainer_utils")
    assert {name.value for name in training_args.OptimizerNames} <= {*SAME, *EIGHT_BITS, *OTHERS}
    assert {name.value for name in trainer_utils.SchedulerType} == set(HUGGING_FACE)


def test_the_keys_of_accelerate_are_known() -> None:
    config = pytest.importorskip("accelerate.commands.config.config_args")
    for kind in (config.ClusterConfig, config.SageMakerConfig):
        names = {field.name for field in dataclasses.fields(kind)}
        assert not names - set(accelerate.KNOWN)
    launch = pytest.importorskip("accelerate.commands.launch")
    source = Path(launch.__file__).read_text()
    flags = set(re.findall(r'"--(\w+)"', source))
    of_fsdp = {*FSDP, "version", "offload_params", "sharding_strategy", "reshard_after_forward"}
    assert not {flag.removeprefix("fsdp_") for flag in flags if flag.startswith("fsdp_")} - of_fsdp
    handled = {"tp_degree", "pp_degree", "use_distributed_optimizer", "gradient_clipping"}
    megatron = {*MEGATRON_LM, *(f"megatron_lm_{name}" for name in handled)}
    assert not {flag for flag in flags if flag.startswith("megatron_lm_")} - megatron
    of_parallelism = {*PARALLELISM, "parallelism_config_tp_size", "parallelism_config_dp_shard_size"}
    assert not {flag for flag in flags if flag.startswith("parallelism_config_")} - of_parallelism
    assert not {flag for flag in flags if flag.startswith("dynamo_")} - {*DYNAMO_CONFIG, "dynamo_backend"}
    of_deepspeed = {"zero_stage", "offload_optimizer_device", "zero3_init_flag", "zero3_save_16bit_model", *DEEPSPEED}
    assert not {flag for flag in flags if flag.startswith(("zero", "offload_", "deepspeed_"))} - {
        *of_deepspeed, *accelerate.OF_DEEPSPEED,
    }  # fmt: skip
    types = {kind.value.lower() for kind in pytest.importorskip("accelerate.utils").DistributedType}
    assert types <= set(accelerate.TYPES)


def test_accelerator_config_is_known() -> None:
    utils = pytest.importorskip("transformers.trainer_pt_utils")
    names = {field.name for field in dataclasses.fields(utils.AcceleratorConfig)}
    assert not names - {*ACCELERATOR, "split_batches", "gradient_accumulation_kwargs"}


def test_the_keys_of_deepspeed_are_known() -> None:
    with patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):
        zero = pytest.importorskip("deepspeed.runtime.zero.config")
        offload = pytest.importorskip("deepspeed.runtime.zero.offload_config")
        precision = pytest.importorskip("deepspeed.runtime.precision_config")
        constants = pytest.importorskip("deepspeed.runtime.constants")
        config = pytest.importorskip("deepspeed.runtime.config")
        rates = pytest.importorskip("deepspeed.runtime.lr_schedules")
    for kind, known in (
        (zero.DeepSpeedZeroConfig, {*ZERO_PLAIN, *deepspeed.OF_ZERO}),
        (offload.DeepSpeedZeroOffloadParamConfig, {*OFFLOAD_DETAILS, "device"}),
        (offload.DeepSpeedZeroOffloadOptimizerConfig, {*OFFLOAD_DETAILS, "device"}),
        (precision.DeepSpeedBF16Config, {*BF16, "enabled"}),
        (precision.DeepSpeedFP16Config, {*FP16, "enabled"}),
    ):
        names = {name for key, field in kind.model_fields.items() for name in (key, field.alias or key)}
        assert not names - known, kind
    names = ("TRAIN_BATCH_SIZE", "OPTIMIZER", "SCHEDULER", "STEPS_PER_PRINT", "TRAIN_MICRO_BATCH_SIZE_PER_GPU", "BFLOAT16",
             "GRADIENT_ACCUMULATION_STEPS", "MANAGED_GRADIENT_ACCUMULATION", "BFLOAT16_OLD", "FP16", "TORCH_AUTOCAST",
             "GRADIENT_CLIPPING", "COMMUNICATION_DATA_TYPE", "SEQ_PARALLEL_COMMUNICATION_DATA_TYPE", "PRESCALE_GRADIENTS",
             "GRADIENT_PREDIVIDE_FACTOR", "GRADIENT_ALLREDUCE_OP", "DISABLE_ALLGATHER", "DUMP_STATE", "DISABLE_PYTHON_GC",
             "VOCABULARY_SIZE", "WALL_CLOCK_BREAKDOWN", "MEMORY_BREAKDOWN", "CHECKPOINT", "DATA_TYPES", "DATALOADER_DROP_LAST",
             "USE_DATA_BEFORE_EXPERT_PARALLEL", "LOG_LEVEL", "ZERO_ALLOW_UNTESTED_OPTIMIZER",
             "ZERO_FORCE_DS_CPU_OPTIMIZER")  # fmt: skip
    assert not {getattr(constants, name) for name in names} - set(deepspeed.KNOWN)
    assert not set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) - set(deepspeed.KNOWN)
    assert not set(config._REMOVED_ZERO_CONFIG_KEYS) - set(ZERO_PLAIN)
    assert set(config.DEEPSPEED_OPTIMIZERS) <= {*OURS, *DEEPSPEED_OTHERS}
    for kind, known in ((rates.WarmupDecayLR, WARMUP_KEYS), (rates.OneCycle, CYCLE_KEYS)):
        taken = kind.__init__.__code__.co_varnames[2 : kind.__init__.__code__.co_argcount]
        assert not set(taken) - set(known)


NESTED = {
    "zero_optimization": (*ZERO_PLAIN, *deepspeed.OF_ZERO),
    "bf16": (*BF16, "enabled"),
    "fp16": (*FP16, "enabled"),
    "deepspeed_config": (*DEEPSPEED, *accelerate.OF_DEEPSPEED[1:]),
    "fsdp_config": tuple(f"fsdp_{name}" for name in (*FSDP, "sharding_strategy", "version")),
    "megatron_lm_config": (*MEGATRON_LM, "megatron_lm_tp_degree"),
    "parallelism_config": tuple(PARALLELISM),
    "accelerator_config": (*ACCELERATOR, "split_batches"),
}


def mappings(known: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    """Some keys of a tool, and some that nobody knows, with all kinds of values."""
    names = st.one_of(st.sampled_from(known), st.sampled_from(known), st.sampled_from(("stray", "lerning_rate", "stage")))
    flat = st.dictionaries(names, VALUES, max_size=6)
    sections = [
        st.fixed_dictionaries({}, optional={section: st.dictionaries(st.sampled_from(inside), VALUES, max_size=3)})
        for section, inside in NESTED.items()
        if section in known
    ]
    return st.tuples(flat, *sections).map(lambda parts: {key: value for part in parts for key, value in part.items()})


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    ds=st.one_of(st.none(), mappings(deepspeed.KNOWN)),
    acc=st.one_of(st.none(), mappings(accelerate.KNOWN)),
    args=st.one_of(st.none(), mappings(arguments.KNOWN)),
    kind=st.sampled_from(["NO", "MULTI_GPU", "FSDP", "DEEPSPEED", "MEGATRON_LM"]),
)
def test_nothing_is_dropped_and_the_recipe_is_always_valid(
    ds: dict[str, Any] | None, acc: dict[str, Any] | None, args: dict[str, Any] | None, kind: str
) -> None:
    files: dict[str, Mapping[str, Any]] = {}
    if ds is not None:
        files["ds"] = {**ZERO, **ds}
    if acc is not None:
        files["acc"] = {**TWO, **acc, "distributed_type": kind}
    if args is not None:
        files["args"] = {**OUTPUT, **args}
        files["args"].pop("deepspeed", None)
    if not files:
        return
    found = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = imported(Path(folder), **files)
        except InputError as refused:
            message = str(refused)
    if found is None:
        assert "must be" in message, message
        return
    for name, values in files.items():
        file = f"{name}.{'yaml' if name == 'acc' else 'json'}"
        assert not dropped(found, file, values)
    parse(recipe_yaml.read(render(found), "rendered"))


def check_each(folder: Path, kind: str, file: str, plain: dict[str, Any], key: str, values: tuple[Any, ...]) -> None:
    """A key is accounted for with each value that makes sense for it, and some do."""
    told = 0
    for value in values:
        with suppress(InputError):
            found = imported(folder, **{kind: {**plain, key: value}})
            told += 1
            assert not dropped(found, file, {**plain, key: value})
    assert told


@pytest.mark.parametrize("key", [key for key in arguments.KNOWN if key != "deepspeed"])
def test_each_argument_is_accounted_for(tmp_path: Path, key: str) -> None:
    check_each(
        tmp_path,
        "args",
        "args.json",
        OUTPUT,
        key,
        (True, False, 3, 0.5, "steps", "tensorboard", "linear", {"a": 1}, ["a"], None),
    )


@pytest.mark.parametrize("key", deepspeed.KNOWN)
def test_each_key_of_deepspeed_is_accounted_for(tmp_path: Path, key: str) -> None:
    check_each(
        tmp_path,
        "ds",
        "ds.json",
        ZERO,
        key,
        (True, False, 3, 0.5, "fp32", {"enabled": True}, {"type": "Adam"}, {"type": "WarmupLR"}, {"stage": 1}, None),
    )


@pytest.mark.parametrize("key", accelerate.KNOWN)
def test_each_key_of_accelerate_is_accounted_for(tmp_path: Path, key: str) -> None:
    check_each(
        tmp_path,
        "acc",
        "acc.yaml",
        TWO,
        key,
        (True, False, 3, "bf16", "no", "NO", "local_machine", "0,1", {"a": 1}, ["a"], None),
    )
