"""What a compiler makes of a block, on tensors without values: torch's own partition into forward and backward, run as kernels.

``torch.compile`` doesn't trace while operators are watched. So a block is traced by AOTAutograd with the decompositions and the
partition that inductor gets, and its graphs are walked as inductor would lay them out: products, convolutions, attention and
other kernels write memory; elementwise work and reductions join until a kernel, a later use or the graph's end needs a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.traceback import preserve_node_meta
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainwright.memory import selective
from trainwright.memory.checkpointing import Offloaded, Recomputed, Segmented
from trainwright.parallel.mesh import Axis
from trainwright.plan.counting import PRODUCTS, messages_traced

Pause = Callable[[], AbstractContextManager[object]]
Fused = Callable[[Sequence[Tensor], Tensor], None]
Policy = Callable[..., CheckpointPolicy]
NOTHING = nn.Module()
AROUND = (Offloaded, Segmented)  # classes whose forward is never a part of what is compiled
KERNELS = {"convolution", "convolution_backward", "sort", "topk", "index_put", "embedding_dense_backward", "cumsum", "scatter",
           "scatter_add", "index_add", "multinomial"}  # fmt: skip
HEAVY = PRODUCTS | KERNELS


class Compiler:
    """Stands in for ``torch.compile``; several rehearsals may share what it has traced.

    pause  a context in which operators aren't watched
    fused  told of what joined work reads, and what it writes
    """

    def __init__(self) -> None:
        self.pause: Pause = nullcontext
        self.fused: Fused = lambda reads, result: None
        self._functions: dict[Any, Callable[..., Any]] = {}

    def attach(self, pause: Pause, fused: Fused) -> None:
        """From now on another rehearsal is served."""
        self.pause, self.fused = pause, fused

    def compile(self, forward: Any) -> Any:
        """A function, or the forward of a block, as it would be compiled; what can't be a part of a graph stays around it."""
        block: nn.Module | None = getattr(forward, "__self__", None)
        if block is None:
            return lambda *args, **kwargs: self.run(forward, NOTHING, args, kwargs)
        block.__class__ = _within(type(block), self)
        return getattr(block, "forward")  # noqa: B009  (a bound method of the new class)

    def run(self, forward: Callable[..., Any], block: nn.Module, args: Any, kwargs: Any, policy: Policy | None = None) -> Any:
        """One call of a block's own forward; ``policy`` says what becomes of each result of a checkpointed one."""
        named = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        flat, spec = tree_flatten((args, kwargs))
        places = [place for place, value in enumerate(flat) if isinstance(value, Tensor)]
        tensors = [flat[place] for place in places]
        others = [None if isinstance(value, Tensor) else value for value in flat]
        key = _key(block, list(named.values()), tensors, [policy, *others])
        if key not in self._functions:
            names = list(named)

            def plain(values: list[Tensor], inputs: list[Tensor]) -> Any:
                whole = list(others)
                for place, tensor in zip(places, inputs, strict=True):
                    whole[place] = tensor
                given, options = torch.utils._pytree.tree_unflatten(whole, spec)
                with _reparametrize_module(block, dict(zip(names, values, strict=True)), tie_weights=True):
                    return forward(*given, **options)

            traced = plain if policy is None else partial(_recomputed, plain, policy)
            self._functions[key] = self._traced(traced, list(named.values()), tensors)
        return self._functions[key](list(named.values()), tensors)

    def _traced(self, plain: Callable[..., Any], values: list[Tensor], tensors: list[Tensor]) -> Callable[..., Any]:
        function = aot_function(
            plain,
            fw_compiler=self._lay_out,
            bw_compiler=self._lay_out,
            partition_fn=_partition,
            decompositions=select_decomp_table(),
        )
        with self.pause():  # new ones: the graphs remember what they were traced with
            like = tree_map_only(Tensor, _like, (values, tensors))
        # The trace itself isn't part of the run, nor anything that waits for a backward.
        with _disable_current_modes(), saved_tensors_hooks(lambda x: x, lambda x: x), messages_traced():
            function(*like)
        return function

    def _lay_out(self, gm: fx.GraphModule, example_inputs: Any) -> Any:
        run = _Kernels(gm, self).run

        def boxed(values: list[Any]) -> Any:
            return run(values)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed


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


