"""Partial tuning: what matches learns, only that is saved, and it goes onto its own base alone."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import tiny
from trainwright import build, export, fit, loop
from trainwright.adapt import partial
from trainwright.recipe import InputError
from trainwright.runfolder import finished

TRAIN = ["model.layers.1.mlp.*", "*norm.weight"]
PARTIAL = {"adapt__method": "partial", "adapt__train": TRAIN}


def test_what_matches_learns_and_nothing_else(tmp_path):
    run = build.assemble(tiny.recipe(tmp_path, **PARTIAL))
    before = {n: p.clone() for n, p in run.model.named_parameters()}
    list(loop.train(run))
    for name, parameter in run.model.named_parameters():
        learns = name.startswith("model.layers.1.mlp.") or name.endswith("norm.weight")
        assert parameter.requires_grad is learns
        assert torch.equal(parameter, before[name]) is not learns, name


def test_only_what_learned_is_saved_and_loads_onto_the_base(tmp_path):
    fit.train(tiny.recipe(tmp_path, **PARTIAL), quiet=True)
    path = tmp_path / "run" / "model" / "delta.safetensors"
    with safe_open(path, "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert names == {n for n in names if ".1.mlp." in n or n.endswith("norm.weight")}
    assert metadata["base"] == str(tmp_path / "base")
    assert partial.read_section(tmp_path / "run" / "model").train == TRAIN
    built = build.load_model(finished(tmp_path / "run"))
    stored, base = load_file(path), load_file(tmp_path / "base" / "model.safetensors")
    for name, parameter in built.model.named_parameters():
        assert torch.equal(parameter, stored.get(name, base.get(name))), name


def test_merged_is_a_plain_folder(tmp_path):
    fit.train(tiny.recipe(tmp_path, **PARTIAL), quiet=True)
    folder = export.export(tmp_path / "run", "merged")["folder"]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    built = build.load_model(finished(tmp_path / "run"))
    tokens = torch.randint(0, 320, (1, 20))
    mine = built.model.logits(built.model(tokens, torch.arange(20)[None], torch.tensor([0, 20], dtype=torch.int32)))
    torch.testing.assert_close(theirs(tokens).logits, mine, rtol=1e-5, atol=1e-5)


def test_another_base_is_refused(tmp_path):
    build.assemble(tiny.recipe(tmp_path, **PARTIAL)).save(tmp_path / "delta")
    tiny.model(tmp_path / "other", seed=1)
    again = tiny.recipe(tmp_path, **PARTIAL, model__pretrained=str(tmp_path / "other"), adapt__start=str(tmp_path / "delta"))
    with pytest.raises(InputError, match="another base"):
        build.assemble(again)


def test_going_on_from_a_delta(tmp_path):
    run = build.assemble(tiny.recipe(tmp_path, **PARTIAL))
    list(loop.train(run))
    run.save(tmp_path / "delta")
    again = build.assemble(tiny.recipe(tmp_path, **PARTIAL, adapt__start=str(tmp_path / "delta")))
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), again.model.parameters(), strict=True))


def test_a_pattern_that_matches_nothing(tmp_path):
    with pytest.raises(InputError, match=r"adapt\.train.*layerz"):
        build.assemble(tiny.recipe(tmp_path, adapt__method="partial", adapt__train=["*layerz*"]))


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"\xff" * 40])
def test_a_damaged_delta(tmp_path, damage):
    build.assemble(tiny.recipe(tmp_path, **PARTIAL)).save(tmp_path / "delta")
    path = tmp_path / "delta" / "delta.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"delta\.safetensors"):
        build.assemble(tiny.recipe(tmp_path, **PARTIAL, adapt__start=str(tmp_path / "delta")))
