"""The file of ``accelerate config`` as statements for a recipe and the number of processes."""

from __future__ import annotations

from trainwright.importing import deepspeed
from trainwright.importing.accelerate_plain import DEEPSPEED, DYNAMO_CONFIG, MEGATRON_LM, PARALLELISM, TOP
from trainwright.importing.arguments import fsdp
from trainwright.importing.findings import Plain, Reading, shown

ENVIRONMENTS = ("local_machine", "amazon_sagemaker")
TYPES = (
    "no", "multi_cpu", "multi_gpu", "multi_npu", "multi_mlu", "multi_sdaa", "multi_musa", "multi_xpu", "multi_hpu",
    "multi_neuron", "deepspeed", "fsdp", "xla", "tpu", "megatron_lm", "data_parallel", "model_parallel",
)  # fmt: skip
ELSEWHERE = ("xla", "tpu", "multi_npu", "multi_mlu", "multi_sdaa", "multi_musa", "multi_hpu", "multi_neuron")
TRANSLATED = (
    "compute_environment", "distributed_type", "num_processes", "num_machines", "machine_rank", "mixed_precision", "fp16",
    "use_cpu", "gpu_ids", "deepspeed_config", "fsdp_config", "parallelism_config", "megatron_lm_config", "dynamo_config",
    "dynamo_backend",
)  # fmt: skip
KNOWN = (*TRANSLATED, *TOP)
REFUSED = "accelerate refuses it"
OF_DEEPSPEED = (
    "deepspeed_config_file", "zero3_init_flag", "zero_stage", "offload_optimizer_device", "offload_param_device",
    "gradient_accumulation_steps", "gradient_clipping", "zero3_save_16bit_model",
)  # fmt: skip
IN_THE_FILE = OF_DEEPSPEED[2:]  # what accelerate refuses beside deepspeed_config_file
DEFAULT_STAGE = 2  # of accelerate, where there is no file and no zero_stage


def translate(reading: Reading) -> None:
    """Everything that the file says."""
    kind = reading.word("distributed_type", TYPES)
    _environment(reading, kind)
    _processes(reading, kind)
    _precision(reading)
    _deepspeed(reading, kind)
    _fsdp(reading, kind)
    _megatron(reading, kind)
    _parallelism(reading)
    _dynamo(reading)
    reading.rest("", TOP, TRANSLATED, REFUSED)


def config_file(reading: Reading) -> str | None:
    """The DeepSpeed file that is named, if that engine is asked for."""
    if reading.word("distributed_type", TYPES) != "deepspeed":
        return None
    name = reading.word("deepspeed_config.deepspeed_config_file")
    return None if name is None or name.lower() == "none" else name


def _environment(reading: Reading, kind: str | None) -> None:
    environment = reading.word("compute_environment", ENVIRONMENTS)
    if environment == "amazon_sagemaker":
        what = "AMAZON_SAGEMAKER: no jobs are started there"
        reading.tell("warning", "compute_environment", what, "start trainwright on the machine itself")
    elif environment:
        reading.tell("note", "compute_environment", "LOCAL_MACHINE: processes are started where trainwright is")
    if reading.flag("use_cpu") or kind == "multi_cpu":
        reading.say("run.device", "cpu", "use_cpu" if reading.flag("use_cpu") else "distributed_type")
    if kind is None and not reading.faults:
        reading.tell("error", "distributed_type", "lacks, and accelerate refuses a file without it", "add distributed_type")
    elif kind in ELSEWHERE:
        what = f"{shown(reading.get('distributed_type'))}: that hardware isn't offered here"
        reading.tell("warning", "distributed_type", what, "set run.device by hand", "run")


