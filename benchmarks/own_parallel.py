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
from trainwright.losses.tokens import STRIDE
from trainwright.parallel import collectives
from trainwright.pieces import local
from trainwright.recipe import Recipe
from trainwright.recipe.file import parse

Theory = Callable[[loop.Run, int], dict[str, float]]  # of a run and its rows' length, bytes by what they are for

CPU = torch.device("cpu")
ROWS = 4  # of a global batch of SmolLM2; a process takes two at once
IMAGES = 64  # of a global batch of images: 32 for each of two processes, as ResNets are usually trained
IMAGE_FILE, TOKENIZER = "parallel-images.npz", "parallel-tokenizer"
SMALL = {
    "vocab_size": 512, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
SHORT = 8  # tokens of a row: activations would hide a gathered block
LONG = 64  # enough that what tensor ranks tell each other of activations isn't hidden by anything else
TCP_INFO_SENT, TCP_INFO_AGAIN = slice(200, 208), slice(208, 216)  # tcpi_bytes_sent, tcpi_bytes_retrans of linux/tcp.h


def small(length: int, micro: int, work: Path, parallel: dict[str, Any]) -> loop.Run:
    """A decoder of 6.7 million numbers, not compiled, with AdamW in float32; each process has ``micro`` rows, one at a time."""
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
    return build.assemble(
        recipe, splits=TextSplits(documents({"tokens": tokens, "lengths": np.full(len(tokens), length)}), None, True)
    )


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def states(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is held at each stage; one process divides nothing, and a recipe that says it should is refused."""
    return [held(stage, options.work) for stage in ([0] if ranks() == 1 else [0, 1, 2, 3])]


def held(stage: int, work: Path) -> dict[str, Any]:
    """Bytes of all tensors that live because of a run: ``measured`` and in theory, and some more.

    measured    between two micro-batches of a step, so that gradients wait for more: what the theory of the stages speaks of
    at_update   when all gradients are there and the optimizer's step begins
    peak        at most, with activations
    """
    empty = Live().bytes
    run = small(SHORT, 2, work, {"zero": stage})
    found: dict[str, Any] = {}
    steps = loop.train(run)
    next(steps)
    watch(run, found, empty)
    next(steps)
    found["between_steps"] = Live().bytes - empty
    run.model.register_forward_hook(lambda *_: found.update(after_forward=Live().bytes - empty))
    with Live() as live:
        next(steps)
    found["peak"] = live.peak - empty
    whole = sizes(run)
    kept = {"measured": found["measured"], "at_update_bytes": found["at_update"], "peak_bytes": found["peak"]}
    row = {"stage": stage, "ranks": ranks(), "theory": states_in_theory(stage, whole["model"]), **kept}
    return row | (transient(found, whole) if stage == 3 else {})


def states_in_theory(stage: int, model: int) -> dict[str, float]:
    """Of P bytes of parameters: P of gradients, 2 P of AdamW's states, divided as Rajbhandari et al. (2020) say."""
    divided = ("optimizer", "gradients", "parameters")[:stage]
    bytes_ = {"parameters": model, "gradients": model, "optimizer": 2 * model}
    return {name: size / (ranks() if name in divided else 1) for name, size in bytes_.items()}


def transient(found: dict[str, Any], whole: dict[str, int]) -> dict[str, float]:
    """What stage 3 has at most beyond its parts: activations; what is in no block, gathered, with its gradient; and blocks.

    A gathered block is its weights; in the backward its whole gradient counts as another one.
    """
    part = whole["model"] / ranks()  # of the gradients
    activations = found["after_forward"] - found["between_steps"] - part - whole["rest"]
    beyond = found["peak"] - found["between_steps"] - part
    blocks = (beyond - activations - 2 * whole["rest"]) / whole["block"]
    sizes_ = {"activation_bytes": activations, "rest_bytes": whole["rest"], "block_bytes": whole["block"]}
    return {"gathered_blocks": blocks, "transient_bytes": beyond, **sizes_}


def sizes(run: loop.Run) -> dict[str, int]:
    """Bytes of the whole model, of the largest of its blocks, and of what is in none."""
    blocks = [sum(4 * p.numel() for p in block.parameters()) for block in run.model.blocks()]  # type: ignore[operator]
    whole = sum(4 * p.numel() for p in run.model.parameters())  # of a DTensor the whole one's
    return {"model": whole, "block": max(blocks), "rest": whole - sum(blocks)}


def watch(run: loop.Run, found: dict[str, Any], empty: int) -> None:
    """Note what lives when the second micro-batch of the next step begins, and when the gradients are complete."""
    calls = 0
    clip = run.clip

    def begin(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            parameters = stored(local(p) for p in run.model.parameters())
            optimizer = stored(v for state in run.optimizer.state.values() for v in state.values())  # type: ignore[attr-defined]
            others = Live().bytes - empty - parameters - optimizer  # gradients, and whatever else there is
            found["measured"] = {"parameters": parameters, "gradients": others, "optimizer": optimizer}
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
    copied: dict[str, dict[str, Any]] = {"DP": {}, **{f"ZeRO {stage}": {"zero": stage} for stage in (1, 2, 3)}}
    found = [sent(name, LONG, parallel, copies_in_theory, options.work) for name, parallel in copied.items()]
    # A length that can't be divided goes through all-reduces, others through their two halves.
    for name, length in (("TP", LONG), ("TP, length not divided", LONG - 1)):
        found.append(sent(name, length, {"tensor": ranks()}, tensor_in_theory, options.work))
    return found


def sent(technique: str, length: int, parallel: dict[str, Any], theory: Theory, work: Path) -> dict[str, Any]:
    """Bytes that this process sends in a second step: by collective, what its connections carried, and in theory."""
    run = small(length, 1, work, parallel)
    steps = loop.train(run)
    next(steps)
    dist.barrier()
    before = wire_bytes()
    with Traffic() as counted:
        next(steps)
    dist.barrier()  # whose few bytes are not worth a correction
    after = wire_bytes()
    found = {"measured": dict(counted.bytes), "wire_bytes": after - before, "theory": theory(run, length)}
    return {"technique": technique, "ranks": ranks(), **found}


def copies_in_theory(run: loop.Run, length: int) -> dict[str, float]:
    """A reduce-scatter and an all-gather of the model; at stage 3 an all-gather more."""
    rounds = 3 if run.recipe.parallel.zero == 3 else 2
    return {"model": rounds * sizes(run)["model"] * (ranks() - 1) / ranks()}


def tensor_in_theory(run: loop.Run, length: int) -> dict[str, float]:
    """An all-reduce of the hidden states is twice their bytes times (N - 1) / N; a block has two in each direction."""
    blocks, share = SMALL["num_hidden_layers"], (ranks() - 1) / ranks()
    reduce = 2 * share * 4 * length * SMALL["hidden_size"]
    divided = length % ranks() == 0
    return {
        "blocks": 4 * blocks * reduce,
        "embedding and last norm": 2 * reduce,  # the forward of one and the backward of the other, or both by halves
        "loss": share * ranks() * 2 * 4 * (length - 1 + -(length - 1) % STRIDE),  # two numbers of each supervised token
        "gradients of norms": 2 * share * 4 * (2 * blocks + 1) * SMALL["hidden_size"] * divided,
    }


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
    return smollm({"method": "full"}, "auto", {"zero": 3}, options)


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
        "seconds_per_step": [result.seconds for result in results],
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
