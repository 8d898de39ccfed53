"""What all verbs share: the app, a ``Job``, the kinds of arguments. typer parses a verb into a ``Job``; ``__main__`` does it.

NOTE: ours and torch are imported inside the jobs, and after the recipe is read: neither ``--help`` nor the report of a
mistyped key may wait for torch.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from trainwright.recipe import Recipe

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """What a verb asks for: the call, and how to show its result to a person where the call itself doesn't.

    The call gives an exit code instead of a result where other processes have told the user everything.
    """

    work: Callable[[], Result | int]
    as_json: bool
    show: Callable[[Result], None] = lambda result: None
    code: Callable[[Result], int] = lambda result: 0


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 the answer is no, 2 your input is wrong, 3 the run failed, 130 interrupted.",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe, such as recipes/docstrings.yaml")]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="the folder of a run, such as runs/docstrings")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="keys to override, such as optimizer.learning_rate=3e-4"),
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, everything else on stderr")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"trainwright {importlib.metadata.version('trainwright')}")
        raise typer.Exit


@app.callback()
def trainwright(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Train and fine-tune PyTorch models from a recipe."""


def folder_of(settings: Recipe) -> Path:
    """Where the run of a recipe lies."""
    return Path(settings.run.folder or "runs/run")


def load_recipe(path: Path, overrides: Sequence[str] | None) -> Recipe:
    from trainwright.recipe.file import load

    return load(path, overrides or ())


def run_folder(name: str) -> Path:
    """The folder of a run.

    Raises:
        InputError: it isn't one, with the nearest that is.
    """
    from trainwright.recipe import InputError, nearest

    folder = Path(name)
    if (folder / "recipe.yaml").is_file():
        return folder
    what = "has no recipe.yaml" if folder.is_dir() else "is a file" if folder.exists() else "doesn't exist"
    places = dict.fromkeys([folder, folder.parent, Path("runs")])
    runs = list(dict.fromkeys(str(file.parent) for place in places for file in sorted(place.glob("*/recipe.yaml"))))
    near = nearest(name, runs) or nearest(str(Path("runs", name)), runs)
    others = f"; runs here: {', '.join(runs[:4])}" if runs else "; trainwright train RECIPE makes one"
    raise InputError(f"{name} isn't the folder of a run: it {what}{near or others}")
