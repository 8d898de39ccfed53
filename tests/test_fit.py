"""Runs from end to end: what lies in the folder, resuming to the same bits, and what is refused."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import tiny
from trainwright import build, checkpoint, evaluation, fit, loop, runfolder
from trainwright.recipe import InputError, RunError
from trainwright.recipe.file import dump
from trainwright.tracking import read_metrics

DROPOUT = {"adapt__method": "lora", "adapt__rank": 4, "adapt__dropout": 0.1}
METHODS = {
    "full": {},
    "lora": DROPOUT,
    "partial": {"adapt__method": "partial", "adapt__train": ["*layers.1*", "*norm*"]},
    "sgd": {"optimizer__name": "sgd", "optimizer__learning_rate": 0.5},
}
FILES = {"full": "model.safetensors", "lora": "adapter_model.safetensors", "partial": "delta.safetensors"}
TIMES = {"seconds", "tokens_per_second", "peak_memory_bytes"}


def bits(folder, method="full"):
    """Everything that must be the same: final weights, last checkpoint, metrics without the times."""
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder / "metrics.jsonl")]
    return (
        load_file(folder / "model" / FILES.get(method, FILES["full"])),
        load_file(checkpoints[-1] / "tensors.safetensors"),
        lines,
    )


def assert_same_bits(left, right):
    for mine, other in zip(left[:2], right[:2], strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert left[2] == right[2]


def start(recipe, *more):
    """The run in a process of its own."""
    path = runfolder.Path(recipe.run.folder).with_suffix(".yaml")
    path.write_text(dump(recipe))
    command = [sys.executable, "-m", "trainwright", "train", str(path), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def wait_for_step(folder, step):
    """Until the run has logged so many steps."""
    path = folder / "metrics.jsonl"
    for _ in range(3000):
        if path.exists() and sum('"learning_rate"' in line for line in path.read_text().splitlines()) >= step:
            return
        time.sleep(0.01)
    raise AssertionError("the run didn't get there")


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_and_the_folder_is_whole(tmp_path, method):
    recipe = tiny.recipe(tmp_path, **METHODS[method], tracking__tensorboard=True, training__steps=12)
    result = fit.train(recipe, quiet=True)
    folder = tmp_path / "run"
    assert result["held_out"]["after"]["loss"] < result["held_out"]["before"]["loss"]
    names = {"recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints", "model", "tensorboard"}
    assert names == {path.name for path in folder.iterdir()}
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [line for line in lines if "split" not in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert {"loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "peak_memory_bytes", "seconds"} < set(steps[0])
    assert [line["step"] for line in lines if line.get("split") == "held_out"] == [0, 12]
    again = evaluation.evaluate(folder, quiet=True)["held_out"]
    assert again["loss"] == pytest.approx(result["held_out"]["after"]["loss"], rel=1e-6)
    assert again["perplexity"] == pytest.approx(math.exp(again["loss"]))


def test_transformers_loads_the_final_model(tmp_path):
    recipe = tiny.recipe(tmp_path)
    fit.train(recipe, quiet=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    done = runfolder.finished(tmp_path / "run")
    built = build.load_model(done)
    tokens = torch.randint(0, 320, (1, 30))
    mine = built.model.logits(built.model(tokens, torch.arange(30)[None], torch.tensor([0, 30], dtype=torch.int32)))
    torch.testing.assert_close(theirs(tokens).logits, mine, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_stopping_anywhere_and_resuming_gives_the_same_bits(tmp_path, method):
    """10 batches an epoch: step 5 lies in its middle, 10 at its end; stopped at both, then resumed to step 14."""
    common = {
        **METHODS[method],
        "data__packing": False,
        "data__held_out": 0.1,
        "checkpoint__every": 5,
        "training__steps": 14,
    }
    whole = tiny.recipe(tmp_path, **common, run__folder=str(tmp_path / "whole"))
    fit.train(whole, quiet=True)
    parts = tiny.recipe(tmp_path, **common, run__folder=str(tmp_path / "parts"))
    for stop in (7, 11):
        interrupt_at(parts, stop, resume=stop != 7)
    fit.train(parts, resume=True, quiet=True)
    assert_same_bits(bits(tmp_path / "whole", method), bits(tmp_path / "parts", method))


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def interrupt_at(recipe, step, resume):
    """Run until just before a step's result is used, and drop everything."""
    original = fit._report

    def dying(session, result):
        original(session, result)
        if result.step == step:
            raise Killed

    fit._report = dying
    try:
        with pytest.raises(Killed):
            fit.train(recipe, resume=resume, quiet=True)
    finally:
        fit._report = original


