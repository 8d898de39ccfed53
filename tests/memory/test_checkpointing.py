"""Checkpointing changes memory, and no bit of a loss, gradient, weight or buffer."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import small, tiny
from trainwright import build, loop
from trainwright.memory import checkpointing, selective
from trainwright.memory.blocks import find
from trainwright.recipe import InputError, Memory, Recipe
from trainwright.recipe.file import parse

CPU = torch.device("cpu")
MODES: dict[str, dict[str, Any]] = {
    "full": {"checkpointing": "full"},
    "every 2": {"checkpointing": "full", "every": 2},
    "selective": {"checkpointing": "selective"},
    "offload": {"checkpointing": "offload"},
    "offload, every 3": {"checkpointing": "offload", "every": 3},
}
TEXT = {"training__batch_size": 8, "training__micro_batch_size": 4}
LORA = {"method": "lora", "rank": 4, "dropout": 0.1}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "decoder": (tiny, TEXT),
    "decoder lora": (tiny, {**TEXT, "adapt": LORA}),
    "decoder partial": (tiny, {**TEXT, "adapt": {"method": "partial", "train": ["*layers.[12].mlp*", "*norm*"]}}),
    "decoder bf16": (tiny, {**TEXT, "adapt": LORA, "precision": "bf16"}),
    "resnet9": (small, {"model": {"architecture": "resnet9", "options": {"stem": 4, "channels": [8, 8]}}}),
    "resnet18": (
        small,
        {"model": {"architecture": "resnet18", "options": {"width": 4, "stochastic_depth": 0.2}}, "training__batch_size": 16},
    ),
    "cnn": (small, {"model": {"architecture": "cnn", "options": {"channels": [4, 16, 16], "dropout": 0.1}}}),
    "lstm": (small, {"model": {"architecture": "lstm", "options": {"layers": 2, "hidden": 16, "dropout": 0.1}}}),
    "mlp": (small, {"model__options": {"hidden": [80, 80, 70], "dropout": 0.1, "norm": "batch"}}),
    "own": (small, {"model": {"architecture": "tests.memory.test_checkpointing:own"}}),
}


class Layer(nn.Module):
    """A user's block: a buffer that decides what its forward gives and that this changes, in-place work, dropout."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(size, size))
        self.norm = nn.BatchNorm1d(size)
        self.activation = nn.ReLU(inplace=True)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        self.calls = self.calls + 1  # another tensor, not another value
        out = nn.functional.dropout(self.activation(self.norm(self.linear(x))), 0.1, self.training)
        return x + out * self.calls if scale is None else x + scale * out


