"""What a run does in a few steps, whole tensors of all processes put together: the same recipe alone and on many must agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests import ranks, small, tiny
from trainwright import build, loop
from trainwright.parallel import exchange

KINDS: dict[str, Callable[..., Any]] = {"text": tiny.recipe, "samples": small.recipe}


@dataclass(frozen=True)
class Trace:
    """Of a few steps: the gradients of the first and the last one, before clipping; the weights after the last one."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    sizes: list[tuple[int, int]]
    first_gradients: dict[str, Tensor]
    last_gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    held_out: dict[str, float]


def trace(kind: str, folder: str, changes: dict[str, Any]) -> Trace:
    """Train a recipe in this process, which may be one of several; whole tensors are at rank 0."""
    run = build.assemble(KINDS[kind](Path(folder), **changes))
    found: list[dict[str, Tensor]] = []
    clip = run.clip

    def watched() -> Tensor:
        if run.step in (0, run.steps - 1):
            found.append(whole(run, run.gradients()))
        return clip()

    run.clip = watched
    steps = list(loop.train(run))
    weights = whole(run, {name: one for name, one in run.remember().items() if not name.startswith("optimizer.")})
    return Trace(
        [step.loss for step in steps],
        [step.grad_norm for step in steps],
        [step.learning_rate for step in steps],
        [(step.size, step.supervised) for step in steps],
        *found,
        weights,
        loop.evaluate(run) if "held_out" in run.splits else {},
    )


def whole(run: loop.Run, held: Any) -> dict[str, Tensor]:
    """Copies of whole tensors at rank 0."""
    return {name: value.clone() for name, value in exchange.gather_all(held, run.device).items()}


def many(count: int, kind: str, folder: Path, changes: dict[str, Any]) -> list[Trace]:
    """The same on several processes."""
    return ranks.run(count, trace, kind, str(folder), changes)


def agree(found: Trace, expected: Trace, *, tolerance: float = 1e-5) -> None:
    """Every loss, norm, gradient and weight; each tensor's error relative to its largest number. Dead runs don't pass."""
    assert found.losses == pytest_approx(expected.losses, tolerance)
    assert found.norms == pytest_approx(expected.norms, tolerance)
    assert found.rates == expected.rates
    assert found.sizes == expected.sizes
    assert found.held_out == pytest_approx(expected.held_out, tolerance)
    assert expected.losses[0] != expected.losses[-1], "the loss doesn't move"
    for what in ("first_gradients", "last_gradients", "weights"):
        ours, theirs = getattr(found, what), getattr(expected, what)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].shape == value.shape, name
            assert what != "last_gradients" or value.any(), f"{name} has no gradient"
            error = (ours[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-12)
            assert error <= tolerance, f"{what} of {name} differ by {error:.2e}"


def pytest_approx(value: Any, tolerance: float) -> Any:
    import pytest

    return pytest.approx(value, rel=tolerance)


def quiet() -> None:
    """Processes of tests share two cores."""
    torch.set_num_threads(1)
