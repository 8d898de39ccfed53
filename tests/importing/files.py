"""The three files of the course, and how tests read files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainwright.importing.findings import Finding
from trainwright.importing.read import Imported, read
from trainwright.recipe import yaml as recipe_yaml

DEEPSPEED = """{
  "zero_optimization": {
    "stage": 3,
    "offload_optimizer": {
      "device": "none"
    },
    "allgather_partitions": true,
    "reduce_scatter": true
  },
  "train_batch_size": 40,
  "gradient_accumulation_steps": 1,
  "train_micro_batch_size_per_gpu": 8,
  "stage3_gather_16bit_weights_on_model_save": false,
  "bf16": {
    "enabled": true
  }
}
"""
ACCELERATE = """compute_environment: LOCAL_MACHINE
debug: false
deepspeed_config:
  deepspeed_config_file: deepspeed.json
  zero3_init_flag: false
distributed_type: DEEPSPEED
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
num_machines: 1
num_processes: 5
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""
ARGUMENTS = """{
  "output_dir": "./output",
  "logging_dir": "./logs",
  "per_device_train_batch_size": 32,
  "per_device_eval_batch_size": 32,
  "max_steps": 20000,
  "warmup_steps": 400,
  "weight_decay": 0.01,
  "logging_steps": 100,
  "bf16": true,
  "eval_strategy": "steps",
  "eval_steps": 100,
  "save_strategy": "steps",
  "save_steps": 100,
  "metric_for_best_model": "eval_F1",
  "greater_is_better": false
}
"""
COURSE = {"deepspeed.json": DEEPSPEED, "deepspeed.yaml": ACCELERATE, "training_arguments.json": ARGUMENTS}
OUTPUT = {"output_dir": "out"}  # enough to be TrainingArguments
TWO = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 2}
ZERO = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 4}


def course(folder: Path) -> Path:
    for name, text in COURSE.items():
        (folder / name).write_text(text)
    return folder


def imported(folder: Path, **files: Mapping[str, Any]) -> Imported:
    """Read mappings: ds=, acc= and args= are written as ds.json, acc.yaml and args.json."""
    paths = []
    for name, values in files.items():
        path = folder / f"{name}.{'yaml' if name == 'acc' else 'json'}"
        path.write_text(recipe_yaml.write(dict(values)) if name == "acc" else json.dumps(values))
        paths.append(path)
    return read(paths)


def about(found: Imported, key: str) -> list[Finding]:
    return [finding for finding in found.findings if finding.key == key]


def one(found: Imported, key: str, level: str) -> str:
    """What the only finding of that level about a key says, with its fix."""
    texts = [f"{finding.what}; {finding.fix}" for finding in about(found, key) if finding.level == level]
    assert len(texts) == 1, [str(finding) for finding in found.findings]
    return texts[0]


def keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The paths of all values that aren't mappings, and of empty mappings."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def dropped(found: Imported, file: str, values: Mapping[str, Any]) -> list[str]:
    """Keys of a file that neither became something nor were told of, by themselves or with their section."""
    accounted = {*found.translated[file], *(finding.key for finding in found.findings if finding.file == file)}
    return [key for key in keys(values) if not any(key == other or key.startswith(f"{other}.") for other in accounted)]
