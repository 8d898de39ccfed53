"""Boxes of stored tensors, parts of models, and files written tensor by tensor; the oracle is the whole, then sliced."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save_file as their_save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests import ranks
from trainwright.models import decoder, folder
from trainwright.models.folder import EMBEDDING, HEAD, FolderWeights, save_folder, write_weights
from trainwright.models.gguf import GGUFWeights
from trainwright.models.tensor_file import KINDS, save_file
from trainwright.models.torchvision_weights import TorchWeights
from trainwright.models.weights import Weights, allocate, load_into
from trainwright.pieces import Piece, local
from trainwright.recipe import InputError

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **changes}))
    for parameter in model.parameters():  # norms start at one: that would hide mistakes
        nn.init.normal_(parameter)
    return model


def on_meta(**changes) -> decoder.Decoder:
    with torch.device("meta"):
        return decoder.Decoder(decoder.read_config(llama(**changes).config.to_dict()))


@st.composite
def boxes(draw, shape: tuple[int, ...]) -> Piece:
    start = tuple(draw(st.integers(0, size)) for size in shape)
    return Piece(shape, start, tuple(draw(st.integers(0, size - first)) for size, first in zip(shape, start, strict=True)))


# Reading boxes

TENSORS = {
    "rows": torch.randn(6, 5),
    "bf16": torch.randn(3, 4, 5).bfloat16(),
    "count": torch.tensor(7),
    "vector": torch.randn(9, dtype=torch.float64),
    "empty": torch.empty(0, 3),
}


def in_gguf(path: Path) -> Path:
    from tests.models.test_gguf import Kind, llama, write

    return write(path, llama(), Kind.Q8_0)


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> list[Weights]:
    home = tmp_path_factory.mktemp("weights")
    their_save_file(TENSORS, home / "model.safetensors")
    torch.save(TENSORS, home / "model.pth")
    return [FolderWeights(home), TorchWeights(home / "model.pth"), GGUFWeights(in_gguf(home / "model.gguf"))]


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_box_is_that_of_the_whole(everywhere: list[Weights], data: st.DataObject) -> None:
    weights = data.draw(st.sampled_from(everywhere))
    name = data.draw(st.sampled_from(weights.names()))
    box = data.draw(boxes(weights.shape(name)))
    for dtype in (None, torch.float16):
        whole, part = weights.load(name, dtype), weights.load(name, dtype, box)
        assert (part.dtype, tuple(part.shape)) == (whole.dtype, box.size)
        assert torch.equal(part, whole[box.slices()])
        assert part.is_contiguous()


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_large_tensor_is_read_by_rows(everywhere: list[Weights], data: st.DataObject) -> None:
    """So that little of it is in memory twice where its dtype changes."""
    weights = everywhere[0]
    name = data.draw(st.sampled_from(weights.names()))
    box = data.draw(boxes(weights.shape(name)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "AT_ONCE", data.draw(st.integers(1, 400)))
        for dtype in (None, torch.float32):
            found = weights.load(name, dtype, box)
            assert torch.equal(found, TENSORS[name][box.slices()].to(found.dtype))
            assert torch.equal(weights.load(name, dtype), TENSORS[name].to(found.dtype))


def test_a_box_of_queries_in_gguf_is_cut_after_the_rows_are_put_in_order(tmp_path: Path) -> None:
    from tests.models.test_gguf import Kind, llama, write

    model, name = llama(), "model.layers.1.self_attn.q_proj.weight"
    weights = GGUFWeights(write(tmp_path / "m.gguf", model, Kind.F32))
    box = Piece.all_of((64, 64)).chunk(2, 1)
    assert torch.equal(weights.load(name, piece=box), model.get_parameter(name)[32:])
    assert gguf is not None


@pytest.mark.parametrize("kind", [0, 1], ids=["safetensors", "pth"])
def test_only_the_boxs_bytes_are_in_memory(tmp_path: Path, kind: int) -> None:
    tensor = torch.ones(8, 1 << 16)
    their_save_file({"w": tensor}, tmp_path / "model.safetensors")
    torch.save({"w": tensor}, tmp_path / "model.pth")
    weights: Weights = [FolderWeights(tmp_path), TorchWeights(tmp_path / "model.pth")][kind]
    part = weights.load("w", piece=Piece.all_of((8, 1 << 16)).chunk(8, 3))
    assert part.untyped_storage().nbytes() == 4 << 16


# Filling parts of models


def shard(model: nn.Module, pieces: dict[str, Piece]) -> None:
    """What tensor parallelism does to a model on the meta device."""
    for name, piece in pieces.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(torch.empty(piece.size, device="meta")))


def test_parameters_are_boxes_of_the_stored_ones(tmp_path: Path) -> None:
    theirs = llama()
    theirs.save_pretrained(tmp_path)
    state = theirs.state_dict()
    cuts = {"q_proj.weight": 0, "o_proj.weight": 1, "embed_tokens.weight": 0}
    for index in (0, 1, 2):
        model = on_meta()
        pieces = {
            name: Piece.all_of(tuple(value.shape)).chunk(3, index, dim)
            for name, value in state.items()
            for end, dim in cuts.items()
            if name.endswith(end)
        }
        assert len(pieces) == 5
        shard(model, pieces)
        report = load_into(model, FolderWeights(tmp_path), pieces=pieces)
        assert not report.uninitialized
        assert not report.unused
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name][pieces[name].slices()] if name in pieces else state[name]), name


def test_the_shape_of_the_whole_is_compared(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    model, piece = on_meta(), Piece.all_of((52, 32)).chunk(2, 0)
    shard(model, {EMBEDDING: piece})
    with pytest.raises(InputError, match=r"embed_tokens.weight is \[50, 32\] in the file but \[52, 32\] in the model"):
        load_into(model, FolderWeights(tmp_path), pieces={EMBEDDING: piece})
    report = load_into(model, FolderWeights(tmp_path), pieces={EMBEDDING: piece}, match="overlap")
    assert report.reshaped == {EMBEDDING: ((50, 32), (52, 32))}
    with pytest.raises(AssertionError, match="embed_tokens"):
        load_into(on_meta(), FolderWeights(tmp_path), pieces={EMBEDDING: piece})


def last_stage(**changes) -> decoder.Decoder:
    """The second layer and the head: parameterless modules stand for what other processes hold."""
    model = on_meta(**changes)
    model.model.embed_tokens = nn.Identity()
    model.model.layers[0] = nn.Identity()
    model.lm_head.weight = nn.Parameter(torch.empty(50, 32, device="meta"))
    return model


def elsewhere(name: str) -> bool:
    return name.startswith(("model.embed_tokens.", "model.layers.0."))


def test_a_last_stage_has_a_copy_of_the_embedding_and_ignores_other_stages(tmp_path: Path) -> None:
    theirs = llama(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    assert HEAD not in FolderWeights(tmp_path).names()
    model = last_stage(tie_word_embeddings=True)
    report = load_into(model, FolderWeights(tmp_path), aliases={HEAD: EMBEDDING}, absent=elsewhere)
    assert (report.unused, report.new, report.notes) == ((), (), ())
    assert HEAD in report.matched
    state = theirs.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert len(model.state_dict()) == 11


def test_a_copy_that_the_file_contradicts_is_refused(tmp_path: Path) -> None:
    theirs = llama(tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="differ, but the model ties them"):
        load_into(last_stage(), FolderWeights(tmp_path), aliases={HEAD: EMBEDDING}, absent=elsewhere)
    model = last_stage()
    load_into(model, FolderWeights(tmp_path), absent=elsewhere)
    assert torch.equal(model.lm_head.weight, theirs.lm_head.weight)


def test_absent_parts_hide_no_strangers(tmp_path: Path) -> None:
    their_save_file({**llama().state_dict(), "model.layers.9.x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"not in the model: model\.layers\.9\.x\n") as caught:
        load_into(last_stage(), FolderWeights(tmp_path), absent=elsewhere)
    assert "layers.0" not in str(caught.value)
    wrapped = {f"module._orig_mod.{name}": value for name, value in llama().state_dict().items()}
    their_save_file(wrapped, tmp_path / "model.safetensors")
    assert not load_into(last_stage(), FolderWeights(tmp_path), absent=elsewhere).unused


def test_a_tied_parameter_may_be_a_box(tmp_path: Path) -> None:
    theirs = llama(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    model, piece = on_meta(tie_word_embeddings=True), Piece.all_of((50, 32)).chunk(2, 1)
    shard(model, {EMBEDDING: piece})
    model.lm_head.weight = model.model.embed_tokens.weight
    load_into(model, FolderWeights(tmp_path), pieces={EMBEDDING: piece, HEAD: piece})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, theirs.lm_head.weight[25:])


def fill_sharded(folder: str, pieces: dict[str, Piece], tied: bool) -> dict[str, Tensor]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, model = init_device_mesh("cpu", (dist.get_world_size(),)), on_meta(tie_word_embeddings=tied)
    shard(model, pieces)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    before = dict(model.named_parameters())
    for p in before.values():
        local(p).fill_(torch.nan)
    report = load_into(model, FolderWeights(Path(folder)), pieces=pieces, dtype=torch.bfloat16)
    assert not report.uninitialized
    assert not allocate(model, "cpu")
    assert all(p is before[name] for name, p in model.named_parameters())
    assert all(torch.equal(local(p), local(p.full_tensor()).chunk(dist.get_world_size())[dist.get_rank()])
               for p in before.values() if p.shape[0] % dist.get_world_size() == 0)  # fmt: skip
    return {name: p.full_tensor().detach() for name, p in before.items()}


@pytest.mark.parametrize(("count", "tied"), [(2, True), (4, False)])
def test_fully_sharded_parameters_are_filled_in_place(tmp_path: Path, count: int, tied: bool) -> None:
    theirs = llama(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    pieces = {name: Piece.all_of((32, 48)).narrow(0, 7, 5).narrow(1, 12, 30)}  # 5 rows on 4 processes: one has none
    for found in ranks.run(count, fill_sharded, str(tmp_path), pieces, tied):
        assert found.keys() == dict(theirs.named_parameters()).keys()
        for key, value in found.items():
            expected = theirs.get_parameter(key)
            assert torch.equal(value, expected[pieces[key].slices()] if key in pieces else expected), key
            assert value.dtype == torch.float32


def fill_meta(folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = on_meta()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    assert not allocate(model, "cpu")
    with pytest.raises(AssertionError, match="no memory yet"):
        load_into(model, FolderWeights(Path(folder)))


def test_parts_without_memory_are_not_filled_silently(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    ranks.run(2, fill_meta, str(tmp_path))


# Writing tensor by tensor

ALL_KINDS = {str(dtype).removeprefix("torch."): torch.arange(6).view(2, 3).to(dtype) for dtype in KINDS}
ODD = {'é "quoted"\n': torch.ones(3), "": torch.ones(()), "empty": torch.empty(2, 0), "b": torch.ones(1).bfloat16()}


@pytest.mark.parametrize("tensors", [ALL_KINDS, ODD, {**ALL_KINDS, **ODD}, {}], ids=["dtypes", "odd", "both", "none"])
def test_a_file_has_the_bytes_of_the_librarys(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    their_save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    save_file({tmp_path / "ours": list(tensors)}, tensors, reversed(tensors.items()))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(max_size=4), st.tuples(st.sampled_from(list(KINDS)), st.lists(st.integers(0, 3), max_size=3))))
def test_any_file_has_the_bytes_of_the_librarys(tmp_path_factory: pytest.TempPathFactory, table: dict) -> None:
    home = tmp_path_factory.mktemp("file")
    table.pop("__metadata__", None)
    tensors = {name: (torch.rand(shape) * 100).to(dtype) for name, (dtype, shape) in table.items()}
    their_save_file(tensors, home / "theirs", metadata={"format": "pt"})
    blank = {name: value.to("meta") for name, value in tensors.items()}
    save_file({home / "ours": list(tensors)}, blank, tensors.items())
    assert (home / "ours").read_bytes() == (home / "theirs").read_bytes()


def blanks(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.to("meta") for name, value in model.state_dict().items()}


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_streamed_folder_is_the_same_as_one_of_tensors(tmp_path: Path, tied: bool, shard_bytes: int) -> None:
    theirs = llama(tie_word_embeddings=tied).bfloat16()
    config = theirs.config.to_dict()
    save_folder(tmp_path / "one", theirs.state_dict(), config, shard_bytes=shard_bytes)
    save_folder(tmp_path / "two", blanks(theirs), config, shard_bytes=shard_bytes, stream=iter(theirs.state_dict().items()))
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    assert (len(files) > 3) == (shard_bytes < 10**9)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype="auto")
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in again.state_dict().items())
    stored = [name for path in (tmp_path / "two").glob("*.safetensors") for name in load_file(path)]
    assert len(stored) == len(set(stored)) == len(theirs.state_dict()) - tied
    assert HEAD not in stored or not tied
    if shard_bytes < 10**9:
        index = json.loads((tmp_path / "two" / "model.safetensors.index.json").read_text())
        assert sorted(index["weight_map"]) == sorted(stored)
        assert all(path.stat().st_size < 25_000 for path in (tmp_path / "two").glob("*.safetensors"))


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    table = {name: torch.empty(5, device="meta") for name in ("a", EMBEDDING, "c", HEAD)}
    alive: list[weakref.ref[Tensor]] = []
    gc.disable()

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name in table:
            assert not any(reference() is not None for reference in alive), name
            alive.append(weakref.ref(tensor := torch.ones(5)))
            yield name, tensor
            del tensor

    try:
        save_folder(tmp_path / "out", table, {"tie_word_embeddings": True}, shard_bytes=30, stream=stream())
    finally:
        gc.enable()
    assert len(alive) == 4


def test_a_stream_that_contradicts_its_table(tmp_path: Path) -> None:
    table = {"a": torch.empty(2, device="meta"), "b": torch.empty(2, device="meta")}
    wrong = {
        "b never came": {"a": torch.ones(2)},
        r"\[3\].* came": {"a": torch.ones(3), "b": torch.ones(2)},
        "float64.* came": {"a": torch.ones(2).double(), "b": torch.ones(2)},
        "only rank 0": {"a": None, "b": None},
        "not gathered": table,
    }
    for message, tensors in wrong.items():
        with pytest.raises(AssertionError, match=message):
            write_weights(tmp_path, table, 10**9, stream=tensors.items())
    with pytest.raises(TypeError, match=r"complex128, the dtype of z"):
        write_weights(tmp_path, {"z": torch.ones(1, dtype=torch.complex128)}, 10**9)


def test_a_streamed_head_that_contradicts_the_tie_is_not_lost(tmp_path: Path) -> None:
    theirs = llama(tie_word_embeddings=True)
    tensors = {**theirs.state_dict(), HEAD: torch.ones(50, 32)}
    for stream in (tensors.items(), reversed(tensors.items())):
        with pytest.raises(InputError, match="set tie_word_embeddings: false"):
            save_folder(tmp_path / "out", blanks(theirs), theirs.config.to_dict(), stream=stream)
        assert list(tmp_path.iterdir()) == []
