"""The keys of TrainingArguments that nothing is made of, each with its reason; also those of older versions of transformers."""

from __future__ import annotations

from trainwright.importing.findings import Plain

MEMORY = "activations are computed again where the recipe says so"
RECOMPUTE = "set memory.checkpointing: full"
LOGGED = "every step is in metrics.jsonl here"
HUB = "nothing is uploaded here"
EVALUATED = "evaluation keeps sums here, not outputs"
WORKERS = "text is tokenised once and read from memory; images have data.workers"
DDP = "gradients are summed in buckets of our own"
OTHER_DEVICE = "belongs to hardware that isn't offered here"
LATER = "train-time code of one's own isn't started by a recipe"
SERVICE = "belongs to a service that isn't fed from here"
COLUMNS = "columns are found, or named by data.fields"

PLAIN: dict[str, Plain] = {
    "activation_checkpointing_kwargs": Plain("never the reentrant way; the numbers are the same"),
    "gradient_checkpointing_kwargs": Plain("never the reentrant way; the numbers are the same"),
    "average_tokens_across_devices": Plain("the loss is divided by the tokens of all processes, always", idle=(None, True)),
    "bf16_full_eval": Plain("evaluation has the precision of training here"),
    "fp16_full_eval": Plain("evaluation has the precision of training here"),
    "tf32": Plain("PyTorch's own setting is kept"),
    "torch_compile_backend": Plain("PyTorch's own compiler backend is used"),
    "torch_compile_mode": Plain("blocks are compiled in the default mode"),
    "use_liger_kernel": Plain("the loss is fused with the head here already"),
    "liger_kernel_config": Plain("the loss is fused with the head here already"),
    "use_cache": Plain("training keeps no key/value cache"),
    "neftune_noise_alpha": Plain("noise on the embeddings isn't offered here, so the training differs", "warning", (None, 0)),
    "torch_empty_cache_steps": Plain("the allocator's cache is left alone"),
    "auto_find_batch_size": Plain(
        "a step's rows never change here", "warning", fix="remove training.micro_batch_size, and what fits is taken"
    ),
    "logging_strategy": Plain(LOGGED, idle=()),
    "logging_steps": Plain(LOGGED, idle=()),
    "logging_first_step": Plain(LOGGED),
    "logging_nan_inf_filter": Plain("a loss that isn't finite ends the run here", idle=()),
    "log_on_each_node": Plain("the first process speaks; each has a log of its own", idle=()),
    "include_num_input_tokens_seen": Plain("the tokens of each step are in metrics.jsonl"),
    "log_level": Plain("the console has one level", idle=("passive",)),
    "log_level_replica": Plain("the console has one level", idle=("warning", "passive")),
    "disable_tqdm": Plain("the console looks whether it is a terminal"),
    "logging_dir": Plain("TensorBoard's files go into the run's folder, under tensorboard/", idle=()),
    "run_name": Plain("a run is named by its folder"),
    "project": Plain(SERVICE, idle=(None, "huggingface")),
    "trackio_space_id": Plain(SERVICE, idle=(None, "trackio")),
    "trackio_bucket_id": Plain(SERVICE),
    "trackio_static_space_id": Plain(SERVICE),
    "eval_delay": Plain("evaluation isn't delayed here", "warning", (None, 0)),
    "per_device_eval_batch_size": Plain(
        "evaluation takes training.micro_batch_size rows at once; its numbers don't depend on it", idle=()
    ),
    "prediction_loss_only": Plain("the metrics are those of the task"),
    "eval_do_concat_batches": Plain(EVALUATED, idle=()),
    "eval_use_gather_object": Plain(EVALUATED),
    "eval_accumulation_steps": Plain(EVALUATED),
    "include_for_metrics": Plain(EVALUATED),
    "include_inputs_for_metrics": Plain(EVALUATED),
    "batch_eval_metrics": Plain(EVALUATED),
    "save_only_model": Plain("a checkpoint can always be resumed here"),
    "save_on_each_node": Plain("one shared folder is written", "warning", fix="give all machines the same run.folder"),
    "save_safetensors": Plain("weights are always safetensors here", idle=(None, True)),
    "enable_jit_checkpoint": Plain("Ctrl-C and SIGTERM finish the step and save, always"),
    "push_to_hub": Plain(HUB, "warning", fix="upload the run's model folder with hf upload"),
    **{
        f"hub_{name}": Plain(HUB, idle=(None, False, "every_save"))
        for name in ("token", "private_repo", "model_id", "strategy", "always_push", "revision")
    },
    **{f"push_to_hub_{name}": Plain(HUB) for name in ("model_id", "organization", "token")},
    "ignore_data_skip": Plain(
        "resuming goes on at the very row, always", "warning", fix="resuming gives the same bits as never stopping"
    ),
    "restore_callback_states_from_checkpoint": Plain("there are no callbacks"),
    "full_determinism": Plain("the same seed gives the same bits here, always"),
    "dataloader_drop_last": Plain("an epoch's last rows make a step with the next epoch's first"),
    "dataloader_num_workers": Plain(WORKERS, idle=(None, 0)),
    "dataloader_pin_memory": Plain(WORKERS, idle=()),
    "dataloader_persistent_workers": Plain(WORKERS),
    "dataloader_prefetch_factor": Plain(WORKERS),
    "dataloader_multiprocessing_context": Plain(WORKERS),
    "dataloader_in_order": Plain(WORKERS, idle=(None, True)),
    "remove_unused_columns": Plain(COLUMNS, idle=()),
    "label_names": Plain(COLUMNS),
    "train_sampling_strategy": Plain(
        "rows are shuffled by the seed, and packed instead of sorted by length", "warning", (None, "random")
    ),
    "group_by_length": Plain("rows are packed instead of sorted by length", "warning", (None, False)),
    "length_column_name": Plain("rows are packed instead of sorted by length", idle=(None, "length")),
    **{
        f"ddp_{name}": Plain(DDP)
        for name in ("find_unused_parameters", "bucket_cap_mb", "broadcast_buffers", "static_graph", "backend")
    },
    "ddp_timeout": Plain("the launcher has a timeout of its own", idle=(None, 1800)),
    "debug": Plain("a loss or gradient that isn't finite is always looked for"),
    "skip_memory_metrics": Plain("peak memory is always told", idle=()),
    "do_train": Plain("trainwright train trains", idle=()),
    "do_eval": Plain("evaluation.every says when", idle=()),
    "do_predict": Plain("trainwright predict RUN predicts"),
    "resume_from_checkpoint": Plain(
        "checkpoints of transformers can't be resumed here", "warning", fix="start from their weights with model.pretrained"
    ),
    "local_rank": Plain("the launcher gives each process its rank", idle=(None, -1)),
    "parallelism_config": Plain(
        "isn't read here", "warning", fix="set parallel.tensor and parallel.zero by hand, or name it in the accelerate file"
    ),
    "overwrite_output_dir": Plain("a run's folder is never overwritten", "warning", (None, False)),
    "past_index": Plain("hidden states aren't carried on", idle=(None, -1)),
    "jit_mode_eval": Plain("evaluation runs the same model as training"),
    "use_ipex": Plain(OTHER_DEVICE),
    "use_mps_device": Plain("run.device auto finds it"),
    "use_habana": Plain(OTHER_DEVICE),
    "tpu_num_cores": Plain(OTHER_DEVICE, "warning"),
    "tpu_metrics_debug": Plain(OTHER_DEVICE),
    "xpu_backend": Plain(OTHER_DEVICE),
    "half_precision_backend": Plain("autocast is PyTorch's", idle=(None, "auto")),
    "fp16_backend": Plain("autocast is PyTorch's", idle=(None, "auto")),
    "fp16_opt_level": Plain("autocast is PyTorch's", idle=(None, "O1")),
    "mp_parameters": Plain(SERVICE),
    "sharded_ddp": Plain("removed from transformers", "warning", fix="set parallel.zero"),
    "ray_scope": Plain(SERVICE, idle=(None, "last")),
    "torchdynamo": Plain("removed from transformers", fix="set run.compile"),
    "include_tokens_per_second": Plain("tokens a second are always told"),
    "use_legacy_prediction_loop": Plain("removed from transformers"),
    "split_batches": Plain("removed from transformers; belongs to accelerator_config", "warning"),
    "dispatch_batches": Plain("each process reads its own rows", idle=(None, False)),
    "fsdp_min_num_params": Plain("each block of the model is sharded by itself", idle=(None, 0)),
    "fsdp_transformer_layer_cls_to_wrap": Plain("each block of the model is sharded by itself"),
    "sortish_sampler": Plain("rows are packed instead of sorted by length"),
    "predict_with_generate": Plain("models that translate (encoder and decoder) aren't offered here", "warning"),
    "generation_max_length": Plain("trainwright generate has its own options"),
    "generation_num_beams": Plain("trainwright generate has its own options"),
    "generation_config": Plain("trainwright generate has its own options"),
    "_n_gpu": Plain("processes are counted by the launcher", idle=()),
    "n_gpu": Plain("processes are counted by the launcher", idle=()),
}
# Inside accelerator_config.
ACCELERATOR: dict[str, Plain] = {
    "dispatch_batches": Plain("each process reads its own rows"),
    "even_batches": Plain("every row counts once; uneven ends are divided by their true count", idle=(None, True)),
    "use_seedable_sampler": Plain("the order is a function of the seed, always", idle=(None, True)),
    "non_blocking": Plain("copies to the device overlap where that is safe"),
    "use_configured_state": Plain(LATER),
}
# Inside fsdp_config, with or without the prefix fsdp_, in either tool.
FSDP: dict[str, Plain] = {
    "auto_wrap_policy": Plain("each block of the model is sharded by itself", idle=(None, "TRANSFORMER_BASED_WRAP")),
    "transformer_layer_cls_to_wrap": Plain("each block of the model is sharded by itself"),
    "min_num_params": Plain("each block of the model is sharded by itself", idle=(None, 0)),
    "backward_prefetch": Plain("the next block is fetched while one computes"),
    "forward_prefetch": Plain("the next block is fetched while one computes"),
    "limit_all_gathers": Plain("at most two blocks are whole at a time", idle=(None, True)),
    "state_dict_type": Plain("checkpoints are sharded, and the final model is always whole", idle=()),
    "use_orig_params": Plain("parameters keep their names and shapes, always", idle=(None, True)),
    "cpu_ram_efficient_loading": Plain("no process ever holds the whole model at zero 3", idle=()),
    "sync_module_states": Plain("weights are loaded straight into their shards", idle=()),
    "activation_checkpointing": Plain(MEMORY, "warning", fix=RECOMPUTE),
    "activation_checkpointing_offload": Plain(MEMORY, "warning", fix="set memory.checkpointing: offload"),
    "xla": Plain(OTHER_DEVICE, "warning"),
    "xla_fsdp_settings": Plain(OTHER_DEVICE),
    "xla_fsdp_grad_ckpt": Plain(OTHER_DEVICE),
    "xla_fsdp_v2": Plain(OTHER_DEVICE),
}
