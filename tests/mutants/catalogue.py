"""All mutants: each silent bug of PITFALLS that can be seeded, with the recipe that it hides in."""

from __future__ import annotations

from typing import Any

from tests.mutants import keeping, memory, models, steps
from tests.mutants.mutant import Mutant

DP: dict[str, Any] = {"parallel__data": 2}
TP: dict[str, Any] = {"parallel__tensor": 2}
PP: dict[str, Any] = {"parallel__pipeline": 2}
ZERO1, ZERO2, ZERO3 = ({**DP, "parallel__zero": stage} for stage in (1, 2, 3))
DEEPSPEED: dict[str, Any] = {**ZERO2, "parallel__engine": "deepspeed"}
SMOOTH: dict[str, Any] = {"loss": {"name": "cross_entropy", "label_smoothing": 0.2}}
COMPILED: dict[str, Any] = {"run__compile": "on"}
BF16: dict[str, Any] = {"precision": "bf16"}
# The weights are about 0.1, and bfloat16 knows 1/256 of that.
SLOW: dict[str, Any] = {"optimizer": {"name": "adamw", "learning_rate": 1e-5, "weight_decay": 0.1}}
AVERAGED: dict[str, Any] = {"training__ema": {"decay": 0.9}}
CHANGED: dict[str, Any] = {"data__augment": {"translate": 0.2}}
CHECKPOINTED: dict[str, Any] = {"memory__checkpointing": "full"}
PURE: dict[str, Any] = {"precision": "pure_bf16"}
FP16: dict[str, Any] = {"precision": "fp16"}
EIGHT: dict[str, Any] = {"memory__optimizer_states": "8bit"}
ON_DISK: dict[str, Any] = {"memory__optimizer_offload": "disk"}
STREAMED: dict[str, Any] = {"memory__frozen": "stream"}
FOUR: dict[str, Any] = {"adapt": {"method": "lora", "rank": 4, "base": "4bit"}}
AT_ONCE: dict[str, Any] = {
    "memory__optimizer_in_backward": True, "training__micro_batch_size": 8, "training__clip_norm": None
}  # fmt: skip
DATA, TENSOR, PIPELINE = ("data parallel",), ("tensor parallel",), ("pipeline parallel",)
ACCUMULATION, ZERO, KERNELS, CHECKPOINTING = ("accumulation",), ("ZeRO",), ("own kernels",), ("checkpointing",)

