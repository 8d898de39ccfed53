"""Our side of the benchmark of many processes: one process of a job that runs one case; see ``parallel``.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.own_parallel --case states --work FOLDER

states    what a process holds of a small decoder at each ZeRO stage, in bytes
traffic   what a process sends in a step, in bytes
decoder   LoRA on SmolLM2-135M, rows of 512 tokens
resnet50  random 224x224 images
zero3     every weight of SmolLM2-135M, as ``peer_parallel`` does it

Rank 0 puts one JSON document on stdout, a list of what each rank found; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import trainwright.supervised  # noqa: F401 (build imports it late, and memory counts from after the imports)
from benchmarks.machine import peak_resident_bytes, resident_bytes
from benchmarks.own_finetune import LENGTH, documents
from tests.parallel.traffic import Live, Traffic
from trainwright import build, launch, loop
from trainwright.data import loader
from trainwright.data.packing import Documents
from trainwright.data.sampler import Share
from trainwright.data.text import TextSplits
from trainwright.parallel import collectives
from trainwright.pieces import local
from trainwright.recipe import Recipe
from trainwright.recipe.file import parse

CPU = torch.device("cpu")
ROWS = 4  # of a global batch of SmolLM2; a process takes two at once
IMAGES = 16  # of a global batch of images
IMAGE_FILE, TOKENIZER = "parallel-images.npz", "parallel-tokenizer"
SMALL = {
    "vocab_size": 512, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
SHORT = 8  # tokens of a row: activations would hide a gathered block
LONG = 64  # enough that what tensor ranks tell each other of activations isn't hidden by anything else
TCP_INFO_SENT, TCP_INFO_AGAIN = slice(200, 208), slice(208, 216)  # tcpi_bytes_sent, tcpi_bytes_retrans of linux/tcp.h


def small(length: int, micro: int, work: Path, parallel: dict[str, Any]) -> loop.Run:
    """A decoder of 6.7 million numbers, not compiled, with AdamW in float32; ``micro`` micro-batches of a row in each process."""
    copies = 1 if parallel.get("tensor", 1) > 1 else ranks()
    recipe = parse(
        {
            "model": {"options": SMALL, "tokenizer": str(work / TOKENIZER)},
            "data": {"source": "random tokens", "sequence_length": length, "held_out": None},
            "optimizer": {"name": "adamw", "learning_rate": 1e-3},
            "precision": "fp32",
            "parallel": parallel,
            "training": {"steps": 3, "batch_size": micro * copies, "micro_batch_size": 1, "clip_norm": 1.0},
            "run": {"compile": "off", "device": "cpu"},
        }
    )
    tokens = np.random.default_rng(0).integers(3, SMALL["vocab_size"], (4 * micro * copies, length))
    return build.assemble(recipe, splits=TextSplits(documents({"tokens": tokens, "lengths": [length] * len(tokens)}), None, True))


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def states(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is held at each stage; one process divides nothing, and a recipe that says it should is refused."""
    return [held(stage, options.work) for stage in ([0] if ranks() == 1 else [0, 1, 2, 3])]


def held(stage: int, work: Path) -> dict[str, Any]:
    """Bytes of all tensors that live because of a run, at three moments of its second and third step.

    within      between two micro-batches, so that gradients wait for more: what the theory of the stages speaks of
    at_update   when all gradients are there and the optimizer's step begins
    peak        at most, with activations
    """
    empty = Live().bytes
    run = small(SHORT, 2, work, {"zero": stage})
    found: dict[str, Any] = {"stage": stage, "ranks": ranks(), **sizes(run)}
    steps = loop.train(run)
    next(steps)
    watch(run, "within", found, empty)
    next(steps)
    found["between_steps"] = Live().bytes - empty
    run.model.register_forward_hook(lambda *_: found.update(after_forward=Live().bytes - empty))
    with Live() as live:
        next(steps)
    return found | {"peak": live.peak - empty}


def sizes(run: loop.Run) -> dict[str, int]:
    """Bytes of the whole model, of the largest of its blocks, and of what is in none."""
    blocks = [sum(4 * p.numel() for p in block.parameters()) for block in run.model.blocks()]  # type: ignore[operator]
    whole = sum(4 * p.numel() for p in run.model.parameters())  # of a DTensor the whole one's
    return {"model": whole, "block": max(blocks), "rest": whole - sum(blocks)}


