"""What memory techniques save and cost: SmolLM2-135M, LoRA r=16, two rows of 512 tokens; a process for each run, in turn.

    python -m benchmarks.memory [--json] [--cases checkpointing,stream,budgets,accuracy] [--rounds 2] [--steps 6] [--warmup 2]

checkpointing   memory.checkpointing none, full, selective and offload, compiled as a recipe is by default, and Hugging Face's
                model with PEFT (bf16 weights, SDPA), without and with gradient_checkpointing=True; both in float32 where
                the processor has no instructions for bfloat16
stream          a model larger than its memory: see ``memory_stream``
budgets         LoRA (rows of 512 tokens) and a full fine-tune by settings that take less and less memory, or a budget; of each
                the process's peak less what it held after the imports (VmHWM - VmRSS), and tokens/s; weights from a file in
                bfloat16, as models are published
accuracy        what ways of storing and rounding cost in held-out loss: see ``memory_accuracy``

Bytes of the first case are those of live tensors, as PyTorch's profiler sees each allocation of the CPU, compiled or not:
  held         what the forward left for the backward of the blocks: live when that begins, less what was live before the step
  activations  the most that is live from then to the end of the backward, less the same
The theory for full: the inputs of all blocks, and what one block of the run without checkpointing holds.
Every figure is a median over the rounds; a ratio is taken within a round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import memory_accuracy, memory_stream
from benchmarks.child import result_of
from benchmarks.machine import FAST
from benchmarks.memory_stream import bytes_of

LENGTH, ROWS, WIDTH, BLOCKS = 512, 2, 576, 30
MODES = ("none", "full", "selective", "offload")
PEERS = ("peer none", "peer full")
INPUTS = BLOCKS * ROWS * LENGTH * WIDTH * FAST.itemsize  # bytes of the residual stream before each block
FILE, PUBLISHED = "model.safetensors", "base-bf16"
BUDGETS = {"dense": 450.0, "full": 1536.0}  # MiB on top of the imports
ONE, CKPT = {"training.micro_batch_size": 1}, {"memory.checkpointing": "full"}
LORA_4BIT = {"adapt": {"method": "lora", "rank": 16, "alpha": 32, "base": "4bit"}}
EAGER, STREAM = {"run.compile": "off"}, {"memory.frozen": "stream"}
DISK, EIGHT = {"memory.optimizer_offload": "disk"}, {"memory.optimizer_states": "8bit"}
EARLY = {"memory.optimizer_in_backward": True, "training.clip_norm": None}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("dense", {}),
    "lora, full, 1": ("dense", {**ONE, **CKPT}),
    "lora, full, 1, stream": ("dense", {**ONE, **CKPT, **STREAM}),
    "lora, full, stream": ("dense", {**CKPT, **STREAM}),
    "lora, full, 1, 4bit": ("dense", {**ONE, **CKPT, **LORA_4BIT}),
    "lora, full, 1, eager": ("dense", {**ONE, **CKPT, **EAGER}),
    "lora, full, 1, stream, eager": ("dense", {**ONE, **CKPT, **STREAM, **EAGER}),
    "lora, full, 1, stream, disk": ("dense", {**ONE, **CKPT, **STREAM, **DISK}),
    "lora, full, 1, stream, 8bit": ("dense", {**ONE, **CKPT, **STREAM, **EIGHT}),
    "lora, 450MiB": ("dense", {"memory.budget": "450MiB"}),
    "tuned": ("full", {}),
    "tuned, 8bit, early": ("full", {**EIGHT, **EARLY}),
    "tuned, full, 8bit, early": ("full", {**CKPT, **EIGHT, **EARLY}),
    "tuned, full, disk": ("full", {**CKPT, **DISK}),
    "tuned, full, disk, early": ("full", {**CKPT, **DISK, **EARLY}),
    "tuned, full, disk, early, eager": ("full", {**CKPT, **DISK, **EARLY, **EAGER}),
}
PLANNED = {"data.source": "python-docstrings", "data.limit": 100}  # rows of the same length that another process finds
BEGIN, MARK = "step begins", "backward of the blocks begins"


def live_bytes(step: Callable[[], object], last_block: nn.Module) -> dict[str, int]:
    """``held`` and ``activations`` of a step, see above."""

    def marked(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: _mark(MARK))

    handle = last_block.register_forward_hook(marked)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _mark(BEGIN)
        step()
    handle.remove()
    assert profiler.profiler is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    live = at_mark = peak = 0
    begun = marked_ = False
    for event in events:
        if event.name() == BEGIN:
            begun = True
        elif event.name() == MARK:
            at_mark = peak = live
            marked_ = True
        elif event.name() == "[memory]" and begun:
            live += event.nbytes()
            peak = max(peak, live)
    assert marked_, "no backward was seen"
    return {"held": at_mark, "activations": peak}


def _mark(name: str) -> None:
    with record_function(name):
        pass


def ours(mode: str, base: Path, data: Path, options: argparse.Namespace) -> tuple[Callable[[], object], nn.Module]:
    """A step of trainwright, and the model's last block."""
    from benchmarks import own_finetune
    from trainwright import build, loop
    from trainwright.data.text import TextSplits
    from trainwright.recipe import Memory

    recipe = own_finetune.recipe("dense", options.steps + 2, str(base))
    recipe = recipe.model_copy(
        update={"memory": Memory(checkpointing=mode, folder=options.folder if mode == "offload" else None)}
    )
    with np.load(data) as file:
        content = own_finetune.documents(dict(file))
    run = build.assemble(recipe, splits=TextSplits(content, None, cached=True))
    own_finetune.in_order(run, content, ROWS)
    steps = loop.train(run)
    return lambda: next(steps), run.model.blocks()[-1]  # type: ignore[operator]


