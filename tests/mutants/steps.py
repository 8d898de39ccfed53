"""Bugs of a training step: what a loss is divided by, how gradients are put together, clipped and used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

import trainwright.steps as steps_
from trainwright import build, loop, losses, optim, spread
from trainwright.losses.tokens import STRIDE
from trainwright.parallel import deepspeed, norm, pipeline_run, tensor, zero_units
from trainwright.parallel.gradients import _Shared
from trainwright.parallel.sharded import _Sharded

Context = Any  # what patch.object gives


def _dividing(factor: Callable[..., Any]) -> Context:
    """``accumulate`` with each micro-batch's sums times ``factor(count, batch, batches, total)``."""
    true = loop.accumulate

    def accumulate(objective: Any, count: Any, batches: Sequence[Any], **more: Any) -> Tensor:
        total = more.get("total", lambda value: value)

        def wrong(batch: Any) -> Tensor:
            sums = objective(batch)
            return sums * torch.as_tensor(factor(count, batch, batches, total)).to(sums)

        return true(wrong, count, batches, **more)

    return patch.object(steps_, "accumulate", accumulate)


def mean_of_means() -> Context:
    def factor(count: Any, batch: Any, batches: Sequence[Any], total: Any) -> Any:
        return loop.count_all(count, batches, total) / loop.count_all(count, [batch], total) / len(batches)

    return _dividing(factor)


def last_window() -> Context:
    """Every window is divided as if it had as many micro-batches as the longest."""
    longest = [1]

    def factor(count: Any, batch: Any, batches: Sequence[Any], total: Any) -> float:
        longest[0] = max(longest[0], len(batches))
        return len(batches) / longest[0]

    return _dividing(factor)


def only_the_last_micro_batch_is_shared() -> Context:
    """As with a ``no_sync`` that covers too much: what earlier portions gave is lost where ranks share data."""
    true = _Shared.portion

    @contextmanager
    def portion(self: Any, last: bool) -> Iterator[None]:
        with true(self, last):
            yield
        if not last:
            for unit in self._units:
                for member in unit.members:
                    member.parameter.grad = None

    return patch.object(_Shared, "portion", portion)


def own_count_of_a_rank() -> Context:
    true = loop.count_all

    def count_all(count: Any, batches: Sequence[Any], total: Any) -> Tensor:
        ranks = total(torch.ones((), dtype=torch.float64))
        return true(count, batches, lambda value: value) * ranks

    return patch.object(loop, "count_all", count_all)


def gradient_not_reduced() -> Context:
    return patch.object(zero_units, "start_all_reduce", lambda values, group: lambda: values)


def gradient_averaged() -> Context:
    return patch.object(zero_units, "start_all_reduce", _averaging(zero_units.start_all_reduce))


def shard_averaged() -> Context:
    return patch.object(zero_units, "start_reduce_scatter", _averaging(zero_units.start_reduce_scatter))


def _averaging(true: Any) -> Any:
    def start(values: Tensor, group: dist.ProcessGroup) -> Any:
        landing = true(values, group)
        return lambda: landing() / group.size()

    return start


def deepspeed_averages() -> Context:
    def backward(self: Any, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    return patch.object(deepspeed.Engine, "backward", backward)


def deepspeed_second_group_at_its_peak() -> Context:
    """The rate of groups after the first is set in copies that nobody reads."""

    def groups(self: Any) -> list[dict[str, Any]]:
        first, *others = self.engine.optimizer.param_groups
        return [first, *map(dict, others)]

    return patch.object(deepspeed.Stepper, "param_groups", property(groups))


def replicated_counted_twice() -> Context:
    true = spread._axes
    return patch.object(spread, "_axes", lambda places, name: true(places, name) | {"tensor"})


def norm_of_a_shard() -> Context:
    """Each rank clips by the norm of what it updates."""
    true = spread.clip

    def clip(places: Any, largest: float | None) -> Tensor:
        named = places.sharing.named
        if not any(places.sharing.splits(name) for name, _ in named):
            return true(places, largest)
        return optim.clip_([p for _, p in named], largest)

    return patch.object(spread, "clip", clip)


def clipped_too_late() -> Context:
    """The norm is looked at, but the gradients are scaled when they have been used."""
    true = optim.clip_
    return patch.object(optim, "clip_", lambda parameters, largest: true(parameters, None))


def ranks_do_not_clip() -> Context:
    return patch.object(norm, "clip_", lambda gradients, mesh, largest: norm.global_norm(gradients, mesh))


def summands_not_summed() -> Context:
    """Norms, biases and factors that tensor ranks have whole keep their own part of the gradient."""
    return patch.object(tensor, "sum_partial", lambda gradients, axis: None)


def ends_not_summed() -> Context:
    return patch.object(pipeline_run, "sum_ends_", lambda split, axis, tensors: None)


def pipeline_scales() -> Context:
    """Gradients are divided by the number of micro-batches, though the loss is a sum already."""
    true = pipeline_run.Pipe._loss

    def scaled(self: Any, out: Tensor, number: Tensor) -> Tensor:
        loss = true(self, out, number)
        return loss.detach() + (loss - loss.detach()) / len(self._batches)

    return patch.object(pipeline_run.Pipe, "_loss", scaled)


def shard_not_gathered() -> Context:
    return patch.object(_Shared, "updated", lambda self: None)


def stale_parameters() -> Context:
    """The optimizer got its parameters before they were divided."""
    true = _Sharded.__init__

    def init(self: Any, *arguments: Any) -> None:
        true(self, *arguments)
        self.named = [(name, nn.Parameter(p.detach().clone())) for name, p in self.named]

    return patch.object(_Sharded, "__init__", init)


def schedule_by_world_size() -> Context:
    true = build.schedules.factor

    def factor(section: Any, count: int) -> Any:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        rate = true(section, count)
        return lambda step: rate(min(step * ranks, count - 1))

    return patch.object(build.schedules, "factor", factor)


def decay_on_everything() -> Context:
    def split(members: Any, settings: Any, section: Any) -> list[dict[str, Any]]:
        names, params = [name for name, _ in members], [p for _, p in members]
        decay = section.weight_decay
        return [{"params": params, "names": names, "weight_decay": decay, "peak": section.learning_rate}] if members else []

    return patch.object(optim, "_split", split)


def smoothing_by_the_wrong_count() -> Context:
    """The smoothed part is a mean over padding, too."""
    true = losses.token_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, section: Any, *more: Any) -> tuple[Tensor, int]:
        plain, count = true(hidden, weight, labels, section.model_copy(update={"label_smoothing": 0.0}), *more)
        smooth, _ = true(hidden, weight, labels, section, *more)
        return plain + (smooth - plain) * (count / (count + -count % STRIDE)), count

    return _in_losses(loss)


def smoothing_without_gradient() -> Context:
    true = losses.token_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, section: Any, *more: Any) -> tuple[Tensor, int]:
        plain, count = true(hidden, weight, labels, section.model_copy(update={"label_smoothing": 0.0}), *more)
        smooth, _ = true(hidden, weight, labels, section, *more)
        return plain + (smooth - plain).detach(), count

    return _in_losses(loss)


def _in_losses(loss: Any) -> Context:
    return patch.object(losses, "token_cross_entropy", loss)


def same_random_numbers() -> Context:
    """Ranks with other data draw the same masks."""
    true = loop.seed

    def seed(run: Any, step: int) -> None:
        stream, run.stream = run.stream, 0
        true(run, step)
        run.stream = stream

    return patch.object(loop, "seed", seed)