MUTANTS = (
    # what a loss is divided by
    Mutant("mean of means", 1, steps.mean_of_means, "full", DP, ACCUMULATION),
    Mutant("mean of means of smoothed labels", 1, steps.mean_of_means, "lora", SMOOTH, ACCUMULATION),
    Mutant("last window divided by the wrong count", 2, steps.last_window, "mlp",
           {**DP, "training__micro_batch_size": 8, "data__limit": 165}, ACCUMULATION),
    Mutant("count of a rank alone", 3, steps.own_count_of_a_rank, "lora", DP, DATA),
    Mutant("pipeline divides by its micro-batches", 4, steps.pipeline_scales, "full", PP, (*ACCUMULATION, *PIPELINE)),
    Mutant("smoothing divided by padding, too", 1, steps.smoothing_by_the_wrong_count, "full", {**SMOOTH, **DP}, KERNELS),
    Mutant("smoothing without its gradient", 27, steps.smoothing_without_gradient, "partial", SMOOTH, KERNELS),
    # gradients over ranks
    Mutant("gradient not reduced", 3, steps.gradient_not_reduced, "full", DP, DATA),
    Mutant("gradient averaged over ranks", 3, steps.gradient_averaged, "mlp", DP, DATA),
    Mutant("gradient averaged by ZeRO", 15, steps.shard_averaged, "lora", ZERO2, ZERO),
    Mutant("gradient averaged by DeepSpeed", 15, steps.deepspeed_averages, "full", DEEPSPEED, ("DeepSpeed",)),
    Mutant("only the last micro-batch is shared", 8, steps.only_the_last_micro_batch_is_shared, "mlp", DP,
           (*ACCUMULATION, *DATA)),
    Mutant("partial gradients of norms not summed", 6, steps.summands_not_summed, "partial", TP, TENSOR),
    Mutant("tied ends not summed by the pipeline", 18, steps.ends_not_summed, "full", PP, PIPELINE),
    # clipping
    Mutant("norm counts replicated parameters twice", 5, steps.replicated_counted_twice, "full", TP, TENSOR),
    Mutant("norm of a shard alone", 5, steps.norm_of_a_shard, "full", ZERO2, ZERO),
    Mutant("clipped after the update", 5, steps.clipped_too_late, "full", line="structure"),
    Mutant("ranks don't clip", 5, steps.ranks_do_not_clip, "full", DP, DATA),
    # the update
    Mutant("shard updated but not gathered", 9, steps.shard_not_gathered, "lora", ZERO1, ZERO),
    Mutant("optimizer holds stale parameters", 9, steps.stale_parameters, "full", ZERO3, ZERO),
    Mutant("weight decay on norms and biases", 0, steps.decay_on_everything, "full", line="structure: weight decay"),
    Mutant("schedule by world size", 24, steps.schedule_by_world_size, "full", DP, DATA),
    Mutant("second group stays at its peak", 16, steps.deepspeed_second_group_at_its_peak, "full", DEEPSPEED, ("DeepSpeed",)),
    # adapters and tying
    Mutant("B not zero", 10, models.b_not_zero, "lora", line="structure: start of the adapter"),
    Mutant("base of LoRA not frozen", 10, models.base_not_frozen, "lora", DP, line="structure: what learns"),
    Mutant("LoRA's scale divided by tensor ranks", 10, models.scale_divided_by_tensor_ranks, "lora", TP, TENSOR),
    Mutant("tied weights untied", 17, models.not_tied, "scratch", line="structure: tied weights"),
    # BatchNorm
    Mutant("BatchNorm's statistics of a rank", 26, models.statistics_of_a_rank, "resnet9", DP, DATA),
    Mutant("BatchNorm updates its statistics twice", 20, models.statistics_updated_twice, "resnet9", DP, DATA),
    # checkpointing
    Mutant("BatchNorm updated again by checkpointing", 20, models.buffers_change_again, "resnet9", {**DP, **CHECKPOINTED},
           CHECKPOINTING),
    Mutant("dropout replayed with another mask", 19, models.other_masks_in_the_backward, "mlp",
           {**CHECKPOINTED, "model__options": {"hidden": [32, 24, 16], "dropout": 0.1}, "training__micro_batch_size": 64},
           CHECKPOINTING, dropout=True),
    Mutant("reentrant checkpointing without gradients", 7, models.reentrant, "partial",
           {**CHECKPOINTED, **DP, "adapt": {"method": "partial", "train": ["*layers.0.mlp*", "*norm*"]}}, CHECKPOINTING),
    # less memory
    Mutant("stochastic rounding always rounds down", 11, memory.always_down, "full", PURE, ("low precision",), "stochastic"),
    Mutant("stochastic rounding to the nearest", 11, memory.to_the_nearest, "full", {**PURE, **SLOW}, ("low precision",),
           "stochastic"),
    Mutant("8-bit states with the scale of a neighbour", 11, memory.scale_of_the_neighbour, "full", EIGHT,
           ("8-bit optimizer states",), "states in 8 bits"),
    Mutant("a streamed layer reads the previous layer's weights", 21, memory.previous_layer_in_the_backward, "lora", STREAMED,
           ("streamed weights",), "gradients of step 1"),
    Mutant("two codes of NF4 exchanged", 11, memory.two_codes_exchanged, "lora", FOUR, ("4-bit base",), "weights before"),
    Mutant("float16's gradients clipped before they are unscaled", 5, memory.clipped_before_unscaled, "full", FP16,
           ("low precision",), "plain run"),
    Mutant("update in the backward with the rate of the step before", 24, memory.rate_of_the_step_before, "full", AT_ONCE,
           ("optimizer in backward",), "weights after"),
    Mutant("states on the disk are stale by a step", 21, memory.stale_by_a_step, "full", ON_DISK,
           ("offloaded optimizer states",), "weights after"),
    # kernels, compiling, precision
    Mutant("attention 1% too large", 0, models.attention_too_large, "full", DP, KERNELS),
    Mutant("softmax 2% too cold", 0, models.attention_too_cold, "lora", {}, KERNELS),
    Mutant("compiled blocks 0.1% too large", 0, models.compiled_slightly_wrong, "full", COMPILED, ("compile",)),
    Mutant("bfloat16 without masters", 11, models.no_masters, "full", {**BF16, **SLOW}, ("low precision",)),
    # packing and data
    Mutant("positions go on in a packed row", 22, models.positions_go_on, "positional", DP, ("packing",)),
    Mutant("packed documents leak", 22, models.documents_leak, "full", DP, ("packing",)),
    Mutant("labels one off", 22, models.labels_one_off, "full", line="structure: labels"),
    Mutant("ranks read the same rows", 28, models.ranks_read_the_same, "full", DP, DATA, "rows of the data"),
    Mutant("sampler depends on the ranks", 23, models.sampler_by_ranks, "mlp", DP, DATA, "rows of the data"),
    Mutant("same augmentations in every rank", 28, models.changes_by_place_in_the_micro_batch, "mlp",
           {**CHANGED, **DP, "training__micro_batch_size": 32}, DATA, "rows of the data"),
    Mutant("padded samples counted", 24, models.padded_samples_counted, "mlp", DP, DATA, "held-out loss"),
    Mutant("ranks draw the same masks", 19, steps.same_random_numbers, "lora",
           {"adapt": {"method": "lora", "rank": 4, "dropout": 0.1}, **DP}, DATA),
    # loading, saving, resuming
    Mutant("GGUF's rows as stored", 25, keeping.gguf_rows_as_stored, "gguf", line="structure: loaded weights"),
    Mutant("a tensor not loaded", 25, keeping.a_tensor_not_loaded, "full", line="structure: loaded weights"),
    Mutant("heads in another order under tensor parallel", 25, keeping.heads_in_another_order, "full", TP, TENSOR),
    Mutant("frozen parts not loaded", 13, keeping.frozen_parts_not_loaded, "partial", ZERO3, ZERO, "weights before"),
    Mutant("a tensor left out of the saved model", 12, keeping.a_tensor_left_out, "full", line="structure"),
    Mutant("only the own piece saved", 12, keeping.own_piece_saved, "full", ZERO3, ZERO, "saved model"),
    Mutant("saved before the last update", 12, keeping.saved_too_early, "full", line="structure"),
    Mutant("optimizer not restored", 23, keeping.optimizer_not_restored, "full", line="resume", resume=True),
    Mutant("average not restored", 23, keeping.average_not_restored, "mlp", AVERAGED, line="resume", resume=True),
)  # fmt: skip


def named(name: str) -> Mutant:
    """The mutant of this name."""
    return next(mutant for mutant in MUTANTS if mutant.name == name)
