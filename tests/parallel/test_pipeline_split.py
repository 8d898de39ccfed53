"""Where a pipeline is cut, against every way to cut it; how long it idles, against a simulation; what it refuses."""

from __future__ import annotations

import copy
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainwright.adapt import lora
from trainwright.models import catalogue
from trainwright.models.cnn import Cnn, CnnOptions
from trainwright.models.contract import Absent
from trainwright.models.decoder import Decoder, read_config
from trainwright.models.mlp import Mlp, MlpOptions
from trainwright.models.vgg import Vgg16, VggOptions
from trainwright.parallel import pipeline
from trainwright.parallel.mesh import Axis
from trainwright.parallel.pipeline_split import bubble, cut, part_costs, split
from trainwright.recipe import InputError, Lora
from trainwright.recipe.task import Task


def runs(costs: list[int], ends: list[int]) -> list[int]:
    """The sums of the runs."""
    return [sum(costs[first:end]) for first, end in zip([0, *ends], ends, strict=False)]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.data())
def test_no_cut_has_a_lesser_largest_run(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    ends = cut(costs, stages)
    assert len(ends) == stages
    assert ends[-1] == len(costs)
    assert ends == sorted(set(ends))
    assert ends[0] > 0
    every = ([*places, len(costs)] for places in combinations(range(1, len(costs)), stages - 1))
    assert max(runs(costs, ends)) == min(max(runs(costs, ends)) for ends in every)


def test_equal_parts_are_spread_evenly() -> None:
    assert sorted(runs([1] * 10, cut([1] * 10, 4))) == [2, 2, 3, 3]
    assert runs([5, 1, 1, 1, 1], cut([5, 1, 1, 1, 1], 3)) == [5, 2, 2]


def decoder(layers: int = 6, vocabulary: int = 40, **changes) -> Decoder:
    config = {
        "vocab_size": vocabulary, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True, **changes,
    }  # fmt: skip
    with torch.device("meta"):
        return Decoder(read_config(config))


def test_costs_of_a_decoder() -> None:
    costs = part_costs(decoder())
    assert costs["model.embed_tokens"] == 0
    assert costs["model.norm"] == 0
    assert costs["lm_head"] == 40 * 8
    assert costs["model.layers.0"] == 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12


def test_a_decoder_is_cut_between_layers_and_before_its_head() -> None:
    assert split(decoder(), 2) == [
        ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2"],
        ["model.layers.3", "model.layers.4", "model.layers.5", "model.norm", "lm_head"],
    ]
    heavy_head = split(decoder(vocabulary=400), 2)
    assert heavy_head[1] == ["lm_head"]
    assert heavy_head[0][-1] == "model.norm"


@pytest.mark.parametrize("size", range(1, 8))
def test_every_part_stays_in_its_place(size: int) -> None:
    model = decoder()
    assert [name for stage in split(model, size) for name in stage] == list(model.parts())


def test_costs_of_convolutions_count_pixels() -> None:
    with torch.device("meta"):
        costs = part_costs(Vgg16(VggOptions(), (3, 224, 224), 10, norm=False))
    assert costs["features.0"] == 224 * 224 * 64 * 3 * 9
    assert costs["features.28"] == 14 * 14 * 512 * 512 * 9
    assert costs["classifier.0"] == 512 * 49 * 4096
    assert costs["features.1"] == costs["avgpool"] == 0
    # 15.5 thousand million multiplications, as published for configuration D
    assert sum(costs.values()) == pytest.approx(15.47e9, rel=0.01)


PLAIN = [
    Mlp(MlpOptions(hidden=[5, 6, 7]), (2, 3), 4),
    Cnn(CnnOptions(channels=[4, 6, 5], norm="none"), (3, 8, 8), 3),
]


@pytest.mark.parametrize("model", PLAIN, ids=lambda model: type(model).__name__)
def test_the_stages_of_a_model_are_the_model(model: nn.Module) -> None:
    """One after the other, each alone: the same outputs, and the parameters are divided."""
    model.eval()
    x = torch.randn(2, *((2, 3) if isinstance(model, Mlp) else (3, 8, 8)))
    expected, names = model(x), {name for name, _ in model.named_parameters()}
    found: list[str] = []
    for index in range(3):
        part = copy.deepcopy(model)
        pipeline.apply(part, Axis(3, index), "1f1b")
        found += [name for name, _ in part.named_parameters()]
        x = part(x)
    torch.testing.assert_close(x, expected)
    assert len(found) == len(names)
    assert set(found) == names


@pytest.mark.parametrize("pixels", [32, 224])
def test_the_stages_of_vgg_fit_together(pixels: int) -> None:
    with torch.device("meta"):
        x = torch.empty(2, 3, pixels, pixels)
        for index in range(16):
            options = VggOptions(input="fixed" if pixels == 224 else "any")
            model = Vgg16(options, (3, pixels, pixels), 10, norm=False)
            pipeline.apply(model, Axis(16, index), "1f1b")
            assert sum(p.ndim > 1 for p in model.parameters()) == 1
            # NOTE: a leaf as what is received is one, and layers in place mustn't change it
            x = model(x.detach().requires_grad_())
    assert x.shape == (2, 10)


def test_nothing_of_another_stage_is_left() -> None:
    """Not even where ``blocks()`` groups the layers anew."""
    with torch.device("meta"):
        model = Vgg16(VggOptions(), (3, 224, 224), 10, norm=False)
    all_of_it = sum(p.numel() for p in model.parameters())
    division = pipeline.apply(model, Axis(4, 0), "1f1b")
    kept = {id(p) for p in model.parameters()}
    assert {id(p) for block in model.blocks() for p in block.parameters()} <= kept
    assert sum(p.numel() for p in model.parameters()) < all_of_it / 100
    assert all(isinstance(layer, Absent) for layer in model.classifier)
    assert division.change.names == division.parts[0]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_tied_parameters_are_known_at_both_ends(index: int) -> None:
    model = decoder()
    division = pipeline.apply(model, Axis(3, index), "1f1b")
    ends = [(end.name, end.canonical, end.peer) for end in division.shared]
    first, last = "model.embed_tokens.weight", "lm_head.weight"
    assert ends == [[(first, first, 2)], [], [(last, first, 0)]][index]
    assert division.copies == ({last: first} if index == 2 else {})
    assert division.last == (index == 2)
    assert ("model.embed_tokens.weight" in dict(model.named_parameters())) == (index == 0)
    assert (last in dict(model.named_parameters())) == (index == 2)


def test_untied_parameters_are_nobodys_copies() -> None:
    assert not pipeline.apply(decoder(tie_word_embeddings=False), Axis(2, 1), "1f1b").shared


def test_interleaved_stages_go_round() -> None:
    model = decoder()
    division = pipeline.apply(model, Axis(2, 1), "interleaved")
    assert division.mine == (1, 3)
    held = {name for name, module in model.named_modules() if name in model.parts() and not isinstance(module, Absent)}
    assert held == {*division.parts[1], *division.parts[3]}
    assert pipeline.apply(decoder(), Axis(2, 0), "interleaved", virtual=3).mine == (0, 2, 4)


def test_what_learns_and_adapters_are_kept() -> None:
    model = decoder()
    lora.apply(model, Lora(method="lora", rank=2, alpha=4))
    whole = {name: p.requires_grad for name, p in model.named_parameters()}
    division = pipeline.apply(model, Axis(2, 1), "1f1b")
    found = {name: p.requires_grad for name, p in model.named_parameters()}
    assert found == {name: whole[division.copies.get(name, name)] for name in found}
    assert any(name.endswith("lora_A") for name in found)


def test_gradients_flow_back_only_to_what_learns() -> None:
    model = decoder()
    model.requires_grad_(False)
    model.model.layers[3].requires_grad_(True)
    assert pipeline.apply(model, Axis(3, 0), "1f1b").flows == (False, True, True)


@pytest.mark.parametrize(
    ("processes", "count", "virtual", "expected"),
    [
        (2, 1, 1, 1 / 2),
        (4, 8, 1, 3 / 11),
        (4, 2, 1, 3 / 5),
        (4, 8, 2, 3 / 19),
        (2, 1, 2, 1 / 2),
        (4, 2, 2, 1 - 4 / 9),
        (1, 3, 1, 0),
    ],
)
def test_bubble(processes: int, count: int, virtual: int, expected: float) -> None:
    assert bubble(processes, count, virtual) == pytest.approx(expected)


def simulated(processes: int, count: int, virtual: int) -> int:
    """How long a forward takes where each process sends rounds of p micro-batches through one of its stages after another."""
    rounds = [range(start, min(start + processes, count)) for start in range(0, count, processes)]
    todo = {
        index: [(batch, stage) for each in rounds for stage in range(index, processes * virtual, processes) for batch in each]
        for index in range(processes)
    }
    done: dict[tuple[int, int], int] = {}
    clock = 0
    while any(todo.values()):
        clock += 1
        ready = [work for work in todo.values() if work and (work[0][1] == 0 or (work[0][0], work[0][1] - 1) in done)]
        done |= {work.pop(0): clock for work in ready}
    return clock


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 3))
def test_bubble_of_a_simulated_forward(processes: int, count: int, virtual: int) -> None:
    idle = 1 - count * virtual / simulated(processes, count, virtual)
    if count % processes == 0 or virtual == 1 or count < processes:
        assert idle == pytest.approx(bubble(processes, count, virtual))
    else:  # a last round that isn't full waits for itself; torch makes the rounds longer instead
        assert idle >= bubble(processes, count, virtual) - 1e-9


