"""Tiny models, batches that divide unevenly, and a plain training loop around a ``Sharing``: what tests of ZeRO share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from tests.parallel.traffic import Live, Traffic
from trainwright.adapt import lora
from trainwright.losses.tokens import token_cross_entropy
from trainwright.models.decoder import Decoder, read_config
from trainwright.models.mlp import Mlp, MlpOptions
from trainwright.parallel import batchnorm, gradients, sharded
from trainwright.parallel.mesh import Axis
from trainwright.parallel.sharing import Sharing, alone
from trainwright.pieces import Piece, local
from trainwright.recipe import CrossEntropy, Lora

CPU = torch.device("cpu")
LENGTH, VOCABULARY = 6, 33
# Samples of each process in the micro-batches of a step, which differ from step to step; 0: an empty part.
PARTS = {1: [[5], [4], [3]], 2: [[3, 2], [0, 4], [2, 1]], 4: [[2, 1, 0, 2], [0, 0, 4, 0], [1, 1, 1, 0]]}

MODELS = ["decoder", "decoder-tied", "decoder-lora", "decoder-partial", "decoder-head", "mlp", "branches", "branches-unused"]


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    model: str = "decoder"
    stage: int = 0
    micro: int = 1
    dtype: torch.dtype = torch.float64
    steps: int = 3
    meta: bool = True  # stage 3 starts without values
    overlap: bool = True
    fused: bool = False


class Conv(nn.Module):
    """Convolutions, BatchNorm, a residual connection, and a parameter without dimensions."""

    def __init__(self, scalar: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(5, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5, momentum=None))
        self.head = nn.Linear(5, 4)
        self.gain = nn.Parameter(torch.tensor(1.5) if scalar else torch.tensor([1.5]))

    def blocks(self) -> list[nn.Module]:
        return [self.stem, self.block]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.gain * self.block(x)).relu().mean((2, 3)))


class Ways(nn.Module):
    """Some samples take one way, some another, and one parameter may be on none."""

    def __init__(self, unused: bool) -> None:
        super().__init__()
        self.ways = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        if unused:
            self.never = nn.Parameter(torch.ones(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        total = x * 0
        for number, way in enumerate(self.ways):
            chosen = x[:, 0].gt(0).eq(bool(number))
            if chosen.any():
                total = total + way(x) * chosen[:, None]
        return total.tanh()


class Branches(nn.Module):
    """A unit of which each process uses another part, and a view of its output."""

    def __init__(self, unused: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.ways = Ways(unused)
        self.head = nn.Linear(6, 4)

    def blocks(self) -> list[nn.Module]:
        return [self.first, self.ways]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.ways(self.first(x))).view(len(x), 4)


def make(name: str, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """decoder[-tied][-lora|-partial|-head], mlp, conv[-last][-vector], branches[-unused]: the same values each time."""
    torch.manual_seed(0)
    kind, *ways = name.split("-")
    if kind == "decoder":
        model: nn.Module = Decoder(decoder_config("tied" in ways))
        if "lora" in ways:
            lora.apply(model, Lora(method="lora", rank=3))
            lora.initialize(model, 0)
            for _, layer in lora.adapted(model):
                nn.init.normal_(layer.lora_B)
        if "partial" in ways:
            for key, p in model.named_parameters():
                p.requires_grad_("layers.1" in key or "embed" in key)
        if "head" in ways:
            for key, p in model.named_parameters():
                p.requires_grad_("lm_head" in key)
    elif kind == "mlp":
        model = Mlp(MlpOptions(hidden=[7, 6], norm="layer"), (5,), 4)
    elif kind == "conv":
        model = Conv("vector" not in ways)
        model.to(memory_format=torch.channels_last) if "last" in ways else None
    else:
        model = Branches("unused" in ways)
    model = model.to(dtype).to(device)
    if isinstance(model, Decoder):
        model.tie()  # what .to("meta") undoes
    return model


def decoder_config(tied: bool = False) -> Any:
    return read_config(
        {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "tie_word_embeddings": tied, "attention_bias": True}
    )  # fmt: skip


def samples(name: str, step: int, micro: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The whole micro-batch: inputs and labels."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    if name.startswith("decoder"):
        tokens = torch.randint(VOCABULARY, (count, LENGTH + 1), generator=generator)
        labels = tokens[:, 1:].where(torch.rand(count, LENGTH, generator=generator) < 0.7, -100)
        return tokens[:, :-1], labels
    shape = {"mlp": (5,), "branches": (6,)}.get(name.partition("-")[0], (3, 4, 4))
    return torch.randn(count, *shape, generator=generator, dtype=dtype), torch.randint(4, (count,), generator=generator)


def loss_sum(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    if not isinstance(model, Decoder):
        return nn.functional.cross_entropy(model(inputs), labels, reduction="sum")
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    documents = torch.arange(len(inputs) + 1, dtype=torch.int32) * inputs.shape[1]
    hidden = model(inputs, positions, documents)
    return token_cross_entropy(hidden, model.head_weight(), labels, CrossEntropy())[0]


def part_of(tensor: Tensor, sizes: list[int], rank: int) -> Tensor:
    return tensor.split(sizes)[rank]


def share(case: Case, axis: Axis) -> tuple[nn.Module, Sharing]:
    model = make(case.model, case.dtype)
    batchnorm.apply(model, axis)
    if axis.size == 1:
        return model, alone(model)
    if case.stage < 3:
        return model, gradients.share(model, axis, case.stage, model.blocks())
    whole = make(case.model, case.dtype, device="meta" if case.meta else "cpu")
    batchnorm.apply(whole, axis)
    kept = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    sharing = sharded.shard(whole, init_device_mesh("cpu", (axis.size,)), whole.blocks(), CPU)
    for name, p in whole.named_parameters():
        local(p).copy_(Piece.all_of(tuple(p.shape)).chunk(axis.size, axis.index).of(kept[name]))
    for name, b in whole.named_buffers():
        b.copy_(buffers[name])
    return whole, sharing


def world(size: int) -> Axis:
    return Axis(size, dist.get_rank(), dist.group.WORLD) if size > 1 else Axis()


def train(case: Case, size: int, parts: list[list[int]] | None = None) -> dict[str, Any]:
    """A few steps of AdamW. Gives the sum of local losses a step, gradients of step 1, and all weights after."""
    axis = world(size)
    model, sharing = share(case, axis)
    before = {name: p.detach().clone() for name, p in sharing.named}
    optimizer = torch.optim.AdamW([p for _, p in sharing.named], 1e-2, weight_decay=0.1, fused=case.fused)
    losses: list[float] = []
    found: dict[str, Any] = {}
    parts = parts or PARTS[size]
    for step in range(case.steps):
        losses.append(_backward(case, model, sharing, axis, step, parts))
        if step == 0:
            found = {name: _held(name, None if p.grad is None else p.grad, p, sharing, model) for name, p in sharing.named}
        optimizer.step()
        sharing.updated()
        optimizer.zero_grad(set_to_none=True)
    sharing.rest()
    assert not any(p.grad is not None for p in model.parameters())
    weights = {name: _whole_or_part(name, p, sharing) for name, p in model.named_parameters()}
    changed = {name: not torch.equal(before[name], p) for name, p in sharing.named if p.numel()}
    buffers = {name: b.double().numpy() for name, b in model.named_buffers()}
    return {"losses": losses, "gradients": found, "weights": weights, "changed": changed, "buffers": buffers}


def _backward(case: Case, model: nn.Module, sharing: Sharing, axis: Axis, step: int, parts: list[list[int]]) -> float:
    total = 0.0
    chosen = [parts[(step + micro) % len(parts)] for micro in range(case.micro)]
    batches = [samples(case.model, step, micro, sum(sizes), case.dtype) for micro, sizes in enumerate(chosen)]
    count = sum(int(labels.ne(-100).sum()) for _, labels in batches)
    for micro, (sizes, (inputs, labels)) in enumerate(zip(chosen, batches, strict=True)):
        if axis.size > 1:
            inputs, labels = part_of(inputs, sizes, axis.index), part_of(labels, sizes, axis.index)
        with sharing.portion(case.overlap and micro == case.micro - 1):
            loss = loss_sum(model, inputs, labels) / count
            if loss.requires_grad:
                loss.backward()
        total += loss.item()
    sharing.finish()
    return total


def _held(name: str, value: Tensor | None, part: Tensor, sharing: Sharing, model: nn.Module) -> Any:
    """(start, values, shape of the whole); None: no gradient."""
    if value is None:
        return None
    assert value.shape == part.shape
    piece = sharing.piece(name, Piece.all_of(tuple(model.get_parameter(name).shape)))
    assert tuple(value.shape) == piece.size, name
    return piece.start, value.double().numpy(), piece.shape


def _whole_or_part(name: str, p: Tensor, sharing: Sharing) -> Any:
    shape = tuple(p.shape)
    piece = sharing.piece(name, Piece.all_of(shape)) if sharing.shards_parameters else Piece.all_of(shape)
    return piece.start, local(p).detach().double().numpy(), shape


def assembled(results: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """Whole tensors of all processes' parts, which must agree where they overlap."""
    whole: dict[str, Any] = {}
    for name, first in results[0][what].items():
        if first is None:
            assert all(result[what][name] is None for result in results), name
            whole[name] = None
            continue
        value = np.full(first[2], np.nan)
        for start, part, _ in (result[what][name] for result in results):
            box = tuple(slice(a, a + n) for a, n in zip(start, part.shape, strict=True))
            assert np.isnan(value[box]).all() or np.array_equal(value[box], part), f"{name}: replicas differ"
            value[box] = part
        assert not np.isnan(value).any(), name
        whole[name] = value
    return whole


