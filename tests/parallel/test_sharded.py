"""Stage 3 against one process, with every gradient and every weight, from the meta device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tests import ranks
from tests.parallel import zero
from tests.parallel.zero import CPU, Case
from trainwright.memory import precision
from trainwright.models.decoder import Decoder, KVCache
from trainwright.parallel import sharded
from trainwright.pieces import Piece, local
from trainwright.recipe import InputError

MODELS = [*zero.MODELS, "conv-vector"]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_equals_one_process(model: str, size: int) -> None:
    for micro in (1, 3) if size == 2 else (3,):
        case = Case(model, 3, micro, meta=micro == 3)
        results, expected = ranks.run(size, zero.train, case, size), zero.reference(case, size)
        zero.assert_same(results, expected, 1e-9)
        assert all(any(r["changed"].get(name, False) for r in results) for name in expected["changed"] if "never" not in name)
        nonzero = [name for name, held in zero.assembled([expected], "gradients").items() if held is not None and np.any(held)]
        assert len(nonzero) >= len(expected["gradients"]) - ("unused" in model)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_memory_and_traffic_are_as_in_theory(size: int, frozen: bool) -> None:
    for has in ranks.run(size, zero.weigh, 3, size, frozen):
        whole = has["trained"] + has["frozen"]
        rest = whole - 6 * has["block"]
        assert has["started"] <= 1.03 * whole / size + 1024, "more than the local parts was made"
        assert has["largest"] <= has["block"], "a whole parameter was made"
        assert has["within"] == pytest.approx((whole + 3 * has["trained"]) / size, rel=0.03, abs=1024)
        assert has["after"] == pytest.approx((whole + 2 * has["trained"]) / size, rel=0.03, abs=1024)
        rounds = 2 * whole - rest + has["trained"] if not frozen else whole + has["trained"]
        assert has["sent"] == pytest.approx(2 * rounds * (size - 1) / size, rel=0.05)
        activations = 16 * 1024
        # A third one lives on where a busy machine is late in sending its gradients.
        assert has["peak"] <= has["trained"] / size + 3.05 * has["block"] + rest + activations, "more blocks at once"


def stored_in_two_dtypes(size: int) -> dict[str, np.ndarray]:
    """Gradients of LoRA factors in float32 beside a base in bfloat16, which take no part themselves."""
    model = zero.make("decoder-lora", torch.float32)
    precision.apply(model, "bf16")
    axis = zero.world(size)
    sharing = zero.alone(model)
    if size > 1:
        sharing = sharded.shard(model, init_device_mesh("cpu", (size,)), model.blocks(), CPU)
    inputs, labels = (zero.part_of(t, [2] * size, axis.index) for t in zero.samples("decoder", 0, 0, 2 * size, torch.float32))
    if size == 1:
        inputs, labels = zero.samples("decoder", 0, 0, 4, torch.float32)
    with sharing.portion(True), torch.autocast("cpu", torch.bfloat16):
        zero.loss_sum(model, inputs, labels).backward()
    sharing.finish()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    assert all(p.dtype == torch.float32 for _, p in sharing.named)
    wholes = {name: Piece.all_of(tuple(model.get_parameter(name).shape)) for name, _ in sharing.named}
    return {name: (sharing.piece(name, wholes[name]).start, p.grad.numpy(), wholes[name].shape) for name, p in sharing.named}


def test_frozen_bfloat16_beside_trained_float32() -> None:
    found = zero.assembled([{"gradients": r} for r in ranks.run(2, stored_in_two_dtypes, 2)], "gradients")
    expected = zero.assembled([{"gradients": stored_in_two_dtypes(1)}], "gradients")
    for name, value in expected.items():
        assert np.abs(value).max() > 0
        np.testing.assert_allclose(found[name], value, atol=0.02 * np.abs(value).max(), err_msg=name)


def extended(size: int) -> list[float]:
    """Hidden states from a cache, evaluated between two training steps, and what is gathered after that."""
    model = zero.make("decoder-tied", torch.float64)
    assert isinstance(model, Decoder)
    alone = size == 1
    sharing = zero.alone(model) if alone else sharded.shard(model, init_device_mesh("cpu", (size,)), model.blocks(), CPU)
    values = []
    for step in range(2):
        with torch.no_grad():
            cache = KVCache(model.config, 1, 4, dtype=torch.float64, device=CPU)
            for token in (3, 5):
                hidden = model.extend(torch.tensor([[token]]), cache)
            values.append(model.logits(hidden).sum().item())
        sharing.rest()
        inputs, labels = zero.samples("decoder", step, 0, 2, torch.float64)
        loss = zero.loss_sum(model, inputs, labels)
        loss.backward()
        sharing.finish()
        values.append(loss.item())
        with torch.no_grad():
            for _, p in sharing.named:
                p -= 0.1 * p.grad / size
                p.grad = None
        sharing.updated()
    if size > 1:
        with torch.no_grad():
            zero.loss_sum(model, inputs, labels)
        assert type(model.lm_head.weight.data) is torch.Tensor, "the root stays gathered after a forward"
        sharing.rest()
        assert all(local(p).numel() < p.numel() for p in model.parameters())
        assert model.lm_head.weight is model.model.embed_tokens.weight
    return values


def test_other_forwards_and_rest() -> None:
    expected = extended(1)
    assert expected[0] != expected[2]
    for found in ranks.run(2, extended, 2):
        assert found == pytest.approx(expected, rel=1e-9)


def refused(kind: str) -> str:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    if kind == "scalar":
        model[1].gain = nn.Parameter(torch.tensor(1.0))
    else:
        model[0].bias.data = model[0].bias.data.double()
    with pytest.raises(InputError) as error:
        sharded.shard(model, init_device_mesh("cpu", (2,)), [model[0]], CPU)
    return str(error.value)


def test_refusals() -> None:
    assert "can't divide 1.gain, which has no dimensions; set 2" in ranks.run(2, refused, "scalar")[0]
    assert "0.weight is float32, 0.bias is float64; set 2" in ranks.run(2, refused, "dtypes")[0]
