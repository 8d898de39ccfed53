"""A traced graph as inductor would lay it out, and run on tensors without values.

Products, convolutions, attention and other kernels write memory; elementwise work and reductions join until a kernel, a later
use or the graph's end needs a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from trainwright.plan.counting import PRODUCTS

Pause = Callable[[], AbstractContextManager[object]]
Fused = Callable[[Sequence[Tensor], Tensor], None]
KERNELS = {"convolution", "convolution_backward", "sort", "topk", "index_put", "embedding_dense_backward", "cumsum", "scatter",
           "scatter_add", "index_add", "multinomial"}  # fmt: skip
HEAVY = PRODUCTS | KERNELS


class Watched(Protocol):
    """Who sees the kernels: ``pause`` is a context in which operators aren't watched, ``fused`` is told of joined work."""

    pause: Pause
    fused: Fused


class Kernels:
    """A graph in the order of its kernels, with what each reads."""

    def __init__(self, module: fx.GraphModule, compiler: Watched) -> None:
        self._module, self._nodes, self._compiler = module, list(module.graph.nodes), compiler
        self._written = self._choose()
        self._sources = self._read()
        self._join()
        self._last = self._lives()
        self._made, self._left = self._cheap()

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

    def _cheap(self) -> tuple[dict[fx.Node, Tensor], set[fx.Node]]:
        """Joined work that the trace knows: results that are made like those there, and such that nobody reads."""
        known, made, left = self._known(), {}, set()
        read: set[fx.Node] = set()
        for node in reversed(self._nodes):
            if node in known and (node in read or node in self._written):
                made[node] = node.meta["val"]
            elif node in known or (_is_view(node) and node not in read):
                left.add(node)
            else:
                read.update(node.all_input_nodes)
        return made, left

    def _known(self) -> set[fx.Node]:
        """Work that gives a new tensor, of the shape that it had when it was traced: not of the documents' offsets."""
        offsets: set[fx.Node] = set()
        found = set()
        for node in self._nodes:
            value = node.meta.get("val")
            if (node.op == "placeholder" and isinstance(value, Tensor) and value.dtype == torch.int32) or (
                not _is_heavy(node) and not offsets.isdisjoint(node.all_input_nodes)
            ):
                offsets.add(node)
            elif isinstance(value, Tensor) and (_is_pointwise(node) or _is_reduction(node)):
                found.add(node)
        return found

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
            elif node.op != "placeholder" and node not in self._left:
                values[node] = self._value(node, values)
            for one in self._last.get(node, ()):
                if one is not node or node.op != "output":
                    values.pop(one, None)
        return result

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        like = self._made.get(node)
        if like is not None:
            with self._compiler.pause():
                result = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        else:
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


def _is_pointwise(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    tagged = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return tagged and schema is not None and not schema.is_mutable and _joins(node)


def _is_reduction(node: fx.Node) -> bool:
    return _name(node) in ("sum", "mean", "amax", "amin", "var_mean", "var", "argmax", "native_layer_norm")


def _needs(user: fx.Node) -> bool:
    """Whether a user reads from memory."""
    return user.op == "output" or _is_heavy(user)
