"""Which tensor differs first, along the forward and then the backward, where a set of techniques fails."""

from __future__ import annotations

from trainwright.recipe import InputError
from trainwright.verify.job import Job
from trainwright.verify.proof import Blame, Prover
from trainwright.verify.running import Broken

ALIKE = {"fp32": 1e-3, "bf16": 0.1, "pure_bf16": 0.1, "fp16": 0.1, "fp64": 1e-7}  # relative, of a module's mean square
UNSEEN = {"compile", "packing"}  # fused, or with other paddings: module outputs don't compare


def first_difference(prover: Prover, blame: Blame, job: Job) -> str:
    """In words; empty where no module's output tells."""
    if UNSEEN & {one.name for one in blame.techniques}:
        return ""
    try:
        mine = prover.runner.run(blame.job.but(watch=True, resume=False))
        plain = prover.runner.run(prover.plain(blame.job).but(watch=True, separate=blame.job.separate))
    except (InputError, Broken):
        return ""
    bound = ALIKE[prover.facts.precision(job)]
    return _first("the output of {} differs first in the forward", mine.outputs, plain.outputs, bound) or _first(
        "the gradient of {}'s output differs first in the backward", mine.inner, plain.inner, bound
    )


def _first(words: str, mine: dict[str, float], plain: dict[str, float], bound: float) -> str:
    for name, expected in plain.items():
        if name in mine and abs(mine[name] - expected) > bound * abs(expected):
            return words.format(name) + f": its mean square is {mine[name]:.4g} instead of {expected:.4g}"
    return ""