def _processes(reading: Reading, kind: str | None) -> None:
    """All processes, and the machines that share them."""
    count = reading.whole("num_processes", least=-1)
    count = count if count and count > 0 else None
    machines = reading.whole("num_machines") or 1
    rank = reading.whole("machine_rank", least=0)
    if kind == "no":
        if count and count > 1:
            what = f"{count}, but with distributed_type NO accelerate starts 1"
            reading.tell(
                "warning", "num_processes", what, "set distributed_type: MULTI_GPU, DEEPSPEED or FSDP if more are meant"
            )
        count = 1
    if count:
        reading.say("processes", count, "num_processes")
    if reading.has("num_machines"):
        reading.say("machines", machines, "num_machines")
    if rank is not None and rank >= machines:
        what = (
            f"{rank}, but num_machines is {machines}, so ranks go from 0 to {machines - 1}: it would wait for others for ever"
        )
        reading.tell("error", "machine_rank", what, f"set num_machines above {rank}, or machine_rank: 0")
    elif rank is not None:
        why = "the only machine" if machines == 1 else "each machine is told its own by the launcher"
        reading.tell("note", "machine_rank", f"{rank}: {why}")
    if count and count % machines:
        what = f"{count} processes can't be divided among {machines} machines"
        reading.tell("error", "num_processes", what, f"set num_processes to a multiple of {machines}")
    if reading.get("gpu_ids") is not None:
        _devices(reading, kind, count, machines)