def test_sigkill_twice_then_resume(tmp_path):
    """Real processes, really killed: mid-epoch, and at an epoch's end."""
    common = {**DROPOUT, "data__packing": False, "checkpoint__every": 3, "training__steps": 200}
    whole = tiny.recipe(tmp_path, **common, run__folder=str(tmp_path / "whole"))
    parts = tiny.recipe(tmp_path, **common, run__folder=str(tmp_path / "parts"))
    fit.train(whole, quiet=True)
    for step, more in ((7, []), (60, ["--resume"])):
        process = start(parts, *more)
        wait_for_step(tmp_path / "parts", step)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was over before it was killed"
    process = start(parts, "--resume")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert_same_bits(bits(tmp_path / "whole", "lora"), bits(tmp_path / "parts", "lora"))


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    recipe = tiny.recipe(tmp_path, training__steps=100000, checkpoint__every=None)
    process = start(recipe)
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in err
    assert "Traceback" not in err
    assert checkpoint.latest(tmp_path / "run") is not None


def test_a_flipped_byte_is_named_and_the_older_checkpoint_taken(tmp_path, capsys):
    recipe = tiny.recipe(tmp_path, checkpoint__every=2, training__steps=7)
    interrupt_at(recipe, 5, resume=False)
    newest = checkpoint.latest(tmp_path / "run")
    path = newest / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 4
    path.write_bytes(content)
    fit.train(recipe, resume=True)
    err = capsys.readouterr().err.replace("\n", "")
    assert "step-00000004" in err
    assert "tensors.safetensors" in err
    assert "resumed after step 2" in err
    whole = tiny.recipe(tmp_path, checkpoint__every=2, training__steps=7, run__folder=str(tmp_path / "whole"))
    fit.train(whole, quiet=True)
    assert_same_bits(bits(tmp_path / "whole"), bits(tmp_path / "run"))


@pytest.mark.parametrize(("direction", "best"), [("minimize", min), ("maximize", max)])
def test_best_goes_by_the_stated_direction(tmp_path, direction, best):
    changes = {"evaluation__every": 2, "evaluation__best": {"metric": "loss", "direction": direction}}
    recipe = tiny.recipe(tmp_path, training__steps=9, optimizer__learning_rate=0.2, checkpoint__keep=1, **changes)
    result = fit.train(recipe, quiet=True)
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line.get("split") and line["step"]]
    assert result["best"]["value"] == best(line["loss"] for line in lines)
    assert evaluation.evaluate(tmp_path / "run", quiet=True)["held_out"]["loss"] == pytest.approx(
        result["best"]["value"], rel=1e-6
    )
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) <= 2


def test_a_loss_that_is_not_finite_names_the_batch_and_changes_nothing(tmp_path):
    run = build.assemble(tiny.recipe(tmp_path))
    with torch.no_grad():
        run.model.model.norm.weight[0] = float("nan")
    before = {n: p.clone() for n, p in run.model.named_parameters()}
    with pytest.raises(RunError, match=r"step 1: loss nan .* epoch 1, rows"):
        next(loop.train(run))
    assert all(torch.equal(p, before[n]) or n == "model.norm.weight" for n, p in run.model.named_parameters())