def reference(case: Case, size: int) -> dict[str, Any]:
    """The same in one process."""
    return train(case, 1, PARTS[size])


def assert_same(results: list[dict[str, Any]], expected: dict[str, Any], tolerance: float) -> None:
    """Losses, every gradient of step 1 and every weight after the last step; and that something was learned."""
    np.testing.assert_allclose(sum(np.array(r["losses"]) for r in results), expected["losses"], rtol=tolerance)
    for what in ("gradients", "weights"):
        found, wanted = assembled(results, what), assembled([expected], what)
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            assert (value is None) == (found[name] is None), name
            if value is not None:
                scale = np.abs(value).max()
                np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance * scale, err_msg=f"{what} {name}")
    for result in results:
        for name, value in result["buffers"].items():
            np.testing.assert_allclose(value, expected["buffers"][name], rtol=tolerance, atol=tolerance, err_msg=name)


class Deep(nn.Module):
    """Equal blocks, all parameters in them but for a small head."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def weigh(stage: int, size: int, frozen: bool = False) -> dict[str, float]:
    """Bytes of live tensors of a model, its gradients and Adam's states: within a step and after it; and at most."""
    width, depth = 128, 6
    x, y = torch.randn(2, width), torch.randint(4, (2,))
    live = Live()
    empty = live.bytes
    with live, torch.device("meta" if stage == 3 else "cpu"):
        model = Deep(width, depth)
        if frozen:
            model.layers.requires_grad_(False)
    numbers = {grad: 4 * sum(p.numel() for p in model.parameters() if p.requires_grad is grad) for grad in (True, False)}
    axis = world(size)
    with live:
        if stage == 3:
            sharing = sharded.shard(model, init_device_mesh("cpu", (size,)), model.blocks(), CPU)
        else:
            sharing = gradients.share(model, axis, stage, model.blocks())
    result: dict[str, float] = {"started": live.peak - empty, "largest": live.largest}
    for p in model.parameters():
        local(p).detach().normal_(0, 0.1)
    optimizer = torch.optim.Adam([p for _, p in sharing.named], fused=True)
    for _ in range(2):
        live.peak = before = live.bytes
        with live, Traffic() as traffic:
            for last in (False, True):
                with sharing.portion(last):
                    nn.functional.cross_entropy(model(x), y).backward()
                if not last:
                    within = live.bytes - empty
            sharing.finish()
            optimizer.step()
            sharing.updated()
            optimizer.zero_grad()
        result |= {"within": within, "after": live.bytes - empty, "peak": live.peak - before, "sent": traffic.total}
    return {**result, "trained": numbers[True], "frozen": numbers[False], "block": 4 * (width + 1) * width}
