"""Frozen weights that stay in their file: the bits of a run that keeps them, and how much is in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.models import test_gguf
from tests.parity import together
from trainwright import build, loop
from trainwright.memory import narrow, streaming, supplied
from trainwright.recipe import InputError, RunError
from trainwright.recipe.file import parse

STREAM = {"frozen": "stream"}
LORA = {"method": "lora", "rank": 4}
PARTIAL = {"method": "partial", "train": ["*norm*", "*.1.mlp.down_proj.weight"]}
TEXT: dict[str, Any] = {"training__steps": 3, "training__batch_size": 8, "training__micro_batch_size": 2}


def trained(folder: Path, **changes) -> tuple[list[tuple[float, float]], dict[str, Tensor], dict[str, float], loop.Run]:
    run = build.assemble(tiny.recipe(folder, **{**TEXT, **changes}))
    steps = [(step.loss, step.grad_norm) for step in loop.train(run)]
    learned = {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}
    return steps, learned, loop.evaluate(run), run


CASES: dict[str, dict[str, Any]] = {
    "lora fp32": {"adapt": LORA, "precision": "fp32"},
    "lora bf16": {"adapt": LORA, "precision": "bf16"},
    "lora fp16": {"adapt": LORA, "precision": "fp16"},
    "partial pure bf16": {"adapt": PARTIAL, "precision": "pure_bf16", "optimizer": {"name": "sgd", "learning_rate": 0.1}},
    "dropout, checkpointing": {"adapt": {**LORA, "dropout": 0.1}, "precision": "bf16", "memory": {"checkpointing": "full"}},
    "every 2": {"adapt": LORA, "precision": "bf16", "memory": {"checkpointing": "full", "every": 2}},
    "offload": {"adapt": LORA, "precision": "bf16", "memory": {"checkpointing": "offload"}},
    "selective": {"adapt": LORA, "precision": "bf16", "memory": {"checkpointing": "selective"}},
    "one at a time": {"adapt": LORA, "precision": "bf16", "data__packing": False},
}


@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_a_run_that_keeps_them(name, folder):
    changes = CASES[name]
    memory = changes.get("memory", {})
    steps, learned, held_out, _ = trained(folder, **changes)
    found, mine, measured, run = trained(folder, **{**changes, "memory": {**memory, **STREAM}})
    assert found == steps
    assert measured == held_out
    assert len({loss for loss, _ in steps}) == 3
    assert mine.keys() == learned.keys()
    for key, value in learned.items():
        assert torch.equal(mine[key], value), key
    layers = [m for m in run.model.modules() if isinstance(m, supplied.Supplied)]
    assert len(layers) == (14 if changes["adapt"] is not PARTIAL else 13)
    assert all(m.weight.isnan().all() for m in layers)
    assert all(m.weight.untyped_storage().nbytes() <= 4 for m in layers)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_compiled(folder):
    """One graph for all blocks, and the bits of the compiled run that keeps them."""
    keys = {"adapt": LORA, "precision": "fp32", "run__compile": "on", "training__steps": 2}
    steps, learned, _, _ = trained(folder, **keys)
    torch._dynamo.utils.counters.clear()
    found, mine, _, _ = trained(folder, **keys, memory=STREAM)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["frames"]["ok"] <= 3  # two blocks share a graph; the loss's softmax has its own
    assert found == steps
    for key, value in learned.items():
        assert torch.equal(mine[key], value), key


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_in_another_dtype_is_converted(tied, tmp_path):
    """A bf16 file in float32 isn't rounded at all; the vocabulary's tables stay as in the file, and are widened where used."""
    here = tiny.in_bfloat16(tmp_path, tie_word_embeddings=tied)
    steps, learned, held_out, plain = trained(here, adapt=LORA, precision="fp32")
    found, mine, measured, run = trained(here, adapt=LORA, precision="fp32", memory=STREAM)
    assert found == steps
    assert measured == held_out
    assert all(torch.equal(mine[name], value) for name, value in learned.items())
    tables = [run.model.model.embed_tokens, run.model.lm_head]
    assert [table.weight.dtype for table in tables] == [torch.bfloat16] * 2
    assert (tables[0].weight is tables[1].weight) == tied
    assert run.samples(2) == plain.samples(2)
    told = [change.summary for change in run.changes if change.technique == "tables"]
    names = ["model.embed_tokens and lm_head"] if tied else ["model.embed_tokens", "lm_head"]
    assert told == [f"{name} stay in the file's bfloat16, 0.0 MiB; parts are widened for use" for name in names]
    head = run.model.lm_head
    torch.testing.assert_close(head(torch.eye(64)), head.weight.float().T)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"precision": "bf16"}, []),  # as wide as the numbers that are computed with
        ({"adapt": {**LORA, "targets": ["*_proj", "lm_head"]}}, []),  # a head that something else has changed
        ({"adapt": {"method": "partial", "train": ["lm_head.weight"]}}, ["model.embed_tokens"]),
        ({"run__kernels": "off"}, ["model.embed_tokens", "lm_head"]),
    ],
    ids=["as wide", "adapted", "learns", "plain operations"],
)
def test_which_tables_stay_as_in_the_file(changes, names, tmp_path):
    here = tiny.in_bfloat16(tmp_path, tie_word_embeddings="targets" in changes.get("adapt", {}))
    keys = {"adapt": LORA, "precision": "fp32", "training__steps": 1, **changes}
    steps, *_ = trained(here, **keys)
    found, _, _, run = trained(here, **keys, memory=STREAM)
    assert found == steps
    kinds = narrow.NarrowEmbedding, narrow.NarrowLinear
    assert [name for name, module in run.model.named_modules() if isinstance(module, kinds)] == names
    assert any(change.technique == "tables" for change in run.changes) == bool(names)


@pytest.mark.parametrize("parallel", [{"zero": 2}, {"pipeline": 2}], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_many_processes(stored, parallel, folder, tmp_path):
    folder = tiny.in_bfloat16(tmp_path) if stored == torch.bfloat16 else folder
    keys = {**TEXT, "adapt": LORA, "evaluation__before": False, "optimizer": {"learning_rate": 0.01, "eps": 1e-3}}
    plain = together.trace("text", str(folder), keys)
    changes = {f"parallel__{name}": value for name, value in parallel.items()}
    first, _ = together.many(2, "text", folder, {**keys, **changes, "memory": STREAM})
    together.agree(first, plain, tolerance=5e-5)


def test_generating_streams_as_well(folder):
    run = build.assemble(tiny.recipe(folder, adapt=LORA, memory=STREAM))
    plain = build.assemble(tiny.recipe(folder, adapt=LORA))
    assert run.samples is not None
    assert plain.samples is not None
    assert run.samples(2) == plain.samples(2)


def test_what_is_said(folder):
    run = build.assemble(tiny.recipe(folder, adapt=LORA, memory=STREAM, precision="bf16"))
    [change] = [change for change in run.changes if change.technique == "streaming"]
    assert "14 weights, 0.1 MiB, stay in" in change.summary
    assert change.summary.endswith("each reading turns float32 to bfloat16: a file in that dtype would be read faster")
    assert len(change.names) == 14
    assert not [name for name in run.remember() if "ticket" in name or name.endswith("_proj.weight")]


# --- reading ------------------------------------------------------------------------


def stored(tmp_path: Path, count: int = 3, dtype: torch.dtype = torch.float32) -> tuple[streaming.Reader, list, list[Tensor]]:
    values = [torch.randn(4, 3 + number % 2).to(dtype) for number in range(count)]
    path, offset, places = tmp_path / "numbers", 0, []
    path.write_bytes(b"".join(value.view(torch.uint8).numpy().tobytes() for value in values))
    reader = streaming.Reader()
    for value in values:
        places.append(reader.add(path, offset, (4, value.shape[1]), dtype))
        offset += value.nbytes
    return reader, places, values


def test_reading_ahead_learns_the_order(tmp_path):
    reader, places, values = stored(tmp_path, 4)
    order = [0, 1, 2, 3, 3, 2, 1, 0]
    for turn in range(4):
        for index in order:
            assert torch.equal(reader.fetch(places[index], torch.float32), values[index])
        if turn == 1:
            reads, guessed = reader.reads, reader.guessed
    assert reader.reads - reads == 2 * 6  # the two turns need no reading
    assert reader.guessed - guessed == 2 * 6


@pytest.mark.parametrize("alone", [streaming.ALONE, 5])
def test_a_wrong_guess_costs_a_reading_and_nothing_else(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "ALONE", alone)  # numbers that are converted at once: fewer than a weight has, too
    reader, places, values = stored(tmp_path, 4)
    generator = torch.Generator().manual_seed(0)
    for index in torch.randint(4, (200,), generator=generator).tolist():
        dtype = torch.float64 if index == 2 else torch.float32
        assert torch.equal(reader.fetch(places[index], dtype), values[index].to(dtype))


def test_the_last_weight_stays_while_the_next_is_read(tmp_path):
    reader, places, values = stored(tmp_path, 3)
    for _ in range(3):
        for index in range(3):
            now = reader.fetch(places[index], torch.float32)
            if reader._ahead is not None:
                reader._ahead[2].result()
            assert torch.equal(now, values[index])


def test_two_weights_are_in_memory(tmp_path):
    reader, places, _ = stored(tmp_path, 5, torch.bfloat16)
    for _ in range(3):
        for place in places:
            reader.fetch(place, torch.bfloat16)
    largest = max(place.nbytes for place in places)
    assert sum(len(room) for room in reader._room) + len(reader._raw) == 2 * largest


@pytest.mark.parametrize("turn", [0, 2])
def test_a_file_that_becomes_shorter(tmp_path, turn):
    reader, places, _ = stored(tmp_path)
    for _ in range(turn):
        for place in places:
            reader.fetch(place, torch.float32)
    os.truncate(tmp_path / "numbers", 20)
    with pytest.raises(RunError, match=r"memory.frozen: .*numbers has become shorter while the run reads"):
        [reader.fetch(place, torch.float32) for place in [*places, *places]]


def test_files_are_closed_with_the_model(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    reader, places, _ = stored(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    number = places[0].number
    del reader, places
    assert len(os.listdir("/proc/self/fd")) == before
    assert number not in streaming._STORED


# --- wrong input ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parallel": {"zero": 3, "data": 2}}, "isn't offered with parallel.zero: 3, which divides weights itself"),
        ({"parallel": {"tensor": 2}}, "isn't offered with parallel.tensor, which cuts weights across blocks"),
        ({"parallel": {"engine": "deepspeed"}}, "isn't offered with parallel.engine: deepspeed"),
        ({"model": {"options": {"vocab_size": 3}}}, "needs model.pretrained: there are no frozen weights otherwise"),
        ({"adapt": {**LORA, "base": "4bit"}}, "and adapt.base: 4bit exclude each other"),
    ],
    ids=["zero 3", "tensor", "deepspeed", "random", "4bit"],
)
def test_what_is_refused_at_once(changes, says, folder):
    mapping = {
        "model": {"pretrained": str(folder / "base")}, "data": {"source": "x"}, "adapt": LORA, "memory": STREAM, **changes,
    }  # fmt: skip
    with pytest.raises(InputError, match=says):
        parse(mapping)


def test_nothing_is_frozen(folder):
    with pytest.raises(InputError, match=r"memory.frozen has no effect: no linear layer of the model's blocks is frozen"):
        build.assemble(tiny.recipe(folder, memory=STREAM))


def test_a_gguf_file(folder, tmp_path):
    test_gguf.write(tmp_path / "model.gguf", test_gguf.llama(vocab_size=320))
    changes = {"adapt": LORA, "memory": STREAM, "model": {"pretrained": str(tmp_path / "model.gguf"),
                                                          "tokenizer": str(folder / "base")}}  # fmt: skip
    with pytest.raises(
        InputError, match=r"reads safetensors files, and .*model.gguf is none; adapt.base: 4bit keeps the blocks"
    ):
        build.assemble(tiny.recipe(folder, **changes))


def test_a_bias_that_learns_gets_its_gradient(tmp_path):
    """Of a plain layer, against torch's own."""
    torch.manual_seed(0)
    plain, layer = nn.Linear(8, 6), nn.Linear(8, 6)
    layer.load_state_dict(plain.state_dict())
    path = tmp_path / "numbers"
    path.write_bytes(plain.weight.detach().numpy().tobytes())
    place = streaming.Reader().add(path, 0, (6, 8), torch.float32)
    supplied.become(layer, "stream", {streaming.TICKET: place.ticket()}, torch.device("cpu"))
    x = torch.randn(2, 3, 8, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    plain(x).square().sum().backward()
    layer(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.allclose(plain.bias.grad, layer.bias.grad, rtol=1e-6)
    assert layer.bias.grad.any()
    assert layer.weight.grad is None
    assert torch.equal(layer.effective_weight(), plain.weight)  # type: ignore[operator]
