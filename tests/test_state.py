"""What a run remembers of any optimizer: stopped and resumed, it ends with the same bits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import small
from trainwright import fit

OPTIMIZERS = {
    "adamw": {"name": "adamw", "learning_rate": 0.01},
    "sgd": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9},
    "rmsprop": {"name": "rmsprop", "learning_rate": 0.01, "momentum": 0.5},
    "adagrad": {"name": "adagrad", "learning_rate": 0.1},
    "adadelta": {"name": "adadelta", "learning_rate": 1.0},
    **{kind: {"name": "torch", "type": kind, "learning_rate": 0.01} for kind in ("NAdam", "RAdam", "Adamax", "ASGD", "Rprop")},
}


def trained(folder: Path, name: str, steps: int, *, resume: bool) -> dict[str, torch.Tensor]:
    changes = {"optimizer": OPTIMIZERS[name], "training__steps": steps, "schedule": {"name": "constant"}}
    changes |= {"model__options": {"hidden": [16], "norm": "batch", "dropout": 0.2}, "training__ema": {"decay": 0.9}}
    fit.train(small.recipe(folder, **changes), quiet=True, resume=resume)
    return load_file(folder / "run" / "model" / "model.safetensors")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resuming_gives_the_same_bits(name, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = trained(whole, name, 6, resume=False)
    before = trained(parts, name, 3, resume=False)
    found = trained(parts, name, 6, resume=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert not all(torch.equal(before[key], value) for key, value in expected.items())
