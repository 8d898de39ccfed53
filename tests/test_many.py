"""The command line on many processes, end to end: what users start, and what they find afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import ranks, tiny
from tests.importing.files import ACCELERATE, DEEPSPEED
from trainwright import evaluation, fit
from trainwright.recipe import Parallel
from trainwright.recipe.file import dump, load

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "trainwright", *map(str, arguments)]


def started(*arguments: str | Path, timeout: float = 250) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT)


def written(folder: Path, **changes) -> Path:
    """A recipe for the tiny Llama as a file."""
    path = folder / "recipe.yaml"
    path.write_text(dump(tiny.recipe(folder, **changes)))
    return path


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "split" not in line]


def trained(folder: str, steps: int, resume: bool, changes: dict) -> list[float]:
    """One process of a run."""
    recipe = tiny.recipe(Path(folder), training__steps=steps, **changes)
    rank = dist.get_rank() if dist.is_initialized() else 0
    fit.train(recipe, resume=resume, quiet=True, rank=rank)
    return losses(Path(folder) / "run") if rank == 0 else []


def test_a_run_goes_on_in_any_other_layout(tmp_path):
    """One process, then ZeRO 3 on four, tensor x pipeline on four, ZeRO 1 on two, one again; with averaged weights."""
    rest = {"training__batch_size": 8, "schedule": {"name": "constant"}, "evaluation__before": False}
    rest |= {"training__ema": {"decay": 0.9}}
    for name in ("alone", "many"):
        (tmp_path / name).mkdir()
        tiny.model(tmp_path / name / "base", num_hidden_layers=2)
        tiny.pairs(tmp_path / name / "pairs.jsonl")
    expected = trained(str(tmp_path / "alone"), 10, False, rest)
    folder = str(tmp_path / "many")
    trained(folder, 2, False, rest)
    for count, steps, parallel in (
        (4, 4, {"parallel__zero": 3}),
        (4, 6, {"parallel__tensor": 2, "parallel__pipeline": 2}),
        (2, 8, {"parallel__zero": 1}),
    ):
        ranks.run(count, trained, folder, steps, True, {**rest, **parallel})
    found = trained(folder, 10, True, rest)
    assert found == pytest.approx(expected, rel=1e-5)
    recipe = tmp_path / "many" / "run" / "recipe.yaml"
    recipe.write_text(dump(load(recipe).model_copy(update={"parallel": Parallel(tensor=2)})))
    measured = evaluation.evaluate(tmp_path / "many" / "run", quiet=True)
    assert measured["held_out"]["loss"] < expected[0], "evaluated by one process, whatever trained it"
    ours, theirs = (load_file(tmp_path / name / "run" / "model" / "model.safetensors") for name in ("many", "alone"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_goes_on_from_torch_to_deepspeed_and_back(stage, tmp_path):
    rest = {"training__batch_size": 8, "schedule": {"name": "constant"}, "evaluation__before": False}
    for name in ("alone", "many"):
        (tmp_path / name).mkdir()
        tiny.model(tmp_path / name / "base")
        tiny.pairs(tmp_path / name / "pairs.jsonl")
    expected = trained(str(tmp_path / "alone"), 6, False, rest)
    folder = str(tmp_path / "many")
    trained(folder, 2, False, rest)
    ranks.run(2, trained, folder, 4, True, {**rest, "parallel": {"engine": "deepspeed", "zero": stage}})
    assert trained(folder, 6, True, rest) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "partial"])
def test_frozen_parameters_come_back_as_they_were(method, tmp_path):
    """ZeRO 3 divides frozen parameters, too, and checkpoints hold only what learns."""
    section = {"method": "lora", "rank": 2} if method == "lora" else {"method": "partial", "train": ["*mlp*"]}
    rest = {"adapt": section, "evaluation__before": False, "schedule": {"name": "constant"}}
    for name in ("alone", "many"):
        (tmp_path / name).mkdir()
        tiny.model(tmp_path / name / "base")
        tiny.pairs(tmp_path / name / "pairs.jsonl")
    expected = trained(str(tmp_path / "alone"), 4, False, rest)
    folder = str(tmp_path / "many")
    ranks.run(2, trained, folder, 2, False, {**rest, "parallel__zero": 3})
    found = ranks.run(2, trained, folder, 4, True, {**rest, "parallel__zero": 3})[0]
    assert found == pytest.approx(expected, rel=1e-5)
    loss = [evaluation.evaluate(tmp_path / name / "run", quiet=True)["held_out"]["loss"] for name in ("many", "alone")]
    assert loss[0] == pytest.approx(loss[1], rel=1e-5)


def test_the_course_files_train_a_llama_in_five_processes(tmp_path):
    """ZeRO 3 by DeepSpeed with a global batch of 40, from files that people have; the export is whole."""
    tiny.model(tmp_path / "base"), tiny.pairs(tmp_path / "pairs.jsonl", 90)
    (tmp_path / "deepspeed.json").write_text(DEEPSPEED), (tmp_path / "deepspeed.yaml").write_text(ACCELERATE)
    files = [tmp_path / "deepspeed.json", tmp_path / "deepspeed.yaml"]
    imported = started("import", *files, "--model", tmp_path / "base", "--data", tmp_path / "pairs.jsonl")
    assert imported.returncode == 0, imported.stderr
    assert "save_pretrained would write empty weights" in imported.stderr
    assert imported.stdout.rstrip().endswith("--nproc 5")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(imported.stdout)
    settings = ["training.steps=2", "precision=fp32", "run.device=cpu", "run.compile=off", "data.sequence_length=64"]
    common = [*settings, f"data.cache={tmp_path / 'cache'}", "tracking.tensorboard=false", "evaluation.before=false"]
    done = started("train", recipe, *common, f"run.folder={tmp_path / 'five'}", "--nproc", "5", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["steps"] == 2
    plain = ["parallel={}", "training.micro_batch_size=null"]
    alone = started("train", recipe, *common, *plain, f"run.folder={tmp_path / 'one'}", "--json")
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert losses(tmp_path / "five") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    five, one = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("five", "one"))
    for name, value in one.items():
        torch.testing.assert_close(five[name], value, rtol=1e-4, atol=1e-6)


def test_a_killed_rank_is_named_and_the_run_goes_on(tmp_path):
    """Killed in the middle: with --max-restarts it goes on by itself from the last checkpoint, to the same weights."""
    changes = {"training__steps": 60, "checkpoint": {"every": 5}, "evaluation__before": False}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = started("train", written(tmp_path / "whole", **changes), "--nproc", "2")
    assert whole.returncode == 0, whole.stderr[-3000:]
    recipe, run = written(tmp_path / "killed", **changes), tmp_path / "killed" / "run"
    arguments = command("train", recipe, "--nproc", "2", "--max-restarts", "1")
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    _kill_rank(1, process.pid, run)
    _, said = process.communicate(timeout=250)
    assert process.returncode == 0, said[-3000:]
    assert "resumed after step" in said
    assert losses(run) == losses(tmp_path / "whole" / "run")
    ours, theirs = (load_file(tmp_path / name / "run" / "model" / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def _kill_rank(rank: int, launcher: int, run: Path) -> None:
    """As soon as a checkpoint is there."""
    deadline = time.monotonic() + 200
    while not list(run.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.05)
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = dict(pair.split("=", 1) for pair in (place / "environ").read_text().split("\0") if "=" in pair)
        except OSError:
            continue
        if fields.get("RANK") == str(rank) and fields.get("TRAINWRIGHT_RANKS") == str(run / "ranks"):
            os.kill(int(place.name), signal.SIGKILL)
            return
    raise AssertionError(f"no process of rank {rank} found below {launcher}")


def _differing(folder: str, what: str) -> None:
    rank = dist.get_rank()
    changes = {"optimizer__learning_rate": 0.01 + 0.01 * rank} if what == "recipe" else {}
    recipe = tiny.recipe(Path(folder), **changes)
    source = Path(folder) / f"pairs{rank}.jsonl"
    if what == "data":
        section = recipe.data.model_copy(update={"source": str(source), "cache": str(Path(folder) / f"cache{rank}")})
        kept = fit._essence
        fit._essence = lambda recipe: "the same"
        recipe = recipe.model_copy(update={"data": section})
    try:
        fit.train(recipe, quiet=True, rank=rank)
    finally:
        if what == "data":
            fit._essence = kept


@pytest.mark.parametrize("what", ["recipe", "data"])
def test_ranks_that_disagree_are_refused(what, tmp_path):
    tiny.model(tmp_path / "base"), tiny.pairs(tmp_path / "pairs.jsonl")
    tiny.pairs(tmp_path / "pairs0.jsonl", 40), tiny.pairs(tmp_path / "pairs1.jsonl", 41)
    with pytest.raises(AssertionError, match=f"InputError: the ranks don't agree on the {what}"):
        ranks.run(2, _differing, str(tmp_path), what)
    assert not (tmp_path / "run").exists()


WRONG = {
    "too few processes": ((), {"parallel__tensor": 2}, [], "parallel: pipeline 1 x tensor 2 doesn't divide the 1 process"),
    "batch": (("--nproc", "3"), {}, [], "training.batch_size: 4 rows can't be shared by 3 data ranks"),
    "idle zero": ((), {"parallel__zero": 2}, [], "parallel.zero: 2 has no effect"),
    "restarts": (("--max-restarts", "2"), {}, [], "--max-restarts needs --nproc"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_told_once(name, tmp_path):
    options, changes, overrides, words = WRONG[name]
    done = started("train", written(tmp_path, **changes), *overrides, *options)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert done.stderr.count("error:") == 1
    assert not (tmp_path / "run").exists()


WRONG_FOR_ALL = {
    "heads": (3, {"parallel__tensor": 3}, "num_key_value_heads 2 is not a multiple of 3"),
    "stages": (4, {"parallel__pipeline": 4}, "parallel.pipeline: 4 processes need 4 parts"),
}


@pytest.mark.parametrize("name", WRONG_FOR_ALL)
def test_what_the_processes_cannot_share_is_refused(name, tmp_path):
    count, changes, words = WRONG_FOR_ALL[name]
    tiny.model(tmp_path / "base"), tiny.pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(AssertionError, match=f"InputError: .*{words}"):
        ranks.run(count, trained, str(tmp_path), 1, False, changes)
    assert not (tmp_path / "run").exists()
