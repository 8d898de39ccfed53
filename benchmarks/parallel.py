"""Many processes: what each holds and sends against theory, and how fast they are; whole jobs in turn on one machine.

    python -m benchmarks.parallel [--json] [--markdown FILE] [--cases states,traffic,scaling,peers] [--rounds 2]
        [--steps N] [--warmup N] [--variants fsdp2,fsdp2_pure_bf16,deepspeed]

states   bytes of parameters, gradients and AdamW's states in a process, of a decoder in float32, at each ZeRO stage; one
         process divides nothing, so it has stage 0 only
traffic  bytes that a process sends in a step of one micro-batch
scaling  two processes of one thread each share the data, against one process of two threads: SmolLM2-135M with LoRA, and
         ResNet-50 at 224x224; ``decoder`` and ``resnet50`` are ratios of rates, ``details`` what they come from
peers    every weight of SmolLM2-135M in two processes at ZeRO stage 3, ours against Hugging Face accelerate driving FSDP2 and
         DeepSpeed; see ``peer_parallel``

An error is measured / theory - 1, of the rank where it is largest. ``measured`` of traffic counts what collectives send at
best, a reduce-scatter or all-gather of b bytes b (N - 1) / N and an all-reduce twice that; ``wire`` is what the connections of
the process carried, counted by the kernel. A rate comes from the median step after the warm-up; each figure is a median over
the rounds, and a ratio is taken within a round. Memory is the largest growth of resident memory of a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Found = dict[str, Any]
CASES = ("states", "traffic", "scaling", "peers")
STEPS = {"decoder": (9, 3), "resnet50": (9, 3), "zero3": (8, 3)}  # (all, of which warm-up)
VARIANTS = ("fsdp2", "fsdp2_pure_bf16", "deepspeed")
UNIT = {"decoder": "tokens", "resnet50": "images"}
WHO = ("one_process", "two_processes")
JOB_SECONDS = 900
IMAGES, SIDE, CLASSES = 64, 224, 1000
ON_CPU = {
    "fsdp2": "accelerate leaves its FSDP plugin aside on the CPU; its state was set by hand, the rest runs as on GPUs",
    "deepspeed": "by accelerate without cpu=True and with gloo given by hand, because it leaves DeepSpeed aside on the CPU",
}


class JobError(Exception):
    """What a job said when it failed."""


def start(module: str, ranks: int, threads: int, arguments: list[str], work: Path) -> list[Found]:
    """One job to its end: what each rank found.

    Raises:
        JobError: it failed, or took too long.
    """
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *launcher, f"benchmarks.{module}", *arguments, "--work", str(work)]
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # DeepSpeed asks for ninja
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PATH": tools}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as job:
        try:
            output, errors = job.communicate(timeout=JOB_SECONDS)
        except BaseException as error:
            job.terminate()  # the launcher ends its ranks
            if isinstance(error, subprocess.TimeoutExpired):
                raise JobError(f"no answer in {JOB_SECONDS} s") from None
            raise
    if job.returncode:
        print(errors[-6000:], file=sys.stderr)
        raise JobError(reason(errors))
    found: list[Found] = json.loads(output.strip().splitlines()[-1])
    return found


def reason(errors: str) -> str:
    """The first exception that a rank died of; those of the launcher and of other ranks come later."""
    named = re.findall(r"^(?:\[rank\d+\]:\s*)?((?:[\w.]+\.)?\w*(?:Error|Exception): .*)$", errors, re.MULTILINE)
    return named[0] if named else errors.strip()[-500:]


def prepare(cases: list[str], work: Path) -> None:
    """What the jobs read."""
    if {"states", "traffic"} & set(cases) and not (work / "parallel-tokenizer").exists():
        from tests import tiny  # text needs a tokenizer; tokens are random

        tiny.tokenizer().save_pretrained(work / "parallel-tokenizer")
    if {"scaling", "peers"} & set(cases):
        from benchmarks.finetune import prepare_data
        from benchmarks.peer_finetune import prepare_base

        prepare_base(work / "base")
        prepare_data(work)
    if "scaling" in cases:
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
        names = [str(number) for number in range(CLASSES)]
        np.savez(work / "parallel-images.npz", images=images, labels=random.integers(0, CLASSES, IMAGES), classes=names)


def counted(case: str, counts: tuple[int, ...], options: argparse.Namespace) -> list[Found]:
    """The rows of jobs of so many processes."""
    rows = []
    for count in counts:
        answers = start("own_parallel", count, 1, ["--case", case], options.work)
        rows += [of_ranks(list(same)) for same in zip(*(answer["found"] for answer in answers), strict=True)]
        say(f"{case} in {count}: largest error {max((row['error'] for row in rows), key=abs):+.2%}")
    return rows


def of_ranks(rows: list[Found]) -> Found:
    """One row of those of all ranks: that of the largest error; of the other figures the largest."""
    for row in rows:
        row["theory_bytes"], row["measured_bytes"] = (sum(row[key].values()) for key in ("theory", "measured"))
        row["error"] = row["measured_bytes"] / row["theory_bytes"] - 1
        if "wire_bytes" in row:
            row["wire_error"] = row["wire_bytes"] / row["theory_bytes"] - 1
    chosen = max(rows, key=lambda row: abs(row["error"]))
    numbers = {key: max(row[key] for row in rows) for key, value in chosen.items() if isinstance(value, int | float)}
    return chosen | numbers | {"error": chosen["error"]}


def scaling(options: argparse.Namespace) -> Found:
    """Ratios of rates, two processes to one."""
    details = {case: compare_scaling(case, options) for case in ("decoder", "resnet50")}
    return {**{case: values["ratio"] for case, values in details.items()}, "details": details}


def compare_scaling(case: str, options: argparse.Namespace) -> Found:
    rounds = []
    for number in range(options.rounds):
        layouts = {"one": (1, 2), "two": (2, 1)}  # processes, threads of each
        order = sorted(layouts, reverse=number % 2 == 1)
        rounds.append({name: timed("own_parallel", ["--case", case], case, *layouts[name], options) for name in order})
    ratios = [found["two"]["per_second"] / found["one"]["per_second"] for found in rounds]
    result: Found = {"ratio": statistics.median(ratios), "ratios": ratios}
    for name, shown in zip(("one", "two"), WHO, strict=True):
        result[f"{UNIT[case]}_per_second_{shown}"] = median(rounds, name, "per_second")
        result[f"memory_growth_gib_{shown}"] = median(rounds, name, "memory_growth_bytes") / 2**30
        result[f"seconds_per_step_{shown}"] = [found[name]["seconds_per_step"] for found in rounds]
        result[f"losses_{shown}"] = rounds[0][name]["losses"]
    losses = [rounds[0][name]["losses"] for name in ("one", "two")]
    return result | {"largest_loss_difference": largest_difference(*losses), "changes": rounds[0]["two"]["changes"]}


def timed(module: str, arguments: list[str], case: str, ranks: int, threads: int, options: argparse.Namespace) -> Found:
    """A job of so many steps: what rank 0 found, with the slowest rank's rate and the largest growth of memory."""
    steps, warmup = plan(case, options)
    answers = start(module, ranks, threads, [*arguments, "--steps", str(steps), "--warmup", str(warmup)], options.work)
    found = [answer.get("found", answer) for answer in answers]
    if {has["threads"] for has in found} != {threads}:
        raise JobError(f"each process should have {threads} threads, but has {[has['threads'] for has in found]}")
    growth = max(answer["memory_growth_bytes"] for answer in answers)
    rate = min(has["per_second"] for has in found)
    say(f"{module} {' '.join(arguments)} in {ranks}: {rate:,.1f} a second, {growth / 2**30:.2f} GiB")
    return {**found[0], "per_second": rate, "memory_growth_bytes": growth}


