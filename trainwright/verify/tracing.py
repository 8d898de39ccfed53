"""What a run does in its first steps, as whole tensors of the plain model's names; the same from one process or many."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainwright import build, checkpoint, loop
from trainwright.loop import Run
from trainwright.parallel import exchange
from trainwright.parallel.mesh import Mesh
from trainwright.pieces import Held
from trainwright.recipe.imports import import_function
from trainwright.verify import batches, dropping, four_bits, probing, seeing, watching
from trainwright.verify.job import Job

GONE = 1e30  # larger than any difference; JSON has no infinity
SCALARS, TENSORS = "trace.json", "trace.safetensors"
BEGIN, FIRST, LAST, END, AVERAGE, SAVED = "begin", "first gradient", "last gradient", "end", "average", "saved"
STATE = "state"


@dataclass(frozen=True)
class Trace:
    """What was seen; the tensors lie in a file, under names such as ``first gradient/lm_head.weight``.

    begin, end      every parameter and buffer, before the first and after the last step
    first, last gradient   of the first and of the last step, before clipping
    average         averaged weights, where the recipe has them
    saved           the tensors of the saved model's files
    state           what the optimizer keeps after the last step; nothing of DeepSpeed's

    faults    what is wrong with a batch by itself
    rows      for each step a number made of the rows that were trained on, in whatever order
    buffers   names of buffers
    learning  names of what learns
    decayed   names of what weight decay shrinks
    probes    see ``probing.probe``
    clipped   the norm of the whole gradient as the optimizer gets it, for each step
    draws     the first random numbers of each process
    skipped   why a step updated nothing; "" where it did
    outputs, inner  see ``watching``: of modules in the first step, of what they give and of its gradient
    resumed   tensors that are others after a checkpoint was read, and by how much of their size; None: that wasn't tried
    """

    folder: Path
    losses: list[float]
    norms: list[float]
    rates: list[float]
    supervised: list[int]
    faults: list[str]
    rows: list[int]
    held_out: dict[str, float]
    buffers: list[str]
    learning: list[str]
    decayed: list[str]
    resumed: dict[str, float] | None = None
    probes: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, float] = field(default_factory=dict)
    inner: dict[str, float] = field(default_factory=dict)
    clipped: list[float] = field(default_factory=list)
    draws: list[list[float]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def names(self, what: str) -> list[str]:
        """Of the tensors of a kind."""
        with safe_open(self.folder / TENSORS, "pt") as file:
            return [name.removeprefix(f"{what}/") for name in file.keys() if name.startswith(f"{what}/")]  # noqa: SIM118

    def tensors(self, what: str) -> dict[str, Tensor]:
        """The tensors of a kind, by name."""
        with safe_open(self.folder / TENSORS, "pt") as file:
            return {name: file.get_tensor(f"{what}/{name}") for name in self.names(what)}


def trace(job: Job, folder: Path) -> None:
    """Run a job in this process, which may be one of several; the first one leaves in ``folder`` what ``load`` reads.

    Raises:
        InputError: the recipe is refused. RunError: a loss isn't finite.
    """
    torch._dynamo.reset()  # what jobs before this one compiled counts towards a limit, beyond which nothing is compiled
    mesh = build.place(job.recipe)
    run = _assembled(job, mesh)
    tensors: dict[str, Tensor] = {}
    _keep(tensors, BEGIN, run, seeing.weights(run))
    rows, faults = batches.watch(run)
    clipped: list[float] = []
    steps, seen = _stepped(run, job, tensors, folder, clipped)
    found = {
        "losses": [step.loss for step in steps],
        "norms": [step.grad_norm for step in steps],
        "rates": [step.learning_rate for step in steps],
        "supervised": [step.supervised for step in steps],
        "faults": _all_names(run, iter(faults)),
        "rows": [int(number) for number in run.together([float(number) for number in rows])],
        "buffers": sorted(name for name, _ in run.model.named_buffers()),
        "learning": _all_names(run, (n.removeprefix("model.") for n in run.remember() if n.startswith("model."))),
        "decayed": _all_names(
            run, (n for group in run.optimizer.param_groups if group["weight_decay"] for n in group["names"])
        ),
        "clipped": clipped,
        "skipped": [step.skipped for step in steps],
        "notes": [f"{change.technique}: {change.summary}" for change in run.changes] + run.notes,
    }
    if seen is not None:
        found |= {"outputs": watching.gathered(run, seen.outputs), "inner": watching.gathered(run, seen.inner)}
    _keep(tensors, END, run, seeing.weights(run))
    _keep(tensors, AVERAGE, run, seeing.averages(run))
    _keep(tensors, STATE, run, seeing.states(run))
    found["held_out"] = loop.evaluate(run) if "held_out" in run.splits else {}
    _save(run, folder, tensors)
    found["draws"] = _draws(run)
    found["probes"] = probing.probe(run) if job.probe else {}
    found["resumed"] = _resumed(run, job, mesh, folder) if job.resume else None
    if run.rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
        (folder / SCALARS).write_text(json.dumps(found), encoding="utf-8")


def load(folder: Path) -> Trace:
    """What ``trace`` left."""
    return Trace(folder=folder, **json.loads((folder / SCALARS).read_text(encoding="utf-8")))


def _assembled(job: Job, mesh: Mesh) -> Run:
    run = build.assemble(job.recipe, mesh=mesh)
    seeing.calm(run)
    if job.rounded:
        four_bits.round_base(run)
    if not job.dropout:
        dropping.off(run.model)
    if job.separate:
        batches.separate(run)
    if job.prepare:
        import_function(job.prepare, "--prepare")(run)
    return run


def _stepped(
    run: Run, job: Job, tensors: dict[str, Tensor], folder: Path, clipped: list[float]
) -> tuple[list[loop.StepResult], watching.Watch | None]:
    """Take the steps; keeps the gradients of the first and last one, and writes a checkpoint before the last."""
    clip, last = run.clip, job.steps - 1
    seen = watching.watch(run.model) if job.watch else None
    gradients = seeing.gradients(run)

    def watched() -> Tensor:
        if run.step == 0:
            _keep(tensors, FIRST, run, gradients())
        if run.step == last:
            _keep(tensors, LAST, run, gradients())
        norm = clip()
        if run.recipe.parallel.engine == "torch":  # DeepSpeed clips inside of its step
            clipped.append(_norm(run))
        return norm

    run.clip = watched
    steps = []
    for step in islice(loop.train(run), job.steps):
        steps.append(step)
        if seen is not None:
            seen.stop()
        if job.resume and run.step == last:
            _write(run, folder)
    run.clip = clip
    return steps, seen


def _keep(tensors: dict[str, Tensor], what: str, run: Run, held: Mapping[str, Held]) -> None:
    """Copies of whole tensors, at the first process."""
    for name, value in exchange.collect(held, run.device):
        if value is not None:
            tensors[f"{what}/{name}"] = value.cpu().clone()


def _norm(run: Run) -> float:
    """Of the whole gradient as it is now, another way than the run's own."""
    squares = [float(one.tensor.double().square().sum()) for one in run.gradients().values() if one.speaks]
    return float(sum(run.share(sum(squares))) ** 0.5)


