"""Where a program stands: in which phase of a step, and in which module of the model, in the backward too."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class Moments:
    """Follows a model's forwards; in a backward the sequence number of autograd's node tells which module made it."""

    def __init__(self) -> None:
        self.phase = "building"
        self._names: dict[int, str] = {}
        self._stack: list[str] = []
        self._firsts: list[int] = []  # sequence numbers from which on ...
        self._modules: list[str] = []  # ... nodes come from this module

    def name(self, model: nn.Module) -> None:
        """Learn the names of a model's modules."""
        self._names = {id(module): name or type(model).__name__ for name, module in model.named_modules()}

    def now(self) -> tuple[str, str]:
        """Phase and module."""
        if torch._C._current_graph_task_id() == -1:
            return self.phase, self._stack[-1] if self._stack else ""
        node = torch._C._current_autograd_node()
        return "backward", self._stack[-1] if self._stack else self._maker(node)

    def _maker(self, node: Any) -> str:
        if node is None or not self._firsts:
            return ""
        place = bisect.bisect_right(self._firsts, node._sequence_nr()) - 1
        return self._modules[max(place, 0)]

    @contextmanager
    def following(self) -> Iterator[None]:
        """While forwards are followed."""
        hooks = [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave, always_call=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._stack.append(self._names.get(id(module), type(module).__name__))
        self._mark()

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._stack.pop()
        self._mark()

    def _mark(self) -> None:
        if torch._C._current_graph_task_id() == -1:
            self._firsts.append(torch._C._autograd._get_sequence_nr())
            self._modules.append(self._stack[-1] if self._stack else "")
