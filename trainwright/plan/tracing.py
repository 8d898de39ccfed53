"""AOTAutograd in its two stages: a function is traced once, and its graph cut into forward and backward as often as is asked.

``torch._functorch.aot_autograd.aot_function`` does both at once. Only the second asks which results of a checkpointed function
are kept, which marks on the graph's nodes say.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing
from torch._functorch._aot_autograd.descriptors import PlainAOTInput
from torch._functorch._aot_autograd.frontend_utils import construct_fake_mode, process_inputs
from torch._functorch._aot_autograd.graph_compile import aot_stage1_graph_capture, aot_stage2_compile
from torch._functorch._aot_autograd.schemas import AOTConfig
from torch._functorch._aot_autograd.utils import create_tree_flattened_fn
from torch._functorch.aot_autograd import create_aot_state
from torch.utils._pytree import tree_leaves


class Traced:
    """The joint graph of a function and its gradients.

    Args:
        function: of tensors, in lists or by themselves, that gives tensors.
        like: its arguments, whose shapes, dtypes and ``requires_grad`` count.
    """

    def __init__(self, function: Callable[..., Any], like: tuple[Any, ...], decompositions: Any) -> None:
        flat = tree_leaves(like)
        config = AOTConfig(None, None, None, decompositions, 0, 0, keep_inference_input_mutations=True)
        flattened, self._outputs = create_tree_flattened_fn(function, like, {})
        self._fake, shapes = construct_fake_mode(flat, config)
        fake, paths = process_inputs(flat, config, self._fake, shapes)
        described: Any = [PlainAOTInput(number) for number in range(len(fake))]
        with ExitStack() as stack:
            self._state = create_aot_state(stack, flattened, fake, described, config, self._fake, shapes)
            self._state.fw_metadata.act_input_paths = paths
            self._capture = aot_stage1_graph_capture(self._state, flattened)

    def cut(self, marked: Callable[[fx.Node], None], partition: Callable[..., Any], lay_out: Callable[..., Any]) -> Any:
        """The function of two graphs.

        Args:
            marked: changes the marks of each node of a copy.
            partition: gives forward and backward of it.
            lay_out: makes each of these something that can be called.
        """
        whole = self._capture.graph_module
        module = fx.GraphModule(whole, copy.deepcopy(whole.graph))
        for node in module.graph.nodes:
            marked(node)
        metadata = copy.copy(self._state.fw_metadata)
        state = dataclasses.replace(self._state, fw_metadata=metadata)
        with _as_while_tracing(self._fake):
            function, _ = aot_stage2_compile(
                state, dataclasses.replace(self._capture, graph_module=module), partition, lay_out, lay_out, lay_out
            )
        return lambda *args: self._outputs.unflatten(function(tree_leaves(args)))


@contextmanager
def _as_while_tracing(fake: Any) -> Iterator[None]:
    """As ``create_aot_state`` leaves things for both stages."""
    with torch.autograd.set_multithreading_enabled(False), fake, _disable_saved_tensors_hooks_during_tracing():
        yield
