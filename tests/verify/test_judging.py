"""How differences are judged and told, on tensors made by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from trainwright.verify import judging, telling
from trainwright.verify.judging import Line
from trainwright.verify.tracing import BEGIN, END, FIRST, LAST, SAVED, TENSORS, Trace

NOISE = 3e-7


def made(folder: Path, seed: int = 0, noise: float = NOISE, **changes: dict[str, Tensor]) -> Trace:
    """Two tensors that learn and one that doesn't, with noise; changes replace tensors of a kind."""
    folder.mkdir(exist_ok=True)
    values, extra = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    tensors = {}
    for kind in (BEGIN, FIRST, LAST, END, SAVED):
        for name, shape in (("a", (8, 4)), ("b", (16,))):
            exact = torch.randn(shape, generator=values, dtype=torch.float64)
            tensors[f"{kind}/{name}"] = exact * (1 + noise * torch.randn(shape, generator=extra, dtype=torch.float64))
    tensors[f"{BEGIN}/frozen"] = tensors[f"{END}/frozen"] = torch.ones(3)
    for kind, found in changes.items():
        tensors |= {f"{kind.replace('_', ' ')}/{name}": value for name, value in found.items()}
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, folder / TENSORS)
    return Trace(
        folder=folder, losses=[2.0, 1.5], norms=[1.0, 0.9], rates=[0.1, 0.05], supervised=[8, 8], faults=[], rows=[1, 2],
        held_out={"loss": 1.4}, buffers=[], learning=["a", "b"], decayed=["a"], resumed={},
    )  # fmt: skip


def judged(tmp: Path, run: Trace) -> list[Line]:
    return judging.judge(run, made(tmp / "plain", 1), made(tmp / "truth", noise=0.0), "fp32")


def failed(lines: list[Line]) -> dict[str, Line]:
    return {line.what: line for line in lines if line.verdict == "failed"}


def test_noise_as_the_plain_runs_is_within(tmp_path):
    assert not failed(judged(tmp_path, made(tmp_path / "run", 2)))


def test_a_hundred_times_the_noise_fails(tmp_path):
    assert "gradients of step 1" in failed(judged(tmp_path, made(tmp_path / "run", 2, noise=300 * NOISE)))


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (BEGIN, "weights before step 1"),
        (FIRST, "gradients of step 1"),
        (LAST, "gradients of step 2"),
        (END, "weights after step 2"),
        (SAVED, "saved model"),
    ],
)
def test_every_kind_of_tensor_is_compared(kind, line, tmp_path):
    truth = made(tmp_path / "exact", noise=0.0).tensors(kind)["a"]
    found = failed(judged(tmp_path, made(tmp_path / "run", 2, **{kind.replace(" ", "_"): {"a": truth * 1.01}})))
    assert line in found
    assert found[line].where == "a"


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("losses", [2.01, 1.5], "loss of step 1"),
        ("losses", [2.0, 1.51], "loss of later steps"),
        ("norms", [1.01, 0.9], "gradient norm"),
        ("rates", [0.1, 0.0500001], "learning rate"),
        ("rows", [1, 3], "rows of the data"),
        ("supervised", [8, 7], "counted targets"),
        ("held_out", {"loss": 1.41}, "held-out loss"),
        ("resumed", {"optimizer.a.exp_avg": 1e-9}, "resume"),
        ("losses", [2.0, 2.0], "living gradients"),
        ("learning", ["a", "b", "frozen"], "living gradients"),
    ],
)
def test_every_number_is_compared(field, value, line, tmp_path):
    run = dataclasses.replace(made(tmp_path / "run", 2), **{field: value})
    assert line in failed(judged(tmp_path, run))


def test_frozen_weights_must_not_move(tmp_path):
    found = failed(judged(tmp_path, made(tmp_path / "run", 2, end={"frozen": torch.tensor([1.0, 1.0, 1.0000001])})))
    assert found["frozen weights"].why == "frozen is frozen, but changed"


def test_the_last_gradient_comes_first(tmp_path):
    """Along the backward, that is where a fault begins."""
    wrong = {name: value * 2 for name, value in made(tmp_path / "exact", noise=0.0).tensors(FIRST).items()}
    found = failed(judged(tmp_path, made(tmp_path / "run", 2, first_gradient=wrong)))["gradients of step 1"]
    assert found.why == "b is twice what it should be; so do 1 others"
    assert found.tensors == ("b", "a")


X = torch.arange(1.0, 13.0, dtype=torch.float64).view(4, 3)


@pytest.mark.parametrize(
    ("mine", "says"),
    [
        (X / 2, "is half of what it should be"),
        (X * 2, "is twice what it should be"),
        (X / 4, "is 1/4 of what it should be"),
        (X * 3, "is 3 times what it should be"),
        (X * 0, "is zero"),
        (X * float("nan"), "has values that are not numbers"),
        (X * 1.001, "is off by 1.0e-03 of its size"),
        (torch.cat([X[:2], X[2:] * -1]), "differs by 185.5% of its size, in rows 2, 3 of 4"),
    ],
)
def test_differences_in_words(mine, says):
    assert telling.difference(mine, X) == says


def test_tensors_that_only_one_side_has():
    assert telling.missing(None, X) == "is missing"
    assert telling.missing(X, None) == "should not be there"
    assert telling.missing(X, X[:2]) == "has the shape [4, 3], not [2, 3]"
