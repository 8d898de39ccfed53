"""A traced graph as inductor would lay it out, and run on tensors without values.

Products, convolutions, attention and other kernels write memory; elementwise work and reductions join until a kernel or the
graph's end needs a result, and are done again for another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state

from trainwright.plan.counting import PRODUCTS

KERNELS = {"convolution", "convolution_backward", "sort", "topk", "index_put", "embedding_dense_backward", "cumsum", "scatter",
           "scatter_add", "index_add", "multinomial"}  # fmt: skip
HEAVY = PRODUCTS | KERNELS
MAKERS = {"aten", "prims", "trainwright"}  # whose results have the shapes of the trace


class Watcher(Protocol):
    """Who is told of memory and work."""

    def pausing(self) -> AbstractContextManager[object]:
        """While operators aren't watched."""

    def new(self, like: Tensor) -> Tensor:
        """Without values, and not seen yet."""

    def see(self, result: Tensor | Memory | None) -> None:
        """Memory is written, and lives as long as this object."""

    def fused(self, reads: Sequence[Tensor], result: Tensor) -> None:
        """A kernel of joined work."""

    def called(self, operator: Any, args: Any, kwargs: Any, result: Any) -> None:
        """An operator with tensors of these shapes."""


class Served(Protocol):
    """Has the watcher of the moment."""

    watcher: Watcher


class Memory:
    """A tensor's memory that no tensor looks into."""

    def __init__(self, like: Tensor) -> None:
        self.device, self._bytes = like.device, like.untyped_storage().nbytes()

    def nbytes(self) -> int:
        """Its size."""
        return self._bytes


class Kernels:
    """A graph in the order of its kernels, with what each reads."""

    def __init__(self, module: fx.GraphModule, compiler: Served) -> None:
        self._module, self._nodes, self._compiler = module, list(module.graph.nodes), compiler
        self._written = self._choose()
        self._sources = self._read()
        self._join()
        self._last = self._lives()
        self._shaped = self._known()
        self._outside = self._read_outside()

    def _choose(self) -> set[fx.Node]:
        """What is written to memory."""
        return {
            node
            for node in self._nodes
            if node.op == "call_function"
            and (_is_heavy(node) or _is_reduction(node) or _changes_input(node) or any(_needs(user) for user in _users(node)))
        }

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
        """Put side by side what inductor makes one kernel of: work of one size that reads the same. Results exist together."""
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
        return _size(one) == _size(other) and any(_size(x) == _size(one) for x in shared)

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

    def _known(self) -> set[fx.Node]:
        """What gives new tensors of the shapes that it had when it was traced: not what is made of the documents' offsets."""
        offsets: set[fx.Node] = set()
        found = set()
        for node in self._nodes:
            value = node.meta.get("val")
            if (node.op == "placeholder" and isinstance(value, Tensor) and value.dtype == torch.int32) or (
                not _is_heavy(node) and not offsets.isdisjoint(node.all_input_nodes)
            ):
                offsets.add(node)
            elif _makes(node) and all(isinstance(x, Tensor | None) for x in _several(value)):
                found.add(node)
        return found

    def _read_outside(self) -> set[fx.Node]:
        """What must be tensors: the graph's results, what is called with them, and what these are views of."""
        found: set[fx.Node] = set()
        for node in reversed(self._nodes):
            viewed = node in found and _is_view(node)
            if viewed or node.op == "output" or not (node in self._shaped or _is_view(node)):
                found.update(node.all_input_nodes)
        return found

    def run(self, inputs: list[Any]) -> Any:
        """The graph's outputs. What nobody reads outside is only noted: so many bytes from here to its last use."""
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
        if node in self._shaped:
            return self._noted(node, values)
        if _is_view(node) and node not in self._outside:
            return _viewed(node, values)
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        target: Any = _REPLAYED.get(node.target, node.target)
        if _is_heavy(node):
            return target(*args, **kwargs)
        with self._compiler.watcher.pausing():
            result = target(*args, **kwargs)
        if node in self._written and not _is_view(node):
            for one in _several(result):
                if isinstance(one, Tensor):
                    self._compiler.watcher.see(one)
                    self._compiler.watcher.fused(self._reads(node, values), one)
        return result

    def _noted(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """What stands for the results of a node whose shapes are known, without a call of its operator."""
        watcher, like = self._compiler.watcher, node.meta["val"]
        make: Callable[[Tensor], Any] = watcher.new if node in self._outside else Memory
        made = [x if x is None else make(x) for x in _several(like)]
        if node in self._written:
            for one in made:
                watcher.see(one)
            if _is_heavy(node):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: _shape(one, values))
                watcher.called(node.target, args, kwargs, like)
            else:
                for one in _several(like):
                    watcher.fused(self._reads(node, values), one)
        return made[0] if isinstance(like, Tensor) else tuple(made)

    def _reads(self, node: fx.Node, values: dict[fx.Node, Any]) -> list[Tensor]:
        """The tensors that joined work is computed from, or others of their shapes."""
        found = [_shape(one, values) for one in self._sources[node]]
        return [one for one in found if isinstance(one, Tensor)]


def _drawn(operator: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """A generator's state, which is a few thousand bytes, and what is drawn from there."""
    return torch.empty(0, dtype=torch.uint8), operator(*args, **kwargs)


def _drawn_again(state: Tensor, operator: Any, *args: Any, **kwargs: Any) -> Any:
    return operator(*args, **kwargs)


# Modes have no rule for these: draws of a forward that its backward computes again.
_REPLAYED: dict[Any, Any] = {run_and_save_rng_state: _drawn, run_with_rng_state: _drawn_again}


def _viewed(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What stands for a view that nobody looks through: what it is a view of, if that has memory at all."""
    whole, place = values.get(node.all_input_nodes[0]), node.args[-1]
    return whole[place] if isinstance(whole, tuple) and isinstance(place, int) else whole


def _shape(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What is given to the graph, or the trace's tensor of the same shape."""
    return values[node] if node.op in ("placeholder", "get_attr") else node.meta.get("val")


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _makes(node: fx.Node) -> bool:
    """Whether an operator gives new tensors and changes none."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable or _is_view(node) or "rnn" in schema.name:  # a recurrent kernel's workspace
        return False
    return schema.name.partition("::")[0] in MAKERS and all(one.alias_info is None for one in schema.returns)


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
    if node.op != "call_function" or not hasattr(node.target, "namespace") or node.target in _REPLAYED:
        return False
    outside = node.target.namespace not in ("aten", "prims")
    return outside or _name(node) in HEAVY or "attention" in _name(node) or "rnn" in _name(node)


def _is_reduction(node: fx.Node) -> bool:
    return _name(node) in ("sum", "mean", "amax", "amin", "var_mean", "var", "argmax", "native_layer_norm")


def _changes_input(node: fx.Node) -> bool:
    """Whether joined work is written into what the graph was given."""
    return node.target is torch.ops.aten.copy_.default


def _needs(user: fx.Node) -> bool:
    """Whether a user reads from memory."""
    return user.op == "output" or _is_heavy(user)
