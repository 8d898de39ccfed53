"""The training loop: a generator over a ``Run``. No technique is named here; ``build`` puts them into the callables."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from trainwright.models.contract import Change
from trainwright.recipe import Recipe, RunError


class Batch(Protocol):
    """What a micro-batch must tell of itself."""

    @property
    def supervised(self) -> int:
        """How many terms its loss sums."""

    @property
    def size(self) -> int:
        """How many units of work it holds (tokens without padding, or samples)."""


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, what should follow, and what the model says."""

    prompt: str
    expected: str
    answer: str


@dataclass
class Run:
    """A training program, ready to go: what ``build.assemble`` makes and ``train`` drives.

    ``step`` counts the optimizer steps done. The global batch of a step depends on (seed, step) alone. ``save`` writes the
    model in the format of its method; ``flops`` counts the work of a micro-batch, where that is known.
    """

    recipe: Recipe
    model: nn.Module
    changes: list[Change]
    device: torch.device
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]
    steps: int
    batch: Callable[[int], Sequence[Batch]]
    identity: Callable[[int], str]
    objective: Callable[[Batch], tuple[Tensor, int]]
    forward_backward: Callable[[Sequence[Batch]], Tensor]
    clip: Callable[[], Tensor]
    held_out: Callable[[], Iterable[Batch]] | None
    metrics: Callable[[float, int], dict[str, float]]
    flops: Callable[[Batch], float] | None
    save: Callable[[Path], None]
    compute_dtype: torch.dtype
    steps_per_epoch: int
    samples: Callable[[int], list[Sample]] | None
    unit: str = "tokens"
    notes: list[str] = field(default_factory=list)
    step: int = 0


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. ``loss`` is the mean over the step's supervised units, ``size`` its units of work."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    size: int
    supervised: int
    seconds: float
    peak_memory_bytes: int
    flops: float


def train(run: Run) -> Iterator[StepResult]:
    """Take the steps that are left, giving each one's result when it is done.

    Raises:
        RunError: the loss or the gradient isn't finite; nothing was updated by that step.
    """
    run.model.train()
    while run.step < run.steps:
        yield _take_step(run)


def _take_step(run: Run) -> StepResult:
    started, step = time.perf_counter(), run.step
    # Dropout's masks are a function of (seed, step) too, so that resuming needs no generator state.
    torch.manual_seed(run.recipe.run.seed * 1_000_003 + step)
    batches = run.batch(step)
    loss = run.forward_backward(batches).item()
    norm = run.clip().item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        run.optimizer.zero_grad(set_to_none=True)
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm} (loss {loss:.4f})"
        raise RunError(
            f"step {step + 1}: {what} is not finite, at {run.identity(step)}; lower the learning rate or look at that data"
        )
    for group in run.optimizer.param_groups:
        group["lr"] = run.rate(step)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step = step + 1
    return StepResult(
        step=run.step,
        loss=loss,
        learning_rate=run.rate(step),
        grad_norm=norm,
        size=sum(batch.size for batch in batches),
        supervised=sum(batch.supervised for batch in batches),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory(run.device),
        flops=sum(run.flops(batch) for batch in batches) if run.flops else 0.0,
    )


def accumulate(objective: Callable[[Batch], tuple[Tensor, int]], batches: Sequence[Batch]) -> Tensor:
    """Gradients of the mean over all micro-batches' supervised units; gives that mean.

    Dividing each micro-batch's sum by the whole count makes accumulation exact for any lengths and any last window.
    """
    count = sum(batch.supervised for batch in batches)
    assert count > 0, "a batch without anything to learn"
    total = torch.zeros(())
    for batch in batches:
        loss = objective(batch)[0] / count
        loss.backward()
        total = total.to(loss.device) + loss.detach()
    return total


@torch.no_grad()
def evaluate(run: Run, progress: Callable[[int], None] = lambda done: None) -> dict[str, float]:
    """The run's metrics over the held-out data; every unit counts once."""
    assert run.held_out is not None
    was_training = run.model.training
    run.model.eval()
    total, count = 0.0, 0
    for batch in run.held_out():
        loss, supervised = run.objective(batch)
        total, count = total + loss.item(), count + supervised
        progress(batch.size)
    run.model.train(was_training)
    return run.metrics(total, count)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors held on the accelerator, or that this process held resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # where there is one: ru_maxrss is inherited from the parent process
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
