"""The real program of a recipe on fake tensors: built by ``build.assemble``, stepped by its own callables, nothing computed.

Fake tensors have a shape, a dtype and a device, and no values (``torch._subclasses.fake_tensor``); a fake process group answers
at once. So the steps of a job of any size run in one process in seconds, and every storage and every operator is seen.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from trainwright import build, loop
from trainwright.loop import Batch, Run
from trainwright.parallel.pipeline_run import Hidden
from trainwright.pieces import local
from trainwright.plan.alike import portions_once
from trainwright.plan.compiling import Compiler
from trainwright.plan.counting import Counts
from trainwright.plan.hops import told
from trainwright.plan.ledger import Ledger, Peak, numbers
from trainwright.plan.moments import Moments
from trainwright.plan.report import PARTS
from trainwright.plan.watching import Watching
from trainwright.recipe import Recipe

FEW = 2  # micro-batches of a step that are taken; all but the last are alike


@dataclass(frozen=True)
class Rehearsed:
    """What one process of a run takes.

    parts     bytes at the peak, by ``report.PARTS``
    units     of work in this process's part of a step
    resting   bytes between steps
    timeline  (phase, bytes) in equal parts of a step
    """

    rank: int
    peak: Peak
    parts: dict[str, int]
    resting: int
    timeline: list[tuple[str, int]]
    counts: Counts
    units: int
    micro_batches: int
    changes: list[tuple[str, str]] = field(default_factory=list)
    unit: str = "tokens"


@contextmanager
def processes(count: int, rank: int) -> Iterator[None]:
    """A job of so many processes of which this one is ``rank``, and which does nothing."""
    if count == 1:
        yield
        return
    dist.init_process_group("fake", rank=rank, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def converting() -> Iterator[None]:
    """While modules change the dtype of fake parameters: torch would swap them, which those that are looked up can't be."""

    plain = torch.utils.swap_tensors

    def set_data(tensor: Tensor, other: Tensor) -> None:
        if isinstance(tensor, FakeTensor) and isinstance(other, FakeTensor) and tensor.device == other.device:
            tensor.data = other.data
        else:
            plain(tensor, other)

    with mock.patch.object(torch.utils, "swap_tensors", set_data):
        yield


@contextmanager
def collecting_new() -> Iterator[None]:
    """While Python's garbage collector waits to be asked, and leaves alone what was there before: the libraries are large."""
    gc.freeze()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
        if enabled:
            gc.enable()


@collecting_new()
def rehearse(
    recipe: Recipe,
    count: int = 1,
    rank: int = 0,
    *,
    splits: Any = None,
    hops: dict[int, Hidden] | None = None,
    compiler: Compiler | None = None,
) -> Rehearsed:
    """Build a recipe's program as process ``rank`` of ``count`` sees it, and take a step.

    Args:
        splits: documents already tokenised.
        hops: what the pipeline's earlier processes, rehearsed before, send; gets what this one sends.
        compiler: with what it has traced for other rehearsals.

    Raises:
        InputError: as ``build.assemble``; or an operator that has no fake form.
    """
    moments, counts = Moments(), Counts()
    device = build.choose_device(recipe.run.device)
    ledger = Ledger(device, moments.now)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    watching = Watching(fake, ledger, counts, moments)
    compiler = compiler or Compiler()
    compiler.watcher = watching
    with ExitStack() as stack:
        stack.enter_context(processes(count, rank))
        stack.enter_context(ledger.resizing())
        stack.enter_context(converting())
        stack.enter_context(portions_once(ledger, counts, lambda: moments.now()[0]))
        stack.enter_context(told({} if hops is None else hops, counts.nothing))
        stack.enter_context(fake)
        stack.enter_context(watching)
        run = build.assemble(recipe, splits=splits, rehearsal=build.Rehearsal(_disable_current_modes, compiler.compile))
        moments.name(run.model)
        stack.enter_context(moments.following())
        return _steps(run, watching, rank)


