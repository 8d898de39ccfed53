"""What a recipe has switched on that should not change the answer, in the order in which ``build`` applies it.

Each technique says how a job looks without it. ``exact`` ones leave every operation as it is, so that all bits must agree;
``order`` ones sum the same numbers in another order or another way; ``precision`` ones round more, and the plain run has them,
too. A base in 4 bits is held against the same values kept plainly: that is exact.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from trainwright.recipe import TorchOptimizer
from trainwright.verify.facts import Facts
from trainwright.verify.job import Job

Kind = Literal["exact", "order", "precision"]


@dataclass(frozen=True)
class Technique:
    """One of them.

    on       whether a job has it
    without  the job without it
    """

    name: str
    key: str
    kind: Kind
    on: Callable[[Job, Facts], bool]
    without: Callable[[Job, Facts], Job]


def _keys(**values: object) -> Callable[[Job, Facts], Job]:
    """Without it, these keys (with __ for the dot) have these values."""
    dotted = {name.replace("__", "."): value for name, value in values.items()}
    return lambda job, facts: job.with_keys(dotted)


def _accumulates(job: Job, facts: Facts) -> bool:
    return divides(job, facts) and not facts.batch_norm


def divides(job: Job, facts: Facts) -> bool:
    """Whether a step has several micro-batches."""
    section = job.recipe.parallel
    assert section.data != "auto"
    return facts.micro_batch(job) * section.data < job.recipe.training.batch_size


def _at_once(job: Job, facts: Facts) -> Job:
    section = job.recipe.parallel
    assert section.data != "auto"
    return job.with_keys({"training.micro_batch_size": job.recipe.training.batch_size // section.data})


def _one_data_rank(job: Job, facts: Facts) -> Job:
    """The same micro-batches over all ranks: BatchNorm takes its statistics from those."""
    section = job.recipe.parallel
    assert section.data != "auto"
    size = facts.micro_batch(job) * section.data
    return job.with_keys({"parallel.data": 1, "parallel.zero": 0, "training.micro_batch_size": size})


LOW = ("bf16", "pure_bf16", "fp16")
TECHNIQUES = (
    Technique("packing", "data.packing", "order", lambda job, facts: facts.packs and not job.separate,
              lambda job, facts: job.but(separate=True)),
    Technique("own kernels", "run.kernels", "order", lambda job, facts: facts.kernels and job.recipe.run.kernels != "off",
              _keys(run__kernels="off")),
    Technique("checkpointing", "memory.checkpointing", "exact", lambda job, facts: job.recipe.memory.checkpointing != "none",
              _keys(memory__checkpointing="none", memory__every=1, memory__blocks=None)),
    Technique("streamed weights", "memory.frozen", "exact", lambda job, facts: job.recipe.memory.frozen == "stream",
              _keys(memory__frozen="resident")),
    Technique("4-bit base", "adapt.base", "exact", lambda job, facts: getattr(job.recipe.adapt, "base", "") == "4bit",
              lambda job, facts: job.but(rounded=True).with_keys({"adapt.base": "plain"})),
    Technique("8-bit optimizer states", "memory.optimizer_states", "precision",
              lambda job, facts: job.recipe.memory.optimizer_states == "8bit", _keys(memory__optimizer_states="plain")),
    Technique("offloaded optimizer states", "memory.optimizer_offload", "exact",
              lambda job, facts: job.recipe.memory.optimizer_offload != "none", _keys(memory__optimizer_offload="none")),
    Technique("optimizer in backward", "memory.optimizer_in_backward", "exact",
              lambda job, facts: job.recipe.memory.optimizer_in_backward, _keys(memory__optimizer_in_backward=False)),
    Technique("compile", "run.compile", "order", lambda job, facts: facts.compiles(job), _keys(run__compile="off")),
    Technique("low precision", "precision", "precision", lambda job, facts: facts.precision(job) in LOW,
              _keys(precision="fp32")),
    Technique("accumulation", "training.micro_batch_size", "order", _accumulates, _at_once),
    Technique("tensor parallel", "parallel.tensor", "order", lambda job, facts: job.recipe.parallel.tensor > 1,
              _keys(parallel__tensor=1)),
    Technique("pipeline parallel", "parallel.pipeline", "order", lambda job, facts: job.recipe.parallel.pipeline > 1,
              _keys(parallel__pipeline=1, parallel__schedule="1f1b")),
    Technique("offload to the CPU", "parallel.offload_optimizer", "order",
              lambda job, facts: job.recipe.parallel.offload_optimizer, _keys(parallel__offload_optimizer=False)),
    Technique("DeepSpeed", "parallel.engine", "order", lambda job, facts: job.recipe.parallel.engine == "deepspeed",
              _keys(parallel__engine="torch", parallel__offload_optimizer=False)),
    Technique("ZeRO", "parallel.zero", "order", lambda job, facts: job.recipe.parallel.zero > 0,
              _keys(parallel__zero=0, parallel__offload_optimizer=False)),
    Technique("data parallel", "parallel.data", "order", lambda job, facts: job.recipe.parallel.data != 1, _one_data_rank),
)  # fmt: skip


def conditioned(job: Job, facts: Facts) -> Job:
    """The job with an optimizer whose step isn't the sign of a rounding error, where a gradient is nearly zero.

    Adam and its kin divide by the root of squared gradients plus ``eps``; with ``eps`` of the size of a usual gradient, the
    step is as well-conditioned as the gradient. All runs of a proof have it.
    """
    section = job.recipe.optimizer
    usual = (job.recipe.training.clip_norm or 1.0) / math.sqrt(facts.learning)
    if isinstance(section, TorchOptimizer):
        if "eps" in inspect.signature(getattr(torch.optim, section.type, object)).parameters:
            return job.with_keys({"optimizer.arguments": {**section.arguments, "eps": usual}})
        return job
    eps: float | None = getattr(section, "eps", None)
    return job if eps is None or eps >= usual else job.with_keys({"optimizer.eps": usual})


def of(job: Job, facts: Facts) -> list[Technique]:
    """Those that a job has switched on."""
    return [technique for technique in TECHNIQUES if technique.on(job, facts)]


def exact(job: Job, facts: Facts) -> list[Technique]:
    """Of these, what leaves every operation as it is; a product with parts of a narrower table is another operation."""
    return [one for one in of(job, facts) if one.kind == "exact" and not (facts.narrow and one.key == "memory.frozen")]


def without(job: Job, facts: Facts, techniques: Sequence[Technique]) -> Job:
    """The job without some of them; what builds on one that is gone goes with it."""
    for technique in TECHNIQUES:
        if technique in techniques and technique.on(job, facts):
            job = technique.without(job, facts)
    return job


def described(technique: Technique, job: Job) -> str:
    """Its name with its setting: ``tensor parallel (parallel.tensor: 2)``."""
    value: object = job.recipe
    for name in technique.key.split("."):
        value = getattr(value, name)
    return f"{technique.name} ({technique.key}: {value})"
