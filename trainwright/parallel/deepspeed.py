"""DeepSpeed as the engine of data parallelism and ZeRO: it takes over our model's parameters, gradients and optimizer.

The model stays the plain module. It must hold its values, and each rank holds it whole, when ``start`` is called: at stage 3
DeepSpeed cuts the parameters up there.
"""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from trainwright.parallel.mesh import Axis
from trainwright.recipe import InputError, Parallel, RunError

Group = dict[str, Any]
Factory = Callable[[list[Group]], torch.optim.Optimizer]

# DeepSpeed updates slices of flat vectors, so an optimizer may look at nothing but single numbers.
ELEMENTWISE = ("Adadelta", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
BUCKET = 25_000_000  # numbers that are reduced at once: 100 MB


@dataclass
class Stepper:
    """What the loop needs of an optimizer. Setting ``lr`` in a group takes effect; the other keys are those of our groups."""

    engine: Any
    hooks: list[Callable[..., Any]] = field(default_factory=list)

    @property
    def param_groups(self) -> list[Group]:
        """The groups, in our order; their ``params`` are DeepSpeed's."""
        return self.engine.optimizer.param_groups

    def step(self) -> None:
        """Clip and update; the gradients are gone afterwards."""
        self.engine.step()
        for hook in self.hooks:
            hook(self, (), {})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        (self.engine if self.engine.zero_optimization_stage() == 0 else self.engine.optimizer).zero_grad()

    def register_step_post_hook(self, hook: Callable[..., Any]) -> None:
        """Call ``hook(self, (), {})`` after each step."""
        self.hooks.append(hook)


@dataclass
class Engine:
    """A model that DeepSpeed trains.

    Every method is to be called by all ranks of the axis, and a generator to be read to its end.
    """

    stage: int
    model: nn.Module
    axis: Axis
    clip_norm: float | None
    engine: Any
    optimizer: Stepper

    def inside(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function, called so that it finds whole parameters wherever it uses the model, and DeepSpeed its graph.

        At stage 3 a part's parameters are there only while it is called: also a head's weight that a loss takes by itself
        must be used in here. What it gives is a tensor or a tuple of them.
        """
        return partial(self.engine, function)

    def rest(self) -> None:
        """End gathers that stage 3 began for a forward that doesn't come: a parameter in flight can't be read or set."""
        if self.stage == 3:
            self.engine.empty_partition_cache()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch to the step's; with the last one they are summed over the ranks.

        Args:
            loss: what ``inside`` gave, divided by the global count of the step: the ranks' gradients are added, not averaged.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.axis.size, scale_wrt_gas=False)  # DeepSpeed's mean over the ranks times their number

    def clip(self) -> Tensor:
        """The global 2-norm of the step's gradients, 0-dim float32; the step will scale them to ``clip_norm`` at most.

        Infinite or NaN where a gradient isn't finite.
        """
        if self.stage == 0:
            return _clip_(list(self.model.parameters()), self.clip_norm)
        zero = self.engine.optimizer
        if self.stage < 3:
            norm = zero.scaled_global_norm()
        else:
            norm = import_module("deepspeed.runtime.utils").combine_grad_norm_groups(zero._get_norm_groups())
        return torch.as_tensor(norm, dtype=torch.float32)

    def whole(self, parameters: Iterable[nn.Parameter] | None = None) -> AbstractContextManager[object]:
        """A context in which parameters (default: all) are whole, for reading."""
        chosen = list(self.model.parameters() if parameters is None else parameters)
        return _library().zero.GatheredParameters(chosen) if self.stage == 3 else nullcontext()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Each trained parameter's name and whole gradient, between the last ``backward`` and the step."""
        get = import_module("deepspeed.utils").safe_get_full_grad
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, get(parameter)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model, which isn't usable after stage 3."""
        self.engine.destroy()
        stack = import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK
        stack[:] = [module for module in stack if module is not self.engine.module]


class _Whole(nn.Module):
    """A root above the model, so that what is called inside of it runs under DeepSpeed's hooks, losses included."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        return function(*args)


def start(
    model: nn.Module,
    groups: list[Group],
    factory: Factory,
    section: Parallel,
    axis: Axis,
    device: torch.device,
    *,
    clip_norm: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Engine:
    """Hand a model to DeepSpeed.

    Args:
        model: with its values, the same on all ranks; trained parameters in float32, frozen ones in any dtype.
        groups: as ``optim.parameter_groups`` gives them.
        factory: makes torch's optimizer of the groups.
        axis: the ranks that share each batch, which are all there are.
        settings: more keys of DeepSpeed's ``zero_optimization``.

    Raises:
        InputError: DeepSpeed isn't installed, or can't train this.
    """
    deepspeed = _library(device)
    _check_dtypes(model)
    optimizer = factory(groups)
    _check_optimizer(optimizer, section.zero)
    _join_alone(device)
    if section.zero == 3:
        _gather_by_block(model, deepspeed)
    root = _Whole(model)
    config = _config(model, section, axis, clip_norm, settings or {})
    engine, *_ = deepspeed.initialize(model=root, optimizer=optimizer, config=config, dist_init_required=False)
    stepper = Stepper(engine)
    if [group.get("names") for group in stepper.param_groups] != [group.get("names") for group in groups]:
        raise RunError("DeepSpeed changed the parameter groups: their learning rates would not be their own")
    return Engine(section.zero, model, axis, clip_norm, engine, stepper)


def _library(device: torch.device | None = None) -> Any:
    """DeepSpeed, imported for a kind of device, and quiet.

    Raises:
        InputError: it isn't installed.
    """
    if device is not None:
        os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        deepspeed = import_module("deepspeed")
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise InputError(
            "parallel.engine: deepspeed isn't installed; pip install 'trainwright[deepspeed]', or set parallel.engine: torch"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # it calls the old names
    # It would be compiled at the start, with a line on the console, for products that only inference makes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _check_dtypes(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise InputError(
                f"parallel.engine: deepspeed trains float32 parameters, and {name} is {parameter.dtype}; "
                "set parallel.engine: torch"
            )


def _check_optimizer(optimizer: torch.optim.Optimizer, stage: int) -> None:
    kind = type(optimizer).__name__
    if stage and kind not in ELEMENTWISE:
        reason = "makes it anew without its groups" if kind == "Adagrad" else "updates slices, and it looks at whole matrices"
        raise InputError(
            f"optimizer: {kind} doesn't work with deepspeed at parallel.zero {stage}, which {reason}; "
            "choose another optimizer, set parallel.zero: 0, or parallel.engine: torch"
        )


def _join_alone(device: torch.device) -> None:
    """DeepSpeed needs a process group even for one process; and stage 3 aborts at exit unless it is destroyed before."""
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _gather_by_block(model: nn.Module, deepspeed: Any) -> None:
    """Make each block the unit of gathering, so that no hook of DeepSpeed runs inside of it, where it may be compiled.

    Its layers also use each other's weights without calling each other.
    """
    blocks: Callable[[], list[nn.Module]] | None = getattr(model, "blocks", None)
    for block in blocks() if blocks is not None else []:
        block.register_forward_pre_hook(_with_gradient)
        deepspeed.utils.set_z3_leaf_module(block, True)


def _with_gradient(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make a block's input one that needs a gradient.

    DeepSpeed reduces a block's gradients when that of its input is there. A block without one, such as the first above a
    frozen embedding, would be reduced before its gradients exist: as zeros, silently.
    """
    tensors = [value for value in args if isinstance(value, Tensor)]
    if not torch.is_grad_enabled() or any(value.requires_grad for value in tensors) or not tensors[0].is_floating_point():
        return args
    return tuple(value.detach().requires_grad_() if value is tensors[0] else value for value in args)


def _config(
    model: nn.Module, section: Parallel, axis: Axis, clip_norm: float | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """DeepSpeed's own configuration. The batch sizes mean nothing here: our loop says what a step is."""
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    zero: dict[str, Any] = {
        "stage": section.zero,
        "reduce_bucket_size": min(sum(trained), max(BUCKET, *trained)),
        # Whole parameters only where they are used, and one block ahead.
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": _largest_block(model),
        "memory_efficient_linear": False,  # it would replace torch's function for the whole process
    }
    if section.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": axis.size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm or 0.0 if section.zero else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {**zero, **settings},
    }


def _largest_block(model: nn.Module) -> int:
    blocks: Callable[[], list[nn.Module]] | None = getattr(model, "blocks", None)
    parts = blocks() if blocks is not None else list(model.children())
    return max((sum(p.numel() for p in part.parameters()) for part in parts), default=0)


def _clip_(parameters: list[nn.Parameter], largest: float | None) -> Tensor:
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm
