"""Hugging Face's TrainingArguments, as JSON or YAML, as statements for a recipe."""

from __future__ import annotations

import math
from typing import Any

from trainwright.importing import optimizers, schedules
from trainwright.importing.arguments_plain import ACCELERATOR, FSDP, PLAIN
from trainwright.importing.best import of_arguments as best_of_arguments
from trainwright.importing.findings import Reading, shown
from trainwright.importing.schedules import as_part

# Arguments of example scripts and of TRL that often stand in the same file.
OF_SCRIPTS: dict[str, tuple[str, str]] = {
    "model_name_or_path": ("model.pretrained", "word"),
    "tokenizer_name": ("model.tokenizer", "word"),
    "train_file": ("data.source", "word"),
    "dataset_name": ("data.source", "word"),
    "validation_file": ("data.held_out", "word"),
    "block_size": ("data.sequence_length", "whole"),
    "max_seq_length": ("data.sequence_length", "whole"),
    "max_length": ("data.sequence_length", "whole"),
    "max_train_samples": ("data.limit", "whole"),
    "packing": ("data.packing", "flag"),
    "dataset_text_field": ("data.fields.text", "word"),
}
# Keys that something is made of, here or where several files meet.
RECOMPUTED = ("gradient_checkpointing", "activation_checkpointing")
TRANSLATED = (
    "output_dir", "per_device_train_batch_size", "per_gpu_train_batch_size", "gradient_accumulation_steps", "max_steps",
    "num_train_epochs", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "optim",
    "optim_args", "optim_target_modules", "adafactor", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "label_smoothing_factor", "bf16", "fp16", "torch_compile", "eval_strategy", "evaluation_strategy",
    "eval_steps", "eval_on_start", "save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "seed", "data_seed", "use_cpu", "no_cuda", "report_to",
    "accelerator_config", "fsdp", "fsdp_config", "deepspeed",
    *RECOMPUTED,
)  # fmt: skip
KNOWN = (*TRANSLATED, *PLAIN, *OF_SCRIPTS)
STRATEGIES = ("no", "steps", "epoch")
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "no_cuda": "use_cpu",
}
FSDP_WORDS = {"full_shard": 3, "hybrid_shard": 3, "hybrid_shard_zero2": 2, "shard_grad_op": 2, "no_shard": 0}


def translate(reading: Reading) -> None:
    """Everything that the file says; what it is silent of has transformers' defaults."""
    _length_and_batch(reading)
    optimizers.of_arguments(reading)
    schedules.of_arguments(reading)
    _precision(reading)
    _loss_and_clipping(reading)
    _evaluation(reading)
    _checkpoints(reading)
    best_of_arguments(reading)
    _memory(reading)
    _run(reading)
    _parallel(reading)
    for key, (path, kind) in OF_SCRIPTS.items():
        value = getattr(reading, kind)(key)
        if value is not None:
            reading.say(path, value, key)
    reading.rest(
        "", PLAIN, (*TRANSLATED, *OF_SCRIPTS), "transformers refuses it, unless it belongs to a script's own arguments"
    )


def _renamed(reading: Reading, old: str) -> str:
    """The old name of a key where the file has that, else the new one."""
    new = RENAMED[old]
    if not reading.has(old) or reading.get(new) is not None:
        return new
    reading.tell("note", old, f"the old name of {new}; transformers has removed it")
    return old


def _length_and_batch(reading: Reading) -> None:
    key = _renamed(reading, "per_gpu_train_batch_size")
    micro, steps = reading.whole(key), reading.whole("gradient_accumulation_steps")
    if reading.flag("accelerator_config.split_batches") and micro:
        reading.say("batch.split", micro, key)
    reading.say("batch.micro", micro or 8, key, given=micro is not None)
    reading.say("batch.steps", steps or 1, "gradient_accumulation_steps", given=steps is not None)
    limit, epochs = reading.whole("max_steps", least=-1), reading.number("num_train_epochs")
    if limit is not None and limit > 0:
        reading.say("training.steps", limit, "max_steps")
        if epochs is not None:
            what = f"{epochs:g} epochs, but max_steps {limit} overrides them"
            reading.tell("warning", "num_train_epochs", what, "keep one of them", "training.steps")
        return
    if epochs == 0:
        reading.fault("num_train_epochs", epochs, "a number above 0")
    if epochs is None:
        reading.assume("training.epochs", 3.0, "num_train_epochs")
    else:
        reading.say("training.epochs", epochs, "num_train_epochs")


