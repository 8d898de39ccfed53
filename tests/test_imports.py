"""Who may import whom: the table of docs/architecture.md, held against the source of every module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "trainwright"
FILES = sorted(file.relative_to(ROOT) for file in ROOT.rglob("*.py") if file.name != "__init__.py")

TECHNIQUES = {"adapt", "memory", "parallel"}
PARTS = {"models", "data", "losses", "metrics", "optim", "schedules", "ema", "stopping"}
HELPERS = {"pieces", "checkpoint", "tracking", "flops", "machine", "sampling", "saving"}
KINDS = {"language", "supervised"}  # of data: what each adds to a program
BELOW_KINDS = {"recipe", "loop", "built", "predictor", "report", *PARTS, *TECHNIQUES, *HELPERS}
BELOW_BUILD = {*BELOW_KINDS, *KINDS, "runfolder", "state", "spread", "frozen", "filling", "steps", "steps_deepspeed"}
BELOW_VERBS = {*BELOW_BUILD, "build", "console"}
VERBS = {"fit", "evaluation", "generate", "inspect", "export", "predict", "find_lr", "plot_schedule"}
# A module, or all modules of a folder -> what of ours it may import (a module, or all of a folder).
ALLOWED: dict[str, set[str]] = {
    "recipe": {"recipe"},
    "models": {"recipe", "models", "pieces", "native"},
    "models.contract": {"recipe", "pieces"},
    "data": {"recipe", "data", "forking"},
    "losses": {"recipe", "losses", "widened"},
    **{name: {"recipe", name} for name in ("metrics", "report")},
    **{name: {"recipe"} for name in ("optim", "schedules", "stopping")},
    **{name: {"recipe"} for name in ("tracking", "flops", "machine")},
    "checkpoint": {"recipe", "pieces", "checkpoint", "models.tensor_file"},
    "launch": {"recipe", "launch", "forking"},
    "importing": {"recipe", "importing"},
    **{name: {"recipe", "models.contract", "pieces", name} for name in ("adapt", "parallel")},
    "memory": {"recipe", "models.contract", "pieces", "native", "widened", "memory"},
    "pieces": set(),
    "widened": set(),
    "native": set(),
    "forking": set(),
    "ema": {"recipe", "pieces"},
    "sampling": {"recipe", "models"},
    "saving": {"recipe", "models", "adapt", "built", "parallel", "pieces"},
    "loop": {"recipe", "models.contract", "pieces"},
    "built": {"recipe", "loop", "memory.precision", "models", "parallel", "pieces"},
    "state": {"loop", "parallel", "pieces"},
    "spread": {"recipe", "models.contract", "parallel", "built", "state"},
    "steps_deepspeed": {"recipe", "memory", "optim", "loop", "parallel", "pieces", "built", "spread", "state", "steps"},
    "frozen": {"recipe", "built", "memory", "models"},
    "filling": {"recipe", "frozen", "spread", "adapt", "built", "memory", "models", "parallel", "pieces", "state"},
    "steps": {"recipe", "optim", "loop", "memory", "parallel", "pieces", "built", "spread", "state"},
    "budget": {"recipe", "parallel"},
    "predictor": {"recipe", "data.examples"},
    **dict.fromkeys(KINDS, BELOW_KINDS),
    "console": {"recipe", "loop"},
    "runfolder": {"recipe", "loop", "checkpoint", "tracking", "saving"},
    "build": BELOW_BUILD,
    **dict.fromkeys(VERBS, BELOW_VERBS),
    "fit": {*BELOW_VERBS, "launch", "budget"},
    "verify": {*BELOW_VERBS, "launch.pool", "verify"},
    "plan": {*BELOW_VERBS, "forking", "plan"},
    **{
        f"plan.{name}": {"recipe", "plan"}
        for name in ("work", "devices", "calibrate", "this_cpu", "timing", "pareto", "report", "show")
    },
    "plan.page": {"recipe", "plan", "report.style"},
    "cli": {"cli", "recipe", "sampling", "build", "launch", "importing", "plan", "verify", *VERBS},
    "__main__": {"recipe", "cli", "launch"},
}
HEAVY = {"torch", "transformers", "datasets", "numpy", "pandas", "pyarrow", "safetensors", "tokenizers", "tensorboard"}
LIGHT = [file for file in FILES if file.parts[0] in ("recipe", "cli") or file.stem == "__main__"]
LONGEST_FILE = 350


def dotted(file: Path) -> str:
    """``models/decoder.py`` -> ``models.decoder``."""
    return ".".join(file.with_suffix("").parts)


def covers(entry: str, module: str) -> bool:
    """Whether an entry of the table is a module or its folder."""
    return entry == module or module.startswith(f"{entry}.")


def rule_of(module: str) -> set[str] | None:
    """What a module may import, by its nearest entry."""
    parts = module.split(".")
    entries = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((ALLOWED[entry] for entry in entries if entry in ALLOWED), None)


def imports(tree: ast.AST) -> Iterator[str]:
    """The absolute names of all modules that are imported, at any depth of the code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            for alias in node.names:
                yield f"{node.module}.{alias.name}" if is_module(f"{node.module}.{alias.name}") else str(node.module)


