"""How many floating-point operations a training step needs, by the usual count: a multiply and an add are two.

    linear layer        2 a weight and token forward, 2 for the gradient of its input, 2 for that of its weight if it learns
    head                the same, at the supervised tokens alone
    causal attention    12 * query heads * head_dim a layer, for each token and each token it attends to

That is 4 a frozen matrix parameter and token, 6 a trained one. Work done twice (recomputation) isn't counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class Work(NamedTuple):
    """Operations of a training step for each token, supervised token, and pair of a token and one it attends to."""

    token: float
    supervised: float
    pair: float


def decoder_work(model: nn.Module, config: Any) -> Work:
    """Count a decoder's work, with whatever learns in it now; adapters are linear layers as well."""
    head = model.get_submodule("lm_head")
    body = sum(_products(m) for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    pair = 12.0 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return Work(body, _products(head), pair)


def _products(layer: nn.Module) -> float:
    matrices = [p for p in layer.parameters(recurse=False) if p.ndim == 2]
    return float(sum(p.numel() * (6 if p.requires_grad else 4) for p in matrices))


def counter(work: Work) -> Callable[[Any], float]:
    """A micro-batch to the operations of its forward and backward; padding counts for nothing."""
    return lambda batch: work.token * batch.size + work.supervised * batch.supervised + work.pair * batch.pairs


def sample_counter(model: nn.Module, forward: Callable[[Tensor], Tensor], sample: Tensor) -> Callable[[Any], float] | None:
    """The same for samples, from one forward of ``sample`` (1, *shape): three times its work, where everything learns.

    None where something is frozen, or the forward has no operation that can be counted.
    """
    if not all(p.requires_grad for p in model.parameters()):
        return None
    was_training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        forward(sample)
    model.train(was_training)
    work = 3.0 * counted.get_total_flops()
    return (lambda batch: work * batch.size) if work else None
