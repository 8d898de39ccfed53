"""Files that can't be read, or make no sense: one message with what, where and the fix."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.importing.files import ACCELERATE, DEEPSPEED, OUTPUT, TWO, ZERO, imported
from trainwright.importing.read import read
from trainwright.recipe import InputError


def refused(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        read([path])
    assert str(path) in str(error.value) or path.name in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "", "empty; known are DeepSpeed's JSON"),
        ("a.json", "{}", "empty"),
        ("a.yaml", "# nothing\n", "empty"),
        ("a.json", "[1, 2]", "is a mapping of keys and values, found a list"),
        ("a.yaml", "- a\n- b\n", "found a list"),
        ("a.yaml", "just words", "found the value just words"),
        ("a.json", '{"train_batch_size": 1,}', "not JSON: line 1, column 2"),
        ("a.json", '{"train_batch_size": 1 // rows\n}', "remove comments"),
        ("a.json", '{"train_batch_size": 1, "train_batch_size": 2}', "'train_batch_size' is there twice"),
        ("a.yaml", "distributed_type: NO\ndistributed_type: FSDP\n", "line 2: key 'distributed_type' is there already"),
        ("a.yaml", "distributed_type: [NO\n", "line 2"),
        ("a.yaml", "a:\n\t- b\n", "indent with spaces"),
        ("config.py", "from transformers import TrainingArguments\n", "a Python program, which isn't run"),
        ("ds.py", "x = 1", "a Python program"),
        ("a.bin", b"\x80\x04K\x01.", "a pickle, which is never loaded"),
        ("training_args.bin", b"PK\x03\x04abc", "args.to_json_string()"),
        ("a.json", b"\xff\xfe\x00", "not text in UTF-8"),
        ("a.json", '{"model_type": "llama", "architectures": ["X"]}', "looks like the config.json of a model"),
        ("a.json", '{"peft_type": "LORA", "r": 8}', "the adapter_config.json of an adapter"),
        ("a.yaml", "base_model: x\ndatasets: []\noutput_dir: y\n", "a file of axolotl"),
        ("a.yaml", "data: {source: x}\ntraining: {steps: 3}\n", "a recipe already"),
        ("a.json", '{"log_history": [], "max_steps": 3, "output_dir": "x"}', "trainer_state.json"),
        ("a.json", '{"colour": "red", "shape": "round"}', "its keys are colour, shape"),
        ("a.json", '{"per_device_train_batchsize": 3}', "did you mean 'per_device_train_batch_size'?"),
        ("a.json", '{"gradient_accumulation_steps": 3}', "too little to tell its kind"),
        ("a.json", '{"optim' + '{"a":' * 99999, "not JSON"),
        ("a.json", '{"a":' * 99999, "nested too deeply"),
    ],
)  # fmt: skip
def test_files_of_no_use(tmp_path: Path, name: str, text: str | bytes, said: str) -> None:
    assert said in refused(tmp_path / name, text)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"ds": {**ZERO, "train_batch_size": -4}}, "ds.json: train_batch_size: found -4; must be a whole number of at least 1"),
        ({"ds": {**ZERO, "train_batch_size": 4.5}}, "found 4.5"),
        ({"ds": {**ZERO, "train_batch_size": "many"}}, "found many"),
        ({"ds": {**ZERO, "train_batch_size": True}}, "found true"),
        ({"ds": {**ZERO, "zero_optimization": {"stage": 4}}}, "must be 0, 1, 2 or 3"),
        ({"ds": {**ZERO, "zero_optimization": 3}}, "must be a section of keys and values"),
        ({"ds": {**ZERO, "bf16": True}}, 'must be a section such as {"enabled": true}'),
        ({"ds": {**ZERO, "scheduler": {"type": "WarmupLRR"}}}, "(did you mean 'warmuplr'?)"),
        ({"ds": {**ZERO, "optimizer": {"type": "AdamX"}}}, "must be an optimizer"),
        ({"ds": {**ZERO, "optimizer": {"type": "Adam", "params": {"betas": [0.9]}}}}, "must be two numbers"),
        ({"args": {**OUTPUT, "learning_rate": "fast"}}, "found fast; must be a number of at least 0"),
        ({"args": {**OUTPUT, "learning_rate": -1.0}}, "found -1"),
        ({"args": {**OUTPUT, "eval_strategy": "step"}}, "did you mean 'steps'?"),
        ({"args": {**OUTPUT, "lr_scheduler_type": "cosin"}}, "did you mean 'cosine'?"),
        ({"args": {**OUTPUT, "optim": "adamw_torsh"}}, "did you mean 'adamw_torch'?"),
        ({"args": {**OUTPUT, "bf16": "perhaps"}}, "must be true or false"),
        ({"args": {**OUTPUT, "warmup_ratio": 2}}, "must be a part of all steps"),
        ({"args": {**OUTPUT, "num_train_epochs": 0}}, "must be a number above 0"),
        ({"acc": {**TWO, "distributed_type": "DEEPSPED"}}, "did you mean 'deepspeed'?"),
        ({"acc": {**TWO, "mixed_precision": "bf61"}}, "must be one of no, fp16, bf16, fp8"),
        ({"args": {**OUTPUT, "adam_beta1": 1.5}}, "the recipe that these files make: optimizer.betas"),
    ],
)  # fmt: skip
def test_values_that_make_no_sense(tmp_path: Path, files: Any, said: str) -> None:
    with pytest.raises(InputError) as error:
        imported(tmp_path, **files)
    assert said in str(error.value)


def test_all_values_that_make_no_sense_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        imported(tmp_path, args={**OUTPUT, "seed": "x", "max_steps": "y"}, ds={**ZERO, "gradient_clipping": "z"})
    assert "3 values make no sense" in str(error.value)
    assert all(f"found {word}" in str(error.value) for word in "xyz")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "deepspeed.yaml").write_text(ACCELERATE)
    for files, said in (
        ([], "name at least one file"),
        ([tmp_path / "deepsped.yaml"], "did you mean"),
        ([tmp_path], "is a folder"),
        ([tmp_path / "deepspeed.yaml"], "deepspeed_config_file: no such file: deepspeed.json; it is looked for beside"),
    ):
        with pytest.raises(InputError) as error:
            read(files)
        assert said in str(error.value)
    if os.geteuid():
        (tmp_path / "deepspeed.yaml").chmod(0)
        with pytest.raises(InputError, match="Permission denied"):
            read([tmp_path / "deepspeed.yaml"])


def test_two_of_one_kind(tmp_path: Path) -> None:
    for name in ("deepspeed.json", "other.json"):
        (tmp_path / name).write_text(DEEPSPEED)
    (tmp_path / "acc.yaml").write_text(ACCELERATE)
    with pytest.raises(InputError, match="are both a DeepSpeed configuration; one of a kind can be read"):
        read([tmp_path / "deepspeed.json", tmp_path / "other.json"])
    with pytest.raises(InputError, match="are both a DeepSpeed"):
        read([tmp_path / "acc.yaml", tmp_path / "other.json"])
    same = tmp_path / "." / "deepspeed.json"
    assert read([tmp_path / "deepspeed.json", same, tmp_path / "acc.yaml"]).nproc == 5


def test_a_named_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "deepspeed.json").write_text(json.dumps(OUTPUT))
    (tmp_path / "acc.yaml").write_text(ACCELERATE)
    with pytest.raises(InputError, match="as DeepSpeed's, but that is Hugging Face TrainingArguments"):
        read([tmp_path / "acc.yaml"])


def test_arguments_that_name_or_hold_deepspeed(tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text(json.dumps({**ZERO, "zero_optimization": {"stage": 1}}))
    named = imported(tmp_path, args={**OUTPUT, "deepspeed": "zero.json", "per_device_train_batch_size": 4})
    held = imported(tmp_path, args={**OUTPUT, "deepspeed": ZERO, "per_device_train_batch_size": 4})
    assert (named.recipe["parallel"]["zero"], held.recipe["parallel"]["zero"]) == (1, 2)


def test_words_of_yaml_1_1(tmp_path: Path) -> None:
    (tmp_path / "acc.yaml").write_text("distributed_type: MULTI_GPU\nmixed_precision: no\nuse_cpu: yes\nnum_processes: 2\n")
    found = read([tmp_path / "acc.yaml"])
    assert found.recipe == {"precision": "fp32", "run": {"device": "cpu"}}