def peer(mode: str, base: Path, data: Path, options: argparse.Namespace) -> tuple[Callable[[], object], nn.Module]:
    """The same of transformers with PEFT, the loop around it as small as can be."""
    from benchmarks.peer_finetune import PURE_BF16, load_model

    model = load_model(base, "dense", PURE_BF16)
    model.train()
    if mode == "peer full":
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0, fused=True)
    rows = iter(torch.from_numpy(np.load(data)["tokens"]).split(ROWS))

    def step() -> None:
        tokens = next(rows)
        model(input_ids=tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, model.base_model.model.model.layers[-1]  # type: ignore[union-attr,index]


def one(mode: str, options: argparse.Namespace) -> None:
    """A run in this process; its JSON on stdout."""
    make = peer if mode in PEERS else ours
    step, last_block = make(mode, options.work / "base", options.work / "dense.npz", options)
    seconds = []
    for _ in range(options.steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    found = live_bytes(step, last_block)
    print(json.dumps({"seconds": statistics.median(seconds[options.warmup :]), **found}))


def run(mode: str, options: argparse.Namespace) -> dict[str, float]:
    """One process to its end."""
    steps = ["--steps", str(options.steps), "--warmup", str(options.warmup)]
    folder = ["--folder", options.folder] if options.folder else []
    result = result_of("memory", "--one", mode, *steps, *folder, "--work", str(options.work))
    print(f"{mode}: {result['seconds']:.2f} s, held {result['held'] / 2**20:.0f} MiB, "
          f"activations {result['activations'] / 2**20:.0f} MiB", file=sys.stderr)  # fmt: skip
    return result


def checkpointing(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of all modes and the peer's, in turn."""
    rounds = [{mode: run(mode, options) for mode in (*MODES, *PEERS)} for _ in range(options.rounds)]

    def median(figure: Callable[[dict[str, dict[str, float]]], float]) -> float:
        return statistics.median(figure(found) for found in rounds)

    result: dict[str, Any] = {
        mode: {
            "seconds": median(lambda found, mode=mode: found[mode]["seconds"]),
            "time_ratio": median(
                lambda found, mode=mode: found[mode]["seconds"] / found["peer none" if mode in PEERS else "none"]["seconds"]
            ),
            "held_mib": median(lambda found, mode=mode: found[mode]["held"] / 2**20),
            "activations_mib": median(lambda found, mode=mode: found[mode]["activations"] / 2**20),
        }
        for mode in (*MODES, *PEERS)
    }
    theory = median(lambda found: INPUTS + found["none"]["held"] / BLOCKS)
    return {
        **result,
        "full_theory_mib": theory / 2**20,
        "full_over_theory": result["full"]["activations_mib"] * 2**20 / theory,
        "full_over_peer": median(lambda found: found["full"]["activations"] / found["peer full"]["activations"]),
    }


def measure(name: str, options: argparse.Namespace) -> None:
    """Train in this process by one of ``SETTINGS``; its JSON on stdout."""
    import transformers  # noqa: F401  (what a run imports counts as imports)

    from benchmarks import own_finetune
    from trainwright import budget, build, loop, supervised  # noqa: F401
    from trainwright.adapt import lora  # noqa: F401
    from trainwright.data.text import TextSplits
    from trainwright.recipe.file import changed

    before = bytes_of("VmRSS")
    with np.load(options.work / "dense.npz") as file:
        rows = {"tokens": file["tokens"][: ROWS * (options.steps + 2)]}
    content = own_finetune.documents(rows)
    case, keys = SETTINGS[name]
    recipe = changed(own_finetune.recipe(case, options.steps, str(options.work / PUBLISHED)), keys)
    if recipe.memory.budget is not None:
        chosen = budget.settled(changed(recipe, PLANNED), torch.device("cpu"), lambda text: print(text, file=sys.stderr))
        recipe = recipe.model_copy(update={"memory": chosen.memory, "training": chosen.training, "adapt": chosen.adapt})
    run = build.assemble(recipe, splits=TextSplits(content, None, cached=True))
    built, results = bytes_of("VmHWM"), list(loop.train(run))
    seconds = statistics.median(result.seconds for result in results[options.warmup :])
    print(json.dumps({
        "peak_mib": (bytes_of("VmHWM") - before) / 2**20, "built_mib": (built - before) / 2**20,
        "tokens_per_second": results[-1].size / seconds, "losses": [result.loss for result in results],
    }))  # fmt: skip


def budgets(options: argparse.Namespace) -> dict[str, Any]:
    """All settings, or those that ``--settings`` names, in turn; their speed relative to the first of the same case."""
    _publish(options.work)
    found: dict[str, Any] = {}
    for name, (case, keys) in SETTINGS.items():
        if not options.settings or name in options.settings.split(";"):
            steps = ["--steps", str(options.steps), "--warmup", str(options.warmup), "--work", str(options.work)]
            result = result_of("memory", "--measure", name, *steps)
            plain = found.setdefault(case, {}).setdefault("plain tokens/s", result["tokens_per_second"])
            result |= {"speed": result["tokens_per_second"] / plain, "fits": result["peak_mib"] <= BUDGETS[case], "keys": keys}
            found[case][name] = result
            print(f"{name}: {result['peak_mib']:.0f} MiB ({result['built_mib']:.0f} built), "
                  f"{result['tokens_per_second']:.0f} tokens/s, {result['speed']:.2f}", file=sys.stderr)  # fmt: skip
    return found


def _publish(work: Path) -> None:
    """The base in bfloat16."""
    source, target = work / "base" / FILE, work / PUBLISHED
    if not (target / FILE).exists():
        shutil.copytree(work / "base", target, ignore=shutil.ignore_patterns(FILE), dirs_exist_ok=True)
        save_file({name: tensor.bfloat16() for name, tensor in load_file(source).items()}, target / FILE, {"format": "pt"})


def stream(options: argparse.Namespace) -> dict[str, Any]:
    """See ``memory_stream``."""
    return memory_stream.case()


def accuracy(options: argparse.Namespace) -> dict[str, Any]:
    """See ``memory_accuracy``."""
    return memory_accuracy.case()


CASES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "checkpointing": checkpointing, "stream": stream, "budgets": budgets, "accuracy": accuracy
}  # fmt: skip


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--folder", help="where offloaded tensors go")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "trainwright-bench"))
    parser.add_argument("--settings", default="", help="of the budgets: names, divided by semicolons; by default all")
    parser.add_argument("--measure", choices=list(SETTINGS), help=argparse.SUPPRESS)
    parser.add_argument("--one", choices=(*MODES, *PEERS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if options.one:
        return one(options.one, options)
    if options.measure:
        return measure(options.measure, options)
    from benchmarks.finetune import prepare_data
    from benchmarks.peer_finetune import prepare_base

    options.work.mkdir(parents=True, exist_ok=True)
    prepare_base(options.work / "base")
    prepare_data(options.work)
    report = {case: CASES[case](options) for case in options.cases.split(",")}
    if options.json:
        print(json.dumps(report, indent=2))
        return None
    for case, values in report.items():
        print(case, json.dumps(values, indent=2))
    return None


if __name__ == "__main__":
    main()
