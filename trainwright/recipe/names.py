"""Keys that don't exist: what was probably meant, and what other tools' names are called here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from trainwright.recipe import Section
from trainwright.recipe.types import either, known_paths

# Names of Hugging Face's TrainingArguments, PEFT's LoraConfig, TRL, axolotl and LLaMA-Factory that people type
# from habit: "key of the recipe", "key: value" or "key; a remark".
ALIASES = {
    "activation_checkpointing": "memory.checkpointing: full",
    "activation_offloading": "memory.checkpointing: offload",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "adapter": "adapt.method",
    "base_model": "model.pretrained",
    "bf16": "precision: bf16",
    "block_size": "data.sequence_length",
    "cutoff_len": "data.sequence_length",
    "dataset": "data.source",
    "dataset_name": "data.source",
    "dataset_path": "data.source",
    "datasets": "data.source",
    "dtype": "precision",
    "eval_on_start": "evaluation.before",
    "eval_steps": "evaluation.every",
    "fp16": "precision: fp16",
    "load_in_4bit": "adapt.base: 4bit",
    "grad_clip": "training.clip_norm",
    "gradient_accumulation_steps": "training.micro_batch_size; accumulation follows from it and training.batch_size",
    "gradient_checkpointing": "memory.checkpointing: full",
    "gradient_clipping": "training.clip_norm",
    "greater_is_better": "evaluation.best.direction",
    "label_smoothing_factor": "loss.label_smoothing",
    "load_best_model_at_end": "evaluation.best; with metric and direction",
    "logging_dir": "run.folder",
    "lora_alpha": "adapt.alpha",
    "lora_dropout": "adapt.dropout",
    "lora_r": "adapt.rank",
    "lora_rank": "adapt.rank",
    "lora_target": "adapt.targets",
    "lora_target_modules": "adapt.targets",
    "lr": "optimizer.learning_rate",
    "lr_scheduler": "schedule.name",
    "lr_scheduler_type": "schedule.name",
    "max_grad_norm": "training.clip_norm",
    "max_length": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "max_steps": "training.steps",
    "max_train_samples": "data.limit",
    "metric_for_best_model": "evaluation.best.metric",
    "micro_batch": "training.micro_batch_size",
    "mixed_precision": "precision",
    "model_name": "model.pretrained",
    "model_name_or_path": "model.pretrained",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "optim": "optimizer.name",
    "output_dir": "run.folder",
    "peft_type": "adapt.method",
    "per_device_train_batch_size": "training.micro_batch_size; training.batch_size counts all processes",
    "r": "adapt.rank",
    "recompute_activations": "memory.checkpointing: full",
    "report_to": "tracking.tensorboard",
    "sample_packing": "data.packing",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "sequence_len": "data.sequence_length",
    "target_modules": "adapt.targets",
    "tokenizer_name": "model.tokenizer",
    "torch_compile": "run.compile",
    "torch_dtype": "precision",
    "train_batch_size": "training.batch_size",
    "train_file": "data.source",
    "train_on_inputs": "data.supervise: all",
    "trainable_parameters": "adapt.train; with adapt.method: partial",
    "unfrozen_parameters": "adapt.train; with adapt.method: partial",
    "use_gradient_checkpointing": "memory.checkpointing: full",
    "use_rslora": "adapt.scaling: rslora",
    "val_set_size": "data.held_out",
    "validation_file": "data.held_out",
    "warmup_ratio": "schedule.warmup",
    "warmup_steps": "schedule.warmup",
}
# Last parts that are too common to say where a key belongs.
MANY = 3


def advice(key: str, section: type[Section], prefix: str) -> str:
    """' (did you mean ...?)', or where the key belongs, or else which keys there are in its section."""
    alias = ALIASES.get(key.lower().replace("-", "_"))
    if alias:
        name, _, remark = alias.partition("; ")
        return f" (did you mean {_relative(name, prefix)!r}?{remark and ' ' + remark})"
    if key in known_paths():
        return f" (in a file, write {key.rpartition('.')[2]!r} inside {key.rpartition('.')[0]!r})"
    elsewhere = [path for path in known_paths() if path.rpartition(".")[2] == key]
    if 0 < len(elsewhere) <= MANY:
        return f" here; it belongs to {either(elsewhere)}"
    return _near(key, section, prefix) or f"; known here: {', '.join(section.model_fields)}"


def _near(key: str, section: type[Section], prefix: str) -> str:
    """The nearest key of this section, or else of the whole recipe."""
    near = _closest(key, section.model_fields)
    if near is None:
        leaves = {path.rpartition(".")[2]: path for path in known_paths()}
        leaf = _closest(key, leaves)
        near = leaf and leaves[leaf]
    return f" (did you mean {_relative(near, prefix)!r}?)" if near else ""


def _relative(path: str, prefix: str) -> str:
    """A path as it is written inside of the section ``prefix``."""
    return path.removeprefix(f"{prefix}.") if prefix else path


def _closest(word: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word.lower().replace("-", "_"), list(known), n=1, cutoff=0.7)), None)
