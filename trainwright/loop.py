"""The training loop: a generator over a ``Run``. No technique is named here; ``build`` puts them into the callables."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainwright.models.contract import Change
from trainwright.pieces import Held, Piece
from trainwright.recipe import Recipe, RunError


class Batch(Protocol):
    """What a micro-batch must tell of itself."""

    @property
    def supervised(self) -> int:
        """How many terms its loss sums."""

    @property
    def size(self) -> int:
        """How many units of work it holds (tokens without padding, or samples)."""


class Updates(Protocol):
    """What the loop needs of an optimizer, such as torch's."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """With ``lr`` and ``update``, the step's number, which the loop sets, and ``peak``, which the schedule multiplies."""

    def step(self) -> Any:
        """Update what learns."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""

    def register_step_post_hook(self, hook: Callable[..., Any]) -> Any:
        """Have something called after each step."""


class Stored(Protocol):
    """A checkpoint that is read piece by piece."""

    def names(self) -> list[str]:
        """Of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor."""

    def load(self, name: str, piece: Piece | None = None) -> Tensor:
        """A box of it, by default all."""


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, what should follow, and what the model says."""

    prompt: str
    expected: str
    answer: str


class Extra(Protocol):
    """What a technique must remember in checkpoints besides weights and the optimizer's state."""

    def state(self) -> dict[str, Tensor]:
        """Its tensors: those that belong to a parameter under its name, and others, equal in all processes."""

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Set it to what ``state`` gave."""


@dataclass
class Run:
    """A training program, ready to go: what ``build.assemble`` makes and ``train`` drives.

    step      optimizer steps done; the global batch of a step depends on (seed, step) alone
    factor    the learning rate of a step, as a multiple of each parameter group's peak
    splits    what is never trained on: held_out, test
    measure   batches of a split to its metrics
    rank      this process among all of the run
    share     what every process says (JSON), in the order of their ranks
    agree     whether any process says yes
    together  sums of numbers over all processes that share the data
    stream    makes the random numbers of this process others than those of processes with other parts of the data
    fingerprint  of the data: a run can't be resumed with other data
    averaged  a context in which the model holds the weights to be evaluated and saved
    save      writes the model in the format of its method; every process calls it
    gradients  of a whole step, between ``forward_backward`` and the optimizer's step; by name
    weights   all parameters, tied ones once, and the buffers that are saved; by name
    remember  what a checkpoint needs, by name; recall sets it again, or only the weights of it
    flops     counts the work of a micro-batch, where that is known
    pictures  draws what the model makes of a split, and gives the files
    judge     a step's loss and gradient norm to why nothing is to be updated, "" if it is; raises RunError where it can't go on
    """

    recipe: Recipe
    model: nn.Module
    changes: list[Change]
    device: torch.device
    optimizer: Updates
    factor: Callable[[int], float]
    steps: int
    steps_per_epoch: int
    batch: Callable[[int], Sequence[Batch]]
    identity: Callable[[int], str]
    forward_backward: Callable[[Sequence[Batch]], Tensor]
    clip: Callable[[], Tensor]
    splits: Mapping[str, Callable[[], Iterable[Batch]]]
    measure: Callable[[Iterable[Batch], Callable[[int], None]], dict[str, float]]
    save: Callable[[Path], None]
    gradients: Callable[[], dict[str, Held]]
    weights: Callable[[], dict[str, Held]]
    remember: Callable[[], dict[str, Held]]
    recall: Callable[[Stored, bool], None]
    compute_dtype: torch.dtype
    unit: str
    fingerprint: str
    flops: Callable[[Batch], float] | None = None
    samples: Callable[[int], list[Sample]] | None = None
    pictures: Callable[[Path, str, Mapping[str, float]], list[Path]] | None = None
    averaged: Callable[[], AbstractContextManager[object]] = nullcontext
    extra: Extra | None = None
    judge: Callable[[float, float], str] = field(default_factory=lambda: finite)
    rank: int = 0
    share: Callable[[Any], list[Any]] = lambda value: [value]
    agree: Callable[[bool], bool] = lambda mine: mine
    together: Callable[[list[float]], list[float]] = lambda numbers: numbers
    stream: int = 0
    notes: list[str] = field(default_factory=list)
    step: int = 0


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    loss     the mean over the step's supervised units
    size     its units of work
    skipped  why nothing was updated, if so; the step counts all the same
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    size: int
    supervised: int
    seconds: float
    peak_memory_bytes: int
    flops: float
    skipped: str = ""


def finite(loss: float, norm: float) -> str:
    """The usual judgement of a step: its loss and gradient are numbers.

    Raises:
        RunError: one isn't.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return ""
    what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm} (loss {loss:.4f})"
    raise RunError(f"{what} is not finite; lower the learning rate or look at the step's data")


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
    seed(run, step)
    batches = run.batch(step)
    factor = run.factor(step)
    for group in run.optimizer.param_groups:  # before the backward, in which some optimizers update
        group["lr"], group["update"] = group["peak"] * factor, step
    loss = run.forward_backward(batches).item()
    norm = run.clip().item()
    try:
        skipped = run.judge(loss, norm)
    except RunError as error:
        run.optimizer.zero_grad(set_to_none=True)
        raise RunError(f"step {step + 1}: {error} (its data: {run.identity(step)})") from None
    if not skipped:
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step = step + 1
    size, supervised = run.together([sum(batch.size for batch in batches), sum(batch.supervised for batch in batches)])
    return StepResult(
        step=run.step,
        loss=loss,
        learning_rate=run.optimizer.param_groups[0]["lr"],
        grad_norm=norm,
        size=round(size),
        supervised=round(supervised),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory(run.device),
        flops=sum(run.flops(batch) for batch in batches) if run.flops else 0.0,
        skipped=skipped,
    )