def _draws(run: Run) -> list[list[float]]:
    """What each process draws for dropout."""
    loop.seed(run, 0)
    return run.share(torch.rand(2).tolist())


def _all_names(run: Run, mine: Iterator[str]) -> list[str]:
    """The names that any process has."""
    return sorted({name for names in run.share(sorted(mine)) for name in names})


def _save(run: Run, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Save the model as the run would, and read its files again."""
    target = folder / "model"
    with run.averaged():
        run.save(target)
    if run.rank == 0:
        for file in sorted(target.rglob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensors[f"{SAVED}/{name}"] = opened.get_tensor(name)


def _write(run: Run, folder: Path) -> None:
    team = checkpoint.Team(run.rank, len(run.share(None)), folder.name)
    checkpoint.write_held(folder, run.step, run.remember(), {}, team)


def _resumed(run: Run, job: Job, mesh: Mesh, folder: Path) -> dict[str, float]:
    """Take the last step once more, in a run that begins from the checkpoint; the tensors that are others then.

    With each, the largest difference that a process sees, relative to its part of the tensor. What was compiled serves again.
    """
    again = _assembled(job, mesh)
    again.recall(checkpoint.Reader(checkpoint.path_of(folder, job.steps - 1)), True)
    again.step = job.steps - 1
    for _ in islice(loop.train(again), 1):
        pass
    mine, theirs = run.remember(), again.remember()
    different = {name: _apart(one, theirs.get(name)) for name, one in mine.items()}
    told = run.share({name: apart for name, apart in different.items() if apart})
    return {name: max(one.get(name, 0.0) for one in told) for names in told for name in names}


def _apart(one: Held, other: Held | None) -> float:
    """Relative; 0 where every bit is the same, and huge where the other is missing."""
    if other is None:
        return GONE
    if same_bits(one.tensor, other.tensor):
        return 0.0
    mine, theirs = one.tensor.double(), other.tensor.double()
    return float((mine - theirs).norm() / mine.norm().clamp(min=1e-30))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same; NaN is the same as NaN."""
    return one.shape == other.shape and bool(torch.equal(one.nan_to_num(), other.nan_to_num()))
