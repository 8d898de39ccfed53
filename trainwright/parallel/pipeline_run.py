"""Runs a pipeline: torch's schedules carry hidden states; the micro-batches are at every process already."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle, ScheduleLoopedBFS
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.nn.functional import pad

from trainwright.models.contract import Absent
from trainwright.parallel.mesh import Axis
from trainwright.parallel.pipeline import Place, Split, put, sum_ends_, where

Batch = Any
Program = PipelineScheduleSingle | PipelineScheduleMulti
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DIMS = 8  # of a hidden state, at most
PROGRAMS = 4  # kept: each has buffers for all of its micro-batches


@dataclass(frozen=True)
class Hidden:
    """The kind of a tensor that goes from one stage to the next."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(eq=False)
class Pipe:
    """A pipeline ready to run; see ``make``."""

    split: Split
    model: nn.Module
    axis: Axis
    forward: Callable[[nn.Module, Batch, Tensor | None], Tensor]
    sums: Callable[[Tensor, Batch], Tensor]
    shape: Callable[[Batch], Hashable]
    device: torch.device
    portion: Callable[[bool], AbstractContextManager[object]]
    _seen: dict[Hashable, dict[int, Hidden]] = field(default_factory=dict)
    _programs: dict[Hashable, Program] = field(default_factory=dict)
    _places: dict[str, list[Place]] = field(default_factory=dict)
    _batches: Sequence[Batch] = ()
    _counts: Tensor | float = 1.0

    def forward_backward(self, batches: Sequence[Batch], counts: Tensor | float) -> Tensor:
        """Gradients of the sum over all micro-batches of ``(sums / counts).sum()``; gives that sum, float64, at every stage.

        Any number of micro-batches, each of any shape; all processes of the pipeline must be given the same.
        ``finish`` is still to be called.
        """
        self._learn_shapes(batches)
        self._batches, self._counts = batches, counts
        program, numbers = self._program(), torch.arange(len(batches))
        losses: list[Tensor] = []
        with self.portion(False):  # it holds many backwards
            program.step(number=numbers, target=numbers, losses=losses, return_outputs=False)
        self._batches = ()
        return self._tell(losses)

    def finish(self, named: Iterable[tuple[str, nn.Parameter]] | None = None) -> None:
        """Sum the gradients of parameters that two stages share, after the backward; both ends get the same bits.

        Args:
            named: what the optimizer updates, where that isn't the model's own parameters but parts of them, with gradients
                that are summed over the axis ``data`` already; both ends have the same parts.
        """
        trained = dict(self.model.named_parameters() if named is None else named)
        gradients = {}
        for end in self.split.shared:
            parameter = trained.get(end.name)
            if parameter is not None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradients[end.name] = parameter.grad
        sum_ends_(self.split, self.axis, gradients)

    def outputs(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Each batch with what the last stage makes of it, at the last process; nothing at the others, which must iterate, too.

        Without gradients, in evaluation mode. Any number of batches of any shapes, the same at all processes of the pipeline.
        """
        waiting = iter(batches)
        while window := list(islice(waiting, self.axis.size)):
            yield from self._evaluate(window)

    def _learn_shapes(self, batches: Sequence[Batch]) -> None:
        """Send batches of new shapes through once, so that both ends of each hop know what to expect without a word."""
        new = {self.shape(batch): batch for batch in batches if self.shape(batch) not in self._seen}
        for batch in new.values():
            self._evaluate([batch])

    @torch.no_grad()
    def _evaluate(self, batches: Sequence[Batch]) -> list[tuple[Batch, Tensor]]:
        training = self.model.training
        self.model.eval()
        outputs, sends = [], []
        for stage in self.split.mine:
            for batch in batches:
                x = self._receive(stage) if stage else None
                with self._only(stage):
                    out = self.forward(self.model, batch, x).contiguous()
                seen = self._seen.setdefault(self.shape(batch), {})
                seen |= {stage + 1: Hidden(tuple(out.shape), out.dtype)}
                if x is not None:
                    seen[stage] = Hidden(tuple(x.shape), x.dtype)
                if self._is_last(stage):
                    outputs.append((batch, out))
                else:
                    sends += self._send(out, stage)
        for work, _ in sends:
            work.wait()
        self.model.train(training)
        return outputs

    def _send(self, out: Tensor, stage: int) -> list[tuple[Any, Tensor]]:
        """A header and the tensor to the next stage; with both, because they must live until they are sent."""
        header = torch.zeros(2 + DIMS, dtype=torch.int64)
        header[: 2 + out.ndim] = torch.tensor([DTYPES.index(out.dtype), out.ndim, *out.shape])
        peer = (stage + 1) % self.axis.size
        return [(dist.isend(what, group=self.axis.group, group_dst=peer), what) for what in (header.to(self.device), out)]

    def _receive(self, stage: int) -> Tensor:
        peer = (stage - 1) % self.axis.size
        header = torch.empty(2 + DIMS, dtype=torch.int64, device=self.device)
        dist.recv(header, group=self.axis.group, group_src=peer)
        kind, ndim, *shape = header.tolist()
        x = torch.empty(shape[:ndim], dtype=DTYPES[kind], device=self.device)
        dist.recv(x, group=self.axis.group, group_src=peer)
        return x

    def _is_last(self, stage: int) -> bool:
        return stage == len(self.split.parts) - 1

    @contextmanager
    def _only(self, stage: int) -> Iterator[None]:
        """Only one stage's parts of the model, where this process has several: the others are absent meanwhile."""
        others = [name for other in self.split.mine if other != stage for name in self.split.parts[other]]
        if others and not self._places:
            self._places = where(self.model, [name for mine in self.split.mine for name in self.split.parts[mine]])
        modules = {name: self.model.get_submodule(name) for name in others}
        for name in others:
            put(self._places[name], Absent())
        try:
            yield
        finally:
            for name, module in modules.items():
                put(self._places[name], module)

    def _program(self) -> Program:
        """The schedule for the micro-batches at hand, with stages that know their shapes."""
        wires = {hop: self._wire(hop) for stage in self.split.mine for hop in (stage, stage + 1) if hop}
        key = (len(self._batches), *wires.items())
        if key not in self._programs:
            self._programs[key] = self._make_program(wires)
            if len(self._programs) > PROGRAMS:
                self._programs.pop(next(iter(self._programs)))
        return self._programs[key]

    def _wire(self, hop: int) -> Hidden:
        """What travels into stage ``hop``: one kind for all micro-batches, of the size of the largest."""
        kinds = {self._seen[self.shape(batch)][hop]: None for batch in self._batches}
        if len(kinds) == 1:
            return next(iter(kinds))
        (dtype,) = {kind.dtype for kind in kinds}
        return Hidden((max(prod(kind.shape) for kind in kinds),), dtype)

    def _make_program(self, wires: dict[int, Hidden]) -> Program:
        count, size = len(self._batches), self.axis.size
        stages: list[_PipelineStageBase] = [self._make_stage(stage, wires) for stage in self.split.mine]
        keys: dict[str, Any] = {"n_microbatches": count, "loss_fn": self._loss, "scale_grads": False}
        if len(stages) > 1:
            # Interleaving takes whole rounds; breadth first (Lamy-Poirier 2022) idles no longer, and keeps more in memory.
            whole = count % max(1, count // size) == 0
            return ScheduleInterleaved1F1B(stages, **keys) if whole else ScheduleLoopedBFS(stages, **keys)
        # 1F1B with less micro-batches than stages is GPipe, and torch refuses it.
        kind = Schedule1F1B if self.split.schedule == "1f1b" and count >= size else ScheduleGPipe
        return kind(stages[0], **keys)

    def _make_stage(self, stage: int, wires: dict[int, Hidden]) -> PipelineStage:
        """torch's stage; that all shapes are given keeps it from sending pickles to find them."""
        into = (_meta(wires[stage], self.split.flows[stage - 1]),) if stage else ()
        wire = wires[stage + 1]
        return PipelineStage(
            _Runner(lambda number, x: self._run(stage, wire, number, x)),
            stage,
            len(self.split.parts),
            self.device,
            input_args=into,
            output_args=(_meta(wire, self.split.flows[stage]),),
            group=self.axis.group,
        )

    def _run(self, stage: int, wire: Hidden, number: int, x: Tensor | None) -> Tensor:
        batch = self._batches[number]
        if x is not None:
            x = _unpack(x, self._seen[self.shape(batch)][stage].shape)
        with self._only(stage):
            out = self.forward(self.model, batch, x)
        return out if self._is_last(stage) else _pack(out, wire.shape)

    def _loss(self, out: Tensor, number: Tensor) -> Tensor:
        sums = self.sums(out, self._batches[int(number)])
        return (sums / (self._counts.to(sums) if isinstance(self._counts, Tensor) else self._counts)).sum()

    def _tell(self, losses: Sequence[Tensor]) -> Tensor:
        """The sum of the losses that the last stage has, at every stage: in float64, which holds any of their dtypes."""
        total = torch.zeros(())
        for loss in losses:
            total = total.to(loss.device) + loss.detach()
        total = total.to(self.device, torch.float64)
        dist.broadcast(total, group=self.axis.group, group_src=self.axis.size - 1)
        return total


class _Runner(nn.Module):
    """The function of a stage as a module: without parameters, for what wraps those is done already."""

    def __init__(self, run: Callable[[int, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *received: Tensor, number: Tensor) -> Tensor:
        return self.run(int(number), received[0] if received else None)


def make(
    split: Split,
    model: nn.Module,
    axis: Axis,
    forward: Callable[[nn.Module, Batch, Tensor | None], Tensor],
    sums: Callable[[Tensor, Batch], Tensor],
    shape: Callable[[Batch], Hashable],
    device: torch.device,
    portion: Callable[[bool], AbstractContextManager[object]] = lambda last: nullcontext(),
) -> Pipe:
    """What runs a model that ``pipeline.apply`` divided.

    Args:
        forward: what a stage makes of a micro-batch, (model, batch, x) -> hidden states or outputs; x is what the stage before
            made, None at the first; enters the autocast context itself.
        sums: the loss sums, 0-dim or (terms,), of the last stage's outputs and their micro-batch; enters it, too.
        shape: what decides the shapes of a micro-batch's hidden states: that of its tokens or samples.
        portion: that of ``sharing.Sharing``, once around a whole step.
    """
    return Pipe(split, model, axis, forward, sums, shape, device, portion)


def _meta(kind: Hidden, flows: bool) -> Tensor:
    return torch.empty(kind.shape, dtype=kind.dtype, device="meta", requires_grad=flows)


def _pack(out: Tensor, shape: tuple[int, ...]) -> Tensor:
    """As it travels: a tensor smaller than the largest of a step is flat, with zeros behind.

    NOTE: contiguous, because what is sent is the memory: other strides would arrive as other numbers.
    """
    if tuple(out.shape) == shape:
        return out.contiguous()
    flat = out.flatten()
    return pad(flat, (0, shape[0] - len(flat)))


def _unpack(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x if tuple(x.shape) == shape else x[: prod(shape)].view(shape)