def plan(case: str, options: argparse.Namespace) -> tuple[int, int]:
    """Steps of a case, and how many of them are warm-up."""
    steps, warmup = STEPS[case]
    steps, warmup = options.steps or steps, warmup if options.warmup is None else options.warmup
    if not 0 < warmup < steps:
        sys.exit(f"--warmup {warmup} must be above 0 and below the {steps} steps of {case}")
    return steps, warmup


def peers(options: argparse.Namespace) -> Found:
    """Ratios ours / peer of rates and of growth of memory; or why a peer can't run."""
    rounds: list[Found] = []
    failed: dict[str, str] = {}
    for _ in range(options.rounds):
        found = {"ours": timed("own_parallel", ["--case", "zero3"], "zero3", 2, 1, options)}
        for variant in (name for name in options.variants if name not in failed):
            try:
                found[variant] = timed("peer_parallel", ["--variant", variant], "zero3", 2, 1, options)
            except JobError as error:
                failed[variant] = str(error)
                say(f"{variant} can't run: {error}")
        rounds.append(found)
    result: Found = {"ours": figures(rounds, "ours")}
    for variant in options.variants:
        result[variant] = {"error": failed[variant]} if variant in failed else against(rounds, variant)
        result[variant]["how"] = ON_CPU[variant.partition("_")[0]]
    return result


