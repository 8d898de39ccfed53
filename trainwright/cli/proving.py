"""The verb that proves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from trainwright.cli.base import AsJson, Job, Overrides, Result, app, load_recipe, run_folder


@app.command()
def verify(
    target: Annotated[
        str | None, typer.Argument(metavar="RECIPE|RUN", help="a recipe, or the folder of a run; neither with --matrix")
    ] = None,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="processes, as for train; by default what the section parallel needs")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="optimizer steps that are compared")] = 3,
    layers: Annotated[int | None, typer.Option(min=1, help="reduce a decoder to so many blocks")] = None,
    width: Annotated[int | None, typer.Option(min=2, help="reduce a decoder to this hidden size")] = None,
    no_reduce: Annotated[bool, typer.Option("--no-reduce", help="run the recipe's own model and batch")] = False,
    against: Annotated[
        Literal["hf", "torch"] | None,
        typer.Option(help="compare with Hugging Face's Trainer, or a plain PyTorch loop, instead of our own plain run"),
    ] = None,
    prepare: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="a change of your own to the built run, to be proved")
    ] = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="all pairs of techniques; writes docs/compatibility.md")] = False,
    small: Annotated[bool, typer.Option("--small", help="with --matrix: fewer combinations")] = False,
    out: Annotated[Path, typer.Option(help="with --matrix: where results are kept, so that it can go on")] = Path(
        "runs/matrix"
    ),
    as_json: AsJson = False,
) -> Job:
    """Prove that a recipe's techniques compute what the plain run computes, or name the culprit.

    The recipe runs a few steps, and so does its plain twin: one process, no technique, once in the recipe's precision and once
    in float64. Every loss, gradient and weight is compared. Of a finished run, its first steps are taken again.
    """

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def work() -> Result:
        from trainwright.launch import pool
        from trainwright.recipe import InputError

        if matrix:
            if target is not None:
                raise InputError(f"--matrix has recipes of its own; leave {target} out")
            pool.warm()
            return _matrix(out, small, say)
        if target is None:
            raise InputError("give a recipe, the folder of a run, or --matrix")
        if Path(target).is_dir():
            from trainwright.verify import command

            return command.again(run_folder(target), steps, nproc)
        recipe = load_recipe(Path(target), overrides)
        if recipe.parallel.model_fields_set or nproc not in (None, 1):
            pool.warm()  # before this process imports as much itself
        from trainwright.verify import command

        options = command.Options(nproc, steps, layers, width, not no_reduce, against, prepare)
        return command.verify(recipe, options, say).plain()

    return Job(work, as_json, lambda result: _show(result, matrix), lambda result: 0 if result.get("verified", True) else 1)


def _matrix(out: Path, small: bool, say: Callable[[str], None]) -> Result:
    from trainwright.verify import matrix, page

    result = matrix.run(out, small=small, say=say)
    file = out / "compatibility.md"
    file.write_text(page.render(result), encoding="utf-8")
    return {**result.counts(), "verified": result.good, "page": str(file)}


def _show(result: Result, matrix: bool) -> None:
    from trainwright.verify import show

    if not matrix:
        show.show(result)
        return
    for name, value in result.items():
        print(f"{name:14} {value}")