class Own(nn.Module):
    """Blocks that nobody names, with the model's own code between them."""

    def __init__(self, inputs: int, size: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, size)
        self.body = nn.ModuleList(Layer(size) for _ in range(4))
        self.last = nn.Linear(size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        for place, block in enumerate(self.body):
            x = block(x, scale=x.mean(0)) if place == 1 else block(x)
            x = x.tanh() if place == 2 else x
        return self.last(x)


def own(inputs: tuple[int, ...], outputs: int) -> nn.Module:
    return Own(64, 72, outputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("memory")
    tiny.model(place / "base", num_hidden_layers=4)
    tiny.pairs(place / "pairs.jsonl")
    return place


def trace(folder: Path, name: str, memory: dict[str, Any]) -> tuple[Any, ...]:
    """Losses, gradients of each step, weights and buffers at the end, and names."""
    kind, changes = MODELS[name]
    run = build.assemble(kind.recipe(folder, **{"training__steps": 3, **changes}, memory=memory))
    names = [name for name, _ in run.model.named_modules()]
    gradients, clip = [], run.clip

    def watched() -> Tensor:
        gradients.append({name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None})
        return clip()

    run.clip = watched
    losses = [step.loss for step in loop.train(run)]
    assert [change.technique for change in run.changes].count("checkpointing") == (1 if memory else 0)
    return losses, gradients, dict(run.model.state_dict()), names


@pytest.fixture(scope="module")
def plain(folder) -> Any:
    known: dict[str, tuple[Any, ...]] = {}

    def found(name: str) -> tuple[Any, ...]:
        if name not in known:
            known[name] = trace(folder, name, {})
        return known[name]

    return found


@pytest.mark.parametrize(
    ("name", "mode"), [(n, m) for n in MODELS for m in MODES if n != "resnet18" or m in ("full", "every 2")]
)
def test_no_bit_changes(name, mode, folder, plain):
    losses, gradients, state, names = plain(name)
    found = trace(folder, name, MODES[mode])
    assert found[0] == losses
    assert losses[0] != losses[-1]
    assert found[3] == names
    for step, expected in enumerate(gradients):
        assert found[1][step].keys() == expected.keys()
        for key, gradient in expected.items():
            assert torch.equal(found[1][step][key], gradient), f"step {step}: {key}"
            assert step == 0 or gradient.any(), f"{key} has no gradient"
    assert found[2].keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(found[2][key], value), key


# --- what is held -------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of tensors that were made within and are still there; the most of them since ``mark``."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive = {x.untyped_storage()._cdata: None for x in known}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        for storage in [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor) and not x.is_meta]:
            if storage._cdata not in self.alive:
                self.now += storage.nbytes()
                self.alive[storage._cdata] = weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.alive.pop(key)
        self.now -= size

    def mark(self) -> int:
        gc.collect()
        self.peak = self.now
        return self.now


DEEP, WIDE = 8, 72


class Deep(nn.Module):
    """Residual blocks of frozen products and norms, so that a backward makes nothing that stays."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(WIDE), nn.Linear(WIDE, 3 * WIDE), nn.Linear(3 * WIDE, WIDE)

        def forward(self, x: Tensor) -> Tensor:
            wide = self.up(self.norm(x))
            return x + self.down(wide.sigmoid() * wide.tanh() * nn.functional.gelu(wide)).sigmoid()

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Deep.Block() for _ in range(DEEP)))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def held(memory: dict[str, Any]) -> tuple[float, float]:
    """What a forward leaves, and the most in the backward, in block inputs."""
    torch.manual_seed(0)
    model = Deep()
    checkpointing.apply(model, Memory(**memory), CPU)
    x = torch.randn(256, WIDE, requires_grad=True)
    with Live([x, *model.parameters()]) as live:
        (model(x) * 1.0).sum().backward()  # what is learned on the way: which buffers change
        x.grad = None
        out = model(x).sum()
        before = live.mark()
        out.backward()
        peak = live.peak
    size = x.numel() * x.element_size()
    return before / size, peak / size


def test_memory_is_what_the_mode_promises():
    found = {name: held(memory) for name, memory in {"none": {}, **MODES}.items()}
    block = found["none"][0] / DEEP
    inputs = DEEP - 1  # the first one is the model's input, which is there anyway
    assert block > 5
    assert found["full"][0] <= 1.05 * inputs
    assert found["every 2"][0] <= 1.05 * (DEEP / 2 - 1)
    assert found["offload"][0] < 0.1
    assert found["offload, every 3"][0] < 0.1
    assert 1.3 * found["full"][0] < found["selective"][0] < 0.7 * found["none"][0]
    flow = found["none"][1] - found["none"][0]  # gradients on their way, which are there in any backward
    at_once = {"full": 1, "every 2": 2, "offload": 1, "offload, every 3": 3}
    for name, blocks in at_once.items():
        assert found[name][1] <= 1.05 * (found[name][0] + blocks * block + flow + ("offload" in name)), name
    assert found["full"][1] <= 1.3 * (inputs + block)


def test_evaluation_keeps_nothing(folder, monkeypatch):
    monkeypatch.setattr(checkpointing, "checkpoint", None)
    run = build.assemble(tiny.recipe(folder, memory={"checkpointing": "full"}, **TEXT))
    assert loop.evaluate(run)["loss"] > 0
    assert run.samples is not None
    assert run.samples(1)[0].answer is not None


def test_a_changed_input_is_noticed():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)))
    checkpointing.apply(model, Memory(checkpointing="full", every=2), CPU)
    x = torch.ones(2, 4)
    out = model(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="a block's input was changed in place"):
        out.backward()


def test_a_forward_that_depends_on_something_else_is_noticed():
    class Fickle(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            Fickle.calls += 1
            return self.linear(x).sin() if Fickle.calls < 3 else self.linear(x)

    model = nn.Sequential(Fickle(), Fickle())
    checkpointing.apply(model, Memory(checkpointing="full", every=2), CPU)
    with pytest.raises(RuntimeError, match=r"kept \d tensors for the backward, not \d: .*memory\.every"):
        model(torch.ones(2, 4)).sum().backward()


def test_the_graph_can_be_used_twice():
    for memory in MODES.values():
        if memory["checkpointing"] == "selective":
            continue  # torch keeps its results for one backward
        torch.manual_seed(0)
        model = Own(4, 8, 3)
        checkpointing.apply(model, Memory(**memory), CPU)
        out = model(torch.randn(5, 4)).square().sum()
        parameters = list(model.parameters())
        first = torch.autograd.grad(out, parameters, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(out, parameters), strict=True))


# --- offload ------------------------------------------------------------------


def test_the_file_has_no_name_and_its_room_is_used_again(tmp_path):
    model = Deep()
    x = torch.randn(64, WIDE, requires_grad=True)
    checkpointing.apply(model, Memory(checkpointing="offload", folder=str(tmp_path)), CPU)
    number = model.layers[0].store._place._file
    sizes = set()
    for _ in range(3):
        model(x).sum().backward()
        sizes.add(os.fstat(number).st_size)
    assert sizes == {(DEEP - 1) * x.numel() * 4}
    assert not list(tmp_path.iterdir())
    del model
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_tensors_come_back_as_they_were(shape, dtype):
    from trainwright.memory.offloading import store_for

    store = store_for(CPU, None)
    whole = torch.randn(shape).to(dtype)
    last = whole.contiguous(memory_format=torch.channels_last) if whole.ndim == 4 else whole
    for x in (whole, whole.transpose(0, 1), last, whole[:, ::2]):
        back = store.keep(x).fetch()
        assert torch.equal(back, x)
        assert back.dtype == dtype
        dense = x.numel() == whole.numel()
        assert not dense or back.stride() == x.stride()


def test_no_room(monkeypatch, tmp_path):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    model = Deep()
    checkpointing.apply(model, Memory(checkpointing="offload", folder=str(tmp_path)), CPU)
    with pytest.raises(InputError, match=rf"memory\.folder: {tmp_path} has no room: .*; name another folder"):
        model(torch.randn(4, WIDE, requires_grad=True))


@pytest.mark.parametrize("name", ["missing", "file"])
def test_no_folder(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=rf"memory\.folder: {tmp_path}/{name}: .*; name a folder that can be written to"):
        checkpointing.apply(Deep(), Memory(checkpointing="offload", folder=str(tmp_path / name)), CPU)


# --- which blocks -------------------------------------------------------------


def test_blocks_by_name_are_the_outermost():
    assert list(find(Own(4, 8, 3), ["body*"], "memory.blocks")) == [f"body.{place}" for place in range(4)]
    assert list(find(Own(4, 8, 3), ["body.[12].*", "last"], "memory.blocks")) == [
        f"body.{place}.{name}" for place in (1, 2) for name in ("linear", "norm")
    ] + ["last"]


def test_repeated_parts_are_blocks():
    assert list(find(Own(4, 8, 3), None, "memory.blocks")) == [f"body.{place}" for place in range(4)]
    with pytest.raises(
        InputError, match=r"memory\.blocks: this Sequential has no blocks\(\).*name its blocks, such as .*'0\*'"
    ):
        find(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), None, "memory.blocks")


def test_names_that_match_nothing(folder):
    with pytest.raises(InputError, match=r"memory\.blocks: pattern '\*\.layer\.\*' matches none .*did you mean 'layers'"):
        build.assemble(tiny.recipe(folder, memory={"checkpointing": "full", "blocks": ["*.layer.*"]}))


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"every": 2}, "every has no effect: checkpointing is none"),
        ({"every": 2, "checkpointing": "selective"}, "every has no effect: checkpointing is selective"),
        ({"blocks": ["a*"]}, "blocks has no effect: checkpointing is none"),
        ({"folder": "/tmp", "checkpointing": "full"}, "folder has no effect: checkpointing is full, not offload"),
        ({"checkpointing": "ful"}, "'full'"),
        ({"gradient_checkpointing": True}, "memory.checkpointing|did you mean 'checkpointing"),
    ],
)
def test_what_has_no_effect_is_refused(memory, message):
    with pytest.raises(InputError, match=message):
        parse({"data": {"source": "x"}, "memory": memory})


@pytest.mark.parametrize("key", ["gradient_checkpointing", "activation_checkpointing", "use_gradient_checkpointing"])
def test_other_words(key):
    with pytest.raises(InputError, match=r"did you mean 'memory\.checkpointing: full'"):
        parse({"data": {"source": "x"}, key: True})


# --- selective ----------------------------------------------------------------


def test_what_is_dear():
    a, b = torch.empty(8, 64), torch.empty(64, 8)
    assert selective.is_dear(torch.ops.aten.mm.default, (a, b))
    assert not selective.is_dear(torch.ops.aten.mm.default, (b, a)), "eight terms are soon added"
    assert selective.is_dear(torch.ops.trainwright.packed_attention.default, ())
    assert not selective.is_dear(torch.ops.aten.gelu.default, (a,))
    for name in selective.KERNELS | selective.PRODUCTS.keys() | selective.CONVOLUTIONS.keys():
        space, operator = name.split("::")
        assert hasattr(getattr(torch.ops, space), operator) or space == "torch_attn", name


def test_kernels_that_drop_are_computed_again():
    kernel = torch.ops.aten._scaled_dot_product_flash_attention.default
    q = torch.empty(1, 1, 8, 64)
    keep, again = (selective.policy(None, kernel, q, q, q, rate) for rate in (0.0, 0.1))
    assert keep.name == "MUST_SAVE"
    assert again.name == "PREFER_RECOMPUTE"


def test_layers_in_place_leave_what_is_kept():
    gradients = []
    for memory in (Memory(), Memory(checkpointing="selective")):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.SiLU(inplace=True)) for _ in range(2)))
        checkpointing.apply(model, memory, CPU)
        model(torch.randn(8, 64)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- compiled -----------------------------------------------------------------


class Drop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDE, WIDE) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout((x @ self.weight).sigmoid(), 0.5, self.training)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("mode", MODES)
def test_compiled_blocks_drop_the_same_and_share_a_graph(mode):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(*(Drop() for _ in range(4)))
    names = [name for name, _ in model.named_parameters()]
    checkpointing.apply(model, Memory(**MODES[mode], blocks=["*"]), CPU)
    for block in model:
        block.forward = torch.compile(block.forward)
    x = torch.randn(16, WIDE, requires_grad=True)
    states = [x]
    for block in model:
        states.append(block(states[-1]))
        states[-1].retain_grad()
    states[-1].sum().backward()
    gradient = torch.ones_like(x)
    for block, before, after in zip(reversed(model), states[-2::-1], states[:0:-1], strict=True):
        kept = (before @ block.weight).sigmoid()
        gradient = gradient * (after != 0) * 2 * kept * (1 - kept)
        torch.testing.assert_close(block.weight.grad, before.T @ gradient)
        gradient = gradient @ block.weight.T
        torch.testing.assert_close(before.grad, gradient)
    assert 0.3 < (states[-1] == 0).float().mean() < 0.7
    assert counters["stats"]["unique_graphs"] <= 2, "one for a leaf, one for all others"
    assert [name for name, _ in model.named_parameters()] == names


def test_every_mode_is_described(folder):
    for mode in ("full", "selective", "offload"):
        (change,) = checkpointing.apply(Own(4, 8, 3), Memory(checkpointing=mode), CPU)
        assert change.summary.startswith(f"{mode}: ")
        assert change.names == tuple(f"body.{place}" for place in range(4))
    assert checkpointing.apply(Own(4, 8, 3), Memory(), CPU) == []
    assert isinstance(tiny.recipe(folder, memory={"checkpointing": "full"}), Recipe)