def _precision(reading: Reading) -> None:
    bf16, fp16 = reading.flag("bf16"), reading.flag("fp16")
    if bf16 and fp16:
        reading.tell("error", "fp16", "bf16 and fp16 at once: transformers refuses", "keep bf16", "precision")
    for key, value in (("bf16", bf16), ("fp16", fp16)):
        if value is not None:
            reading.used[key] = "precision"
    if bf16 or not fp16:
        reading.say("precision", "bf16" if bf16 else "fp32", "bf16", raw="bf16" if bf16 else "no", given=bool(bf16))
    else:
        reading.say("precision", "bf16", "fp16", raw="fp16")


def _loss_and_clipping(reading: Reading) -> None:
    largest, smoothing = reading.number("max_grad_norm"), reading.number("label_smoothing_factor")
    reading.say("training.clip_norm", 1.0 if largest is None else largest or None, "max_grad_norm", given=largest is not None)
    if smoothing:
        reading.say("loss.label_smoothing", smoothing, "label_smoothing_factor")


def _every(reading: Reading, strategy: str, steps_key: str, default: float | None, path: str) -> int | str | None:
    """How often, for the recipe: steps, epoch, or null. A part of all steps is counted out where max_steps says how many."""
    if strategy != "steps":
        reading.tell("note", steps_key, f"the strategy is {strategy}, so steps count nothing") if reading.has(
            steps_key
        ) else None
        return "epoch" if strategy == "epoch" else None
    value = reading.number(steps_key) or default
    if not value:
        return None
    part = as_part(value)
    if reading.get(steps_key) is not None:
        reading.used[steps_key] = path
    if part is None:
        return int(value)
    steps = reading.whole("max_steps", least=-1) or 0
    if steps > 0:
        reading.tell("note", steps_key, f"{part:g} of {steps} steps", about=path)
        return math.ceil(part * steps)
    what = f"{part:g} of all steps, and how many these are is known with the data only; it becomes every epoch"
    reading.tell("warning", steps_key, what, "give a number of steps", path)
    return "epoch"


def _evaluation(reading: Reading) -> None:
    key = _renamed(reading, "evaluation_strategy")
    strategy = reading.word(key, STRATEGIES) or "no"
    # An eval_steps that is absent is logging_steps, as in transformers.
    default = reading.number("logging_steps") if strategy == "steps" else None
    every = _every(reading, strategy, "eval_steps", 500 if default is None else default, "evaluation.every")
    reading.say("evaluation.every", every, key, given=reading.get(key) is not None)
    if strategy == "steps" and reading.get("eval_steps") is None:
        reading.tell("note", "eval_steps", f"not in the file: logging_steps, {shown(every)}, holds", about="evaluation.every")
    before = reading.flag("eval_on_start")
    if before is not None:
        reading.say("evaluation.before", before, "eval_on_start")


def _checkpoints(reading: Reading) -> None:
    strategy = reading.word("save_strategy", (*STRATEGIES, "best"))
    path = "checkpoint.every"
    if strategy == "best":
        reading.tell("note", "save_strategy", "the best weights are saved at each evaluation", about=path)
        every: Any = reading.said["evaluation.every"].value
    else:
        every = _every(reading, strategy or "steps", "save_steps", 500, path)
    given = strategy is not None or reading.get("save_steps") is not None
    reading.say(path, every, "save_strategy" if strategy else "save_steps", given=given)
    keep = reading.whole("save_total_limit", least=0)
    if keep:
        reading.say("checkpoint.keep", keep, "save_total_limit")
        return
    steps = reading.whole("max_steps", least=-1) or 0
    count = f": {steps // every} of them" if isinstance(every, int) and steps > every else ""
    what = f"not limited, so transformers keeps every checkpoint{count}; here the last 2 stay"
    reading.tell("note", "save_total_limit", what, "set checkpoint.keep for more", "checkpoint.every")


def _memory(reading: Reading) -> None:
    for key in RECOMPUTED:
        if reading.flag(key):
            reading.say("memory.checkpointing", "full", key)


