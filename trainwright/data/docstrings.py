"""The built-in data set: functions of this interpreter's own standard library, and the docstrings they carry.

It needs no download, is real text written by people, and is large enough to see a model learn.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

# Tests, vendored packages and applications: their docstrings are not those of a library.
EXCLUDED = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "ensurepip", "site-packages", "dist-packages"}
)
CODE_CHARACTERS = range(40, 1601)
DOCSTRING_CHARACTERS = range(24, 801)
INSTRUCTION = "Write the docstring of this Python function."

Function = ast.FunctionDef | ast.AsyncFunctionDef


def chats() -> Iterator[dict[str, list[dict[str, str]]]]:
    """Rows ``{"messages": [user, assistant]}`` in the order of the files and of the functions in them.

    A function appears once, and so does a docstring: a copy in the held-out data would measure memory.
    """
    seen: set[str] = set()
    for path in _files():
        for code, docstring in _pairs(path):
            if code in seen or docstring in seen:
                continue
            seen.update((code, docstring))
            question = f"{INSTRUCTION}\n\n```python\n{code}\n```"
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": docstring}]}


def fingerprint() -> str:
    """Changes whenever ``chats`` may: the digest of the library's sources and of this file."""
    digest = hashlib.sha256(platform.python_version().encode())
    for path in (Path(__file__), *_files()):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _files() -> list[Path]:
    """The library's modules, sorted by their path inside it; empty where Python comes without sources."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in EXCLUDED]  # site-packages may hold far more than the library
        found += (Path(folder, name) for name in files if name.endswith(".py"))
    return sorted(found, key=Path.as_posix)


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    """(source without the docstring, docstring) of the functions in a file that are worth learning from."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules are not our user's concern
            tree = ast.parse(source)
    except (SyntaxError, ValueError, OSError):
        return
    lines = source.split("\n")  # as ast counts them; splitlines would also split at form feeds
    for node in ast.walk(tree):
        if isinstance(node, Function) and _has_own_lines(node, lines):
            docstring = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            code = _without_docstring(node, lines)
            if len(code) in CODE_CHARACTERS and len(docstring) in DOCSTRING_CHARACTERS:
                yield code, docstring


def _has_own_lines(node: Function, lines: list[str]) -> bool:
    """Whether there is a docstring that shares no line with other code, and a body besides it."""
    if ast.get_docstring(node, clean=False) is None or len(node.body) < 2:
        return False
    docstring, following = node.body[0], node.body[1]
    alone = lines[docstring.lineno - 1][: docstring.col_offset].isspace()
    return alone and (docstring.end_lineno or 0) < following.lineno


def _without_docstring(node: Function, lines: list[str]) -> str:
    """The function's source with its decorators, moved to the left margin."""
    docstring = node.body[0]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    signature = lines[first : docstring.lineno - 1]
    body = lines[docstring.end_lineno : node.end_lineno]
    while not body[0].strip():
        body = body[1:]
    margin = " " * node.col_offset
    return "\n".join(line.removeprefix(margin).rstrip() for line in (*signature, *body))
