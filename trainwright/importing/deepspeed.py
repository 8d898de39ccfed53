"""DeepSpeed's configuration as statements for a recipe."""

from __future__ import annotations

from collections.abc import Mapping

from trainwright.importing import optimizers, schedules
from trainwright.importing.deepspeed_plain import AMP, AUTOCAST, BF16, FP16, OFFLOAD_DETAILS, TOP, ZERO
from trainwright.importing.findings import Plain, Reading, shown
from trainwright.recipe import nearest

TRANSLATED = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16",
    "bfloat16", "fp16", "amp", "torch_autocast", "optimizer", "scheduler", "zero_optimization", "tensorboard",
)  # fmt: skip
GATHER = (
    "stage3_gather_16bit_weights_on_model_save", "gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
)  # fmt: skip
OF_ZERO = ("stage", "offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param", *GATHER)
KNOWN = (*TRANSLATED, *TOP)
SECTIONS: dict[str, Mapping[str, Plain]] = {
    "fp16": FP16,
    "bf16": BF16,
    "bfloat16": BF16,
    "amp": AMP,
    "torch_autocast": AUTOCAST,
}
IGNORED = "DeepSpeed ignores it"
CLIPPING = 1.0  # of deepspeed 0.19.8, where the file is silent


def translate(reading: Reading) -> None:
    """Everything that the file says."""
    for key, path, least in (
        ("train_batch_size", "batch.rows", 1),
        ("train_micro_batch_size_per_gpu", "batch.micro", 1),
        ("gradient_accumulation_steps", "batch.steps", 1),
    ):
        value = reading.whole(key, least)
        if value is not None:
            reading.say(path, value, key)
    reading.say("parallel.engine", "deepspeed", "zero_optimization")
    _zero(reading)
    _precision(reading)
    clipping = reading.number("gradient_clipping")
    if clipping is not None:
        reading.say("training.clip_norm", clipping or None, "gradient_clipping")
    elif not reading.has("gradient_clipping"):
        reading.say("training.clip_norm", CLIPPING, "gradient_clipping", given=False)
    optimizers.of_deepspeed(reading)
    schedules.of_deepspeed(reading)
    _tensorboard(reading)
    _misplaced(reading)
    reading.rest("", TOP, (*TRANSLATED, *ZERO, *OF_ZERO), IGNORED)


def _zero(reading: Reading) -> None:
    if isinstance(reading.get("zero_optimization"), bool):
        reading.say("parallel.zero", int(bool(reading.flag("zero_optimization"))), "zero_optimization")
        reading.tell("note", "zero_optimization", "the old way to say stage 1, or none", about="parallel.zero")
        return
    stage = reading.whole("zero_optimization.stage", least=0)
    if stage is not None and stage > 3:
        reading.fault("zero_optimization.stage", stage, "0, 1, 2 or 3")
    elif stage is not None:
        reading.say("parallel.zero", stage, "zero_optimization.stage")
    else:
        reading.say("parallel.zero", 0, "zero_optimization.stage", given=False)
    _offload_optimizer(reading, stage or 0)
    _offload_param(reading)
    _gathering(reading, stage or 0)
    for section in ("offload_optimizer", "offload_param"):
        if isinstance(reading.get(f"zero_optimization.{section}"), Mapping):
            reading.rest(f"zero_optimization.{section}", OFFLOAD_DETAILS, ("device",), "DeepSpeed refuses it")
    reading.rest("zero_optimization", ZERO, OF_ZERO, "DeepSpeed refuses it")


def _offload_optimizer(reading: Reading, stage: int) -> None:
    key = "zero_optimization.offload_optimizer.device"
    device = reading.word(key, ("none", "cpu", "nvme"))
    if reading.flag("zero_optimization.cpu_offload"):
        key, device = "zero_optimization.cpu_offload", "cpu"
        reading.tell("note", key, "the old way to say offload_optimizer", about="parallel.offload_optimizer")
    offload(reading, key, device, stage)


def offload(reading: Reading, key: str, device: str | None, stage: int) -> None:
    """``offload_optimizer``, of DeepSpeed or of accelerate."""
    if device == "none":
        reading.tell("note", key, "none: optimizer states stay with the parameters; it says the same as leaving it out")
    elif device is not None and not stage:
        what = f"{device}: without a ZeRO stage nothing is offloaded"
        reading.tell("warning", key, what, "set stage to 1, 2 or 3, or remove it", "parallel.zero")
    elif device is not None:
        reading.say("parallel.offload_optimizer", True, key)
        if device == "nvme":
            what = "optimizer states go to CPU memory here, not to NVMe"
            reading.tell("warning", key, what, about="parallel.offload_optimizer")


def _offload_param(reading: Reading) -> None:
    key = "zero_optimization.offload_param.device"
    device = reading.word(key, ("none", "cpu", "nvme"))
    if reading.flag("zero_optimization.cpu_offload_param"):
        key, device = "zero_optimization.cpu_offload_param", "cpu"
    offload_param(reading, key, device)


