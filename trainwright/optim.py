"""Optimizers from torch, parameter groups, and schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from trainwright.recipe import SGD as SGDSection
from trainwright.recipe import AdamW, InputError, Schedule

LearningRate = Callable[[int], float]


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Two groups: matrices (and larger) with weight decay; norms and biases, that is vectors, without.

    Raises:
        InputError: no parameter is trainable.
    """
    trainable = [(name, p) for name, p in named if p.requires_grad]
    if not trainable:
        raise InputError("nothing to train: every parameter is frozen; see the section adapt")
    groups = []
    for decayed, decay in ((True, weight_decay), (False, 0.0)):
        members = [(name, p) for name, p in trainable if (p.ndim >= 2) is decayed]
        if members:
            groups.append({"params": [p for _, p in members], "names": [name for name, _ in members], "weight_decay": decay})
    return groups


def make_optimizer(groups: list[dict], section: AdamW | SGDSection) -> torch.optim.Optimizer:
    """torch's fused optimizer; the learning rate is set before each step by the loop."""
    if isinstance(section, AdamW):
        return torch.optim.AdamW(groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=True)
    return torch.optim.SGD(groups, lr=section.learning_rate, momentum=section.momentum, nesterov=section.nesterov, fused=True)


def schedule(section: Schedule, peak: float, steps: int) -> LearningRate:
    """The learning rate of step 0 .. steps - 1.

    Warmup rises linearly and reaches the peak at its last step, so that no step is wasted on a rate of zero; then the rate
    falls from the peak to ``final * peak``, which it would reach at step ``steps``.
    """
    warmup = round(section.warmup * steps) if section.warmup < 1 else int(section.warmup)
    if warmup >= steps and warmup > 0:
        raise InputError(f"schedule.warmup: {warmup} warmup steps, but the run has only {steps}; make it less")
    shape = {"constant": lambda t: 1.0, "linear": lambda t: 1.0 - t, "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2}
    fall = shape[section.name]

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return peak * (section.final + (1 - section.final) * fall(progress))

    return rate


def clip_(parameters: list[nn.Parameter], largest: float | None) -> Tensor:
    """Scale the gradients so that their global 2-norm is at most ``largest``; gives the norm before, 0-dim float32."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=None)
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm
