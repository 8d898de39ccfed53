"""The keys of a DeepSpeed configuration that nothing is made of, each with its reason."""

from __future__ import annotations

from typing import Any

from trainwright.importing.findings import Plain

TUNING = "how DeepSpeed cuts its communication: the numbers don't change, and its own default is used"
PRINTS = "belongs to DeepSpeed's own printing"
OFFLOAD = "details of DeepSpeed's offloading; its own defaults are used"
REMOVED = "removed from DeepSpeed, which refuses a file with it"
NO_COUNT: tuple[Any, ...] = (None, False, {}, 0)
ANY: tuple[Any, ...] = (None,)

TOP: dict[str, Plain] = {
    "steps_per_print": Plain(PRINTS, idle=ANY),
    "wall_clock_breakdown": Plain("trainwright tells times by itself"),
    "memory_breakdown": Plain("peak memory is always told"),
    "dump_state": Plain(PRINTS),
    "log_level": Plain(PRINTS),
    "disable_python_gc": Plain(TUNING),
    "vocabulary_size": Plain("the model knows its vocabulary"),
    "zero_allow_untested_optimizer": Plain("the optimizers offered here are tested with every stage", idle=()),
    "zero_force_ds_cpu_optimizer": Plain("with offloading the optimizer is DeepSpeed's CPU Adam", idle=()),
    "communication_data_type": Plain("gradients travel in the dtype that they have", "warning"),
    "seq_parallel_communication_data_type": Plain("there is no sequence parallelism"),
    "prescale_gradients": Plain("gradients are summed, each divided by the count of the step"),
    "gradient_predivide_factor": Plain("gradients are summed, each divided by the count of the step", idle=(None, 1)),
    "gradient_allreduce_op": Plain(
        "the loss is the mean of the step here, so the rate means something else", "warning", (None, "mean", "MEAN")
    ),
    "managed_gradient_accumulation": Plain("our loop accumulates", idle=(None, True)),
    "disable_allgather": Plain(TUNING),
    "dataloader_drop_last": Plain("an epoch's last rows make a step with the next epoch's first"),
    "activation_checkpointing": Plain(
        "settings of DeepSpeed's own checkpointing functions, which a model has to call; activations aren't recomputed here"
    ),
    "flops_profiler": Plain("trainwright tells the rate of each step", idle=NO_COUNT),
    "autotuning": Plain("nothing is tuned by trial", "warning", NO_COUNT),
    "comms_logger": Plain("bytes sent aren't logged by step", idle=NO_COUNT),
    "wandb": Plain("numbers go to metrics.jsonl and TensorBoard only", idle=NO_COUNT),
    "comet": Plain("numbers go to metrics.jsonl and TensorBoard only", idle=NO_COUNT),
    "csv_monitor": Plain("every number is in metrics.jsonl", idle=NO_COUNT),
    "data_efficiency": Plain("curricula and dropped tokens aren't offered here, so the training differs", "warning", NO_COUNT),
    "hybrid_engine": Plain("generation inside of training isn't offered here", "warning", NO_COUNT),
    "aio": Plain("nothing goes to NVMe", idle=NO_COUNT),
    "checkpoint": Plain("checkpoints are our own, and resume under any number of processes", idle=NO_COUNT),
    "data_types": Plain("gradients and masters are float32", "warning", NO_COUNT),
    "compile": Plain("blocks are compiled by run.compile", idle=NO_COUNT),
    "timers": Plain("trainwright tells times by itself", idle=NO_COUNT),
    "datastates": Plain("checkpoints are our own", idle=NO_COUNT),
    "weight_quantization": Plain("belongs to inference", "warning", NO_COUNT),
    "expert_parallel": Plain("mixtures of experts aren't offered here", "warning", NO_COUNT),
    "use_data_before_expert_parallelism": Plain("mixtures of experts aren't offered here"),
    "pipeline": Plain("belongs to DeepSpeed's PipelineModule", "warning", NO_COUNT, "set parallel.pipeline, engine: torch"),
    "inference": Plain("belongs to inference", idle=NO_COUNT),
    "msamp": Plain("fp8 isn't offered here", "warning", NO_COUNT),
    "fp8": Plain("fp8 isn't offered here", "warning", NO_COUNT),
    "communication_options": Plain(TUNING, idle=NO_COUNT),
    "sequence_parallel_size": Plain("sequences aren't divided among processes here", "warning", (None, 1)),
    "tensor_parallel": Plain(
        "the engine deepspeed shares data only", "warning", NO_COUNT, "set parallel.tensor, engine: torch"
    ),
    "elasticity": Plain(REMOVED, "warning", (None,), "any number of processes that divides the batch can resume here"),
    **{
        name: Plain(REMOVED, "warning", (None,))
        for name in (
            "nebula", "compression_training", "quantize_training", "sparse_gradients", "eigenvalue", "sparse_attention",
            "graph_harvesting", "curriculum_learning", "progressive_layer_drop",
        )
    },
}  # fmt: skip
ZERO: dict[str, Plain] = {
    **{
        name: Plain(TUNING, idle=ANY)
        for name in (
            "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
            "allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "sub_group_size",
            "stage3_prefetch_bucket_size", "prefetch_bucket_size", "stage3_param_persistence_threshold",
            "param_persistence_threshold", "stage3_model_persistence_threshold", "model_persistence_threshold",
            "stage3_max_live_parameters", "max_live_parameters", "stage3_max_reuse_distance", "max_reuse_distance",
            "stage3_module_granularity_threshold", "module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params",
            "use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "allgather_sequential",
            "ignore_unused_parameters", "round_robin_gradients", "parameter_alignment", "memory_efficient_linear",
            "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks", "leaf_module",
            "pipeline_loading_checkpoint", "legacy_stage1", "cpu_offload_use_pin_memory",
        )
    },
    "load_from_fp32_weights": Plain("masters are made from the weights in the file, in their precision", idle=(None, True)),
    "elastic_checkpoint": Plain("checkpoints resume under any number of processes here"),
    "zenflow": Plain("stale updates aren't offered here, so the training differs", "warning", NO_COUNT),
    "zero_hpz_partition_size": Plain("the model is sharded over all processes", idle=(None, 1)),
    "zero_quantized_weights": Plain("nothing is quantized to be sent: more is sent, and the numbers are better", "warning"),
    "zero_quantized_nontrainable_weights": Plain("frozen weights are stored in bf16", "warning"),
    "zero_quantized_gradients": Plain(
        "nothing is quantized to be sent: more is sent, and the numbers are better", "warning"
    ),
    "save_muon_momentum_buffer_in_memory": Plain("Muon isn't offered with DeepSpeed here"),
    **{
        name: Plain(REMOVED, "warning", (None,))
        for name in ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param")
    },
}  # fmt: skip
OFFLOAD_DETAILS: dict[str, Plain] = {
    name: Plain(OFFLOAD, idle=ANY)
    for name in (
        "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory", "pipeline_read", "pipeline_write", "pipeline",
        "fast_init", "ratio", "super_offload", "cpuadam_cores_perc",
    )
}  # fmt: skip
SCALING = "belongs to the scaling of losses in fp16, which bf16 doesn't need"
FP16: dict[str, Plain] = {
    **{
        name: Plain(SCALING, idle=ANY)
        for name in (
            "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis",
            "min_loss_scale",
        )
    },
    "fp16_master_weights_and_grads": Plain("masters and their gradients are float32 here", "warning"),
}  # fmt: skip
BF16: dict[str, Plain] = {
    "immediate_grad_update": Plain(TUNING, idle=ANY),
    "check_grad_overflow": Plain("a gradient that isn't finite ends the run here", idle=ANY),
    "check_overflow": Plain("a gradient that isn't finite ends the run here", idle=ANY),
    "bf16_master_weights_and_grads": Plain("masters and their gradients are float32 here", "warning"),
    "bf16_optimizer_states": Plain("optimizer states are float32 here", "warning"),
}
AMP: dict[str, Plain] = {
    name: Plain("Apex was removed from DeepSpeed", idle=ANY)
    for name in ("opt_level", "keep_batchnorm_fp32", "loss_scale", "master_weights", "cast_model_type")
}
AUTOCAST: dict[str, Plain] = {"lower_precision_safe_modules": Plain("PyTorch's autocast chooses the operations", idle=ANY)}