def test_the_change_tells_stages_and_idling() -> None:
    shown = pipeline.apply(decoder(), Axis(2, 0), "1f1b").change.summary
    assert shown == (
        "2 stages on 2 processes, schedule 1f1b; 0: model.embed_tokens to model.layers.2; 1: model.layers.3 to lm_head"
    )


def test_more_stages_than_parts() -> None:
    with pytest.raises(InputError, match=r"parallel.pipeline: 8 processes need 8 parts.* has 7; set .* at most 7"):
        pipeline.apply(decoder(), Axis(8, 0), "1f1b")
    with pytest.raises(InputError, match=r"4 processes with 2 stages each \(schedule interleaved\) need 8 .*at most 3"):
        pipeline.apply(decoder(), Axis(4, 0), "interleaved")


def made(name: str) -> nn.Module:
    dense = name == "unet"
    with torch.device("meta"):
        return catalogue.make(name, {}, (5, 4) if name == "lstm" else (3, 224, 224), Task("classes", 3, dense=dense))


@pytest.mark.parametrize("name", ["resnet9", "resnet18", "cnn", "vgg16_bn", "unet"])
def test_batch_normalisation_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"batch normalisation \(.*more\).*micro-batch; set pipeline: 1"):
        pipeline.apply(made(name), Axis(2, 0), "1f1b")


def test_a_model_that_is_no_chain_is_refused() -> None:
    with pytest.raises(InputError, match=r"Recurrent is no chain of parts .*set pipeline: 1 .*parallel.data"):
        pipeline.apply(made("lstm"), Axis(2, 0), "1f1b")