def _devices(reading: Reading, kind: str | None, count: int | None, machines: int) -> None:
    ids = str(reading.get("gpu_ids"))
    if ids.lower() == "all":
        reading.tell("note", "gpu_ids", "all: each process takes the device of its local rank")
        return
    number = len([part for part in ids.split(",") if part.strip()])
    what = f"{ids}: {number} {'device' if number == 1 else 'devices'}"
    reading.tell("note", "gpu_ids", what, f"set CUDA_VISIBLE_DEVICES={ids} when starting")
    if count and kind not in ("no", "multi_cpu"):
        idle(reading, "gpu_ids", number, count // machines, "gpu_ids")


def idle(reading: Reading, key: str, devices: int, processes: int, source: str) -> None:
    """Devices that no process would use, or that several would."""
    if devices > processes:
        what = f"{processes} processes, but {source} has {devices} devices: {devices - processes} would idle"
        reading.tell("warning", key, what, f"start {devices} processes, or name {processes} devices", "parallel")
    elif devices < processes:
        what = f"{processes} processes, but {source} has only {devices} devices"
        reading.tell("error", key, what, f"start {devices} processes", "parallel")


def _precision(reading: Reading) -> None:
    word = reading.word("mixed_precision", ("no", "fp16", "bf16", "fp8"))
    key = "mixed_precision"
    if word is None and reading.flag("fp16"):
        word, key = "fp16", "fp16"
    if word is None:
        return
    if config_file(reading) and key == "mixed_precision":
        what = f"{word}: accelerate refuses it beside deepspeed_config_file"
        reading.tell("error", key, what, "remove it, and say bf16 in the DeepSpeed file", "precision")
    if word == "fp8":
        reading.tell("warning", key, "fp8 isn't offered here; it becomes bf16", about="precision")
    reading.say("precision", "fp32" if word == "no" else "bf16", key, raw="bf16" if word == "fp8" else word, given=word != "no")
    reading.used[key] = "precision"


def _deepspeed(reading: Reading, kind: str | None) -> None:
    section = reading.section("deepspeed_config")
    if kind != "deepspeed":
        if section:
            what = f"distributed_type is {shown(reading.get('distributed_type'))}, so DeepSpeed isn't used"
            reading.tell("warning", "deepspeed_config", what, "set distributed_type: DEEPSPEED if it is meant")
        return
    reading.say("parallel.engine", "deepspeed", "distributed_type")
    file = config_file(reading)
    if file is not None:
        reading.used["deepspeed_config.deepspeed_config_file"] = "parallel"
        _beside_the_file(reading)
    else:
        _without_file(reading)
    if reading.flag("deepspeed_config.zero3_init_flag") is not None:
        reading.used["deepspeed_config.zero3_init_flag"] = "parallel.zero"  # looked at where the stage is known
    reading.rest("deepspeed_config", DEEPSPEED, OF_DEEPSPEED, "accelerate ignores it")


def _beside_the_file(reading: Reading) -> None:
    for name in IN_THE_FILE:
        key = f"deepspeed_config.{name}"
        if reading.get(key) is not None:
            what = f"{shown(reading.get(key))}: accelerate refuses it beside deepspeed_config_file, which says it itself"
            reading.tell("error", key, what, "remove it here", "parallel")


def _without_file(reading: Reading) -> None:
    prefix = "deepspeed_config."
    stage = reading.whole(f"{prefix}zero_stage", least=0)
    if stage is not None and stage > 3:
        reading.fault(f"{prefix}zero_stage", stage, "0, 1, 2 or 3")
    elif stage is None:
        reading.assume("parallel.zero", DEFAULT_STAGE, f"{prefix}zero_stage")
        stage = DEFAULT_STAGE
    else:
        reading.say("parallel.zero", stage, f"{prefix}zero_stage")
    key = f"{prefix}offload_optimizer_device"
    deepspeed.offload(reading, key, reading.word(key, ("none", "cpu", "nvme")), stage)
    key = f"{prefix}offload_param_device"
    deepspeed.offload_param(reading, key, reading.word(key, ("none", "cpu", "nvme")))
    steps, clipping = reading.whole(f"{prefix}gradient_accumulation_steps"), reading.number(f"{prefix}gradient_clipping")
    if steps is not None:
        reading.say("batch.steps", steps, f"{prefix}gradient_accumulation_steps")
    if clipping is not None:
        reading.say("training.clip_norm", clipping or None, f"{prefix}gradient_clipping")
    save = reading.flag(f"{prefix}zero3_save_16bit_model")
    if save is not None:
        deepspeed.gathering(reading, f"{prefix}zero3_save_16bit_model", save, stage)


def _fsdp(reading: Reading, kind: str | None) -> None:
    if kind == "fsdp":
        reading.say("parallel.zero", 3, "distributed_type")
    fsdp(reading, "fsdp_config", asked=3 if kind == "fsdp" else None)


def _megatron(reading: Reading, kind: str | None) -> None:
    """Megatron's degrees are ours; its distributed optimizer is ZeRO's stage 1."""
    section = "megatron_lm_config"
    if kind != "megatron_lm":
        if reading.section(section):
            what = f"distributed_type is {shown(reading.get('distributed_type'))}, so Megatron-LM isn't used"
            reading.tell("note", section, what)
        return
    reading.used["distributed_type"] = "parallel"
    for name, path in (("tp_degree", "parallel.tensor"), ("pp_degree", "parallel.pipeline")):
        value = reading.whole(f"{section}.megatron_lm_{name}")
        if value is not None:
            reading.say(path, value, f"{section}.megatron_lm_{name}")
    key = f"{section}.megatron_lm_use_distributed_optimizer"
    if reading.flag(key) is not None:
        reading.say("parallel.zero", 1 if reading.flag(key) else 0, key)
    clipping = reading.number(f"{section}.megatron_lm_gradient_clipping")
    if clipping is not None:
        reading.say("training.clip_norm", clipping or None, f"{section}.megatron_lm_gradient_clipping")
    handled = ("tp_degree", "pp_degree", "use_distributed_optimizer", "gradient_clipping")
    reading.rest(section, MEGATRON_LM, [f"megatron_lm_{name}" for name in handled], "Megatron-LM's plugin refuses it")


def _parallelism(reading: Reading) -> None:
    section = "parallelism_config"
    names = [f"{prefix}{name}" for prefix in ("parallelism_config_", "") for name in ("tp_size", "dp_shard_size")]
    for name in names:
        key = f"{section}.{name}"
        value = reading.whole(key)
        if value is None:
            continue
        if name.endswith("tp_size") and value > 1:
            reading.say("parallel.tensor", value, key)
        elif value > 1 and "parallel.zero" not in reading.said:
            reading.say("parallel.zero", 3, key)
        elif value > 1:
            reading.used[key] = "parallel.zero"
    reading.rest(section, PARALLELISM, names, REFUSED)


def _dynamo(reading: Reading) -> None:
    for key in ("dynamo_backend", "dynamo_config.dynamo_backend"):
        value = reading.get(key)
        if value is not None:
            off = value is False or str(value).lower() == "no"
            reading.say("run.compile", "off" if off else "on", key)
            if not off and str(value).lower() != "inductor":
                reading.tell("note", key, f"{shown(value)}: PyTorch's own compiler, inductor, is used", about="run.compile")
    reading.rest("dynamo_config", DYNAMO_CONFIG, ("dynamo_backend",), "accelerate ignores it")
    told = Plain("starts the plain single program or one a device; that is --nproc here")
    if reading.has("distributed_type") and not reading.accounted("distributed_type"):
        reading.plainly("distributed_type", told)