def _run(reading: Reading) -> None:
    folder, seed = reading.word("output_dir"), reading.whole("seed", least=0)
    if folder is not None:
        reading.say("run.folder", folder, "output_dir")
    if seed is None:
        reading.assume("run.seed", 42, "seed")
    else:
        reading.say("run.seed", seed, "seed")
    other = reading.whole("data_seed", least=0)
    if other is not None and other != (42 if seed is None else seed):
        what = f"{other}: one seed rules everything here, and it is {42 if seed is None else seed}"
        reading.tell("warning", "data_seed", what, about="run.seed")
    cpu = _renamed(reading, "no_cuda")
    if reading.flag(cpu):
        reading.say("run.device", "cpu", cpu)
    compiled = reading.flag("torch_compile")
    if compiled is not None:
        reading.say("run.compile", "on" if compiled else "off", "torch_compile")
    _trackers(reading)


def _trackers(reading: Reading) -> None:
    value = reading.get("report_to")
    if value is None:
        return
    names = [str(name) for name in (value if isinstance(value, list) else [value])]
    reading.say("tracking.tensorboard", bool({"all", "tensorboard"} & set(names)), "report_to")
    others = [name for name in names if name not in ("none", "all", "tensorboard")]
    if others:
        what = f"{', '.join(others)}: numbers go to metrics.jsonl and TensorBoard only"
        reading.tell("warning", "report_to", what, about="tracking.tensorboard")


def _parallel(reading: Reading) -> None:
    reading.rest("accelerator_config", ACCELERATOR, ("split_batches", "gradient_accumulation_kwargs"), "accelerate refuses it")
    fsdp(reading, "fsdp_config", asked=_fsdp_stage(reading))
    if isinstance(reading.get("deepspeed"), str | dict):
        reading.used["deepspeed"] = "parallel"


def _fsdp_stage(reading: Reading) -> int | None:
    """The ZeRO stage that ``fsdp`` means; None where it isn't asked for."""
    value = reading.get("fsdp")
    if not value:
        return None
    words = value if isinstance(value, list) else [] if value is True else str(value).split()
    if "offload" in words:
        reading.tell("warning", "fsdp", "parameters aren't offloaded to CPU memory here", about="parallel.zero")
    if any("hybrid" in word for word in words):
        reading.tell(
            "warning", "fsdp", "the model is sharded over all processes, not within each machine", about="parallel.zero"
        )
    known = {*FSDP_WORDS, "offload", "auto_wrap", "true"}
    for word in words:
        if word.lower() not in known:
            reading.fault("fsdp", word, f"one of {', '.join(sorted(known))}")
    stage = next((FSDP_WORDS[word] for word in words if word in FSDP_WORDS), 3)
    reading.say("parallel.zero", stage, "fsdp")
    return stage


def fsdp(reading: Reading, section: str, asked: int | None) -> None:
    """``fsdp_config`` of either tool; its keys may have the prefix fsdp_."""
    value = reading.get(section)
    if isinstance(value, str):
        reading.tell("warning", section, f"{value}: a file of its own, which isn't read", "write its keys here", "parallel")
        return
    values = reading.section(section)
    if values and asked is None:
        reading.tell("note", section, "FSDP isn't asked for, so it has no effect")
        return
    for name in values:
        key, plain = f"{section}.{name}", str(name).removeprefix("fsdp_")
        if plain in ("reshard_after_forward", "sharding_strategy"):
            _reshard(reading, key)
        elif plain in ("cpu_offload", "offload_params") and reading.flag(key):
            reading.tell("warning", key, "parameters aren't offloaded to CPU memory here", about="parallel.zero")
        elif plain == "version":
            reading.tell("note", key, "FSDP2 is used")
    prefixed = {name: entry for plain, entry in FSDP.items() for name in (plain, f"fsdp_{plain}")}
    handled = ("reshard_after_forward", "sharding_strategy", "cpu_offload", "offload_params", "version")
    reading.rest(section, prefixed, [f"{p}{name}" for p in ("fsdp_", "") for name in handled], "FSDP ignores it")


def _reshard(reading: Reading, key: str) -> None:
    """True and FULL_SHARD divide the parameters too (zero 3); False and SHARD_GRAD_OP keep them whole (zero 2)."""
    value = reading.get(key)
    numbered = {"1": "full_shard", "2": "shard_grad_op", "3": "no_shard", "4": "hybrid_shard", "5": "hybrid_shard_zero2"}
    words = {**FSDP_WORDS, "true": 3, "false": 2}
    word = numbered.get(str(value), str(value)).lower()
    if word not in words:
        reading.fault(key, value, f"one of {', '.join(words)}")
        return
    if "hybrid" in word:
        reading.tell("warning", key, "the model is sharded over all processes, not within each machine", about="parallel.zero")
    reading.say("parallel.zero", words[word], key)
