"""Packed frozen weights: the published table, gguf's own numbers, gradients of a plain LoRA over the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from scipy.stats import norm
from torch import Tensor, nn

from tests import tiny
from tests.models import test_gguf
from tests.parity import together
from trainwright import build, loop
from trainwright.memory import four_bit, supplied
from trainwright.models import pretrained
from trainwright.recipe import InputError
from trainwright.recipe.file import parse

LORA = {"method": "lora", "rank": 4}
PACKED = {**LORA, "base": "4bit"}
TEXT: dict[str, Any] = {"training__steps": 3, "training__batch_size": 8, "training__micro_batch_size": 2}
CPU = torch.device("cpu")


# --- the numbers ----------------------------------------------------------------------


def test_the_table_is_made_of_the_normal_distributions_quantiles():
    """As the paper's appendix makes it, and bitsandbytes' ``create_normal_map`` publishes: 8 values above zero, 7 below."""
    offset = 0.9677083
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    table = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(four_bit.CODE, table / table.max(), atol=2e-7)


def test_every_number_becomes_the_nearest_of_its_block():
    """Held against all 16 candidates in float64."""
    torch.manual_seed(0)
    weight = torch.randn(24, 32)
    packed, scales = four_bit.quantize(weight)
    assert (packed.dtype, packed.shape, scales.shape) == (torch.uint8, (384,), (12,))
    blocks = weight.double().view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    candidates = largest[..., None] * torch.tensor(four_bit.CODE, dtype=torch.float64)
    best = (candidates - blocks[..., None]).abs().argmin(-1, keepdim=True)
    expected = candidates.expand(*blocks.shape, 16).gather(-1, best).view(24, 32)
    found = four_bit.dequantize("nf4", (packed, scales), (24, 32), torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    error, square = four_bit.errors(weight, (packed, scales))
    assert error == pytest.approx(float((expected - weight).square().sum()), rel=1e-5)
    assert square == pytest.approx(float(weight.double().square().sum()), rel=1e-6)


def test_the_first_number_is_in_the_upper_half_of_a_byte():
    """As bitsandbytes packs them."""
    weight = torch.zeros(64)
    weight[0], weight[1] = 1.0, -1.0
    packed, scales = four_bit.quantize(weight)
    assert packed[0] == 15 * 16 + 0
    assert packed[1:].eq(7 * 16 + 7).all()
    assert scales.tolist() == [1.0]


def test_a_block_of_zeros_stays():
    packed, scales = four_bit.quantize(torch.zeros(128))
    assert not four_bit.dequantize("nf4", (packed, scales), (128,), torch.float32).any()


def test_a_normal_distribution_is_off_by_a_tenth():
    """NF4's error of normal numbers in blocks of 64 is published as about 0.0085 of their variance and more."""
    torch.manual_seed(0)
    weight = torch.randn(1 << 16)
    error, square = four_bit.errors(weight, four_bit.quantize(weight))
    assert 0.085 < (error / square) ** 0.5 < 0.10


