"""Bugs of models and of what is done to them: adapters, tying, BatchNorm, kernels, compiling, precision, data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainwright import filling, spread, supervised
from trainwright.adapt import lora
from trainwright.data import batches, loader, sampler
from trainwright.memory import checkpointing, precision, replay
from trainwright.models import cpu_attention, decoder
from trainwright.models.contract import Change
from trainwright.parallel import batchnorm

Context = Any


# --- adapters, tying, precision -------------------------------------------------------------------------------------


def b_not_zero() -> Context:
    true = lora.initialize

    @torch.no_grad()
    def initialize(model: nn.Module, seed: int, *more: Any) -> None:
        true(model, seed, *more)
        generator = torch.Generator().manual_seed(seed)
        for _, layer in lora.adapted(model):
            layer.lora_B.copy_(torch.empty(layer.lora_B.shape).normal_(0, 0.02, generator=generator))

    return patch.object(lora, "initialize", initialize)


def base_not_frozen() -> Context:
    true = lora.apply

    def apply(model: nn.Module, section: Any, **more: Any) -> Change:
        change = true(model, section, **more)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.requires_grad_(True)
        return change

    return patch.object(lora, "apply", apply)


def scale_divided_by_tensor_ranks() -> Context:
    true = spread.tensor.apply

    def apply(model: nn.Module, axis: Any, **more: Any) -> Any:
        found = true(model, axis, **more)
        for _, layer in lora.adapted(model):
            layer.scale /= axis.size
        return found

    return patch.object(spread.tensor, "apply", apply)


def not_tied() -> Context:
    return patch.object(decoder.Decoder, "tie", lambda self: None)


def no_masters() -> Context:
    """Everything is stored in bfloat16, also what learns."""
    true = precision.apply

    def apply(model: nn.Module, kind: Any) -> Change:
        change = true(model, kind)
        if kind == "bf16":
            model.to(torch.bfloat16)
        return change

    return patch.object(precision, "apply", apply)


# --- BatchNorm ------------------------------------------------------------------------------------------------------


def statistics_of_a_rank() -> Context:
    return patch.object(spread, "join_statistics", lambda model, mesh: [])


def statistics_updated_twice() -> Context:
    true = batchnorm._Shared._follow

    def follow(self: Any, *moments: Tensor) -> None:
        true(self, *moments)
        true(self, *moments)

    return patch.object(batchnorm._Shared, "_follow", follow)


# --- kernels and compiling ------------------------------------------------------------------------------------------


def attention_too_large() -> Context:
    true = cpu_attention.packed_attention
    return patch.object(cpu_attention, "packed_attention", lambda q, k, v, documents: true(q, k, v, documents) * 1.01)


def attention_too_cold() -> Context:
    true = cpu_attention.packed_attention
    return patch.object(cpu_attention, "packed_attention", lambda q, k, v, documents: true(q * 1.02, k, v, documents))


def compiled_slightly_wrong() -> Context:
    true = filling.compile_blocks

    def compile_blocks(built: Any, recipe: Any, compiler: Any) -> Change:
        if filling.compiles(recipe, built):
            for block in built.model.blocks():
                block.forward = _scaled(block.forward)
        return true(built, recipe, compiler)

    return patch.object(filling, "compile_blocks", compile_blocks)


def _scaled(forward: Any) -> Any:
    return lambda *arguments: forward(*arguments) * 1.001


def documents_leak() -> Context:
    """A token attends to all earlier ones of its row."""

    def blind(true: Any) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
            rows, length = q.shape[0], q.shape[2]
            return true(q, k, v, torch.arange(0, rows * length + 1, length, dtype=torch.int32))

        return attend

    return patch.multiple(decoder, attention=blind(decoder.attention), masked_attention=blind(decoder.masked_attention))


# --- data -----------------------------------------------------------------------------------------------------------


def positions_go_on() -> Context:
    true = loader.collate

    def collate(*arguments: Any) -> Any:
        batch = true(*arguments)
        return replace(batch, positions=torch.arange(batch.tokens.shape[1]).expand(batch.tokens.shape).contiguous())

    return patch.object(loader, "collate", collate)


def labels_one_off() -> Context:
    """Each position predicts the token after the next one."""

    def shifted(targets: np.ndarray) -> np.ndarray:
        return np.pad(targets[:, 2:], ((0, 0), (0, 2)), constant_values=loader.IGNORED)

    return patch.object(loader, "_shifted", shifted)


def ranks_read_the_same() -> Context:
    true = sampler._part
    return patch.object(sampler, "_part", lambda first, count, share: true(first, count, sampler.Share(0, share.processes)))


def sampler_by_ranks() -> Context:
    true = sampler.global_batch

    def global_batch(seed: int, *more: Any) -> np.ndarray:
        return true(seed + (dist.get_world_size() if dist.is_initialized() else 1), *more)

    return patch.object(sampler, "global_batch", global_batch)


def padded_samples_counted() -> Context:
    """Ranks whose part of the held-out data is shorter repeat a sample."""
    true = supervised.in_order

    def in_order(examples: Any, size: int, share: Any = sampler.ALONE) -> Iterator[Any]:
        for batch, whole in zip(
            true(examples, size, share), true(examples, size, sampler.Share(0, share.processes)), strict=True
        ):
            lacking = len(whole.inputs) - len(batch.inputs)
            more = (torch.cat([own, own[:1].expand(lacking, *own.shape[1:])]) for own in (batch.inputs, batch.targets))
            yield batches.SampleBatch(*more)

    return patch.object(supervised, "in_order", in_order)


def changes_by_place_in_the_micro_batch() -> Context:
    """Augmentation draws the same numbers in each micro-batch and rank."""
    true = supervised.batches_of

    def batches_of(recipe: Any, data: Any, share: Any = sampler.ALONE) -> Any:
        made = true(recipe, data, share)
        return replace(made, augment=_from_zero(made.augment)) if made.augment else made

    return patch.object(supervised, "batches_of", batches_of)


def _from_zero(augment: Any) -> Any:
    def changed(step: int, positions: np.ndarray, count: int, fetch: Any) -> Any:
        return augment(step, np.arange(len(positions)), count, lambda wanted: fetch(positions[wanted]))

    return changed


# --- checkpointing --------------------------------------------------------------------------------------------------


def buffers_change_again() -> Context:
    """What a second forward does to BatchNorm's statistics stays."""
    return patch.multiple(replay.Before, __enter__=lambda self: None, __exit__=lambda self, *exception: None)


def other_masks_in_the_backward() -> Context:
    true = checkpointing.checkpoint
    return patch.object(checkpointing, "checkpoint", lambda *args, **keys: true(*args, preserve_rng_state=False, **keys))


def reentrant() -> Context:
    """Blocks whose input needs no gradient give their parameters none."""
    true = checkpointing.checkpoint

    def old(function: Any, *args: Any, **keys: Any) -> Any:
        return true(function, *args, use_reentrant=True)

    return patch.object(checkpointing, "checkpoint", old)
