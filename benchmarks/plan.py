"""How well `trainwright plan` foresees: peak memory and time of real steps beside its figures, a process a case.

    python -m benchmarks.plan [--json] [--cases memory,time,rss,ranks,seconds] [--page docs/plan-accuracy.md]

memory   bytes of tensors at the peak of a step. Measured: every allocation of the CPU that PyTorch's profiler sees, in the
         second step of the real run. Target: 3%
time     seconds of a step on this CPU, calibrated in the same process. Measured: the fastest of several steps. Target: 20%
rss      the same peak against the growth of resident memory over the imports. Target: 10%
ranks    ``memory`` in each of several processes. Measured: what C library and heap gave out after each operator. Target: 5%
seconds  how long `plan` itself takes, and its peak of resident memory; and how long a whole sweep

error is predicted / measured - 1. A page is written for what was measured; all else stays on it. Cases in bfloat16 are left out
where the processor has no instructions for it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.child import result_of
from benchmarks.plan_cases import CASES, PLANS, RANKS, SWEEP, left_out, recipe_of
from benchmarks.plan_page import write_page, write_validation
from trainwright.memory import heap
from trainwright.plan import validation
from trainwright.recipe import Recipe

PAGE = Path("docs/plan-accuracy.md")


# --- one measurement, in a process of its own ---------------------------------------


def step(run: Any, number: int = 0) -> None:
    """As the loop takes it."""
    from trainwright import loop

    loop.seed(run, number)
    run.forward_backward(run.batch(number))
    run.clip()
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def peak_of(recipe: Recipe) -> int:
    """Most bytes that the CPU's allocator has given out at once in the second step, by the profiler's memory events."""
    from trainwright import build

    build.assemble(recipe)  # what is made once in a process isn't the run's
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run = build.assemble(recipe)
        run.model.train()
        gc.collect()
        step(run)
        with record_function("second step"):
            pass
        step(run)
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())  # type: ignore[union-attr]
    live, peak = 0, None
    for event in events:
        if event.name() == "second step":
            peak = live
        elif event.name() == "[memory]":
            live += event.nbytes()
            peak = peak if peak is None else max(peak, live)
    assert peak is not None
    return peak


def memory(case: str, work: Path) -> dict[str, float]:
    from trainwright.plan.rehearsal import rehearse

    recipe = recipe_of(case, work)
    return {"predicted": rehearse(recipe).peak.total, "measured": peak_of(recipe)}


def seconds_of(recipe: Recipe) -> float:
    """The fastest of several steps after two to warm up."""
    from trainwright import build

    run = build.assemble(recipe)
    run.model.train()
    found: list[float] = []
    ends = time.perf_counter() + 12
    while len(found) < 5 or (time.perf_counter() < ends and len(found) < 40):
        started = time.perf_counter()
        step(run)
        found.append(time.perf_counter() - started)
    return min(found[2:])


def timing(case: str, work: Path) -> dict[str, float]:
    import trainwright.models.cpu_attention  # noqa: F401  (so that it is calibrated, too)
    from trainwright.plan import devices
    from trainwright.plan.rehearsal import rehearse
    from trainwright.plan.timing import estimate

    recipe = recipe_of(case, work)
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # calibrated next to the run
    device, counts = devices.find("cpu"), rehearse(recipe).counts
    return {"predicted": estimate(counts.all_works(), [], device).seconds, "measured": seconds_of(recipe)}


def rss(case: str, work: Path) -> dict[str, float]:
    """What building and a few steps add to the imports; what is predicted comes from a process before."""
    from benchmarks.machine import peak_resident_bytes, resident_bytes
    from trainwright import build, language, supervised  # noqa: F401  (imports, which aren't the run's)

    recipe = recipe_of(case, work)
    before = resident_bytes()
    run = build.assemble(recipe)
    run.model.train()
    for number in range(3):
        step(run, number)
    return {"measured": peak_resident_bytes() - before}


class _Memory(ctypes.Structure):
    """glibc's mallinfo2."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    ))  # fmt: skip


class _Asking(TorchDispatchMode):
    """Asks the C library after each operator how much is in use. The profiler doesn't see what gloo's threads give back."""

    def __init__(self) -> None:
        super().__init__()
        self._ask = ctypes.CDLL(None).mallinfo2
        self._ask.restype = _Memory
        self.peak = 0

    def now(self) -> int:
        found = self._ask()
        return int(found.uordblks + found.hblkhd) + heap.count().live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, self.now())
        return result


