"""Results of combinations in a file that a killed matrix goes on from: a JSON line each, by a hash of all that made it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from trainwright.verify.job import Job

RESULTS = "results.jsonl"
SOURCES = Path(__file__).parents[1]
ABOUT = "verify/page.py"  # sources that change no result


@dataclass(frozen=True)
class Outcome:
    """How a combination ended.

    exact  whether the run has the plain run's bits
    worst  the largest part of a bound that is used
    why    it is refused or failed, in words
    """

    verdict: Literal["passed", "refused", "failed"]
    exact: bool = False
    worst: float = 0.0
    why: str = ""
    seconds: float = 0.0


class Store:
    """The known results; what failed is tried again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fresh = folder, 0
        self._path = folder / RESULTS
        self._known: dict[str, Outcome] = {}
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True) if self._path.exists() else []
        for line in lines:
            self._remember(line)
        if lines and not lines[-1].endswith("\n"):
            self._append("\n")

    def _append(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)

    def _remember(self, line: str) -> None:
        try:
            kept = json.loads(line)
        except json.JSONDecodeError:  # it was being written when the process was killed
            return
        outcome = Outcome(**kept["outcome"])
        if outcome.verdict != "failed":
            self._known[kept["key"]] = outcome

    def get(self, job: Job, model: str, combination: Mapping[str, str], make: Callable[[], Outcome]) -> Outcome:
        """The outcome of a job: known, or made and written down."""
        key = self.key(job)
        if key not in self._known:
            self.fresh += 1
            self._known[key] = make()
            line = {"key": key, "model": model, "combination": combination, "outcome": asdict(self._known[key])}
            self._append(f"{json.dumps(line)}\n")
        return self._known[key]

    def key(self, job: Job) -> str:
        """Of a job: everything that made its result."""
        recipe = job.recipe.model_dump_json().replace(json.dumps(str(self.folder))[1:-1], "")
        settings = [getattr(job, name) for name in ("steps", "resume", "dropout")]
        return hashlib.sha256(json.dumps([recipe, settings, versions(), _sources()]).encode()).hexdigest()[:16]


@cache
def versions() -> dict[str, str]:
    """Of what a result depends on."""
    return {"trainwright": metadata.version("trainwright"), "torch": torch.__version__}


@cache
def _sources() -> str:
    """SHA-256 over the package: between two versions it is the sources that change."""
    total = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".py", ".cpp") and path != SOURCES / ABOUT:
            total.update(path.read_bytes())
    return total.hexdigest()
