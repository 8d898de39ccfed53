"""What there is to say about a file that was read: values for keys of the recipe, and findings. Nothing is dropped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from trainwright.recipe import nearest

Level = Literal["note", "warning", "error"]
SECRET = ("token", "api_key", "password", "secret", "access_key")


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know about a key of a file.

    level    note: nothing follows from it, or it was filled in; warning: it misleads, or the training differs here;
             error: the files contradict themselves, so the tool itself would refuse them or do something else
    file     the file's name as the user gave it
    key      path of the key in that file (``zero_optimization.stage``)
    what     what is the matter, with the numbers
    fix      what to do, or the empty string
    about    path of the recipe's key above which the finding stands as a comment; empty: at the top
    """

    level: Level
    file: str
    key: str
    what: str
    fix: str = ""
    about: str = ""

    def __str__(self) -> str:
        return f"{self.level}: {self.file}: {self.key}: {self.what}" + (f"; {self.fix}" if self.fix else "")


@dataclass(frozen=True)
class Said:
    """A value that a file gives for a key of the recipe.

    raw      the value in the file's own words, by which files are compared (fp16 and bf16 both become bf16 here)
    given    False: the file is silent, and this is the default of its ``tool``
    """

    value: Any
    file: str
    key: str
    raw: Any
    tool: str
    given: bool = True


class Plain(NamedTuple):
    """A key that nothing is made of.

    why      why not
    level    how serious that is where the value asks for something
    idle     values that ask for nothing
    fix      what to do where it asks for something
    """

    why: str
    level: Level = "note"
    idle: tuple[Any, ...] = (None, False, "", "no")
    fix: str = ""


@dataclass
class Reading:
    """A file that is being read, what it says for the recipe, and what there is to say about it.

    tool     whose file it is: deepspeed, transformers or accelerate
    used     keys that were translated, each with the key of the recipe that came of it
    faults   values that make no sense; any of them ends the import
    """

    file: str
    tool: str
    values: Mapping[str, Any]
    said: dict[str, Said] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    used: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        """The value at a path; ``default`` where it is absent, null or "auto"."""
        value: Any = self.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None or value == "auto" else value

    def has(self, key: str) -> bool:
        """Whether the path is there, whatever it holds."""
        *sections, last = key.split(".")
        section: Any = self.values
        for part in sections:
            section = section.get(part) if isinstance(section, Mapping) else None
        return isinstance(section, Mapping) and last in section

    def say(self, path: str, value: Any, key: str, *, raw: Any = None, given: bool = True) -> None:
        """The file's value for a key of the recipe."""
        self.said[path] = Said(value, self.file, key, value if raw is None else raw, self.tool, given)
        if given and self.has(key):
            self.used[key] = path

    def assume(self, path: str, value: Any, key: str) -> None:
        """The value that the tool takes where the file is silent."""
        self.say(path, value, key, given=False)

    def tell(self, level: Level, key: str, what: str, fix: str = "", about: str = "") -> None:
        self.findings.append(Finding(level, self.file, key, what, fix, about))

    def number(self, key: str, least: float = 0.0) -> float | None:
        """The number at a path, at least ``least``; None where there is none. Text that is a number is one."""
        value = self.get(key)
        if value is None:
            return None
        number = as_number(value)
        if number is None or number < least:
            self.fault(key, value, f"a number of at least {least:g}")
            return None
        return number

    def whole(self, key: str, least: int = 1) -> int | None:
        """The whole number at a path."""
        value = self.get(key)
        if value is None:
            return None
        number = as_number(value)
        if number is None or number != int(number) or number < least:
            self.fault(key, value, f"a whole number of at least {least}")
            return None
        return int(number)

    def flag(self, key: str) -> bool | None:
        """The truth value at a path; 'yes' and 'no' are such, as accelerate writes them."""
        value = self.get(key)
        if value is None:
            return None
        found = as_flag(value)
        if found is None:
            self.fault(key, value, "true or false")
        return found

    def word(self, key: str, known: Iterable[str] = ()) -> str | None:
        """The text at a path; of a closed list, in whatever case, where ``known`` is given."""
        value = self.get(key)
        if value is None:
            return None
        names = list(known)
        word = "no" if value is False and "no" in names else value
        if isinstance(word, str) and (not names or word.lower() in names):
            return word.lower() if names else word
        near = nearest(value.lower(), names) if isinstance(value, str) else ""
        self.fault(key, value, f"one of {', '.join(names)}{near}" if names else "text")
        return None

    def section(self, key: str) -> Mapping[str, Any]:
        """The mapping at a path, empty where there is none."""
        value = self.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.fault(key, value, "a section of keys and values")
            return {}
        return value

    def fault(self, key: str, value: Any, wanted: str) -> None:
        self.faults.append(f"{self.file}: {key}: found {shown(value, key)}; must be {wanted}")

    def plainly(self, key: str, entry: Plain) -> None:
        """Tell why nothing is made of a key that is there."""
        value = self.get(key)
        if value is None or value == [] or value == {} or any(value is idle or value == idle for idle in entry.idle):
            self.tell("note", key, "asks for nothing")
        else:
            self.tell(entry.level, key, f"{shown(value, key)}: {entry.why}", entry.fix)

    def rest(self, section: str, plain: Mapping[str, Plain], known: Iterable[str], otherwise: str) -> None:
        """Account for every key of a section (the whole file: "") that wasn't translated or told of.

        Args:
            plain: the keys of that section that nothing is made of.
            known: its other keys, which were looked at already.
            otherwise: what the tool does with a key that it doesn't know.
        """
        values = self.section(section) if section else self.values
        names = [*plain, *known]
        for name in values:
            key = f"{section}.{name}" if section else str(name)
            if name in plain:
                self.plainly(key, plain[name])
            elif self.accounted(key):
                continue
            elif name not in names:
                self.tell("warning", key, f"unknown{nearest(str(name), names)}; {otherwise}")
            else:
                value = values[name]
                what = "auto: filled in from the other files" if value == "auto" else "asks for nothing"
                self.tell("note", key, what)

    def accounted(self, key: str) -> bool:
        """Whether something was made of a key, of one inside it, or told of either."""
        keys = [*self.used, *(finding.key for finding in self.findings)]
        return any(key == other or other.startswith(f"{key}.") for other in keys)


def as_number(value: Any) -> float | None:
    """A finite number, or text that is one (PyYAML takes 5e-5 for text)."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def as_flag(value: Any) -> bool | None:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    return words.get(str(value).lower())


def shown(value: Any, key: str = "") -> str:
    """A value as the file has it, shortened; never what is secret."""
    if any(word in key.rpartition(".")[2] for word in SECRET):
        return "(not shown)"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):  # something inside may be secret
        return f"a section with {', '.join(map(str, value)) or 'nothing'}"
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