def watch(run: loop.Run, name: str, found: dict[str, Any], empty: int) -> None:
    """Note what lives when the second micro-batch of the next step begins, and when the gradients are complete."""
    calls = 0
    clip = run.clip

    def begin(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            parameters = stored(local(p) for p in run.model.parameters())
            optimizer = stored(v for state in run.optimizer.state.values() for v in state.values())  # type: ignore[attr-defined]
            total = Live().bytes - empty
            found.update(within=total, parameters=parameters, optimizer=optimizer, gradients=total - parameters - optimizer)
            handle.remove()

    def clipped() -> Tensor:
        found["at_update"] = Live().bytes - empty
        run.clip = clip
        return clip()

    handle = run.model.register_forward_pre_hook(begin, prepend=True)  # before stage 3 gathers anything
    run.clip = clipped


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of their storages, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def traffic(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is sent in a step of one micro-batch by each technique."""
    techniques: dict[str, dict[str, Any]] = {"DP": {}, **{f"ZeRO {stage}": {"zero": stage} for stage in (1, 2, 3)}}
    techniques["TP"] = {"tensor": ranks()}
    return [sent(name, parallel, options.work) for name, parallel in techniques.items()]


def sent(technique: str, parallel: dict[str, Any], work: Path) -> dict[str, Any]:
    """Bytes that this process sends in a second step: by collective, and what its connections carried."""
    run = small(LONG, 1, work, parallel)
    whole = {"model": sum(4 * p.numel() for p in run.model.parameters())} if "tensor" not in parallel else {}
    steps = loop.train(run)
    next(steps)
    dist.barrier()
    before = wire_bytes()
    with Traffic() as counted:
        next(steps)
    dist.barrier()  # its few bytes are not worth a correction
    return {
        "technique": technique, "ranks": ranks(), "measured": counted.total, "by_collective": dict(counted.bytes),
        "wire": wire_bytes() - before, **whole, "tokens": LONG,
    }  # fmt: skip


def wire_bytes() -> int:
    """Bytes that this process's TCP connections have sent so far, as the kernel counts them, none twice."""
    total = 0
    for entry in os.scandir("/proc/self/fd"):
        try:
            if not os.readlink(entry.path).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_AGAIN.stop)
                    total += int.from_bytes(info[TCP_INFO_SENT], "little") - int.from_bytes(info[TCP_INFO_AGAIN], "little")
        except OSError:  # gone meanwhile, as scandir's own
            continue
    return total


def decoder(options: argparse.Namespace) -> dict[str, Any]:
    """LoRA r=16 on all linear layers."""
    return smollm({"method": "lora", "rank": 16, "alpha": 32}, "auto", {}, options)


def zero3(options: argparse.Namespace) -> dict[str, Any]:
    """All weights, float32 masters."""
    return smollm({"method": "full"}, "bf16", {"zero": 3}, options)


def smollm(adapt: dict[str, Any], precision: str, parallel: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    recipe = parse(
        {
            "model": {"pretrained": str(options.work / "base")},
            "adapt": adapt,
            "data": {"source": "the benchmark's own", "sequence_length": LENGTH, "held_out": None},
            "optimizer": {"name": "adamw", "learning_rate": 1e-4, "weight_decay": 0.0},
            "schedule": {"name": "constant", "warmup": 0},
            "precision": precision,
            "parallel": parallel,
            "training": {"steps": options.steps, "batch_size": ROWS, "micro_batch_size": 2, "clip_norm": 1.0},
        }
    )
    with np.load(options.work / "dense.npz") as file:
        content = documents({"tokens": file["tokens"][: ROWS * options.steps]})
    run = build.assemble(recipe, splits=TextSplits(content, None, cached=True))
    run.batch = in_order(content)
    return timed(run, options.warmup)


def in_order(content: Documents) -> Callable[[int], list[loader.TextBatch]]:
    """Take rows in the order of the file, as the peers do."""
    share = Share(dist.get_rank(), ranks()) if dist.is_initialized() else Share()

    def batch(step: int) -> list[loader.TextBatch]:
        ids = [np.array([i]) for i in range(step * ROWS, (step + 1) * ROWS)]
        return list(loader.in_order(content, ids, 2, length=LENGTH, pad_id=0, share=share))

    return batch


def resnet50(options: argparse.Namespace) -> dict[str, Any]:
    """SGD with momentum; layout, precision and statistics over both processes are chosen by themselves."""
    recipe: Recipe = parse(
        {
            "model": {"architecture": "resnet50"},
            "data": {"kind": "images", "source": str(options.work / IMAGE_FILE), "held_out": None},
            "optimizer": {"name": "sgd", "learning_rate": 1e-3, "weight_decay": 0.0},
            "schedule": {"name": "constant", "warmup": 0},
            "training": {"steps": options.steps, "batch_size": IMAGES, "clip_norm": None},
        }
    )
    return timed(build.assemble(recipe), options.warmup)


def timed(run: loop.Run, warmup: int) -> dict[str, Any]:
    """The rate (units of all processes a second, by the median step) after the warm-up, and evidence of what was done."""
    results = list(loop.train(run))
    seconds = float(np.median([result.seconds for result in results[warmup:]]))
    return {
        "per_second": results[-1].size / seconds,
        "median_step_seconds": seconds,
        "losses": [result.loss for result in results],
        "threads": torch.get_num_threads(),
        "changes": {change.technique: change.summary for change in run.changes},
    }


CASES = {"states": states, "traffic": traffic, "decoder": decoder, "resnet50": resnet50, "zero3": zero3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), required=True)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps, warm-up included")
    parser.add_argument("--warmup", type=int, default=1, help="first steps that don't count")
    parser.add_argument("--work", type=Path, required=True, help="folder that holds the data")
    options = parser.parse_args()
    # Compilers and libraries print where they like: only the answer goes to stdout.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    before = resident_bytes()
    with launch.processes(CPU):
        found: dict[str, Any] = {"found": CASES[options.case](options)}
        found["memory_growth_bytes"] = peak_resident_bytes() - before
        everyone = collectives.gather_json(found, CPU)
    if launch.rank() == 0:
        print(json.dumps(everyone), file=answer, flush=True)


if __name__ == "__main__":
    main()
