"""The optimizers of transformers and DeepSpeed as ours."""

from __future__ import annotations

from trainwright.importing.findings import Reading, shown
from trainwright.recipe import nearest

OURS = {"adamw": "adamw", "adam": "adam", "sgd": "sgd", "rmsprop": "rmsprop", "adagrad": "adagrad", "adadelta": "adadelta"}
TORCH = ("NAdam", "RAdam", "Adamax", "ASGD", "Rprop", "Adafactor", "Muon")
# Names of transformers for the very same mathematics.
SAME = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_torch_xla": "adamw", "adamw_torch_npu_fused": "adamw",
    "adamw_hf": "adamw", "adamw_apex_fused": "adamw", "paged_adamw_32bit": "adamw", "paged_adamw": "adamw", "sgd": "sgd",
    "adagrad": "adagrad", "rmsprop": "rmsprop", "rmsprop_bnb": "rmsprop", "rmsprop_bnb_32bit": "rmsprop",
}  # fmt: skip
# The same with states in 8 bits (bitsandbytes' or torchao's), where memory.optimizer_states says so.
EIGHT_BITS = {
    "adamw_bnb_8bit": "adamw", "adamw_8bit": "adamw", "paged_adamw_8bit": "adamw", "adamw_torch_8bit": "adamw",
    "rmsprop_bnb_8bit": "rmsprop",
}  # fmt: skip
# The rest of transformers' OptimizerNames: what stands in, for the nearest mathematics.
OTHERS = (
    "adafactor", "adamw_anyprecision", "adamw_torch_4bit", "ademamix", "ademamix_8bit", "lion_8bit", "lion_32bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "galore_adamw", "galore_adamw_8bit", "galore_adafactor",
    "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo", "grokadamw",
    "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise",
    "stable_adamw",
)  # fmt: skip
DEEPSPEED_OTHERS = (
    "lamb", "lion", "muon", "onebitadam", "onebitlamb", "zerooneadam", "muadam", "muadamw", "musgd", "cpuadam", "fusedadam",
)  # fmt: skip
ADAMS = ("adamw", "adam")
DETAILS = {
    "torch_adam", "adam_w_mode", "bias_correction", "amsgrad", "foreach", "fused", "capturable", "maximize",
    "differentiable", "set_grad_none", "fp32_optimizer_states", "dampening", "adamw_mode",
}  # fmt: skip
NUMBERS = {"momentum": "momentum", "alpha": "alpha", "rho": "rho", "lr_decay": "lr_decay"}
DEEPSPEED_RATE = 1e-3  # of FusedAdam and DeepSpeedCPUAdam


def of_arguments(reading: Reading) -> None:
    """``optim`` and the numbers beside it; transformers' defaults where the file is silent."""
    name = _name_of_arguments(reading)
    for key, default in (("learning_rate", 5e-5), ("weight_decay", 0.0)):
        value = reading.number(key)
        reading.say(f"optimizer.{key}", default if value is None else value, key, given=value is not None)
    if name == "sgd":
        reading.assume("optimizer.momentum", 0.0, "optim")  # transformers gives torch's SGD its rate alone
    first, second, eps = reading.number("adam_beta1"), reading.number("adam_beta2"), reading.number("adam_epsilon")
    for key, value in (("adam_beta1", first), ("adam_beta2", second), ("adam_epsilon", eps)):
        if value is not None and name not in ADAMS:
            reading.tell("note", key, f"{shown(value)}: {name} has no such number")
        elif value is not None:
            reading.used[key] = "optimizer.eps" if key == "adam_epsilon" else "optimizer.betas"
    if name in ADAMS and (first is not None or second is not None):
        betas = [0.9 if first is None else first, 0.999 if second is None else second]
        reading.say("optimizer.betas", betas, "adam_beta1" if first is not None else "adam_beta2")
    if name in ADAMS and eps is not None:
        reading.say("optimizer.eps", eps, "adam_epsilon")
    if reading.get("optim_args") is not None:
        reading.tell("warning", "optim_args", f"{shown(reading.get('optim_args'))}: isn't read", about="optimizer.name")
    if reading.get("optim_target_modules") is not None:
        what = "GaLore and APOLLO aren't offered here"
        reading.tell("warning", "optim_target_modules", what, "adapt.method: lora saves memory too", "optimizer.name")


def _name_of_arguments(reading: Reading) -> str:
    if reading.flag("adafactor"):  # of older versions
        reading.say("optimizer.name", "adamw", "adafactor", raw="adafactor")
        reading.tell("warning", "adafactor", "isn't offered; it becomes adamw", "", "optimizer.name")
        return "adamw"
    word = reading.word("optim", (*SAME, *EIGHT_BITS, *OTHERS))
    name = {**SAME, **EIGHT_BITS}.get(word or "adamw_torch", "adamw")
    if word in EIGHT_BITS:
        _in_eight_bits(reading, word)
    if word in OTHERS:
        what = f"{word} isn't offered; it becomes adamw, whose states take 8 bytes a trained parameter"
        reading.tell("warning", "optim", what, "look at the learning rate again", "optimizer.name")
    reading.say("optimizer.name", name, "optim", raw=word or "adamw_torch", given=word is not None)
    return name