@pytest.mark.parametrize("chunk", [64, 192, 1 << 20])
@pytest.mark.parametrize("kind", four_bit.KINDS)
def test_portions_change_nothing(kind, chunk, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(10, 64)
    if kind == "nf4":
        held = list(four_bit.quantize(weight))
    else:
        held = [torch.from_numpy(quantize(weight.numpy(), Kind[kind])).flatten()]
    whole = four_bit.dequantize(kind, held, (10, 64), torch.float32)
    monkeypatch.setattr(four_bit, "CHUNK", chunk)
    assert torch.equal(four_bit.dequantize(kind, held, (10, 64), torch.float32), whole)
    if kind == "nf4":
        assert all(torch.equal(one, other) for one, other in zip(four_bit.quantize(weight), held, strict=True))
        assert four_bit.errors(weight, held) == pytest.approx(
            (float((whole - weight).square().sum()), float(weight.square().sum())), rel=1e-5
        )


@pytest.mark.parametrize("kind", list(four_bit.GGUF_BYTES))
def test_blocks_of_a_gguf_file_mean_what_gguf_says(kind):
    torch.manual_seed(0)
    raw = quantize(torch.randn(6, 96).numpy(), Kind[kind])
    found = four_bit.dequantize(kind, [torch.from_numpy(raw).flatten()], (6, 96), torch.float32)
    assert np.array_equal(found.numpy(), dequantize(raw, Kind[kind]))
    length, dtype = four_bit.sizes(kind, 6 * 96)["packed"]
    assert (length, dtype) == (raw.size, torch.uint8)


# --- training ---------------------------------------------------------------------------


def trained(folder: Path, dequantized: bool, **changes) -> tuple[list[tuple[float, float]], dict[str, Tensor], loop.Run]:
    """Packed, or a plain LoRA whose base holds what the packed one means."""
    run = build.assemble(tiny.recipe(folder, **{**TEXT, "adapt": PACKED, **changes}))
    if dequantized:
        for name, layer in run.model.named_modules():
            if isinstance(layer, supplied.Supplied):
                _unpack(layer)
                assert name
    steps, gradients = [], {}
    for step in loop.train(_watched(run, gradients)):
        steps.append((step.loss, step.grad_norm))
    learned = {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}
    return steps, {**gradients, **learned}, run


def _unpack(layer: supplied.Supplied) -> None:
    value = layer.base_weight()
    layer.__class__ = type(layer).__mro__[2]
    for name in layer.held:
        delattr(layer, name)
    layer.weight = nn.Parameter(value, requires_grad=False)


def _watched(run: loop.Run, found: dict[str, Tensor]) -> loop.Run:
    clip = run.clip

    def watched() -> Tensor:
        found.update({f"{run.step} {n}": p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None})
        return clip()

    run.clip = watched
    return run


CASES: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "pure bf16": {"precision": "pure_bf16", "optimizer": {"name": "sgd", "learning_rate": 0.1}},
    "checkpointing, dropout": {
        "precision": "bf16", "memory": {"checkpointing": "full"}, "adapt": {**PACKED, "dropout": 0.1},
    },
    "not packed rows": {"precision": "fp32", "data__packing": False},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_is_that_of_the_dequantized_base(name, folder):
    expected, plain, _ = trained(folder, True, **CASES[name])
    steps, found, run = trained(folder, False, **CASES[name])
    assert steps == expected
    assert len({loss for loss, _ in steps}) == 3
    assert found.keys() == plain.keys()
    for key, value in plain.items():
        assert torch.equal(found[key], value), key
        assert value.any() or key.startswith("0 "), key
    layers = [m for m in run.model.modules() if isinstance(m, supplied.Supplied)]
    assert len(layers) == 14


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_compiled_keeps_no_weight(folder):
    """The bits of the uncompiled product; and the backward holds nothing of a weight's size."""
    kept: list[tuple[tuple[int, ...], torch.dtype]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tuple(sorted(tensor.shape)), tensor.dtype))
        return tensor

    run = build.assemble(tiny.recipe(folder, **TEXT, adapt=PACKED, precision="fp32", run__compile="on"))
    plain, *_ = trained(folder, False, precision="fp32")
    run.model.train()
    torch._dynamo.utils.counters.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        first = next(iter(loop.train(run)))
    assert first.loss == pytest.approx(plain[0][0], rel=1e-5)
    assert first.grad_norm == pytest.approx(plain[0][1], rel=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]
    layers = [m for m in run.model.modules() if isinstance(m, supplied.Supplied)]
    weights = {tuple(sorted(m.weight.shape)) for m in layers}
    assert (64, 64) in weights
    assert not [shape for shape, _ in kept if shape in weights]
    assert sum(dtype == torch.uint8 for _, dtype in kept) >= len(layers)


@pytest.mark.parametrize("parallel", [{"zero": 1}, {"pipeline": 2}], ids=str)
def test_many_processes(parallel, folder):
    keys = {**TEXT, "adapt": PACKED, "evaluation__before": False, "optimizer": {"learning_rate": 0.01, "eps": 1e-3}}
    plain = together.trace("text", str(folder), keys)
    changes = {f"parallel__{name}": value for name, value in parallel.items()}
    first, _ = together.many(2, "text", folder, {**keys, **changes})
    together.agree(first, plain, tolerance=5e-5)


def test_what_is_said_and_remembered(folder):
    run = build.assemble(tiny.recipe(folder, adapt=PACKED, precision="bf16"))
    [change] = [change for change in run.changes if change.technique == "4-bit base"]
    assert change.summary.startswith("14 weights in nf4: 0.1 MiB become 0.0 MiB, off by 9.")
    assert len(change.names) == 14
    assert not [name for name in run.remember() if "packed" in name or "scales" in name]
    bits = sum(p.nbytes for n, p in run.model.named_parameters() if n.endswith((".packed", ".scales")))
    weights = sum(m.weight.numel() for m in run.model.modules() if isinstance(m, supplied.Supplied))
    assert 8 * bits / weights == 4.5
    others = {n: p.dtype for n, p in run.model.named_parameters() if "embed" in n or "norm" in n}
    assert set(others.values()) == {torch.bfloat16}


