"""Where a process stands among the others: along the axes pipeline, data and tensor, the last of them the innermost."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainwright.recipe import InputError, Parallel

NAMES = ("pipeline", "data", "tensor")


@dataclass(frozen=True)
class Axis:
    """Processes that share one kind of work: this one is number ``index`` of ``size``; no group where it is alone."""

    size: int = 1
    index: int = 0
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """The axes of this process; ``devices`` is the axis ``data`` as torch's mesh."""

    pipeline: Axis = field(default_factory=Axis)
    data: Axis = field(default_factory=Axis)
    tensor: Axis = field(default_factory=Axis)
    devices: DeviceMesh | None = None

    @property
    def size(self) -> int:
        """All processes."""
        return self.pipeline.size * self.data.size * self.tensor.size

    @property
    def rank(self) -> int:
        """This process among all."""
        return (self.pipeline.index * self.data.size + self.data.index) * self.tensor.size + self.tensor.index


def join(section: Parallel, device: torch.device) -> Mesh:
    """This process's place, in the process group that was initialised before; without one it is alone.

    Raises:
        InputError: the number of processes isn't what the section multiplies to.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    sizes = axis_sizes(section, world)
    if world == 1:
        return Mesh()
    devices = init_device_mesh(device.type, sizes, mesh_dim_names=NAMES)
    axes = {name: _axis(devices, name) for name in NAMES}
    return Mesh(**axes, devices=devices["data"])


def axis_sizes(section: Parallel, world: int) -> tuple[int, int, int]:
    """(pipeline, data, tensor) for so many processes.

    Raises:
        InputError: they don't multiply to it.
    """
    others = section.pipeline * section.tensor
    shown = f"pipeline {section.pipeline} x tensor {section.tensor}"
    if section.data == "auto":
        if world % others:
            raise InputError(
                f"parallel: {shown} doesn't divide the {world} process{'es' * (world > 1)} there are; "
                f"start {others} or a multiple of it (--nproc {others})"
            )
        return section.pipeline, world // others, section.tensor
    if section.data * others != world:
        raise InputError(
            f"parallel: data {section.data} x {shown} needs {section.data * others} processes, there are {world}; "
            f"start so many (--nproc {section.data * others}), or set parallel.data: auto"
        )
    return section.pipeline, section.data, section.tensor


def _axis(devices: DeviceMesh, name: str) -> Axis:
    size = devices[name].size()
    return Axis(size, devices.get_local_rank(name), devices.get_group(name) if size > 1 else None)
