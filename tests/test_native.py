"""Our C++ sources are built once, whole or not at all, and a failure is one line."""

import subprocess

import pytest

from trainwright import native

SOURCE = """
#include <c10/core/CPUAllocator.h>
extern "C" int answer() { return c10::GetCPUAllocator() ? 42 : 0; }
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """One that nobody has built yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "small.cpp"
    file.write_text(SOURCE)
    return file


def built(tmp_path):
    return [file.name for file in (tmp_path / "cache/trainwright").iterdir()]


def test_a_source_is_built_once_and_anew_when_it_changes(source, tmp_path, monkeypatch):
    assert native.load(source).answer() == 42
    first = built(tmp_path)
    assert len(first) == 1
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", None)
        assert native.load(source).answer() == 42
    source.write_text(SOURCE.replace("42", "43"))
    assert native.load(source).answer() == 43
    assert len(set(built(tmp_path)) - set(first)) == 1


def test_other_flags_are_another_library(source, tmp_path, monkeypatch):
    native.load(source)
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DOTHER"))
    native.load(source)
    assert len(built(tmp_path)) == 2


def test_a_faulty_source_leaves_nothing(source, tmp_path):
    source.write_text("int answer( {")
    with pytest.raises(native.Unavailable, match=r"failed: .*error") as caught:
        native.load(source)
    assert "\n" not in str(caught.value)
    assert built(tmp_path) == []


@pytest.mark.parametrize(("compiler", "why"), [("/nonexistent", "/nonexistent"), ("sh -c 'exit 7'", "exit 7")])
def test_a_compiler_that_does_not_work(compiler, why, source, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(native.Unavailable, match=why):
        native.load(source)
    assert built(tmp_path) == []


def test_a_missing_compiler_is_named(source, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(native.Unavailable, match="install g\\+\\+"):
        native.load(source)


def test_a_library_that_is_none(source, tmp_path):
    native.load(source)
    source.write_text(SOURCE + "// other")
    file = native._built(source)
    file.write_text("nothing")
    with pytest.raises(native.Unavailable, match="small-"):
        native.load(source)
