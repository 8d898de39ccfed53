"""``trainwright plan`` through the command line: exit codes, messages, the JSON document."""

import json

import pytest

from tests import small
from trainwright.__main__ import run
from trainwright.plan.report import PARTS
from trainwright.recipe.file import dump


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "digits.yaml"
    file.write_text(dump(small.recipe(tmp_path, model__options={"hidden": [64]})))
    return str(file)


def call(capsys, *arguments):
    code = run(["plan", *arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_document(recipe, capsys):
    code, out, _ = call(capsys, recipe, "--device", "a100-40gb", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["fits"] is True
    assert set(found["memory"]["parts"]) == set(PARTS)
    assert sum(found["memory"]["parts"].values()) == found["memory"]["peak"] > 0
    assert found["timing"]["seconds"] > 0
    assert found["flops"] >= 6 * 32 * (64 * 64 + 64 * 10) - 2 * 32 * 64 * 64, "the first layer's input has no gradient"
    assert found["messages"] == []
    assert found["unknown"] == {}
    assert found["validated"]


def test_it_does_not_fit(recipe, capsys):
    code, out, _ = call(capsys, recipe, "--device", "a100-40gb", "--budget", "1KiB", "--json")
    assert code == 1
    assert json.loads(out)["fits"] is False


def test_the_recipe_may_say_the_budget(recipe, capsys):
    code, out, _ = call(capsys, recipe, "memory.budget=1KiB", "--device", "a100-40gb", "--json")
    assert (code, json.loads(out)["budget"]) == (1, 1024)
    code, out, _ = call(capsys, recipe, "memory.budget=1KiB", "--device", "a100-40gb", "--budget", "1GiB", "--json")
    assert (code, json.loads(out)["budget"]) == (0, 2**30)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--device", "h10"], ["h10", "h100"]),
        (["--device", "a100-40gb", "--budget", "some"], ["--budget", "some"]),
        (["--device", "a100-40gb", "--budget", "-3GiB"], ["--budget"]),
        (["--device", "a100-40gb", "--count", "3", "parallel.tensor=2"], ["3", "2"]),
        (["--device", "a100-40gb", "optimiser.name=sgd"], ["optimiser", "optimizer"]),
    ],
)
def test_wrong_input(recipe, capsys, arguments, parts):
    positional = [word for word in arguments if "=" in word]
    code, out, err = call(capsys, recipe, *positional, *[word for word in arguments if "=" not in word])
    assert code == 2
    assert out == ""
    assert all(part in err for part in parts), err
    assert "Traceback" not in err
