"""The peers of the benchmark of many processes: every weight of SmolLM2-135M by Hugging Face accelerate, one process of a job.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.peer_parallel --variant fsdp2 \
        --steps 8 --warmup 3 --work FOLDER

fsdp2            FSDP2 a decoder layer at a time, compiled; bfloat16 with float32 masters, as ours
fsdp2_pure_bf16  the same with weights, gradients and AdamW's states in bfloat16: other training in half the memory
fsdp2_sdpa       fsdp2 with PyTorch's attention rather than the plain one
fsdp2_eager      fsdp2 uncompiled
deepspeed        DeepSpeed stage 3, bfloat16 with float32 masters (made from weights already rounded to bfloat16), compiled
deepspeed_eager  the same uncompiled

Where the processor has no instructions for bfloat16, all is float32.

The loop is the one of accelerate's tutorials. Rank 0 puts one JSON document on stdout, a list of what each rank found; all
else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, TorchDynamoPlugin
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from benchmarks.machine import FAST, peak_resident_bytes, resident_bytes

ROWS = 2  # of a process
LENGTH = 512
MIXED = "bf16" if torch.bfloat16 == FAST else "no"
BUCKET = 25_000_000  # numbers that DeepSpeed reduces at once; by default it would make room for 500 million


@dataclass(frozen=True)
class Settings:
    """What a variant chooses; all else is equal."""

    engine: str
    compile: bool = True
    attention: str = "eager"  # compiled, it is faster for rows of one length than SDPA, see ``peer_finetune``
    masters: bool = True


FSDP2, DEEPSPEED = Settings("fsdp2"), Settings("deepspeed")
SETTINGS = {
    "fsdp2": FSDP2,
    "fsdp2_pure_bf16": replace(FSDP2, masters=False),
    "fsdp2_sdpa": replace(FSDP2, attention="sdpa"),
    "fsdp2_eager": replace(FSDP2, compile=False, attention="sdpa"),
    "deepspeed": DEEPSPEED,
    "deepspeed_eager": replace(DEEPSPEED, compile=False, attention="sdpa"),
}


def make_accelerator(settings: Settings) -> Accelerator:
    """accelerate, set up for this machine's processors."""
    dynamo = TorchDynamoPlugin(backend="inductor", use_regional_compilation=True) if settings.compile else None
    return (on_deepspeed if settings.engine == "deepspeed" else on_fsdp2)(settings, dynamo)


def on_fsdp2(settings: Settings, dynamo: TorchDynamoPlugin | None) -> Accelerator:
    """NOTE: accelerate 1.15 leaves its FSDP plugin aside on the CPU; told otherwise, all that follows works as on GPUs."""
    precision = MIXED if settings.masters else "no"
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, mixed_precision=precision, fsdp_plugin=plugin, dynamo_plugin=dynamo)
    if precision != "no":
        plugin.set_mixed_precision(precision)
    AcceleratorState().fsdp_plugin = plugin
    for state in (AcceleratorState(), PartialState()):
        state.distributed_type = DistributedType.FSDP
    assert accelerator.is_fsdp2
    return accelerator


def on_deepspeed(settings: Settings, dynamo: TorchDynamoPlugin | None) -> Accelerator:
    """NOTE: not with ``cpu=True``, with which accelerate leaves DeepSpeed aside."""
    zero = {
        "stage": 3,
        "reduce_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    }
    config = {
        "zero_optimization": zero,
        "bf16": {"enabled": MIXED == "bf16"},
        "gradient_clipping": 1.0,
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": ROWS,
        "zero_force_ds_cpu_optimizer": False,  # so that torch's fused AdamW updates
    }
    return Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        mixed_precision=MIXED,
        dynamo_plugin=dynamo,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )


def train(settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    """Rates after the warm-up, of all processes together, and the mean loss of each step."""
    accelerator = make_accelerator(settings)
    kind = torch.float32 if settings.masters else FAST
    model = LlamaForCausalLM.from_pretrained(options.work / "base", dtype=kind, attn_implementation=settings.attention)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert all(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()), "nothing was divided"
    model.train()
    step, seconds, losses = one_step(accelerator, model, optimizer), [], []
    for batch in batches(options):
        start = time.perf_counter()
        losses.append(step(batch))
        seconds.append(time.perf_counter() - start)
    median = float(np.median(seconds[options.warmup :]))
    means = torch.tensor(losses)
    dist.all_reduce(means)
    return {
        "per_second": ROWS * LENGTH * dist.get_world_size() / median,
        "median_step_seconds": median,
        "seconds_per_step": seconds,
        "losses": (means / dist.get_world_size()).tolist(),
        "threads": torch.get_num_threads(),
    }


def one_step(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> Callable[[torch.Tensor], float]:
    """Forward, backward, clipping, update; the loss of this process's rows."""

    def step(rows: torch.Tensor) -> float:
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def batches(options: argparse.Namespace) -> list[torch.Tensor]:
    """This process's rows of each step, in the order of the file."""
    with np.load(options.work / "dense.npz") as file:
        rows = torch.from_numpy(file["tokens"])
    count = dist.get_world_size()
    steps = rows[: options.steps * count * ROWS].view(options.steps, count, ROWS, LENGTH)
    return list(steps[:, dist.get_rank()])


def everyone(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank found; only numbers of our own are pickled here."""
    gathered: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    return gathered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=list(SETTINGS), required=True)
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps, warm-up included")
    parser.add_argument("--warmup", type=int, required=True, help="first steps that don't count")
    parser.add_argument("--work", type=Path, required=True, help="folder that holds the model and the data")
    options = parser.parse_args()
    # The libraries and the compiler's children print where they like: only the answer goes to stdout.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = SETTINGS[options.variant]
    if settings.engine == "deepspeed":
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401 (memory counts from after the imports)
    before = resident_bytes()
    found = train(settings, options)
    found["memory_growth_bytes"] = peak_resident_bytes() - before
    results = everyone(found)
    if dist.get_rank() == 0:
        print(json.dumps(results), file=answer, flush=True)
    dist.barrier()
    dist.destroy_process_group()  # DeepSpeed's stage 3 aborts at exit otherwise


if __name__ == "__main__":
    main()
