"""Images, tables and series from a recipe to a model, through the same loop, checkpoints and command line as text."""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import trainwright
from tests import small
from trainwright import build, checkpoint, evaluation, fit, loop
from trainwright.__main__ import run as command
from trainwright.data.batches import SampleBatches
from trainwright.recipe import InputError


def weights(folder):
    tensors, _ = checkpoint.read(sorted((folder / "checkpoints").iterdir())[-1])
    return tensors


def measured(file):
    """The lines of a metrics.jsonl without what differs from time to time."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key and "memory" not in key} for line in lines]


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_ten_lines_of_python(tmp_path):
    run = trainwright.assemble(
        model={"architecture": "mlp", "options": {"hidden": [32]}},
        data={"kind": "images", "source": "digits"},
        optimizer={"learning_rate": 5e-3},
        training={"epochs": 4, "batch_size": 64},
    )
    losses = [step.loss for step in trainwright.train(run)]
    assert losses[-1] < losses[0] / 2
    assert trainwright.evaluate(run)["accuracy"] > 0.85
    trainwright.save(run, tmp_path / "model")
    assert {file.name for file in (tmp_path / "model").iterdir()} == {
        "model.safetensors",
        "config.json",
        "preparation.json",
        "recipe.yaml",
        "task.json",
    }


LOSSES = [
    {"name": "cross_entropy", "label_smoothing": 0.1},
    {"name": "cross_entropy", "weights": [0.1, 2.0, 0.3, 5.0, 1.0, 0.2, 3.0, 0.5, 1.5, 4.0]},
    {"name": "focal"},
]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_micro_batches_give_the_gradients_of_the_whole_batch(tmp_path, loss):
    gradients = []
    for micro in (24, 8, 3):
        sizes = {"training__batch_size": 24, "training__micro_batch_size": micro, "data__limit": 197}
        run = build.assemble(small.recipe(tmp_path, loss=loss, **sizes, training__clip_norm=None))
        run.model.train()
        last = run.steps_per_epoch - 1
        assert run.batch(last)[-1].size == {24: 5, 8: 5, 3: 2}[micro], "the last portion is smaller"
        run.forward_backward([*run.batch(0), *run.batch(last)])
        gradients.append({name: p.grad.clone() for name, p in run.model.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def test_it_follows_a_plain_loop(tmp_path):
    """The oracle: thirty lines of PyTorch on the same samples in the same order."""
    recipe = small.recipe(tmp_path, training__steps=10, training__clip_norm=None, optimizer__weight_decay=0.0)
    run = build.assemble(recipe)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    model.load_state_dict(dict(zip(model.state_dict(), (v.clone() for v in run.model.state_dict().values()), strict=True)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    plain = []
    raw = [[(b.inputs.clone(), b.targets.clone()) for b in run.batch(step)] for step in range(10)]
    mean, std = statistics(tmp_path)
    for step, batches in enumerate(raw):
        (inputs, targets), *rest = batches
        assert not rest
        loss = nn.functional.cross_entropy(model((inputs / 255 - mean) / std), targets)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 10)
        optimizer.step()
        plain.append(loss.item())
    assert [step.loss for step in loop.train(run)] == pytest.approx(plain, rel=1e-4)


def statistics(tmp_path):
    """Mean and deviation of the training split, by NumPy."""
    from trainwright import supervised

    splits = supervised.prepare(small.recipe(tmp_path), lambda what, done: None).splits
    pixels = splits.train.inputs.take(np.arange(len(splits.train))).numpy() / 255
    assert splits.preparation.mean == pytest.approx([pixels.mean()])
    return pixels.mean(), pixels.std()


FULL = {
    "model": {"architecture": "cnn", "options": {"channels": [4], "hidden": 8, "dropout": 0.2, "norm": "batch"}},
    "data__augment": {"pad_crop": 1, "rotate": 10, "erase": 0.3, "mixup": 0.2},
    "training__ema": {"decay": 0.9},
    "training__steps": 14,
    "evaluation__every": 4,
    "evaluation__best": {"metric": "accuracy", "direction": "maximize"},
    "checkpoint__every": 3,
}


@pytest.mark.parametrize("stop", [5, 6, 10])
def test_resuming_gives_the_same_bits(tmp_path, stop):
    """With dropout, BatchNorm, augmentation, averaged weights and the choice of the best."""
    fit.train(small.recipe(tmp_path, **FULL, run__folder=str(tmp_path / "whole")), quiet=True)
    broken = small.recipe(tmp_path, **FULL, run__folder=str(tmp_path / "broken"))
    before = loop._take_step

    def dying(run):
        if run.step == stop:
            raise KeyboardInterrupt
        return before(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_take_step", dying)
        with pytest.raises(KeyboardInterrupt):
            fit.train(broken, quiet=True)
    fit.train(broken, resume=True, quiet=True)
    same(weights(tmp_path / "broken"), weights(tmp_path / "whole"))
    lines = [measured(tmp_path / name / "metrics.jsonl") for name in ("broken", "whole")]
    assert lines[0] == lines[1]
    models = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("broken", "whole")]
    assert models[0] == models[1]


def test_killed_and_resumed(tmp_path):
    """A real process, a real SIGKILL."""
    from trainwright.recipe.file import dump

    for name in ("whole", "broken"):
        recipe = small.recipe(tmp_path, **FULL, run__folder=str(tmp_path / name), run__threads=1)
        (tmp_path / f"{name}.yaml").write_text(dump(recipe))
    assert command(["train", str(tmp_path / "whole.yaml"), "--json"]) == 0
    code = (
        "import os, signal, sys\nfrom trainwright import loop\nfrom trainwright.__main__ import run\nbefore = loop._take_step\n"
        "def dying(r):\n    if r.step == 8: os.kill(os.getpid(), signal.SIGKILL)\n    return before(r)\n"
        "loop._take_step = dying\nsys.exit(run(sys.argv[1:]))"
    )
    killed = subprocess.run([sys.executable, "-c", code, "train", str(tmp_path / "broken.yaml")], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert command(["train", str(tmp_path / "broken.yaml"), "--resume", "--json"]) == 0
    same(weights(tmp_path / "broken"), weights(tmp_path / "whole"))


def test_workers_change_no_bit(tmp_path):
    small.image_folder(tmp_path / "pictures")
    trained = []
    for workers in (None, 0, 1, 2):
        how = {"data__in_memory": "yes"} if workers is None else {"data__in_memory": "no", "data__workers": workers}
        run = build.assemble(
            small.recipe(
                tmp_path,
                data={
                    "kind": "images",
                    "source": str(tmp_path / "pictures"),
                    "held_out": None,
                    "augment": {"flip": 0.5, "mixup": 0.4},
                },
                training__batch_size=8,
                **how,
            )
        )
        losses = [step.loss for step in loop.train(run)]
        trained.append((losses, {name: p.detach().clone() for name, p in run.model.named_parameters()}))
    for losses, values in trained[1:]:
        assert losses == trained[0][0]
        same(values, trained[0][1])


def test_no_two_samples_are_augmented_alike(tmp_path):
    """PITFALLS 28: the same random numbers in every worker."""
    run = build.assemble(small.recipe(tmp_path, data__augment={"rotate": 30}, training__batch_size=32))
    (first,), (second,) = run.batch(0), run.batch(1)
    assert not torch.equal(first.inputs, second.inputs)
    (again,) = run.batch(0)
    assert torch.equal(first.inputs, again.inputs)


def test_the_average_is_evaluated_and_saved(tmp_path):
    recipe = small.recipe(tmp_path, training__ema={"decay": 0.5, "warmup": False}, training__steps=3)
    run = build.assemble(recipe)
    trail = [[p.detach().clone() for p in run.model.parameters()]]
    for _ in loop.train(run):
        trail.append([p.detach().clone() for p in run.model.parameters()])
    expected = trail[0]
    for values in trail[1:]:
        expected = [torch.lerp(old, new, 0.5) for old, new in zip(expected, values, strict=True)]
    plain = loop.evaluate(run)
    trainwright.save(run, tmp_path / "model")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model/model.safetensors")
    for (name, raw), value in zip(run.model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(saved[name], value)
        assert not torch.equal(saved[name], raw), "the raw weights go on training"
    run.averaged = __import__("contextlib").nullcontext
    assert loop.evaluate(run) != plain


def test_a_run_saves_the_average(tmp_path):
    ema = {"decay": 0.95, "warmup": False}
    result = fit.train(small.recipe(tmp_path, training__ema=ema, training__steps=9), quiet=True)
    measured = evaluation.evaluate(tmp_path / "run", quiet=True)["held_out"]
    assert measured["loss"] == pytest.approx(result["held_out"]["after"]["loss"], rel=1e-5)


def test_each_epoch(tmp_path):
    changes = {"evaluation__every": "epoch", "checkpoint__every": "epoch", "checkpoint__keep": 9}
    fit.train(small.recipe(tmp_path, training={"epochs": 3, "batch_size": 64}, **changes), quiet=True)
    evaluated = [line["step"] for line in measured(tmp_path / "run/metrics.jsonl") if "split" in line]
    assert evaluated == [0, 4, 8, 12]
    saved = sorted(int(folder.name.removeprefix("step-")) for folder in (tmp_path / "run/checkpoints").iterdir())
    assert saved == [4, 8, 12]


def test_random_numbers_depend_on_seed_and_step(tmp_path):
    run = build.assemble(small.recipe(tmp_path))

    def drawn(step):
        loop.seed(run, step)
        return torch.rand(3).tolist()

    assert drawn(0) == drawn(0) != drawn(1)


def test_augmentation_is_told_step_and_positions(tmp_path):
    told = []

    def augment(step, positions, batch, fetch):
        told.append((step, positions.tolist(), batch))
        return fetch(positions)

    run = build.assemble(small.recipe(tmp_path, training__batch_size=64, training__micro_batch_size=32))
    batches = dataclasses.replace(run.batch.__self__, augment=augment)
    batches.batch(5)
    assert told == [(5, [*range(32)], 64), (5, [*range(32, 64)], 64)]


def test_early_stop(tmp_path):
    stop = {"metric": "loss", "direction": "minimize", "patience": 2, "min_delta": 1e9}
    recipe = small.recipe(tmp_path, training__steps=50, evaluation__every=2, evaluation__stop=stop)
    result = fit.train(recipe, quiet=True)
    assert result["steps"] == 6, "better once, then not for two evaluations"
    assert (tmp_path / "run/model").is_dir()
    assert fit.train(recipe, resume=True, quiet=True)["steps"] == 6, "resuming doesn't go on"


def test_evaluate_counts_every_sample_once(tmp_path):
    recipe = small.recipe(tmp_path, data__held_out=0.105, metrics=["accuracy"])
    fit.train(recipe, quiet=True)
    result = evaluation.evaluate(tmp_path / "run", quiet=True)
    run = build.assemble(recipe)
    count = sum(batch.size for batch in run.splits["held_out"]())
    assert count % 256
    hits = result["held_out"]["accuracy"] * count
    assert hits == pytest.approx(round(hits), abs=1e-4)


CASES = {
    "digits": ({}, ["mistakes.csv"]),
    "cnn": ({"model": {"architecture": "cnn", "options": {"channels": [4], "hidden": 8}}}, []),
    "resnet": ({"model": {"architecture": "resnet18", "options": {"width": 4}}, "precision": "bf16"}, []),
    "lstm": ({"model": {"architecture": "lstm", "options": {"hidden": 8}}}, []),
    "breast-cancer": (
        {"data": {"kind": "table", "source": "breast-cancer", "test": 0.2}, "loss": {"name": "bce"}},
        ["mistakes.csv"],
    ),
    "diabetes": ({"data": {"kind": "table", "source": "diabetes", "test": 0.2}, "loss": {"name": "mse"}}, []),
    "sunspots": (
        {
            "model": {"architecture": "gru", "options": {"hidden": 8}},
            "data": {"kind": "series", "source": "sunspots", "window": 12},
            "loss": {"name": "huber"},
        },
        [],
    ),
    "strokes": (
        {
            "model": {"architecture": "unet", "options": {"channels": [4, 8]}},
            "data": {"kind": "images", "source": "digit-strokes", "limit": 64},
            "loss": {"name": "sum", "terms": [{"loss": {"name": "bce"}}, {"loss": {"name": "dice"}}]},
            "training": {"steps": 4, "batch_size": 8},
        },
        [],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_end_to_end(tmp_path, case):
    changes, files = CASES[case]
    result = fit.train(small.recipe(tmp_path, **changes), quiet=True)
    before, after = result["held_out"]["before"], result["held_out"]["after"]
    assert after["loss"] < before["loss"]
    measured = evaluation.evaluate(tmp_path / "run", quiet=True)
    values = measured[measured["split"]]
    assert measured["split"] == ("test" if "test" in changes.get("data", {}) else "held_out")
    assert all(isinstance(value, float) and math.isfinite(value) for value in values.values()), values
    names = {path.rsplit("/", 1)[-1] for path in measured["plots"]}
    assert any(name.endswith(".png") for name in names)
    assert set(files) <= {file.name for file in (tmp_path / "run/plots").iterdir()}
    if measured["split"] == "held_out":
        for key, value in after.items():
            assert values[key] == pytest.approx(value, rel=2e-2), "the saved model is the one that was measured"


def test_another_head_on_a_trained_trunk(tmp_path):
    changes = {"model": {"architecture": "resnet18", "options": {"width": 4}}}
    fit.train(small.recipe(tmp_path, **changes, training__steps=2), quiet=True)
    shutil.move(tmp_path / "run", tmp_path / "first")
    small.image_folder(tmp_path / "pictures", colour=False)
    other = {
        "model": {**changes["model"], "pretrained": str(tmp_path / "first/model"), "match": "overlap"},
        "data": {"kind": "images", "source": str(tmp_path / "pictures")},
    }
    run = build.assemble(small.recipe(tmp_path, **other))
    report = next(change for change in run.changes if change.technique == "pretrained").summary
    assert "fc.weight is [10, 32] in the file, [3, 32] in the model" in report
    assert "conv1" not in report.split("\n", 1)[1]
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "first/model/model.safetensors")
    assert torch.equal(run.model.conv1.weight, stored["conv1.weight"])
    assert run.model.fc.weight.isfinite().all()
    with pytest.raises(InputError, match="overlap"):
        build.assemble(small.recipe(tmp_path, **{**other, "model": {**other["model"], "match": "exact"}}))


@pytest.mark.parametrize(("method", "files"), [("partial", "delta.safetensors"), ("lora", "adapter_model.safetensors")])
def test_partial_and_lora_on_an_mlp(tmp_path, method, files):
    fit.train(small.recipe(tmp_path, training__steps=3), quiet=True)
    shutil.move(tmp_path / "run", tmp_path / "base")
    adapt = {"method": "partial", "train": ["*bias"]} if method == "partial" else {"method": "lora", "rank": 2}
    recipe = small.recipe(tmp_path, model__pretrained=str(tmp_path / "base/model"), adapt=adapt)
    result = fit.train(recipe, quiet=True)
    assert (tmp_path / "run/model" / files).is_file()
    measured = evaluation.evaluate(tmp_path / "run", quiet=True)
    assert measured["held_out"]["loss"] == pytest.approx(result["held_out"]["after"]["loss"], rel=1e-4)


def test_freezing_by_pattern(tmp_path):
    run = build.assemble(small.recipe(tmp_path, adapt={"method": "full", "freeze": ["layers.0.*"]}))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    list(loop.train(run))
    frozen = {name for name, p in run.model.named_parameters() if torch.equal(p, before[name])}
    assert frozen == {name for name, p in run.model.named_parameters() if not p.requires_grad} != set()


def test_batches_depend_on_seed_and_step_alone(tmp_path):
    run = build.assemble(small.recipe(tmp_path, data__augment={"translate": 0.2}))
    whole = run.batch(5)[0]
    other = build.assemble(small.recipe(tmp_path, data__augment={"translate": 0.2}, training__micro_batch_size=4))
    parts = other.batch(5)
    assert len(parts) == 8
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
    assert isinstance(run.batch.__self__, SampleBatches)


def test_other_data_is_noticed(tmp_path, capsys):
    """An added picture would move samples from one split to another."""
    small.image_folder(tmp_path / "pictures")
    recipe = small.recipe(tmp_path, data={"kind": "images", "source": str(tmp_path / "pictures")}, training__batch_size=8)
    fit.train(recipe, quiet=True)
    evaluation.evaluate(tmp_path / "run")
    assert "isn't what it was" not in capsys.readouterr().err
    shutil.copy(tmp_path / "pictures/class0/0.png", tmp_path / "pictures/class0/00.png")
    evaluation.evaluate(tmp_path / "run")
    assert "isn't what it was" in capsys.readouterr().err
    with pytest.raises(InputError, match="its data isn't what it was when step-00000006 was written"):
        fit.train(recipe, resume=True, quiet=True)
