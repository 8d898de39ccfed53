"""The keys of an accelerate configuration that nothing is made of, each with its reason."""

from __future__ import annotations

from trainwright.importing.findings import Plain

TPU = "belongs to TPUs"
SAGEMAKER = "belongs to Amazon SageMaker"
RENDEZVOUS = "trainwright launch-script and torchrun are told where the processes meet"
DYNAMO = "blocks are compiled by run.compile, in its default mode"
FP8 = "fp8 isn't offered here"
MEGATRON = "belongs to Megatron-LM's own code"

TOP: dict[str, Plain] = {
    "debug": Plain("collectives check their shapes by themselves"),
    "enable_cpu_affinity": Plain("the operating system places the processes"),
    "main_training_function": Plain("no script of one's own is started", idle=(None, "main")),
    "main_process_ip": Plain(RENDEZVOUS),
    "main_process_port": Plain(RENDEZVOUS),
    "rdzv_backend": Plain(RENDEZVOUS, idle=(None, "static")),
    "rdzv_conf": Plain(RENDEZVOUS),
    "same_network": Plain(RENDEZVOUS, idle=()),
    "max_restarts": Plain("trainwright train --max-restarts", idle=(None, 0)),
    "monitor_interval": Plain(RENDEZVOUS, idle=()),
    "num_cpu_threads_per_process": Plain("threads are divided among the processes", fix="or set run.threads", idle=(None, 0)),
    "deepspeed_hostfile": Plain(RENDEZVOUS),
    "downcast_bf16": Plain(TPU),
    **{
        name: Plain(TPU)
        for name in ("tpu_env", "tpu_use_cluster", "tpu_use_sudo", "tpu_name", "tpu_zone", "tpu_vm", "command_file", "commands")
    },
    **{
        name: Plain(SAGEMAKER)
        for name in (
            "ec2_instance_type", "iam_role_name", "image_uri", "profile", "region", "base_job_name", "pytorch_version",
            "transformers_version", "py_version", "sagemaker_inputs_file", "sagemaker_metrics_file", "additional_args",
        )
    },
    "fp8_config": Plain(FP8, "warning", (None, {})),
    "mpirun_config": Plain(RENDEZVOUS, idle=(None, {})),
    "ipex_config": Plain("belongs to hardware that isn't offered here", idle=(None, {})),
}  # fmt: skip
DEEPSPEED: dict[str, Plain] = {
    "deepspeed_hostfile": Plain(RENDEZVOUS),
    "deepspeed_multinode_launcher": Plain(RENDEZVOUS, idle=(None, "standard", "pdsh")),
    "deepspeed_exclusion_filter": Plain(RENDEZVOUS),
    "deepspeed_inclusion_filter": Plain(RENDEZVOUS),
    "deepspeed_moe_layer_cls_names": Plain("mixtures of experts aren't offered here", "warning"),
    "offload_optimizer_nvme_path": Plain("nothing goes to NVMe", idle=(None, "none")),
    "offload_param_nvme_path": Plain("nothing goes to NVMe", idle=(None, "none")),
}
DYNAMO_CONFIG: dict[str, Plain] = {
    f"dynamo_{name}": Plain(DYNAMO, idle=(None, False, "default"))
    for name in ("mode", "use_fullgraph", "use_dynamic", "use_regional_compilation")
}
PARALLELISM: dict[str, Plain] = {
    f"{prefix}{name}": plain
    for prefix in ("parallelism_config_", "")
    for name, plain in {
        "dp_replicate_size": Plain("the model is sharded over all processes that share data", idle=(None, 1)),
        "cp_size": Plain("sequences aren't divided among processes here", "warning", (None, 1)),
        "cp_backend": Plain("sequences aren't divided among processes here", idle=()),
        "cp_comm_strategy": Plain("sequences aren't divided among processes here", idle=()),
        "sp_size": Plain("sequences aren't divided among processes here", "warning", (None, 1)),
        "sp_backend": Plain("sequences aren't divided among processes here", idle=()),
        "sp_seq_length": Plain("sequences aren't divided among processes here"),
        "sp_seq_length_is_variable": Plain("sequences aren't divided among processes here"),
        "sp_attn_implementation": Plain("sequences aren't divided among processes here"),
    }.items()
}
MEGATRON_LM: dict[str, Plain] = {
    f"megatron_lm_{name}": plain
    for name, plain in {
        "sequence_parallelism": Plain("norms are computed on parts of the sequence where tensor > 1"),
        "num_micro_batches": Plain("micro-batches follow from training.batch_size and micro_batch_size", idle=(None, 1)),
        "recompute_activations": Plain("activations aren't recomputed here: the same numbers, another memory", "warning"),
        "expert_model_parallel_size": Plain("mixtures of experts aren't offered here", "warning", (None, 1)),
        "expert_tensor_parallel_size": Plain("mixtures of experts aren't offered here", "warning", (None, 1)),
        "context_parallel_size": Plain("sequences aren't divided among processes here", "warning", (None, 1)),
        "calculate_per_token_loss": Plain("the loss is a mean over all tokens of the step, always"),
        "optimizer_cpu_offload": Plain("isn't offered with tensor or pipeline", "warning"),
        "decoder_last_pipeline_num_layers": Plain("layers are divided by their cost"),
        **{
            name: Plain(MEGATRON)
            for name in (
                "use_custom_fsdp", "no_load_optim", "no_save_optim", "eod_mask_loss", "overlap_cpu_optimizer_d2h_h2d",
                "use_precision_aware_optimizer", "recompute_granularity", "recompute_method", "recompute_num_layers",
                "attention_backend", "attention_dropout", "hidden_dropout", "attention_softmax_in_fp32",
                "use_rotary_position_embeddings",
            )
        },
    }.items()
}  # fmt: skip
