"""The command line: what each verb calls, what goes to stdout and what to stderr, and the exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trainwright
from trainwright.__main__ import run
from trainwright.recipe import InputError, Recipe, RunError

VERBS = ("train", "verify", "evaluate", "generate", "export", "inspect", "schema")

Fake = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts a function into the place of one of ours; gives the list of the arguments it will have been called with."""

    def replace(module: str, name: str, work: Callable[..., Any] = lambda **_: {"done": True}) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            calls.append({"args": args, **kwargs})
            return work()

        made = types.ModuleType(f"trainwright.{module}")
        setattr(made, name, stand_in)
        monkeypatch.setitem(sys.modules, made.__name__, made)
        monkeypatch.setattr(trainwright, module, made, raising=False)
        return calls

    return replace


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text("data: {source: python-docstrings}\n")
    return "small.yaml"


@pytest.fixture
def finished(recipe: str) -> str:
    """The folder of a run."""
    folder = Path("runs/small")
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(Path(recipe).read_text())
    return str(folder)


def raiser(error: BaseException) -> Callable[[], Any]:
    """A function that raises."""

    def work() -> Any:
        raise error

    return work


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    line = [sys.executable, "-m", "trainwright", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, **options)


# ---------------------------------------------------------------- help


def test_help_names_every_verb() -> None:
    shown = command("--help")
    assert shown.returncode == 0
    assert all(verb in shown.stdout for verb in VERBS)
    assert command().stdout == shown.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["schema"], ["train", "nowhere.yaml"], ["evaluate", "nowhere"]])
def test_no_torch_before_the_work(arguments: list[str]) -> None:
    code = (
        "import sys; from trainwright.__main__ import run; code = run(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("trainwright 0.")


# ---------------------------------------------------------------- verbs


def test_train_reads_the_recipe_and_calls_once(fake: Fake, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    calls = fake("fit", "train")
    assert run(["train", recipe, "training.steps=7", "--resume", "adapt.method=lora"]) == 0
    (call,) = calls
    (settings,) = call["args"]
    assert isinstance(settings, Recipe)
    assert (settings.training.steps, settings.adapt.method, settings.run.folder) == (7, "lora", "runs/small")
    assert call["resume"] is True
    assert capsys.readouterr().out == ""


def test_evaluate_takes_a_run(fake: Fake, finished: str) -> None:
    calls = fake("evaluation", "evaluate")
    assert run(["evaluate", finished]) == 0
    assert calls == [{"args": (Path(finished), None)}]


@pytest.mark.parametrize(("out", "expected"), [([], None), (["there"], Path("there"))])
def test_export(fake: Fake, finished: str, out: list[str], expected: Path | None, capsys: Any) -> None:
    calls = fake("export", "export", lambda: {"format": "merged", "folder": "there"})
    assert run(["export", finished, "--to", "merged", *out]) == 0
    assert calls == [{"args": (Path(finished), "merged", expected)}]
    assert capsys.readouterr().out == "merged: there\n"


def test_generate_passes_its_options_on(fake: Fake) -> None:
    calls = fake("generate", "main")
    options = [
        "--max-tokens",
        "5",
        "--top-k",
        "3",
        "--top-p",
        "0.9",
        "--temperature",
        "1.5",
        "--seed",
        "4",
        "--compare",
    ]
    assert run(["generate", "some/model", "--prompt", "Hi", "--adapter", "lora", *options]) == 0
    (call,) = calls
    sampling = call.pop("sampling")
    assert vars(sampling) == {"max_tokens": 5, "temperature": 1.5, "top_k": 3, "top_p": 0.9, "seed": 4}
    assert call == {
        "args": ("some/model",), "prompt": "Hi", "chat": False, "raw": False, "compare": True, "adapter": "lora",
        "device": "auto", "quiet": False,
    }  # fmt: skip


@pytest.mark.parametrize(("options", "temperature"), [([], 0.7), (["--greedy"], 0.0), (["--temperature", "0"], 0.0)])
def test_generate_temperature(fake: Fake, options: list[str], temperature: float) -> None:
    calls = fake("generate", "main")
    assert run(["generate", "m", "--prompt", "x", *options]) == 0
    (call,) = calls
    assert call["sampling"].temperature == temperature
    assert call["sampling"].max_tokens == 128


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--greedy", "--seed", "0"], "--greedy always takes the likeliest token, so --seed would have no effect"),
        (["--temperature", "0", "--top-k", "3"], "--temperature 0 always takes the likeliest token, so --top-k would"),
        (["--greedy", "--temperature", "0.5"], "so --temperature would have no effect"),
        (["--chat", "--prompt", "x"], "give --prompt or --chat, not both"),
        (["--max-tokens", "0"], "Invalid value for '--max-tokens'"),
        (["--top-p", "2"], "Invalid value for '--top-p'"),
    ],
)
def test_generate_refuses(options: list[str], said: str, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    calls = fake("generate", "main")
    assert run(["generate", "m", *options]) == 2
    assert said in capsys.readouterr().err
    assert not calls


def test_generate_reads_stdin(fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = fake("generate", "main")
    terminal = types.SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    assert run(["generate", "m"]) == 2
    assert "give --prompt TEXT or --chat, or a prompt on stdin" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: False, read=lambda: "from a pipe"))
    assert run(["generate", "m"]) == 0
    assert calls[0]["prompt"] == "from a pipe"


