"""The table of layers: counts against PyTorch's own, tied parameters once, repeated blocks folded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainwright.inspect import Layer, fold, inspect, render, table, totals
from trainwright.recipe.file import parse

OPTIONS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
ATTENTION = 32 * 32 + 2 * 16 * 32 + 32 * 32
PARAMETERS = 100 * 32 + 3 * (ATTENTION + 3 * 32 * 48 + 2 * 32) + 32


def decoder(**sections: Any) -> dict[str, Any]:
    """What inspect finds for a small decoder."""
    return inspect(parse({"data": {"source": "python-docstrings"}, "model": {"options": OPTIONS}, **sections}))


def block() -> nn.Module:
    """A linear layer and a norm."""
    return nn.ModuleDict({"linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})


class Tied(nn.Module):
    """An embedding whose weight is also the head's; the head's bias is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.act = nn.GELU()
        self.head = nn.Linear(4, 10)
        self.head.weight = self.embed.weight


def test_a_row_for_each_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Conv2d(2, 4, 3, bias=False))
    model[0].bias.requires_grad_(False)
    model[2].bfloat16()
    assert table(model) == [
        Layer("0", "Linear", 20, 15, 80, "float32"),
        Layer("1", "ReLU", 0, 0, 0, ""),
        Layer("2", "Conv2d", 72, 72, 144, "bfloat16"),
    ]


def test_parameters_of_a_module_with_children_have_a_row() -> None:
    model = nn.ModuleDict({"inner": nn.Linear(2, 2)})
    model.scale = nn.Parameter(torch.ones(7, dtype=torch.float64))
    assert table(model) == [Layer("", "ModuleDict", 7, 7, 56, "float64"), Layer("inner", "Linear", 6, 6, 24, "float32")]


def test_mixed_dtypes_are_both_named() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data = layer.weight.data.bfloat16()
    assert table(layer)[0].dtype == "bfloat16 + float32"


def test_tied_parameters_count_once() -> None:
    layers = table(Tied())
    assert [(layer.name, layer.parameters, layer.tied) for layer in layers] == [
        ("embed", 40, ""),
        ("act", 0, ""),
        ("head", 10, "embed.weight"),
    ]
    assert totals(layers)["parameters"] == sum(p.numel() for p in Tied().parameters())


def test_totals() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 8, bias=False).requires_grad_(False))
    assert totals(table(model)) == {"parameters": 48, "trainable": 16, "trainable_percent": 100 / 3, "bytes": 192}
    assert totals(table(nn.ReLU()))["trainable_percent"] == 0


def test_no_values_are_needed() -> None:
    with torch.device("meta"):
        assert totals(table(nn.Linear(10**6, 10**6, bias=False)))["bytes"] == 4 * 10**12


def test_repeated_blocks_fold_into_one() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "layers": nn.ModuleList(block() for _ in range(12)), "act": nn.GELU()})
    rows = fold(table(model))
    assert [(row.name, row.copies, row.parameters, row.trainable, row.bytes) for row in rows] == [
        ("first", 1, 20, 20, 80),
        ("layers.0-11.linear", 12, 240, 240, 960),
        ("layers.0-11.norm", 12, 96, 96, 384),
        ("act", 1, 0, 0, 0),
    ]
    assert totals(rows) == totals(table(model))


def test_blocks_inside_of_blocks_fold_too() -> None:
    stages = nn.ModuleList(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))) for _ in range(2))
    assert [(row.name, row.copies) for row in fold(table(stages))] == [("0-1.0-2", 6)]


def test_what_differs_is_not_folded() -> None:
    layers = nn.ModuleList(block() for _ in range(5))
    layers[2].requires_grad_(False)
    layers[4]["linear"].bfloat16()
    assert [row.name for row in fold(table(layers))] == [
        "0-1.linear", "0-1.norm", "2.linear", "2.norm", "3.linear", "3.norm", "4.linear", "4.norm",
    ]  # fmt: skip


def test_dtypes_of_the_same_size_are_not_folded() -> None:
    layers = nn.ModuleList([nn.Linear(4, 4).half(), nn.Linear(4, 4).bfloat16()])
    assert [(row.name, row.dtype) for row in fold(table(layers))] == [("0", "float16"), ("1", "bfloat16")]


def test_numbers_with_gaps_are_not_folded() -> None:
    rows = [Layer(f"blocks.{number}", "Linear", 4, 4, 16, "float32") for number in (0, 1, 3, 4)]
    assert [row.name for row in fold(rows)] == ["blocks.0-1", "blocks.3-4"]


def test_blocks_with_different_insides_are_not_folded() -> None:
    layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4))])
    assert [row.name for row in fold(table(layers))] == ["0.0", "0.1", "1.0"]


def test_fold_of_nothing() -> None:
    assert fold([]) == []


def test_a_recipes_model() -> None:
    found = decoder(precision="fp32")
    assert found["totals"] == {
        "parameters": PARAMETERS,
        "trainable": PARAMETERS,
        "trainable_percent": 100,
        "bytes": 4 * PARAMETERS,
    }
    head = found["layers"][-1]
    assert (head["name"], head["parameters"], head["tied"]) == ("lm_head", 0, "model.embed_tokens.weight")


def test_lora_trains_only_its_factors() -> None:
    found = decoder(adapt={"method": "lora", "rank": 2}, precision="bf16")
    linear = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    factors = 3 * sum(2 * (wide + high) for wide, high in linear)
    assert found["totals"]["trainable"] == factors
    assert found["totals"]["bytes"] == 2 * PARAMETERS + 4 * factors
    assert found["changes"][0]["technique"] == "lora"


def test_a_users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "anatomy_example.py").write_text("from torch import nn\ndef make(width):\n    return nn.Linear(width, 2)\n")
    monkeypatch.chdir(tmp_path)
    found = decoder(model={"architecture": "anatomy_example:make", "options": {"width": 9}})
    assert found["totals"]["parameters"] == 20


def test_rendered_folded_or_not() -> None:
    found = decoder(precision="fp32")
    text = render(found)
    assert "model.layers.0-2.self_attn.q_proj" in text
    assert "x3" in text
    assert "same as model.embed_tokens.weight" in text
    assert f"{PARAMETERS:,} parameters in 0.1 MB, {PARAMETERS:,} of them trainable (100.00%)" in text
    every = render(found, every=True)
    assert all(layer["name"] in every for layer in found["layers"])
    assert len(every.splitlines()) == len(found["layers"]) + 1 + len(found["changes"]) + 1


def test_names_are_never_cut() -> None:
    name = ".".join(["a_rather_long_name"] * 12)
    row = Layer(name, "Linear", 1, 1, 4, "float32")
    text = render({"layers": [vars(row)], "changes": [], "totals": totals([row])})
    assert name in text
