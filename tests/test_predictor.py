"""Trained models on new samples: from a run's folder, and from a folder that ``trainwright.save`` wrote."""

import shutil

import numpy as np
import pytest
import torch

import trainwright
from tests import small
from trainwright import build, export, fit, generate, loop
from trainwright.memory.precision import multiplies_bfloat16
from trainwright.recipe import InputError, RunError
from trainwright.sampling import Sampling

MODELS = {
    "mlp": {"model__options": {"hidden": [8], "norm": "batch"}},
    "resnet9": {"model": {"architecture": "resnet9", "options": {"stem": 2, "channels": [4, 4]}}},
    "lstm": {"model": {"architecture": "lstm", "options": {"hidden": 8}}},
    "unet": {
        "model": {"architecture": "unet", "options": {"channels": [4, 8]}},
        "data": {"kind": "images", "source": "digit-strokes", "limit": 24, "held_out": 0.1},
        "loss": {"name": "dice"},
        "training": {"steps": 2, "batch_size": 8},
    },
    "gru": {
        "model": {"architecture": "gru", "options": {"hidden": 4}},
        "data": {"kind": "series", "source": "sunspots", "window": 9},
        "loss": {"name": "mse"},
    },
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", MODELS)
def test_predictions_are_those_of_the_trained_model(tmp_path, case, precision):
    recipe = small.recipe(tmp_path, **MODELS[case], precision=precision)
    if precision == "bf16" and case == "lstm" and not multiplies_bfloat16():
        with pytest.raises(RunError, match=r"precision: bf16, but .* no kernel for bfloat16 on this cpu .*; use fp32"):
            build.assemble(recipe)
        return
    run = build.assemble(recipe)
    list(loop.train(run))
    trainwright.save(run, tmp_path / "saved")
    predictor = trainwright.load(tmp_path / "saved")
    batch = next(iter(run.splits["held_out"]()))
    run.model.eval()
    found = predictor.outputs(batch.inputs)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        raw = run.model(predictor.preparation.inputs_on(torch.device("cpu"))(batch.inputs)).float()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if precision == "bf16" else {}
    torch.testing.assert_close(found, predictor.preparation.values(raw), **tolerance)


def test_frozen_norms_in_bf16(tmp_path):
    changes = {"model": {"architecture": "cnn", "options": {"channels": [4], "hidden": 4}}}
    run = build.assemble(
        small.recipe(tmp_path, **changes, precision="bf16", adapt={"method": "full", "freeze": ["stages.*"]}, training__steps=3)
    )
    before = run.model.stages[0][1].running_mean.clone()
    list(loop.train(run))
    assert torch.equal(run.model.stages[0][1].running_mean, before), "a frozen norm keeps its statistics"


def test_an_ignored_class_counts_in_no_metric(tmp_path):
    loss = {"name": "cross_entropy", "ignore_index": 9}
    run = build.assemble(small.recipe(tmp_path, loss=loss, metrics=["accuracy"], training__steps=40))
    list(loop.train(run))
    batches = list(run.splits["held_out"]())
    targets = torch.cat([batch.targets for batch in batches])
    assert (targets == 9).any()
    trainwright.save(run, tmp_path / "saved")
    outputs = torch.cat([trainwright.load(tmp_path / "saved").outputs(batch.inputs) for batch in batches])
    keep = targets != 9
    expected = (outputs.argmax(1)[keep] == targets[keep]).float().mean().item()
    assert loop.evaluate(run)["accuracy"] == pytest.approx(expected)


def test_a_single_sample_left_for_batchnorm_is_refused(tmp_path):
    changes = {"model__options": {"hidden": [8], "norm": "batch"}, "data__limit": 129, "training__batch_size": 64}
    with pytest.raises(InputError, match=r"training\.batch_size: 129 samples in portions of 64 leave one alone"):
        build.assemble(small.recipe(tmp_path, **changes))


def test_language_verbs_refuse_a_run_of_images(tmp_path):
    fit.train(small.recipe(tmp_path, training__steps=1), quiet=True)
    with pytest.raises(InputError, match="mlp is no language model"):
        generate.main(
            str(tmp_path / "run"), prompt="hello", chat=False, sampling=Sampling(), raw=False, compare=False, adapter=None,
            device="cpu", quiet=True,
        )  # fmt: skip


def test_merging_lora_into_an_mlp(tmp_path):
    fit.train(small.recipe(tmp_path, training__steps=2), quiet=True)
    shutil.move(tmp_path / "run", tmp_path / "base")
    adapt = {"method": "lora", "rank": 2}
    fit.train(small.recipe(tmp_path, model__pretrained=str(tmp_path / "base/model"), adapt=adapt), quiet=True)
    export.export(tmp_path / "run", "merged", tmp_path / "merged")
    merged = build.assemble(small.recipe(tmp_path, model__pretrained=str(tmp_path / "merged")))
    adapted = trainwright.load(tmp_path / "run")
    raw = next(iter(merged.splits["held_out"]())).inputs
    merged.model.eval()
    found = merged.model(adapted.preparation.inputs_on(torch.device("cpu"))(raw))
    torch.testing.assert_close(found, adapted.outputs(raw), rtol=1e-5, atol=1e-5)


def test_defaults_of_samples_differ_from_those_of_text(tmp_path):
    recipe = trainwright.assemble(model={"architecture": "mlp"}, data={"kind": "images", "source": "digits"}).recipe
    assert (recipe.training.batch_size, recipe.training.epochs, recipe.optimizer.learning_rate) == (64, 10.0, 1e-3)
    given = trainwright.assemble(
        model={"architecture": "mlp"},
        data={"kind": "images", "source": "digits"},
        training={"steps": 3},
        optimizer={"learning_rate": 0.5},
    ).recipe
    assert (given.training.steps, given.training.epochs, given.optimizer.learning_rate) == (3, None, 0.5)


def test_arrays_are_predicted_too(tmp_path):
    random = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", x=random.normal(size=(60, 5)).astype(np.float32), y=random.normal(size=(60, 2)))
    changes = {"data": {"kind": "arrays", "source": str(tmp_path / "a.npz")}, "loss": {"name": "l1"}}
    fit.train(small.recipe(tmp_path, **changes), quiet=True)
    from trainwright.predict import predict

    np.save(tmp_path / "new.npy", random.normal(size=(7, 5)).astype(np.float32))
    assert predict(tmp_path / "run", [tmp_path / "new.npy"])["count"] == 7