def _steps(run: Run, watching: Watching, rank: int) -> Rehearsed:
    ledger, counts = watching.ledger, watching.counts
    run.model.train()
    gc.collect()
    batches = _batches(run, watching)
    _begin(run)
    start = len(ledger.events)
    counts.clear()
    gradients = _step(run, watching, batches)
    peak = ledger.peak(start)
    known = _known(run, watching, gradients)
    return Rehearsed(
        rank=rank,
        peak=peak,
        parts=_parts(peak, known, ledger),
        resting=sum(event.change for event in ledger.events),
        timeline=ledger.timeline(start),
        counts=counts,
        units=sum(batch.size for batch in batches),
        micro_batches=len(batches),
        changes=[(change.technique, change.summary) for change in run.changes],
        unit=run.unit,
    )


def _batches(run: Run, watching: Watching) -> Sequence[Batch]:
    with _disable_current_modes():
        batches = run.batch(0)
    return [_faked(batch, watching) for batch in batches]


def _faked(batch: Any, watching: Watching) -> Any:
    changes = {}
    for entry in dataclasses.fields(batch):
        value = getattr(batch, entry.name)
        if isinstance(value, Tensor):
            changes[entry.name] = watching.fake.from_tensor(value)
            watching.ledger.see(changes[entry.name])
    return dataclasses.replace(batch, **changes)


class _Followed(Sequence[Batch]):
    """Batches that tell which of them is in hand: how many labels it has, no fake tensor knows.

    Of many alike only ``most`` are taken: the first ones, which count for those that are left out, and at the end the one with
    the most labels, beside the gradients of the others.
    """

    def __init__(self, batches: Sequence[Batch], watching: Watching, most: int) -> None:
        self._watching, count = watching, len(batches)
        largest = max(range(count), key=lambda number: (number >= most - 1, batches[number].supervised))
        chosen = list(range(count)) if count <= most else [*range(most - 1), largest]
        self._batches = [batches[number] for number in chosen]
        self._scales = [1.0] if count == 1 else [(count - 1) / (len(chosen) - 1)] * (len(chosen) - 1) + [1.0]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        batch = self._batches[index]
        if isinstance(index, int):
            self._watching.batch, counts = batch, self._watching.counts
            counts.pairs, counts.scale = getattr(batch, "pairs", 0), self._scales[index]
        return batch


def _begin(run: Run) -> None:
    """An optimizer makes its states in its first step, of whatever gradients."""
    for parameter in _learning(run):
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def _step(run: Run, watching: Watching, batches: Sequence[Batch]) -> set[int]:
    """A step as the loop takes it; gives the storages of the gradients."""
    moments, ledger, counts = watching.moments, watching.ledger, watching.counts
    moments.phase = "forward"
    loop.seed(run, 0)
    most = 2 * stages if (stages := run.recipe.parallel.pipeline) > 1 else FEW
    run.forward_backward(_Followed(batches, watching, most))
    moments.phase, counts.scale = "optimizer", 1
    run.clip()
    gradients = numbers(ledger, [local(p.grad) for p in _learning(run) if p.grad is not None])
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return gradients


def _learning(run: Run) -> list[Tensor]:
    return [p for group in run.optimizer.param_groups for p in group["params"]]


def _known(run: Run, watching: Watching, gradients: set[int]) -> dict[str, set[int]]:
    ledger = watching.ledger
    tensors = [local(t) for t in (*run.model.parameters(), *run.model.buffers(), *_learning(run))]
    states = getattr(run.optimizer, "state", {})
    held = [local(v) for state in states.values() for v in state.values() if isinstance(v, Tensor)]
    return {
        "parameters": numbers(ledger, tensors),
        "gradients": gradients,
        "optimizer states": numbers(ledger, held),
        "communication buffers": watching.messages,
    }


def _parts(peak: Peak, known: dict[str, set[int]], ledger: Ledger) -> dict[str, int]:
    """Bytes at the peak. What a forward made and a backward ends is an activation; anything else is temporary."""
    born = {event.storage: event.moment[0] for event in reversed(ledger.events[: peak.index + 1])}
    ended = {event.storage: event.moment[0] for event in ledger.events[peak.index + 1 :] if event.change < 0}
    parts = dict.fromkeys(PARTS, 0)
    for storage, size in peak.live.items():
        kept = born.get(storage) == "forward" and ended.get(storage) == "backward"  # even if it came in a message
        sure = [part for part in known if storage in known[part] and not (kept and part == "communication buffers")]
        parts[sure[0] if sure else "activations" if kept else "temporary"] += size
    return parts
