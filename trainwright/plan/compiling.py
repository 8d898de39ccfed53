"""What a compiler makes of a block, on tensors without values: torch's own partition into forward and backward, run as kernels.

``torch.compile`` doesn't trace while operators are watched. So a block is traced by AOTAutograd with the decompositions and the
partition that inductor gets, and its graphs are walked as inductor would lay them out (``kernels``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.virtualized import V
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.traceback import preserve_node_meta
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainwright.memory import selective
from trainwright.memory.checkpointing import Offloaded, Recomputed, Segmented
from trainwright.parallel.mesh import Axis
from trainwright.plan.counting import messages_traced
from trainwright.plan.kernels import Kernels, Watcher
from trainwright.plan.tracing import Traced

Policy = Callable[..., CheckpointPolicy]
aten = torch.ops.aten
NOTHING = nn.Module()
AROUND = (Offloaded, Segmented)  # classes whose forward is never a part of what is compiled


class Compiler:
    """Stands in for ``torch.compile``; several rehearsals may share what it has traced.

    Args:
        any_mode: trace blocks with the marks of ``selective``, so that one trace does for each way of checkpointing them.

    watcher  of the rehearsal that is served
    """

    watcher: Watcher

    def __init__(self, any_mode: bool = False) -> None:
        self._any_mode = any_mode
        self._traces: dict[Any, Traced] = {}
        self._functions: dict[Any, Callable[..., Any]] = {}

    def compile(self, forward: Any) -> Any:
        """A function, or the forward of a block, as it would be compiled; what can't be a part of a graph stays around it."""
        block: nn.Module | None = getattr(forward, "__self__", None)
        if block is not None and any(isinstance(module, nn.RNNBase) for module in block.modules()):
            return forward  # dynamo leaves such layers as they are
        if block is None:
            return lambda *args, **kwargs: self.run(forward, NOTHING, args, kwargs)
        block.__class__ = _within(type(block), self)
        return getattr(block, "forward")  # noqa: B009  (a bound method of the new class)

    def run(self, forward: Callable[..., Any], block: nn.Module, args: Any, kwargs: Any, policy: Policy | None = None) -> Any:
        """One call of a block's own forward; ``policy`` says what becomes of each result of a checkpointed one."""
        named = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        flat, spec = tree_flatten((args, kwargs))
        values, tensors = list(named.values()), [value for value in flat if isinstance(value, Tensor)]
        others = [... if isinstance(value, Tensor) else value for value in flat]
        key = _key(block, values, tensors, others)
        if (key, policy) not in self._functions:
            with self.watcher.pausing():  # new ones: the graphs remember what they were traced with
                like = tree_map_only(Tensor, _like, (values, tensors))
            # The trace itself isn't part of the run, nor anything that waits for a backward.
            with _disable_current_modes(), saved_tensors_hooks(lambda x: x, lambda x: x), messages_traced():
                marks = selective.policy if self._any_mode and block is not NOTHING else policy
                if (key, marks) not in self._traces:
                    plain = partial(_called, forward, block, list(named), others, spec)
                    marked = plain if marks is None else partial(_recomputed, plain, marks)
                    self._traces[key, marks] = Traced(marked, like, select_decomp_table())
                trace = self._traces[key, marks]
                self._functions[key, policy] = trace.cut(partial(_mark, policy), _partition, self._lay_out)
        return self._functions[key, policy](values, tensors)

    def _lay_out(self, gm: fx.GraphModule, example_inputs: Any) -> Any:
        _sum_in_products(gm.graph)
        run = Kernels(gm, self).run

        def boxed(values: list[Any]) -> Any:
            return run(values)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed


def _called(
    forward: Callable[..., Any],
    block: nn.Module,
    names: list[str],
    others: list[Any],
    spec: Any,
    values: list[Tensor],
    tensors: list[Tensor],
) -> Any:
    """The forward with these parameters and buffers, and these tensors in the gaps of its other arguments."""
    given = iter(tensors)
    args, kwargs = tree_unflatten([next(given) if value is ... else value for value in others], spec)
    with _reparametrize_module(block, dict(zip(names, values, strict=True)), tie_weights=True):
        return forward(*args, **kwargs)


def _like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).requires_grad_(x.requires_grad)


