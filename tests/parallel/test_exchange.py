"""Tensors made whole again from the pieces of live processes: bits, order, memory, and what happens when writing fails."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests import ranks
from trainwright.models.folder import save_folder, write_weights
from trainwright.models.tensor_file import KINDS
from trainwright.parallel import exchange
from trainwright.parallel.collectives import gather_json
from trainwright.pieces import Held, Piece

CPU = torch.device("cpu")


def make() -> dict[str, Tensor]:
    """The whole tensors, the same at every process."""
    generator = torch.Generator().manual_seed(3)
    random = {f"kind.{dtype}": (torch.rand(5, 4, generator=generator) * 100).to(dtype) for dtype in KINDS}
    special = {"count": torch.tensor(7), "empty": torch.empty(0, 3), "cube": torch.arange(60.0).view(3, 4, 5)}
    return {**random, **special, "complex": torch.arange(6.0).to(torch.complex128)}


def cut(tensors: dict[str, Tensor]) -> dict[str, Held]:
    """This process's pieces: by rows, by columns, or all at the last process, with silent copies elsewhere."""
    rank, size = dist.get_rank(), dist.get_world_size()
    held = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        piece = Piece.all_of(tuple(tensor.shape))
        if tensor.ndim and number % 3 < 2:
            piece = piece.chunk(size, rank, number % 3 if tensor.ndim > 1 else 0)
            held[name] = Held(piece.of(tensor), piece)
        elif number % 2 or rank == size - 1:
            speaks = rank == size - 1
            held[name] = Held(tensor if speaks else torch.zeros_like(tensor), piece, speaks)
    return held if rank % 2 == 0 else dict(reversed(held.items()))


def same(left: Tensor, right: Tensor) -> bool:
    alike = (left.dtype, left.shape) == (right.dtype, right.shape)
    return alike and torch.equal(left.flatten().view(torch.uint8), right.flatten().view(torch.uint8))


def collect_all() -> list[str]:
    tensors = make()
    held = cut(tensors)
    names = []
    for name, tensor in exchange.collect(held, CPU):
        names.append(name)
        if dist.get_rank() == 0:
            assert tensor is not None
            assert same(tensor, tensors[name]), name
        else:
            assert tensor is None
    assert sorted(names) == sorted(tensors)
    gathered = exchange.gather_all(held, CPU)
    assert gathered.keys() == (tensors.keys() if dist.get_rank() == 0 else set())
    assert all(same(value, tensors[name]) for name, value in gathered.items())
    table = exchange.table(held, CPU)
    assert list(table) == names
    assert {name: (one.blank().shape, one.dtype, one.blank().is_meta) for name, one in table.items()} == {
        name: (tensor.shape, tensor.dtype, True) for name, tensor in tensors.items()
    }
    return names


@pytest.mark.parametrize("count", [2, 4])
def test_every_tensor_is_whole_at_the_first_process(count: int) -> None:
    first, *others = ranks.run(count, collect_all)
    assert all(names == first for names in others)


def memory(count: int) -> None:
    """At rank 0 one collected tensor lives at a time; one that it holds whole is given as it is."""
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = Piece.all_of((4, 4))
    rows = whole.chunk(size, rank)
    own = torch.ones(4, 4, requires_grad=True)
    held = {"own": Held(own, whole, rank == 0)}
    held |= {f"w{i}": Held(torch.full(rows.size, float(i)), rows) for i in range(count)}
    previous: weakref.ref[Tensor] | None = None
    gc.disable()
    for name, tensor in exchange.collect(held, CPU):
        if rank == 0 and name == "own":
            assert tensor is not None
            assert tensor.data_ptr() == own.data_ptr()
            assert not tensor.requires_grad
        elif rank == 0:
            assert previous is None or previous() is None
            assert tensor is not None
            previous = weakref.ref(tensor)
        del tensor
    gc.enable()


def test_one_tensor_at_a_time() -> None:
    ranks.run(2, memory, 4)