def test_inspect_takes_a_recipe_or_a_run(finished: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "hidden_size: 8, intermediate_size: 8, num_hidden_layers: 2, num_attention_heads: 2, vocab_size: 9"
    options = f"model.options={{{sizes}}}"
    shown = []
    for target in (recipe, finished):
        assert run(["inspect", target, options]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "model.layers.0-1.mlp.up_proj" in shown[0]
    assert run(["inspect", recipe, options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"layers", "totals", "changes"} == set(document)


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "trainwright recipe"


# ---------------------------------------------------------------- what goes where


def test_json_is_one_document_whatever_is_printed(fake: Fake, recipe: str, capfd: pytest.CaptureFixture[str]) -> None:
    def noisy() -> dict[str, Any]:
        print("a library's print")
        os.write(1, b"a C library's print\n")
        subprocess.run([sys.executable, "-c", "print('a child process')"], check=True)
        return {"loss": float("nan"), "folder": Path("x"), "many": (1, 2.5)}

    fake("fit", "train", noisy)
    assert run(["train", recipe, "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"loss": None, "folder": "x", "many": [1, 2.5]}
    assert all(source in err for source in ("a library's", "a C library's", "a child process"))
    print("stdout is back")
    os.write(1, b"here too")
    assert {*capfd.readouterr().out.splitlines()} == {"stdout is back", "here too"}


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("wrong key"), 2, "trainwright: error: wrong key\n"),
        (RunError("the loss is nan"), 3, "trainwright: error: the loss is nan\n"),
        (KeyboardInterrupt(), 130, "trainwright: interrupted\n"),
        (
            KeyboardInterrupt("stopped after step 3; go on with --resume"),
            130,
            "trainwright: stopped after step 3; go on",
        ),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_failures_without_a_traceback(
    error: BaseException, code: int, said: str, as_json: bool, fake: Fake, recipe: str, capsys: Any
) -> None:
    fake("fit", "train", raiser(error))
    assert run(["train", recipe, *(["--json"] if as_json else [])]) == code
    out, err = capsys.readouterr()
    assert err.startswith(said)
    assert "Traceback" not in err
    assert not out or json.loads(out) == {"error": str(error) or "interrupted"}
    assert bool(out) == as_json


@pytest.mark.parametrize("error", [ValueError("no idea"), BrokenPipeError(32, "a worker has died")])
def test_what_nobody_expected_shows_its_traceback(error: Exception, fake: Fake, recipe: str, capsys: Any) -> None:
    fake("fit", "train", raiser(error))
    assert run(["train", recipe, "--json"]) == 3
    out, err = capsys.readouterr()
    assert "Traceback" in err
    assert err.endswith(f"trainwright: error: {type(error).__name__}: {error}\n")
    assert json.loads(out) == {"error": f"{type(error).__name__}: {error}"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tain", "x"], "No such command 'tain'. Did you mean 'train'?; see trainwright --help"),
        (["train"], "Missing argument 'RECIPE'; see trainwright train --help"),
        (["train", "x", "--resum"], "No such option: --resum"),
        (["export", "x"], "Missing option '--to'. Choose from: hf, peft, delta, merged; see trainwright export --help"),
        (
            ["export", "x", "--to", "onnx"],
            "Invalid value for '--to': 'onnx' is not one of 'hf', 'peft', 'delta', 'merged'",
        ),
        (["train", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["train", "small.yaml", "lr=1"], "small.yaml with overrides: lr: unknown key (did you mean"),
        (["inspect", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (
            ["evaluate", "nowhere"],
            "nowhere isn't the folder of a run: it doesn't exist; trainwright train RECIPE makes one",
        ),
        (["evaluate", "small.yaml"], "small.yaml isn't the folder of a run: it is a file"),
        (["inspect", "."], ". isn't the folder of a run: it has no recipe.yaml"),
    ],
)
def test_wrong_input_is_one_clear_message(arguments: list[str], said: str, recipe: str, capsys: Any) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"trainwright: error: {said}")
    assert len(err.splitlines()) == 1
    assert run([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"].startswith(said)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("small", "it doesn't exist (did you mean 'runs/small'?)"),
        ("runs/smal", "it doesn't exist (did you mean 'runs/small'?)"),
        ("runs", "it has no recipe.yaml (did you mean 'runs/small'?)"),
        ("elsewhere", "it doesn't exist; runs here: runs/small"),
    ],
)
def test_a_wrong_run_names_the_nearest(name: str, said: str, finished: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", name]) == 2
    assert capsys.readouterr().err == f"trainwright: error: {name} isn't the folder of a run: {said}\n"


def test_faults_keep_a_line_each(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", recipe, "lr=1", "run.seed=-1"]) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()[1:]] == ["  run.seed", "  lr"]


@pytest.mark.parametrize("arguments", ["schema", "--help", "evaluate nowhere --json"])
def test_a_reader_that_leaves_is_no_failure(arguments: str) -> None:
    line = f"{sys.executable} -m trainwright {arguments} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_main_exits_with_the_code() -> None:
    assert command("train", "nowhere.yaml").returncode == 2