def offload_param(reading: Reading, key: str, device: str | None) -> None:
    """``offload_param``, of DeepSpeed or of accelerate."""
    if device == "none":
        reading.tell("note", key, "none: parameters stay where they compute; it says the same as leaving it out")
    elif device is not None:
        what = f"{device}: parameters aren't offloaded here, only optimizer states are"
        reading.tell("warning", key, what, "set parallel.offload_optimizer: true", "parallel.zero")


def _gathering(reading: Reading, stage: int) -> None:
    """At stage 3 every process has a part of each weight, and saving must gather them."""
    for name in GATHER:
        nested = reading.flag(f"zero_optimization.{name}")
        if nested is not None:
            gathering(reading, f"zero_optimization.{name}", nested, stage)
        if reading.has(name):
            value = reading.flag(name)
            what = f"{shown(reading.get(name))} at the top of the file, where DeepSpeed ignores it"
            what += "; it belongs under zero_optimization"
            if stage == 3 and not any(reading.flag(f"zero_optimization.{other}") for other in GATHER):
                what += "; its default there is false, so " + NOT_GATHERED
            fix = "here the export is always gathered" + ("" if value else "; elsewhere write true under zero_optimization")
            reading.tell("warning", name, what, fix, "parallel.zero")


NOT_GATHERED = "at stage 3 the weights wouldn't be gathered on save: save_pretrained would write empty weights"


def gathering(reading: Reading, key: str, value: bool, stage: int) -> None:
    """``stage3_gather_16bit_weights_on_model_save``, of DeepSpeed or of accelerate."""
    if stage == 3 and not value:
        reading.tell("warning", key, f"false: {NOT_GATHERED}", "here the export is always gathered", "parallel.zero")
    elif stage == 3:
        reading.tell("note", key, "true: the export is always gathered here", about="parallel.zero")
    else:
        reading.tell("note", key, f"has no effect at stage {stage}; the export is always whole here")


def _precision(reading: Reading) -> None:
    on = {key: reading.flag(f"{key}.enabled") for key in SECTIONS}
    for key, plain in SECTIONS.items():
        if reading.get(key) is True or reading.get(key) is False:
            reading.fault(key, reading.get(key), 'a section such as {"enabled": true}')
            continue
        if on[key] is not None:
            reading.used[f"{key}.enabled"] = "precision"
        reading.rest(key, plain, ("enabled", "dtype") if key == "torch_autocast" else ("enabled",), "DeepSpeed refuses it")
    dtype = str(reading.get("torch_autocast.dtype") or "bfloat16").removeprefix("torch.")
    if reading.has("torch_autocast.dtype"):
        reading.used["torch_autocast.dtype"] = "precision"
    brain = next((key for key in ("bf16", "bfloat16") if on[key]), None)
    if on["fp16"] and brain:
        reading.tell("error", "fp16.enabled", "bf16 and fp16 at once: DeepSpeed refuses", "keep bf16", "precision")
    if brain:
        reading.say("precision", "bf16", f"{brain}.enabled", raw="bf16")
    elif on["torch_autocast"]:
        raw = "fp16" if dtype in ("float16", "fp16", "half") else "bf16"
        reading.say("precision", "bf16", "torch_autocast.enabled", raw=raw)
    elif on["fp16"] or on["amp"]:
        reading.say("precision", "bf16", "fp16.enabled" if on["fp16"] else "amp.enabled", raw="fp16")
    elif not any(reading.has(f"{key}.enabled") and reading.get(f"{key}.enabled") is None for key in SECTIONS):
        reading.say("precision", "fp32", "bf16.enabled", raw="no", given=False)
    if on["amp"]:
        reading.tell("warning", "amp.enabled", "Apex was removed from DeepSpeed, which refuses it", "write bf16", "precision")


def _tensorboard(reading: Reading) -> None:
    enabled = reading.flag("tensorboard.enabled")
    if enabled is not None:
        reading.say("tracking.tensorboard", enabled, "tensorboard.enabled")
    told = Plain("TensorBoard's files go into the run's folder, under tensorboard/")
    reading.rest("tensorboard", {"output_path": told, "job_name": told}, ("enabled",), "DeepSpeed refuses it")


def _misplaced(reading: Reading) -> None:
    """Keys at the top that belong into a section, and the reverse: DeepSpeed doesn't see them."""
    for key in reading.values:
        if key in (*ZERO, *OF_ZERO) and key not in KNOWN and not reading.accounted(key):
            what = f"{shown(reading.get(key))} at the top of the file, where DeepSpeed ignores it"
            reading.tell("warning", key, what, "it belongs under zero_optimization")
        elif key not in (*KNOWN, *ZERO, *OF_ZERO):
            inside = [section for section, plain in SECTIONS.items() if key in plain]
            if inside:
                what = f"at the top of the file, where DeepSpeed ignores it{nearest(key, KNOWN)}"
                reading.tell("warning", key, what, f"it belongs under {inside[0]}")