def figures(rounds: list[Found], name: str) -> Found:
    return {
        "tokens_per_second": median(rounds, name, "per_second"),
        "memory_growth_gib": median(rounds, name, "memory_growth_bytes") / 2**30,
        "seconds_per_step": [found[name]["seconds_per_step"] for found in rounds if name in found],
        "losses": rounds[0][name]["losses"],
    }


def against(rounds: list[Found], variant: str) -> Found:
    def ratio(key: str) -> float:
        return statistics.median(found["ours"][key] / found[variant][key] for found in rounds)

    differ = largest_difference(rounds[0]["ours"]["losses"], rounds[0][variant]["losses"])
    ratios = {"ratio": ratio("per_second"), "memory_ratio": ratio("memory_growth_bytes")}
    return {**ratios, **figures(rounds, variant), "largest_loss_difference": differ}


def median(rounds: list[Found], name: str, key: str) -> float:
    return statistics.median(found[name][key] for found in rounds)


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def tables(report: Found) -> Iterator[str]:
    """In Markdown."""
    mib = 2**20
    if "states" in report:
        yield from table(
            "stage | processes | bytes of theory (MiB) | measured | error | at the update | gathered blocks",
            [
                [row["stage"], row["ranks"], f"{row['theory_bytes'] / mib:.2f}", f"{row['measured_bytes'] / mib:.2f}",
                 f"{row['error']:+.3%}", f"{row['at_update_bytes'] / mib:.2f}",
                 f"{row['gathered_blocks']:.2f}" if "gathered_blocks" in row else ""]
                for row in report["states"]
            ],
        )  # fmt: skip
    if "traffic" in report:
        yield from table(
            "technique | processes | bytes of theory (MiB) | counted | error | on the wire | error",
            [
                [row["technique"], row["ranks"], f"{row['theory_bytes'] / mib:.3f}", f"{row['measured_bytes'] / mib:.3f}",
                 f"{row['error']:+.2%}", f"{row['wire_bytes'] / mib:.3f}", f"{row['wire_error']:+.2%}"]
                for row in report["traffic"]
            ],
        )  # fmt: skip
    if "scaling" in report:
        details = report["scaling"]["details"]
        yield from table(
            "two processes to one with two threads | ratio | one, a second | two, a second | one, GiB | two, GiB a process",
            [
                [case, f"{has['ratio']:.1%}", *(f"{has[f'{UNIT[case]}_per_second_{who}']:,.1f}" for who in WHO),
                 *(f"{has[f'memory_growth_gib_{who}']:.2f}" for who in WHO)]
                for case, has in details.items()
            ],
        )  # fmt: skip
    if "peers" in report:
        shown = [(name, has) for name, has in report["peers"].items() if "error" not in has]
        yield from table(
            "ZeRO 3 in two processes | tokens/s | growth of memory, GiB | ours / it, tokens/s | memory",
            [
                [name, f"{has['tokens_per_second']:,.1f}", f"{has['memory_growth_gib']:.2f}",
                 *(f"{has[key]:.2f}" if key in has else "" for key in ("ratio", "memory_ratio"))]
                for name, has in shown
            ],
        )  # fmt: skip
        yield from (f"{name} can't run here: {has['error']}\n" for name, has in report["peers"].items() if "error" in has)


def table(head: str, rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Columns of one width, so that it reads well in a terminal, too."""
    cells = [head.split(" | "), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    yield from [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:], ""]


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def machine() -> Found:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    load = os.getloadavg()[0]  # above 0 before anything has begun: other work makes rates meaningless
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": load,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, rather than tables")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file, too")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of each timed job, warm-up included; default: 8 or 9")
    parser.add_argument("--warmup", type=int, help="steps that don't count; default: 3")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of the peers, see peer_parallel")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "trainwright-bench"))
    options = parser.parse_args()
    cases, options.variants = options.cases.split(","), options.variants.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"--cases: {', '.join(sorted(unknown))} unknown; there are {', '.join(CASES)}")
    options.work.mkdir(parents=True, exist_ok=True)
    report: Found = {"machine": machine()}
    prepare(cases, options.work)
    measures: dict[str, Callable[[argparse.Namespace], Any]] = {
        "states": partial(counted, "states", (1, 2, 4)),
        "traffic": partial(counted, "traffic", (2, 4)),
        "scaling": scaling,
        "peers": peers,
    }
    try:
        report = {case: measures[case](options) for case in CASES if case in cases} | report
    except JobError as error:
        sys.exit(f"a job of ours failed: {error}")
    text = "\n".join(tables(report))
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    print(json.dumps(report, indent=2) if options.json else text)


if __name__ == "__main__":
    main()
