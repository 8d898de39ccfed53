"""What several files say for the same key of the recipe: whose word holds, and what is told where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainwright.importing.findings import Finding, Reading, Said, shown

TOOLS = ("deepspeed", "transformers", "accelerate")  # whose word holds where they differ
# What transformers itself compares with the DeepSpeed file (HfTrainerDeepSpeedConfig.trainer_config_process).
COMPARED = {
    "batch.micro", "batch.steps", "training.clip_norm", "optimizer.learning_rate", "optimizer.betas", "optimizer.eps",
    "optimizer.weight_decay", "precision",
}  # fmt: skip
# Values that the recipe has anyway, so that a tool's default which is the same needn't be written.
SAME_HERE = {"training.clip_norm": 1.0, "evaluation.every": None, "parallel.zero": 0}
AUTO = 'write "auto" in the DeepSpeed file, and transformers fills it in'


class Together:
    """The readings of all files, by tool, and what comes of them.

    recipe   paths of the recipe and their values
    """

    def __init__(self, readings: Mapping[str, Reading]) -> None:
        self.readings = {tool: readings[tool] for tool in TOOLS if tool in readings}
        self.recipe: dict[str, Any] = {}
        self.findings: list[Finding] = []
        self.processes: int | None = None
        self.machines = 1

    def all_said(self, path: str) -> list[Said]:
        """What the files say for a path, the tool first whose word holds; what is given before defaults."""
        found = [reading.said[path] for reading in self.readings.values() if path in reading.said]
        return sorted(found, key=lambda said: not said.given)

    def tell(self, level: Any, said: Said, what: str, fix: str = "", about: str = "") -> None:
        self.findings.append(Finding(level, said.file, said.key, what, fix, about))


def settle(all_: Together, path: str) -> Said:
    """The value for a path that holds, in ``recipe``; what differs from it is told."""
    first, *others = all_.all_said(path)
    for other in others:
        if other.raw != first.raw:
            differ(all_, path, first, other)
    if first.given or path not in SAME_HERE or SAME_HERE[path] != first.value:
        all_.recipe[path] = first.value
        if not first.given:
            what = f"not in the file: {shown(first.raw)} is the default of {first.tool}"
            all_.tell("note", first, what, about=path)
    return first


def differ(all_: Together, path: str, first: Said, other: Said) -> None:
    """How bad it is depends on who compares."""
    tools = {first.tool, other.tool}
    about = "training.batch_size" if path.startswith("batch.") else path
    if path == "optimizer.name":
        if other.given and other.value != first.value:
            what = f"{shown(other.raw)}, but {first.file} has an optimizer, {shown(first.raw)}, which holds"
            all_.tell("warning", other, what, "keep one of them", path)
    elif first.given and other.given:
        refuses = path in COMPARED and tools == {"deepspeed", "transformers"}
        what = f"{shown(other.raw)}, but {first.file} says {shown(first.raw)} in {first.key}, which holds here"
        what += "; transformers refuses to start" if refuses else ""
        all_.tell("error", other, what, AUTO if refuses else "keep one of them", about)
    elif first.given and tools == {"deepspeed", "transformers"} and path in COMPARED:
        _differs_from_default(all_, about, first, other)


def _differs_from_default(all_: Together, path: str, first: Said, default: Said) -> None:
    if first.tool == "deepspeed":
        what = f"{shown(first.raw)}, but {default.key} isn't in {default.file} and is {shown(default.raw)} by default"
        all_.tell("warning", first, f"{what}: transformers refuses to start", AUTO, path)
    elif path == "training.clip_norm":
        what = f"{shown(first.raw)}, but {default.file} has no gradient_clipping, so DeepSpeed clips at {shown(default.raw)}"
        all_.tell("warning", first, what, f"here {shown(first.raw)} holds; elsewhere write gradient_clipping", path)