STREAM = 0x9E3779B1  # far from any other step's seed, also in the 32 bits that the CPU's generator looks at


def seed(run: Run, step: int) -> None:
    """Seed the generators that a step draws from: dropout's masks are a function of (seed, step) too.

    NOTE: not ``torch.manual_seed``, which notes a stack trace at each call as long as CUDA is there but unused.
    """
    number = run.recipe.run.seed * 1_000_003 + step + run.stream * STREAM
    torch.default_generator.manual_seed(number)
    if run.device.type != "cpu":
        torch.get_device_module(run.device).manual_seed(number)


def count_all(count: Callable[[Batch], Tensor | int], batches: Sequence[Batch], total: Callable[[Tensor], Tensor]) -> Tensor:
    """What the sums of a step's losses are divided by, float64, over all processes.

    Raises:
        RunError: nothing counts in the whole batch.
    """
    counts = total(torch.stack([torch.as_tensor(count(batch), dtype=torch.float64) for batch in batches]).sum(0))
    if not counts.gt(0).all():
        raise RunError("nothing to learn in a batch: every target is ignored, or weighs nothing")
    return counts


def accumulate(
    objective: Callable[[Batch], Tensor],
    count: Callable[[Batch], Tensor | int],
    batches: Sequence[Batch],
    *,
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    portion: Callable[[bool], AbstractContextManager[object]] = lambda last: nullcontext(),
    backward: Callable[[Tensor, bool], object] = lambda loss, last: loss.backward(),
) -> Tensor:
    """Gradients of the mean loss over all micro-batches; gives that mean.

    Dividing each micro-batch's sum by the whole count makes accumulation exact for any lengths and any last window. A loss
    of several terms has a sum and a count for each.

    Args:
        objective: a micro-batch to its loss sums, 0-dim or (terms,).
        count: a micro-batch to what those are divided by, known before the forward.
        total: the sum of a tensor over all processes that share the batch.
        portion: what each micro-batch runs in; told whether it is the last of the step.
        backward: adds a loss's gradients; told the same.

    Raises:
        RunError: nothing counts in the whole batch.
    """
    counts = count_all(count, batches, total)
    mean = torch.zeros(())
    for number, batch in enumerate(batches, 1):
        last = number == len(batches)
        with portion(last):
            sums = objective(batch)
            loss = (sums / counts.to(sums)).sum()
            backward(loss, last)
        mean = mean.to(loss.device) + loss.detach()
    return total(mean)


@torch.no_grad()
def evaluate(run: Run, split: str = "held_out", progress: Callable[[int], None] = lambda done: None) -> dict[str, float]:
    """The run's metrics over a split; every unit counts once."""
    was_training = run.model.training
    run.model.eval()
    with run.averaged():
        values = run.measure(run.splits[split](), progress)
    run.model.train(was_training)
    return values


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors held on the accelerator, or that this process held resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident_peak(int(4 * time.monotonic()))


@lru_cache(maxsize=1)
def _resident_peak(quarter_second: int) -> int:
    """Read at most four times a second: it takes as long as a small layer."""
    status = Path("/proc/self/status")  # where there is one: ru_maxrss is inherited from the parent process
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
