"""What plan says of its own errors is what the benchmark measured."""

import json

import pytest

from benchmarks.plan_page import TARGETS, write_validation
from trainwright.plan import validation
from trainwright.plan.validation import sentences

ROWS = [{"case": "a", "error": 0.01}, {"case": "b", "error": -0.04}, {"case": "c", "error": 0.0}]


@pytest.mark.parametrize("several", [False, True])
def test_a_cpu_has_been_measured_and_others_have_not(several):
    here, there = sentences(on_cpu=True, several=several), sentences(on_cpu=False, several=several)
    assert [line.partition(":")[0] for line in here] == [
        "peak of tensors", *(["peak in each process"] if several else []), "growth of resident memory", "time of a step"
    ]  # fmt: skip
    assert there[-1] == validation.ELSEWHERE
    assert set(there[:-1]) < set(here)


def test_measured_kinds_are_replaced_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "FILE", tmp_path / "validation.json")
    write_validation(validation.FILE, dict.fromkeys(TARGETS, ROWS[:1]))
    write_validation(validation.FILE, {"memory": ROWS, "seconds": [{"case": "d", "seconds": 1.0}]})
    assert set(json.loads(validation.FILE.read_text())) == set(TARGETS)
    memory, *others = sentences(on_cpu=True, several=True)
    assert memory.startswith("peak of tensors: 2 of 3 cases within 3%, the largest error 4.0% (")
    assert all("1 of 1 cases" in line for line in others)


def test_the_page_and_the_file_agree():
    page = (validation.FILE.parents[2] / "docs" / "plan-accuracy.md").read_text()
    for kind, found in json.loads(validation.FILE.read_text()).items():
        section = page.partition(f"## {kind}\n")[2].partition("\n## ")[0]
        assert f"{found['within']} of {found['cases']} cases within {found['target']:.0%}" in section