def _recomputed(forward: Callable[..., Any], policy: Policy, values: list[Tensor], inputs: list[Tensor]) -> Any:
    """A checkpointed forward as ``torch.compile`` traces one: its nodes get the marks that the partition obeys.

    Source: ``torch._higher_order_ops.wrap.tag_activation_checkpoint_impl``.
    """

    def contexts() -> Any:
        first, again = create_selective_checkpoint_contexts(policy)
        setattr(first, "ac_graph_id", 0)  # noqa: B010  (torch's type of it has none; a block is one region)
        return first, again

    with preserve_node_meta():
        return checkpoint(
            forward, values, inputs, use_reentrant=False, preserve_rng_state=False, early_stop=False, context_fn=contexts
        )


def _mark(policy: Policy | None, node: fx.Node) -> None:
    """Turn the marks of ``selective``, where a node has them, into those of a policy."""
    if policy is None:
        node.meta.pop("recompute", None)
        node.meta.pop("ac_graph_id", None)
    elif policy is _nothing_kept and "recompute" in node.meta:
        node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE


def _nothing_kept(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def _partition(module: fx.GraphModule, inputs: Any, **options: Any) -> Any:
    """As inductor does it."""
    with V.set_fake_mode(detect_fake_mode(inputs)):
        joint_graph_passes(module)
    return min_cut_rematerialization_partition(module, inputs, compiler="inductor", **options)


def _sum_in_products(graph: fx.Graph) -> None:
    """``x + a @ b`` becomes one product where nobody else wants ``a @ b``, as inductor does it once the gradients are there."""
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        for product, other in (node.args[:2], node.args[1::-1]):
            if _is_only_for(product, node) and isinstance(other, fx.Node) and _widens(other, product):
                with graph.inserting_before(node):
                    both = graph.call_function(aten.addmm.default, (other, *product.args))
                both.meta = dict(node.meta)
                node.replace_all_uses_with(both)
                graph.erase_node(node)
                graph.erase_node(product)
                break


def _is_only_for(product: Any, node: fx.Node) -> bool:
    return (
        isinstance(product, fx.Node) and product.target is aten.mm.default and set(product.users) == {node} and not node.kwargs
    )


def _widens(other: fx.Node, product: fx.Node) -> bool:
    value, whole = other.meta.get("val"), product.meta["val"]
    return (
        isinstance(value, Tensor)
        and value.dtype == whole.dtype
        and torch.broadcast_shapes(value.shape, whole.shape) == whole.shape
    )


def _within(kind: type[nn.Module], compiler: Compiler) -> type[nn.Module]:
    """A class like this one, compiled but for what is around."""
    if kind.__bases__ and kind.__bases__[0] in AROUND:
        return type(kind.__name__, (kind.__bases__[0], _within(kind.__bases__[1], compiler)), {})

    checkpointed = issubclass(kind, Recomputed)
    own: Any = kind.__bases__[1] if checkpointed else kind

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        again = checkpointed and torch.is_grad_enabled()
        policy = (selective.policy if self.selects else _nothing_kept) if again else None
        return compiler.run(own.forward.__get__(self), self, args, kwargs, policy)

    return type(f"Compiled{kind.__name__}", (kind,), {"forward": forward})


def _key(block: nn.Module, values: list[Tensor], tensors: list[Tensor], others: list[Any]) -> Any:
    # How many documents a batch has, which int32 offsets tell, is nothing to a graph.
    shapes = tuple((x.dtype != torch.int32 and tuple(x.shape), x.dtype, x.requires_grad) for x in (*values, *tensors))
    kinds = tuple(type(module) for module in block.modules())[block is not NOTHING :]
    mode = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), block.training
    return kinds, shapes, mode, str(others), _groups(block)


def _groups(block: nn.Module) -> frozenset[Any]:
    """The processes that a graph's messages go to, which it knows by a name alone."""
    held = [value for module in block.modules() for value in vars(module).values()]
    axes = [value if isinstance(value, Axis) else getattr(value, "axis", None) for value in held]
    groups = [axis.group for axis in axes if isinstance(axis, Axis) and axis.group is not None]
    return frozenset((group.group_name, *dist.get_process_group_ranks(group)) for group in groups)
