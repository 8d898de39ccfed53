"""The YAML that recipes are written in: version 1.2's plain words, read safely, without duplicate keys.

PyYAML follows YAML 1.1, in which ``1e-4`` is text, ``off`` is false, ``010`` is eight and ``12:30`` is 750.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import yaml

from trainwright.recipe import InputError

TAG = "tag:yaml.org,2002:"
FLOAT = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
# Not in YAML 1.2, but nobody means text by it: 10_000.
INT = re.compile(r"[-+]?(?:\d{1,3}(?:_\d{3})+|\d+)")
WORDS: list[tuple[str, re.Pattern[str], str]] = [
    ("null", re.compile(r"~|null|Null|NULL|"), "~nN"),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("int", INT, "-+0123456789"),
    ("float", FLOAT, "-+.0123456789"),
    ("merge", re.compile(r"<<"), "<"),
]
PLAIN = {f"{TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class _Loader(yaml.SafeLoader):
    """Safe; knows the words above and plain values only; notes the keys that a mapping holds twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)
    # The tag None stands for every other tag, which is an error.
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in {*PLAIN, None}
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []

    # Here and not where mappings are constructed: there, keys merged in by << are repeated rightfully.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{TAG}merge" and key.value in lines:
                self.repeated.append(f"line {line}: key {key.value!r} is there already, in line {lines[key.value]}")
            lines.setdefault(str(key.value), line)
        return node

    # Always deep: PyYAML then refuses a list that holds itself.
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        return super().construct_object(node, deep=True)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        digits = self.construct_scalar(node)
        if len(digits) > 4000:  # about where Python refuses, to stay linear in time
            raise yaml.constructor.ConstructorError(None, None, f"a number of {len(digits)} digits", node.start_mark)
        return int(digits)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would take for something else."""

    # An alias (&id001) would stand where the same list is used twice.
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, items: Sequence[Any]) -> yaml.Node:
    """Short lists of plain values stay in their line."""
    plain = all(item is None or isinstance(item, bool | int | float | str) for item in items)
    return dumper.represent_sequence(f"{TAG}seq", items, flow_style=plain)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Quoted so that they are escaped, where characters are in it that readers take for the end of a line."""
    unusual = any(character in text for character in "\x85\u2028\u2029\ufeff")
    return dumper.represent_scalar(f"{TAG}str", text, style='"' if unusual else None)


for _name, _pattern, _first in WORDS:
    # PyYAML matches a pattern at the start only; a word has to match whole.
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    _Loader.add_implicit_resolver(TAG + _name, _whole, [*_first, ""] if _name == "null" else list(_first))
    _Dumper.add_implicit_resolver(TAG + _name, _whole, [*_first, ""] if _name == "null" else list(_first))
_Loader.add_constructor(f"{TAG}int", _Loader.construct_decimal)
_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(tuple, _represent_list)
_Dumper.add_representer(str, _represent_text)


def read(text: str, where: str) -> Any:
    """The value that ``text`` holds.

    Raises:
        InputError: not YAML, with line and column; or keys that are there twice, with their lines.
    """
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        raise InputError(f"{where}: {_place(error)}{_problem(error)}{_remedy(error)}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    except yaml.YAMLError as error:  # characters that YAML forbids
        raise InputError(f"{where}: {' '.join(str(error).split())}") from None
    if loader.repeated:
        raise InputError("\n  ".join([f"{where}: a key may stand once only", *loader.repeated]))
    return value


def read_word(text: str) -> Any:
    """A plain word, as on a command line: 3e-4 is a number, true a truth value, and *norm* or a: b are just text."""
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    try:
        return loader.construct_object(yaml.ScalarNode(tag, text)) if tag in PLAIN else text
    except yaml.YAMLError:  # thousands of digits
        return text


def write(value: dict[str, Any]) -> str:
    """YAML in the order of the keys, the inverse of ``read``."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def _place(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "not YAML"
    return f"{error.context}, {problem}" if problem.startswith("but ") else problem


def _remedy(error: yaml.MarkedYAMLError) -> str:
    """What people usually meant."""
    problem, context = error.problem or "", error.context or ""
    if "alias" in problem or "alias" in context:
        return "; text that begins with * must be in quotes, such as '*norm*'"
    if "constructor for the tag" in problem:
        return "; a recipe holds plain values, without tags"
    if r"'\t'" in problem:
        return "; indent with spaces, not with tabs"
    if "mapping values are not allowed" in problem:
        return "; text that holds ': ' must be in quotes, and keys of one section start in the same column"
    return ""