def rank_peak(case: str, work: str) -> int:
    """The most in use after an operator of the second step, less what was before the program was built."""
    from trainwright import build

    recipe, asking = _rank_recipe(case, Path(work)), _Asking()
    step(build.assemble(recipe))  # what is made once in a process isn't the run's
    gc.collect()
    before = asking.now()
    run = build.assemble(recipe)
    run.model.train()
    step(run)
    gc.collect()
    with asking:
        step(run)
    return asking.peak - before


def _rank_recipe(case: str, work: Path) -> Recipe:
    many = {"training__micro_batch_size": 2} if "pipeline" in case else {"training__micro_batch_size": 4}
    return recipe_of("decoder fp32", work, **many, **{f"parallel__{key}": value for key, value in RANKS[case][1].items()})


def ranks(case: str, work: Path) -> dict[str, Any]:
    from trainwright.launch.pool import Pool
    from trainwright.plan.rehearsal import rehearse

    recipe, count = _rank_recipe(case, work), RANKS[case][0]
    hops: dict[int, Any] = {}
    predicted = [rehearse(recipe, count, rank, hops=hops).peak.total for rank in range(count)]
    with Pool(count) as pool:
        measured = pool.run(rank_peak, case, str(work))
    return {"predicted": predicted, "measured": measured}


def plan_seconds(case: str, work: Path) -> dict[str, float]:
    """`plan` from a recipe to its figures, the imports not counted, and the peak of resident memory, the imports counted."""
    from benchmarks.machine import peak_resident_bytes
    from trainwright.plan import command
    from trainwright.recipe.file import parse

    options, parallel, device, count = PLANS[case]
    recipe = parse(
        {
            "model": {"architecture": "decoder", "options": options, "tokenizer": "smollm2-135m"},
            "data": {"source": "python-docstrings", "sequence_length": 4096},
            "parallel": parallel,
            "memory": {"checkpointing": "full"},
            "training": {"steps": 10, "batch_size": max(8, 2 * count // 64)},
            "run": {"compile": "off"},
        }
    )
    started = time.perf_counter()
    planned = command.plan(recipe, command.Options(device, count))
    taken = time.perf_counter() - started
    return {"seconds": taken, "resident_gib": peak_resident_bytes() / 2**30, "peak_gib": planned.plan.memory.peak / 2**30}


def sweep_seconds() -> dict[str, float]:
    """A whole command, from its start to the written page."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trainwright", "plan", *SWEEP, "--device", "h100", "--sweep", "--out", folder]
        started = time.perf_counter()
        subprocess.run([*command, "--json"], check=True, capture_output=True)
        taken = time.perf_counter() - started
        tried = len(json.loads(Path(folder, "plan.json").read_text())["choices"])
    return {"seconds": taken, "combinations": tried}


def seconds(case: str, work: Path) -> dict[str, float]:
    """Of one plan, or of a sweep."""
    return sweep_seconds() if case == "sweep" else plan_seconds(case, work)


# --- all of them ----------------------------------------------------------------------

KINDS: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    "memory": memory, "time": timing, "rss": rss, "ranks": ranks, "seconds": seconds
}  # fmt: skip
KEYS = {"seconds": "plan_seconds"}  # of the report


def run(kind: str, case: str, options: argparse.Namespace) -> dict[str, Any]:
    """One process to its end."""
    return result_of("plan", "--one", kind, case, "--work", str(options.work))


def rows_of(kind: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases of a kind, each with its error; of ranks a row for each."""
    rows: list[dict[str, Any]] = []
    for case in CASES[kind]:
        if (options.only and options.only not in case) or left_out(case):
            continue
        found = run(kind, case, options)
        if kind == "rss":
            found["predicted"] = run("memory", case, options)["predicted"]
        if kind == "ranks":
            pairs = zip(found["predicted"], found["measured"], strict=True)
            new = [{"case": f"{case}, rank {rank}", "predicted": p, "measured": m} for rank, (p, m) in enumerate(pairs)]
        else:
            new = [{"case": case, **found}]
        for row in new:
            if "measured" in row:
                row["error"] = row["predicted"] / row["measured"] - 1
            print(kind, json.dumps(row), file=sys.stderr, flush=True)
        rows += new
    return rows


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--cases", default=",".join(KINDS))
    parser.add_argument("--only", help="cases whose name has this in it; no page is written")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "trainwright-bench-plan"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.one:
        print(json.dumps(KINDS[options.one[0]](options.one[1], options.work)))
        return
    report = {kind: rows_of(kind, options) for kind in options.cases.split(",")}
    if not options.only:
        write_page(options.page, report)
        write_validation(validation.FILE, report)
    if options.json:
        print(json.dumps({KEYS.get(kind, kind): rows for kind, rows in report.items()}, indent=2))


if __name__ == "__main__":
    main()
