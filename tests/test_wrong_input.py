"""Wrong input through the command line: exit code 2, one clear message on stderr, no traceback, nothing half-written."""

import json

import pytest
import yaml

from tests import tiny
from trainwright import build
from trainwright.__main__ import run
from trainwright.models.pretrained import locate


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a good model, good data and a good recipe."""
    monkeypatch.chdir(tmp_path)
    tiny.model(tmp_path / "base")
    tiny.pairs(tmp_path / "pairs.jsonl")
    mapping = {
        "model": {"pretrained": "base"},
        "data": {"source": "pairs.jsonl", "sequence_length": 64, "cache": "cache"},
        "training": {"steps": 1},
        "tracking": {"tensorboard": False},
        "run": {"folder": "out", "compile": "off", "device": "cpu"},
    }
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(mapping))
    return tmp_path


def refused(capsys, *arguments):
    """The message of a refusal."""
    code = run(["train", *arguments])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert "Traceback" not in captured.err
    assert captured.err.count("trainwright: error:") == 1
    return captured.err


def test_the_good_recipe_is_good(place):
    assert run(["train", "good.yaml"]) == 0


CASES = {
    "no such file": (["goood.yaml"], ["goood.yaml", "good.yaml"]),
    "unknown key": (["good.yaml", "training.stepz=3"], ["training.stepz", "steps"]),
    "wrong type": (["good.yaml", "training.steps=many"], ["training.steps", "many"]),
    "several at once": (["good.yaml", "training.steps=0", "precision=bf8"], ["training.steps", "precision", "bf16"]),
    "no such data": (["good.yaml", "data.source=pears.jsonl"], ["pears.jsonl", "pairs.jsonl"]),
    "sequence too long": (["good.yaml", "data.sequence_length=4096"], ["4096", "256"]),
    "lora matches nothing": (["good.yaml", "adapt.method=lora", "adapt.targets=[q_prof]"], ["q_prof", "q_proj"]),
    "no model there": (["good.yaml", "model.pretrained=cache-of-nothing"], ["cache-of-nothing"]),
    "folder that is no model": (["good.yaml", "model.pretrained=empty"], ["config.json"]),
    "batch that does not divide": (["good.yaml", "training.batch_size=5", "training.micro_batch_size=2"], ["5", "2"]),
    "warmup longer than the run": (["good.yaml", "schedule.warmup=10"], ["schedule.warmup"]),
    "no such device": (["good.yaml", "run.device=gpu0"], ["run.device", "cuda"]),
    "unwritable folder": (["good.yaml", "run.folder=pairs.jsonl/run"], ["run.folder"]),
    "unknown architecture": (["good.yaml", "model.architecture=decodr"], ["decodr", "decoder"]),
    "unknown option": (["good.yaml", "model.options.hiden_size=8"], ["hiden_size", "hidden_size"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_message(place, capsys, case):
    (place / "empty").mkdir()
    arguments, words = CASES[case]
    message = refused(capsys, *arguments)
    assert all(word in message for word in words), message
    assert not (place / "out" / "model").exists()


DATA = {
    "empty": ("", ["no data"]),
    "no fields": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', ["line 2", "completion"]),
    "broken line": ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', ["line 2"]),
    "all masked": ('{"messages": [{"role": "user", "content": "a"}]}\n' * 3, ["supervised"]),
}


@pytest.mark.parametrize("case", DATA)
def test_wrong_data(place, capsys, case):
    text, words = DATA[case]
    (place / "wrong.jsonl").write_text(text)
    message = refused(capsys, "good.yaml", "data.source=wrong.jsonl")
    assert all(word in message for word in words), message


def test_truncated_gguf(place, capsys):
    whole = locate("smollm2-135m").path.read_bytes()
    (place / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    assert "cut.gguf" in refused(capsys, "good.yaml", "model.pretrained=cut.gguf")


def test_adapter_for_another_base(place, capsys):
    build.assemble(tiny.recipe(place, adapt__method="lora")).save(place / "adapter")
    tiny.model(place / "other", seed=4)
    more = ["model.pretrained=other", "adapt.method=lora", "adapt.start=adapter"]
    assert "another base" in refused(capsys, "good.yaml", *more)


def test_folder_of_another_run(place, capsys):
    assert run(["train", "good.yaml"]) == 0
    capsys.readouterr()
    assert "--resume" in refused(capsys, "good.yaml")
    assert "optimizer.learning_rate" in refused(capsys, "good.yaml", "optimizer.learning_rate=0.5")


def test_json_holds_the_error(place, capsys):
    assert run(["train", "good.yaml", "training.stepz=3", "--json"]) == 2
    assert "stepz" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("verb", [["evaluate", "nowhere"], ["export", "nowhere", "--to", "hf"], ["inspect", "nowhere"]])
def test_verbs_on_what_is_no_run(place, capsys, verb):
    assert run(verb) == 2
    assert "nowhere" in capsys.readouterr().err


def test_export_to_a_format_of_another_method(place, capsys):
    assert run(["train", "good.yaml"]) == 0
    assert run(["export", "out", "--to", "peft"]) == 2
    assert "hf" in capsys.readouterr().err
