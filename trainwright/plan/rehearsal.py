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
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map_only

from trainwright import build, loop
from trainwright.loop import Batch, Run
from trainwright.parallel.pipeline_run import Hidden
from trainwright.pieces import local
from trainwright.plan.alike import portions_once
from trainwright.plan.compiling import Compiler
from trainwright.plan.counting import Counts
from trainwright.plan.hops import told
from trainwright.plan.kernels import Memory
from trainwright.plan.ledger import Ledger, Peak, numbers
from trainwright.plan.moments import Moments
from trainwright.plan.report import PARTS
from trainwright.plan.workspace import workspace
from trainwright.recipe import InputError, Recipe

aten = torch.ops.aten
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


class Watching(TorchDispatchMode):
    """Sees every operator; answers what a fake tensor can't."""

    def __init__(self, fake: FakeTensorMode, ledger: Ledger, counts: Counts, moments: Moments) -> None:
        super().__init__()
        self.fake, self.ledger, self.counts, self.moments = fake, ledger, counts, moments
        self.batch: Batch | None = None
        self.messages: set[int] = set()
        self.paused = False
        self.answers: dict[str, Any] = {}
        self.counting: set[int] = set()  # storages of 0, 1, 2, ...

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused or func is torch.ops.prim.device.default:
            return func(*args, **(kwargs or {}))
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local operators are seen
        kwargs = kwargs or {}
        if not types and any(isinstance(x, Tensor) for x in tree_leaves(args)):
            with _disable_current_modes():
                return func(*args, **kwargs)  # data, which are real
        if func is aten._local_scalar_dense.default:
            return self._value(args[0])
        if func is aten.equal.default:
            return True
        if func is aten.nonzero.default:
            assert self.batch is not None
            result: Any = torch.empty((self.batch.supervised, 1), dtype=torch.int64, device=args[0].device)
        elif func is aten.mkldnn_rnn_layer.default:
            result = self._asked(func, args, kwargs)
        else:
            try:
                result = func(*args, **kwargs)
            except (NotImplementedError, RuntimeError) as error:
                raise _unable(func, error) from None
        if func.overloadpacket is aten.arange:
            self.counting |= numbers(self.ledger, [result])
        self.ledger.see(result)
        self._count(func, args, kwargs, result)
        if func.namespace in ("c10d", "_c10d_functional"):
            self.messages |= numbers(self.ledger, [x for x in tree_leaves(args) if isinstance(x, Tensor)])
        return result

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """While nothing is seen."""
        self.paused, before = True, self.paused
        try:
            yield
        finally:
            self.paused = before

    def see(self, result: Tensor | Memory | None) -> None:
        """As a kernel of a graph makes it; what runs while a graph is traced, without modes, is no part of the run."""
        if self._watches():
            self.ledger.hold(result) if isinstance(result, Memory) else self.ledger.see(result)

    def fused(self, reads: Sequence[Tensor], result: Tensor) -> None:
        """A kernel of joined work."""
        if self._watches():
            self.counts.fuse(reads, result, self.moments.now()[0])

    def called(self, operator: Any, args: Any, kwargs: Any, result: Any) -> None:
        """An operator of a graph, with tensors of these shapes."""
        if self._watches():
            self._count(operator, args, kwargs, result)

    def _watches(self) -> bool:
        return not self.paused and self in _get_current_dispatch_mode_stack()

    def _count(self, operator: Any, args: Any, kwargs: Any, result: Any) -> None:
        if self.ledger.on_cpu:
            self.ledger.pass_by(workspace(operator, args, result))
        self.counts.count(operator, args, kwargs, result, self.moments.now()[0])

    def _asked(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the kernel itself gives for tensors of this shape: nobody else knows the size of its workspace."""
        key = str(tree_map_only(Tensor, lambda x: (x.shape, x.dtype), (args, kwargs)))
        if key not in self.answers:
            with _disable_current_modes():
                real = tree_map_only(Tensor, lambda x: torch.zeros(x.shape, dtype=x.dtype), (args, kwargs))
                self.answers[key] = tree_map_only(Tensor, lambda x: (x.shape, x.dtype), func(*real[0], **real[1]))
        device = args[0].device
        return tuple(kind and torch.empty(kind[0], dtype=kind[1], device=device) for kind in self.answers[key])

    def _value(self, value: Tensor) -> float | int | bool:
        """A value that is as good as any; of a view of 0, 1, 2, ... its own."""
        if numbers(self.ledger, [value]) & self.counting:
            return int(value.storage_offset())
        if value.dtype == torch.bool:
            return True
        return 1.0 if value.dtype.is_floating_point else 1


def _unable(operator: Any, error: Exception) -> InputError:
    return InputError(
        f"plan: the operator {operator} has no fake form ({str(error).splitlines()[0][:160]}); "
        "give it one by torch.library.register_fake, or measure instead: trainwright train RECIPE training.steps=3"
    )


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
