"""The built-in source against what the interpreter itself says about its functions."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap

import pytest

from trainwright.data import docstrings


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """All of (code, docstring), with the shape of the rows checked on the way."""
    found = []
    for row in docstrings.chats():
        question, answer = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        start, end = f"{docstrings.INSTRUCTION}\n\n```python\n", "\n```"
        assert question["content"].startswith(start)
        assert question["content"].endswith(end)
        found.append((question["content"].removeprefix(start).removesuffix(end), answer["content"]))
    return found


def test_there_are_thousands_and_none_appears_twice(pairs: list[tuple[str, str]]) -> None:
    assert len(pairs) > 3000
    assert len({code for code, _ in pairs}) == len({docstring for _, docstring in pairs}) == len(pairs)


def test_the_code_is_one_function_without_its_docstring(pairs: list[tuple[str, str]]) -> None:
    for code, docstring in pairs[::7]:
        (function,) = ast.parse(code).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef), code
        assert ast.get_docstring(function) != docstring
        assert len(code) in docstrings.CODE_CHARACTERS
        assert len(docstring) in docstrings.DOCSTRING_CHARACTERS


@pytest.mark.parametrize("function", [inspect.ismethod, textwrap.indent, textwrap.TextWrapper.fill, ast.parse])
def test_known_functions_are_there_with_their_docstring(pairs: list[tuple[str, str]], function: object) -> None:
    name = function.__name__  # type: ignore[attr-defined]
    assert [docstring for code, docstring in pairs if code.startswith(f"def {name}(")].count(str(inspect.getdoc(function))) == 1


def test_the_order_is_the_same_each_time(pairs: list[tuple[str, str]]) -> None:
    again = [row["messages"] for row in itertools.islice(docstrings.chats(), 150)]
    assert [messages[1]["content"] for messages in again] == [docstring for _, docstring in pairs[:150]]


def test_the_fingerprint_is_stable() -> None:
    assert docstrings.fingerprint() == docstrings.fingerprint()


SOURCE = '''
# A form feed and a separator are no line ends to Python: \f \u2028
class Stack:
    @property
    def top(self):
        """The value that was pushed last,
        or None."""

        # a comment stays
        return self.values[-1] if self.values else None

    def one_line(self): "A docstring on the line of the definition."; return 1

    def followed_on_its_line(self):
        """A docstring that shares its line."""; shared = 1
        return shared

    def only_documented(self):
        """There is nothing to see in this function."""

    async def poll(
        self,
    ):
        """Waits until there is something to return."""
        return await self.reader.read()
'''


def test_what_is_taken_out_of_a_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("module") / "stack.py"
    path.write_text(SOURCE)
    assert sorted(docstrings._pairs(path)) == [
        (
            "@property\ndef top(self):\n    # a comment stays\n    return self.values[-1] if self.values else None",
            "The value that was pushed last,\nor None.",
        ),
        (
            "async def poll(\n    self,\n):\n    return await self.reader.read()",
            "Waits until there is something to return.",
        ),
    ]


def test_a_file_that_is_not_python_is_passed_over(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("module") / "bad.py"
    path.write_bytes(b"def f(:\n \xff")
    assert list(docstrings._pairs(path)) == []