def is_module(name: str) -> bool:
    """Whether a dotted name is one of our modules or folders, and not something inside of one."""
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def ours(tree: ast.AST) -> set[str]:
    """What of ours is imported: ``models.decoder``."""
    found = {name.removeprefix("trainwright").lstrip(".") for name in imports(tree) if name.partition(".")[0] == "trainwright"}
    return found - {""}


def parsed(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_what_the_table_allows(file: Path) -> None:
    rule = rule_of(dotted(file))
    assert rule is not None, f"give {file} a line in ALLOWED and in docs/architecture.md"
    forbidden = sorted(module for module in ours(parsed(file)) if not any(covers(entry, module) for entry in rule))
    assert not forbidden, f"{file} may import {sorted(rule)} of ours, not {forbidden}"


@pytest.mark.parametrize("file", LIGHT, ids=str)
def test_light_modules_import_nothing_heavy(file: Path) -> None:
    heavy = {name for name in imports(parsed(file)) if name.partition(".")[0] in HEAVY}
    assert not heavy, f"{file} must not import {heavy}: --help would wait for it"


@pytest.mark.parametrize("name", ["base", "training", "using"])
def test_cli_imports_ours_in_functions_only(name: str) -> None:
    at_start = [node for node in parsed(Path("cli", f"{name}.py")).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert ours(ast.Module(at_start, [])) <= {"cli.base"}, "--help would wait for it"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_only_main_imports_cli(file: Path) -> None:
    assert not any(covers("cli", module) for module in ours(parsed(file))) or file.parts[0] in ("cli", "__main__.py")


@pytest.mark.parametrize("file", FILES, ids=str)
def test_files_stay_readable(file: Path) -> None:
    lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{file} has {lines} lines; split it at a seam"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import trainwright.models.decoder", {"models.decoder"}),
        ("from trainwright import build, loop", {"build", "loop"}),
        ("from trainwright.models import contract", {"models.contract"}),
        ("from trainwright.models.contract import Change", {"models.contract"}),
        ("def f():\n    from trainwright.recipe import Recipe", {"recipe"}),
        ("import trainwright_of_others as t\nimport os.path", set()),
    ],
)
def test_imports_are_found(code: str, found: set[str]) -> None:
    assert ours(ast.parse(code)) == found


def test_the_table_tells_allowed_from_forbidden() -> None:
    assert rule_of("models.contract") == {"recipe", "pieces"}
    assert rule_of("adapt.lora") == {"recipe", "models.contract", "pieces", "adapt"}
    assert not any(covers(entry, "models.decoder") for entry in ALLOWED["adapt"])
    assert covers("recipe", "recipe.file")
    assert not covers("recipe", "recipes")