def test_bf16_keeps_masters_and_frozen_weights_small(tmp_path):
    run = build.assemble(tiny.recipe(tmp_path, **DROPOUT, precision="bf16"))
    kinds = {p.requires_grad: p.dtype for p in run.model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    losses = [result.loss for result in loop.train(run)]
    plain = [result.loss for result in loop.train(build.assemble(tiny.recipe(tmp_path, **DROPOUT, precision="fp32")))]
    assert losses == pytest.approx(plain, rel=2e-2)
    full = build.assemble(tiny.recipe(tmp_path, precision="bf16"))
    assert {p.dtype for p in full.model.parameters()} == {torch.float32}


def test_tiny_updates_move_bf16_runs_like_fp32_ones(tmp_path):
    """PITFALLS 11: at a rate of 1e-6 weights stored in bf16 would stand still."""
    moved = {}
    for precision in ("fp32", "bf16"):
        run = build.assemble(tiny.recipe(tmp_path, precision=precision, optimizer__learning_rate=1e-6))
        before = {n: p.clone() for n, p in run.model.named_parameters()}
        list(loop.train(run))
        changed = [(p != before[n]).float().mean() for n, p in run.model.named_parameters() if p.ndim == 2]
        moved[precision] = float(torch.stack(changed).mean())
    assert moved["bf16"] > 0.95 * moved["fp32"] > 0.5


def test_the_schedule_is_a_function_of_the_step(tmp_path):
    run = build.assemble(tiny.recipe(tmp_path, schedule__warmup=2, training__steps=6))
    rates = [result.learning_rate for result in loop.train(run)]
    assert rates == pytest.approx([1e-2 * f for f in (1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4)])


def test_another_recipe_in_the_folder_is_refused(tmp_path):
    fit.train(tiny.recipe(tmp_path, training__steps=1), quiet=True)
    with pytest.raises(InputError, match=r"optimizer\.learning_rate"):
        fit.train(tiny.recipe(tmp_path, training__steps=1, optimizer__learning_rate=0.5), quiet=True)
    with pytest.raises(InputError, match="--resume"):
        fit.train(tiny.recipe(tmp_path, training__steps=1), quiet=True)


def test_a_finished_run_goes_on_with_more_steps(tmp_path):
    constant = {"schedule__name": "constant"}
    fit.train(tiny.recipe(tmp_path, **constant, training__steps=4), quiet=True)
    fit.train(tiny.recipe(tmp_path, **constant, training__steps=8), resume=True, quiet=True)
    fit.train(tiny.recipe(tmp_path, **constant, training__steps=8, run__folder=str(tmp_path / "whole")), quiet=True)
    left, right = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="no run"):
        fit.train(tiny.recipe(tmp_path), quiet=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    recipe = tiny.recipe(tmp_path, run__folder=str(tmp_path / "file" / "run"))
    with pytest.raises(InputError, match=r"run\.folder"):
        runfolder.check(recipe, resume=False)  # before model and data are prepared
    with pytest.raises(InputError, match=r"run\.folder"):
        runfolder.begin(tmp_path / "file" / "run", recipe)


def test_samples_before_and_after(tmp_path):
    result = fit.train(tiny.recipe(tmp_path, evaluation__samples=2), quiet=True)
    assert len(result["samples"]) == 2
    assert set(result["samples"][0]) == {"prompt", "expected", "before", "after"}
    assert json.dumps(result)


def test_a_start_that_failed_leaves_nothing_behind(tmp_path):
    """Mending the recipe is enough: the folder isn't taken by what never ran."""
    with pytest.raises(InputError, match="absent"):
        fit.train(tiny.recipe(tmp_path, data__source=str(tmp_path / "absent.jsonl")), quiet=True)
    assert not (tmp_path / "run").exists()
    fit.train(tiny.recipe(tmp_path, training__steps=1), quiet=True)