def _in_eight_bits(reading: Reading, word: str) -> None:
    if reading.get("deepspeed"):
        what = f"{word}: DeepSpeed keeps optimizer states in float32 here"
        reading.tell("warning", "optim", what, "set parallel.engine: torch and memory.optimizer_states: 8bit")
        return
    reading.say("memory.optimizer_states", "8bit", "optim", raw=word)
    paged = "; to have them in CPU memory, set memory.optimizer_offload: cpu" if word.startswith("paged") else ""
    reading.tell("note", "optim", f"{word}: blocks of 256 in the same map, also of embeddings{paged}", about="optimizer.name")


def of_deepspeed(reading: Reading) -> None:
    """``optimizer`` with its ``params``."""
    if not reading.section("optimizer"):
        return
    name = _name_of_deepspeed(reading)
    if name is None:
        return
    rate, decay = reading.number("optimizer.params.lr"), reading.number("optimizer.params.weight_decay")
    if rate is not None:
        reading.say("optimizer.learning_rate", rate, "optimizer.params.lr")
    elif not reading.has("optimizer.params.lr") and name in ADAMS:
        reading.assume("optimizer.learning_rate", DEEPSPEED_RATE, "optimizer.params.lr")
    if decay is not None:
        reading.say("optimizer.weight_decay", decay, "optimizer.params.weight_decay")
    elif not reading.has("optimizer.params.weight_decay"):
        reading.assume("optimizer.weight_decay", 0.0, "optimizer.params.weight_decay")
    _numbers(reading, name)
    reading.rest("optimizer.params", {}, ("lr", "weight_decay", "betas", "eps", *NUMBERS, *DETAILS), "the optimizer refuses it")
    reading.rest("optimizer", {}, ("type", "params", "legacy_fusion"), "DeepSpeed ignores it")


def _name_of_deepspeed(reading: Reading) -> str | None:
    """Names are torch.optim's classes, in their spelling, or DeepSpeed's own, in any."""
    word = reading.word("optimizer.type")
    if word is None:
        if not reading.faults:
            reading.tell("warning", "optimizer", "no type, so DeepSpeed has no optimizer")
        return None
    lower = word.lower()
    torch_name = next((name for name in TORCH if name.lower() == lower), None)
    name = OURS.get(lower)
    if lower == "adam" and reading.flag("optimizer.params.adam_w_mode") is not False:
        name = "adamw"
        reading.tell("note", "optimizer.type", "DeepSpeed's Adam is AdamW unless adam_w_mode is false", about="optimizer.name")
    elif lower in DEEPSPEED_OTHERS:
        name = "adamw"
        what = f"{word} isn't offered; it becomes adamw"
        reading.tell("warning", "optimizer.type", what, "look at the learning rate again", "optimizer.name")
    elif torch_name:
        name = "torch"
        reading.say("optimizer.type", torch_name, "optimizer.type")
    if name is None:
        reading.fault("optimizer.type", word, f"an optimizer{nearest(word, [*OURS, *TORCH, *DEEPSPEED_OTHERS])}")
        return None
    reading.say("optimizer.name", name, "optimizer.type", raw=lower)
    return name


def _numbers(reading: Reading, name: str) -> None:
    betas = reading.get("optimizer.params.betas")
    if betas is not None and name in ADAMS:
        if isinstance(betas, list) and len(betas) == 2 and all(isinstance(beta, int | float) for beta in betas):
            reading.say("optimizer.betas", [float(beta) for beta in betas], "optimizer.params.betas")
        else:
            reading.fault("optimizer.params.betas", betas, "two numbers")
    eps = reading.number("optimizer.params.eps")
    if eps is not None and name not in ("sgd", "torch"):
        reading.say("optimizer.eps", eps, "optimizer.params.eps")
    for key, number in NUMBERS.items():
        value = reading.number(f"optimizer.params.{key}")
        fits = {"momentum": ("sgd", "rmsprop"), "alpha": ("rmsprop",), "rho": ("adadelta",), "lr_decay": ("adagrad",)}
        if value is not None and name in fits[key]:
            reading.say(f"optimizer.{number}", value, f"optimizer.params.{key}")
    if name == "sgd" and reading.get("optimizer.params.momentum") is None:
        reading.assume("optimizer.momentum", 0.0, "optimizer.params.momentum")  # torch's default, ours is 0.9
    if reading.flag("optimizer.params.nesterov") and name == "sgd":
        reading.say("optimizer.nesterov", True, "optimizer.params.nesterov")
    for key, value in reading.section("optimizer.params").items():
        path = f"optimizer.params.{key}"
        known = key in DETAILS or key in NUMBERS or key in ("betas", "eps", "nesterov")
        if known and value is not None and value != "auto" and not reading.accounted(path):
            reading.tell("note", path, f"{shown(value)}: {name} has no such setting here")
    if reading.get("optimizer.params.max_grad_norm") is not None:
        what = "DeepSpeed refuses a max_grad_norm of the optimizer"
        reading.tell("error", "optimizer.params.max_grad_norm", what, "write gradient_clipping", "training.clip_norm")