def test_one_weight_at_a_time_is_as_it_was(folder, monkeypatch):
    """While loading, no two unpacked weights of blocks are alive."""
    import weakref

    alive: list[weakref.ref[Tensor]] = []
    most = 0
    pack = four_bit.quantize

    def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal most
        alive.append(weakref.ref(weight))
        most = max(most, sum(one() is not None for one in alive))
        return pack(weight)

    monkeypatch.setattr(four_bit, "quantize", quantized)
    build.assemble(tiny.recipe(folder, adapt=PACKED))
    assert len(alive) == 14
    assert most == 1


# --- a GGUF file's own blocks --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16"])
def test_a_gguf_files_blocks_are_used_as_they_are(kind, folder, tmp_path):
    """Against the same file inflated; q and k, whose rows llama.cpp interleaves, are among them."""
    test_gguf.write(tmp_path / "model.gguf", test_gguf.llama(vocab_size=320), Kind[kind])
    model = {"pretrained": str(tmp_path / "model.gguf"), "tokenizer": str(folder / "base")}
    keys: dict[str, Any] = {"model": model, "precision": "fp32", **TEXT}
    run = build.assemble(tiny.recipe(folder, **keys, adapt=PACKED))
    plain = build.assemble(tiny.recipe(folder, **keys, adapt=LORA))
    [change] = [change for change in run.changes if change.technique == "4-bit base"]
    if kind == "F16":
        assert change.summary.startswith("14 weights in nf4: ")
        return
    assert change.summary.startswith(f"14 weights in {kind}: ")
    assert change.summary.endswith("as in the file")
    names = dict(plain.model.named_modules())
    for name, layer in run.model.named_modules():
        if isinstance(layer, supplied.Supplied):
            assert torch.equal(layer.base_weight(), names[name].weight), name
    steps, expected = ([(s.loss, s.grad_norm) for s in loop.train(one)] for one in (run, plain))
    assert steps == expected
    for name, p in plain.model.named_parameters():
        if p.requires_grad:
            assert torch.equal(dict(run.model.named_parameters())[name], p), name


def test_kinds_that_are_mixed_in_one_file(folder, tmp_path):
    """llama.cpp's files often keep some matrices wider; those become NF4."""
    base = test_gguf.llama(vocab_size=320)
    path = test_gguf.write(tmp_path / "model.gguf", base, Kind.Q4_0)
    weights = pretrained.open_weights(pretrained.locate(str(path)))
    raw = weights.blocks("model.layers.0.self_attn.q_proj.weight")  # type: ignore[attr-defined]
    assert raw.shape == (64, 36)
    reader = gguf.GGUFReader(path)
    stored = next(t for t in reader.tensors if t.name == "blk.0.attn_q.weight")
    assert sorted(map(bytes, raw.numpy())) == sorted(map(bytes, stored.data))  # rows moved, no byte changed
    assert not np.array_equal(raw.numpy(), stored.data)


# --- the adapter --------------------------------------------------------------------------


def test_a_finished_models_base_is_packed_again(folder):
    recipe = tiny.recipe(folder, adapt=PACKED, precision="fp32")
    built = build.load_model(recipe)
    layers = [m for m in built.model.modules() if isinstance(m, supplied.Supplied)]
    assert len(layers) == 14
    plain = build.load_model(tiny.recipe(folder, adapt=LORA, precision="fp32"))
    tokens = torch.arange(10)[None] + 20
    documents = torch.tensor([0, 10], dtype=torch.int32)
    with torch.no_grad():
        ours, theirs = (one.model(tokens, torch.arange(10)[None], documents) for one in (built, plain))
    off = float((ours - theirs).norm() / theirs.norm())
    assert 0 < off < 0.3


# --- wrong input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parallel": {"zero": 3, "data": 2}}, "adapt.base: 4bit isn't offered with parallel.zero: 3"),
        ({"parallel": {"tensor": 2}}, "adapt.base: 4bit isn't offered with parallel.tensor"),
        ({"parallel": {"engine": "deepspeed"}}, "adapt.base: 4bit isn't offered with parallel.engine: deepspeed"),
        ({"model": {"options": {"vocab_size": 3}}}, "adapt.base: 4bit needs model.pretrained"),
        ({"adapt": {**LORA, "base": "4-bit"}}, "adapt.base"),
    ],
    ids=["zero 3", "tensor", "deepspeed", "random", "a wrong word"],
)
def test_what_is_refused_at_once(changes, says, folder):
    mapping = {"model": {"pretrained": str(folder / "base")}, "data": {"source": "x"}, "adapt": PACKED, **changes}
    with pytest.raises(InputError, match=says):
        parse(mapping)
