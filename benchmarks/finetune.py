"""Fine-tuning SmolLM2-135M: trainwright against Hugging Face Trainer + PEFT, processes in turn on one machine.

    python -m benchmarks.finetune [--json] [--rounds 2] [--steps 14] [--warmup 4] [--cases dense,ragged,full]

dense    LoRA r=16 on all linear layers, rows of 512 tokens, micro-batch 2, every token supervised, same data and order
ragged   the same on (function -> docstring) pairs as they are: prompts masked, 8 examples a step
full     every weight, data as dense; ours with float32 masters

The peer runs at its ``usual`` settings (bf16=True) and at its ``best`` (see ``peer_finetune``); for full
also at its best with float32 masters (``master``), since its ``best`` there keeps its weights and optimizer in bf16.
Where the processor has no instructions for bfloat16, all of them are faster in float32, and so all take that.
Every figure is a median over the rounds; a ratio is taken within a round. Each process starts anew.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.child import result_of

CASES = {"dense": ["best", "usual"], "ragged": ["best", "usual"], "full": ["best", "master"]}
# Length grouping sorts each 400 examples, longest first: 50 counted steps of 8 see a whole cycle, fewer only the long ones.
RAGGED_STEPS = 50
RATE = {"dense": "tokens_per_second", "ragged": "examples_per_second", "full": "tokens_per_second"}
FORMULA = (
    "operations = tokens * (4 * frozen matrix parameters + 6 * trained ones) + the same for the head at supervised tokens "
    "+ 12 * query heads * head_dim * layers for each pair of a token and one it attends to"
)


def prepare_data(work: Path) -> dict[str, Path]:
    """Docstring pairs, tokenised once: ragged as they are, dense as rows cut from them all in a line."""
    from trainwright.data import text
    from trainwright.models.pretrained import load_tokenizer, locate
    from trainwright.recipe import TextData

    paths = {"ragged": work / "ragged.npz", "dense": work / "dense.npz"}
    if not all(path.exists() for path in paths.values()):
        section = TextData(source="python-docstrings", held_out=None, sequence_length=512)
        content = text.prepare(section, load_tokenizer(locate("smollm2-135m")), model_length=None, seed=0).train
        prompts = [int(np.argmax(content.supervised[a:b])) for a, b in zip(content.offsets, content.offsets[1:], strict=False)]
        np.savez(paths["ragged"], tokens=content.tokens.astype(np.int64), lengths=content.lengths, prompt_lengths=prompts)
        rows = content.tokens[: len(content.tokens) // 512 * 512].reshape(-1, 512).astype(np.int64)
        np.savez(paths["dense"], tokens=rows)
    return paths | {"full": paths["dense"]}


def run(module: str, case: str, arguments: list[str], data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One process to its end; its JSON."""
    count = max(options.steps, options.warmup + RAGGED_STEPS) if case == "ragged" else options.steps
    steps = ["--steps", str(count), "--warmup", str(options.warmup)]
    result = result_of(module, "--case", case, *steps, "--data", str(data), *arguments)
    rate = result[RATE[case]]
    print(f"{module} {case} {' '.join(arguments[:2])}: {rate:,.1f} {RATE[case]}, "
          f"{result['memory_growth_bytes'] / 2**30:.2f} GiB", file=sys.stderr)  # fmt: skip
    return result


def measure(case: str, work: Path, data: Path, options: argparse.Namespace) -> list[dict[str, dict[str, Any]]]:
    """Rounds of ours and each variant of the peer, in turn."""
    rounds = []
    for _ in range(options.rounds):
        found = {"ours": run("own_finetune", case, ["--base", str(work / "base")], data, options)}
        for variant in CASES[case]:
            found[variant] = run("peer_finetune", case, ["--variant", variant, "--work", str(work)], data, options)
        rounds.append(found)
    return rounds


def compare(case: str, rounds: list[dict[str, dict[str, Any]]], machine: dict[str, Any]) -> dict[str, Any]:
    """Ratios of a case and what they come from."""

    def median(variant: str, key: str) -> float:
        return statistics.median(found[variant][key] for found in rounds)

    def ratio(variant: str, key: str) -> float:
        return statistics.median(found["ours"][key] / found[variant][key] for found in rounds)

    rate = RATE[case]
    result: dict[str, Any] = {f"ratio_{variant}": ratio(variant, rate) for variant in CASES[case]}
    result |= {"memory_ratio": ratio("best", "memory_growth_bytes")}
    result |= {f"memory_ratio_{variant}": ratio(variant, "memory_growth_bytes") for variant in CASES[case]}
    flops = median("ours", "flops_per_second")
    result |= {
        "share_of_peak": flops / machine["square"],
        "share_of_model_shapes": flops / machine["model_shapes"],
        rate: median("ours", rate),
        **{f"{rate}_{variant}": median(variant, rate) for variant in CASES[case]},
        "memory_growth_gib": median("ours", "memory_growth_bytes") / 2**30,
        "first_step_seconds": median("ours", "first_step_seconds"),
    }
    if case != "ragged":
        pairs = zip(rounds[0]["ours"]["losses"], rounds[0][CASES[case][1]]["losses"], strict=True)
        result["largest_loss_difference"] = max(abs(mine - other) for mine, other in pairs)
    return result


def machine_figures() -> dict[str, Any]:
    """FLOP/s of products here in the dtype that all take, in a process of its own, and what the machine is."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.machine"], stdout=subprocess.PIPE, text=True, check=True)
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {**json.loads(done.stdout), "cpu": names[0] if names else platform.processor(), "cores": len(names)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "trainwright-bench"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    from benchmarks.peer_finetune import prepare_base

    prepare_base(options.work / "base")
    data, machine = prepare_data(options.work), machine_figures()
    results = {}
    for case in options.cases.split(","):
        results[case] = compare(case, measure(case, options.work, data[case], options), machine)
    report = {**results, "machine": machine, "formula": FORMULA}
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for name, values in report.items():
        print(name, json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