def wrong(kind: str) -> str:
    rank = dist.get_rank()
    whole = Piece.all_of((4, 4))
    boxes = {
        "gap": [whole.chunk(2, 0), whole.narrow(0, 3, 1)],
        "overlap": [whole.narrow(0, 0, 2), whole.narrow(0, 1, 2)],
        "twice": [whole, whole],
        "shape": [whole.chunk(2, 0), Piece.all_of((5, 4)).narrow(0, 2, 2)],
        "dtype": [whole.chunk(2, 0), whole.chunk(2, 1)],
    }[kind]
    dtype = torch.float64 if kind == "dtype" and rank else torch.float32
    good = Held(torch.ones(3), Piece.all_of((3,)), rank == 0)
    with pytest.raises(AssertionError) as caught:
        list(exchange.collect({"good": good, "bad": Held(torch.ones(boxes[rank].size, dtype=dtype), boxes[rank])}, CPU))
    return str(caught.value)


@pytest.mark.parametrize("kind", ["gap", "overlap", "twice", "shape", "dtype"])
def test_pieces_that_do_not_make_up_a_tensor_are_named_everywhere(kind: str) -> None:
    assert all(message.startswith("bad: ") for message in ranks.run(2, wrong, kind))


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(5)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).bfloat16()


def export(folder: str, tied: bool, shard_bytes: int) -> None:
    model = llama(tied)
    held = cut({name: p.detach() for name, p in model.named_parameters()})
    with exchange.collecting(held, CPU) as (table, stream):
        if dist.get_rank() == 0:
            save_folder(Path(folder), table, model.config.to_dict(), shard_bytes=shard_bytes, stream=stream)


@pytest.mark.parametrize(("tied", "shard_bytes"), [(True, 10**9), (False, 15_000)])
def test_transformers_loads_what_many_processes_hold(tmp_path: Path, tied: bool, shard_bytes: int) -> None:
    ranks.run(2, export, str(tmp_path / "many"), tied, shard_bytes)
    theirs = llama(tied)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype="auto")
    assert again.state_dict().keys() == theirs.state_dict().keys()
    assert all(same(value, theirs.state_dict()[name]) for name, value in again.state_dict().items())
    save_folder(tmp_path / "one", dict(theirs.named_parameters()), theirs.config.to_dict(), shard_bytes=shard_bytes)
    one, many = ({k: v for f in (tmp_path / d).glob("*.safetensors") for k, v in load_file(f).items()} for d in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(same(value, many[name]) for name, value in one.items())


def failing(folder: str) -> list[int]:
    """Rank 0 can't write: the others come through all the same, and everybody can go on talking."""
    held = cut({name: tensor for name, tensor in make().items() if tensor.dtype in KINDS})
    try:
        with exchange.collecting(held, CPU) as (table, stream):
            if dist.get_rank() == 0:
                next(iter(stream))
                write_weights(Path(folder) / "missing", table, 10**9, stream)
    except OSError:
        assert dist.get_rank() == 0
    return gather_json(dist.get_rank(), CPU)


def test_the_others_do_not_wait_for_a_stream_that_is_not_written(tmp_path: Path) -> None:
    assert ranks.run(2, failing, str(tmp_path)) == [[0, 1], [0, 1]]


def test_alone_nothing_is_copied() -> None:
    whole = torch.arange(6.0).view(2, 3)
    top, silent = Piece.all_of((2, 3)), Held(torch.ones(3), Piece.all_of((3,)), speaks=False)
    [(name, tensor)] = exchange.collect({"w": Held(whole, top), "silent": silent}, CPU)
    assert tensor is not None
    assert (name, tensor.data_ptr()) == ("w", whole.data_ptr())
    assert exchange.gather_all({"e": Held(torch.empty(0), Piece.all_of((0,)))}, CPU)["e"].shape == (0,)
    with pytest.raises(AssertionError, match="part: "):
        exchange.table({"part": Held(whole[:1], top.chunk(2, 0))}, CPU)
    with pytest.raises(AssertionError, match="part: "):
        exchange.table({"part": Held(whole[:1], top)}, CPU)