def _nothing_kept(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def _partition(module: fx.GraphModule, inputs: Any, **options: Any) -> Any:
    """As inductor does it."""
    joint_graph_passes(module)
    return min_cut_rematerialization_partition(module, inputs, compiler="inductor", **options)


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


class _Kernels:
    """A graph in the order of its kernels, with what each reads."""

    def __init__(self, module: fx.GraphModule, compiler: Compiler) -> None:
        self._module, self._nodes, self._compiler = module, list(module.graph.nodes), compiler
        self._written = self._choose()
        self._sources = self._read()
        self._join()
        self._last = self._lives()

    def _choose(self) -> set[fx.Node]:
        """What is written to memory."""
        order = {node: place for place, node in enumerate(self._nodes)}
        heavy = [order[node] for node in self._nodes if _is_heavy(node)]
        written = set()
        for node in self._nodes:
            if node.op != "call_function":
                continue
            if _is_heavy(node) or any(_needs(user) for user in _users(node)):
                written.add(node)
            elif _is_view(node):
                continue
            else:
                places = [order[user] for user in _users(node)]
                split = len(places) > 1 and any(min(places) < place < max(places) for place in heavy)
                if split or _is_reduction(node):
                    written.add(node)
        return written

    def _read(self) -> dict[fx.Node, set[fx.Node]]:
        """For each node the written ones, or inputs, that its value is computed from."""
        found: dict[fx.Node, set[fx.Node]] = {}
        for node in self._nodes:
            sources: set[fx.Node] = set()
            for one in node.all_input_nodes:
                sources |= {one} if one in self._written or one.op == "placeholder" else found[one]
            found[node] = sources
        return found

    def _join(self) -> None:
        """Put side by side what inductor makes one kernel of: work of one size on the same inputs of the graph.

        Later results aren't looked at: their memory is used again by what reads them last, so that joining costs nothing.
        """
        group: dict[fx.Node, list[fx.Node]] = {}
        for node in reversed([node for node in self._nodes if node in self._written and _joins(node)]):
            after = self._after(node)
            others = [members for one, members in group.items() if self._alike(node, one) and after.isdisjoint(members)]
            group[node] = others[-1] if others else []
            if others:
                self._sink(node, group[node], after)
            group[node].insert(0, node)

    def _alike(self, one: fx.Node, other: fx.Node) -> bool:
        shared = self._sources[one] & self._sources[other]
        return _size(one) == _size(other) and any(x.op == "placeholder" and _size(x) == _size(one) for x in shared)

    def _after(self, node: fx.Node) -> set[fx.Node]:
        """Those that need it, with itself."""
        found = {node}
        for one in self._nodes[self._nodes.index(node) + 1 :]:
            if not found.isdisjoint(one.all_input_nodes):
                found.add(one)
        return found

    def _sink(self, node: fx.Node, members: list[fx.Node], after: set[fx.Node]) -> None:
        """Move it before the first of others, and what needs it behind the last."""
        start, end = self._nodes.index(node), self._nodes.index(members[-1]) + 1
        stay = [one for one in self._nodes[start:end] if one not in after]
        place = stay.index(members[0])
        self._nodes[start:end] = [
            *stay[:place],
            node,
            *stay[place:],
            *(x for x in self._nodes[start:end] if x in after - {node}),
        ]

    def _lives(self) -> dict[fx.Node, list[fx.Node]]:
        """After which node each value is forgotten."""
        last: dict[fx.Node, fx.Node] = {}
        for node in self._nodes:
            for one in (*node.all_input_nodes, *self._sources[node]):
                last[one] = node
            last.setdefault(node, node)
        ends: dict[fx.Node, list[fx.Node]] = {}
        for one, node in last.items():
            ends.setdefault(node, []).append(one)
        return ends

    def run(self, inputs: list[Any]) -> Any:
        """The graph's outputs."""
        values: dict[fx.Node, Any] = {}
        places = [node for node in self._nodes if node.op == "placeholder"]
        values |= dict(zip(places, inputs, strict=True))
        inputs.clear()  # the caller's references end here
        result = None
        for node in self._nodes:
            if node.op == "output":
                result = fx.node.map_arg(node.args[0], values.__getitem__)
            elif node.op == "get_attr":
                values[node] = getattr(self._module, str(node.target))
            elif node.op != "placeholder":
                values[node] = self._value(node, values)
            for one in self._last.get(node, ()):
                if one is not node or node.op != "output":
                    values.pop(one, None)
        return result

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        target: Any = node.target
        if _is_heavy(node):
            return target(*args, **kwargs)
        with self._compiler.pause():
            result = target(*args, **kwargs)
        if node in self._written and not _is_view(node):
            reads = [values[one] for one in self._sources[node] if isinstance(values.get(one), Tensor)]
            for one in tree_leaves(result):
                if isinstance(one, Tensor):
                    self._compiler.fused(reads, one)
        return result


def _users(node: fx.Node) -> list[fx.Node]:
    """Those that read the value, through views."""
    found: list[fx.Node] = []
    for user in node.users:
        found += _users(user) if _is_view(user) else [user]
    return found


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.partition("::")[2] if schema is not None else ""


def _size(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0


def _joins(node: fx.Node) -> bool:
    return not (_is_heavy(node) or _is_reduction(node) or _is_view(node))


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and (
        bool(getattr(node.target, "is_view", False)) or "getitem" in getattr(node.target, "__name__", "")
    )


def _is_heavy(node: fx.Node) -> bool:
    """Whether it is a kernel of its own."""
    if node.op != "call_function" or not hasattr(node.target, "namespace"):
        return False
    outside = node.target.namespace not in ("aten", "prims")
    return outside or _name(node) in HEAVY or "attention" in _name(node) or "rnn" in _name(node)


def _is_reduction(node: fx.Node) -> bool:
    return _name(node) in ("sum", "mean", "amax", "amin", "var_mean", "var", "argmax", "native_layer_norm")


def _needs(user: fx.Node) -> bool:
    """Whether a user reads from memory."""
    return user.op == "output" or _is_heavy(user)
