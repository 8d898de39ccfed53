"""The YAML of an imported recipe: it reads back as the same recipe, and every finding stands in it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.importing.files import COURSE, OUTPUT, TWO, course, imported
from trainwright.importing.read import Imported, read
from trainwright.importing.render import render
from trainwright.recipe import Recipe
from trainwright.recipe import yaml as recipe_yaml
from trainwright.recipe.file import load


@pytest.fixture
def found(tmp_path: Path) -> Imported:
    return read([course(tmp_path) / name for name in COURSE], model="smollm2-135m", data="python-docstrings")


def test_it_reads_back_and_trains(found: Imported, tmp_path: Path) -> None:
    text = render(found)
    assert recipe_yaml.read(text, "") == found.recipe
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load(tmp_path / "recipe.yaml")
    assert recipe == Recipe.model_validate(found.recipe)
    assert (recipe.parallel.zero, recipe.parallel.engine, recipe.training.batch_size) == (3, "deepspeed", 40)
    assert (recipe.model.pretrained, recipe.data.source) == ("smollm2-135m", "python-docstrings")
    assert "REPLACE" not in text


def test_placeholders_are_marked(tmp_path: Path) -> None:
    text = render(read([course(tmp_path) / "deepspeed.json"]))
    lines = text.splitlines()
    assert re.match(r"  # REPLACE: no file says which model", lines[lines.index("  pretrained: REPLACE-ME") - 1])
    assert re.match(r"  # REPLACE: no file says which data", lines[lines.index("  source: REPLACE-ME") - 1])
    assert "REPLACE" not in str(read([tmp_path / "deepspeed.json"]).recipe)


def test_every_finding_is_in_it_above_its_key(found: Imported) -> None:
    text = render(found)
    plain = " ".join(re.sub(r"^\s*#\s*", "", line) for line in text.splitlines())
    for finding in found.findings:
        assert finding.what in plain
        assert finding.key in plain
    best = text.index("  best:")
    assert text.rindex("# warning: training_arguments.json: greater_is_better", 0, best) > text.index("evaluation:")
    assert max(map(len, text.splitlines())) <= 122


def test_the_last_line_is_the_command(found: Imported, tmp_path: Path) -> None:
    assert render(found).endswith("\n# trainwright train recipe.yaml --nproc 5\n")
    assert render(replace(found, nproc=None)).endswith("\n# trainwright train recipe.yaml\n")
    machines = imported(tmp_path, acc={**TWO, "num_machines": 2})
    assert render(machines).endswith("\n# trainwright launch-script recipe.yaml --torchrun\n")


def test_whatever_a_file_holds_a_comment_stays_one(tmp_path: Path) -> None:
    evil = "x\nmodel: {pretrained: evil}\r\x85\u2028run: {}"
    found = imported(tmp_path, args={**OUTPUT, evil: 1, "run_name": evil, "output_dir": evil})
    assert recipe_yaml.read(render(found), "")["run"]["folder"] == evil
    assert recipe_yaml.read(render(found), "")["model"] == {"pretrained": "REPLACE-ME"}


def test_arguments_of_scripts_name_model_and_data(tmp_path: Path) -> None:
    script = {"model_name_or_path": "gpt2", "train_file": "a.jsonl", "validation_file": "b.jsonl", "max_seq_length": 256}
    recipe = imported(tmp_path, args={**OUTPUT, **script, "packing": False}).recipe
    assert recipe["model"] == {"pretrained": "gpt2"}
    assert recipe["data"] == {
        "kind": "text", "source": "a.jsonl", "held_out": "b.jsonl", "sequence_length": 256, "packing": False,
    }  # fmt: skip
    path = tmp_path / "args.json"
    assert read([path], model="mine", data="other.txt").recipe["model"] == {"pretrained": "mine"}


def test_it_answers_at_once() -> None:
    code = "import sys; import trainwright.importing.render; assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
