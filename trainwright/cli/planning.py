"""The verb that tells the price before the run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trainwright.cli.base import AsJson, Job, Overrides, RecipeFile, Result, app, load_recipe


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    device: Annotated[
        str | None,
        typer.Option(help="such as h100, a100-40gb, rtx4090, mi300x, m3max; by default this machine"),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="devices; by default what the section parallel needs")] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="memory of one device, such as 24GiB; by default memory.budget")
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="try techniques in all combinations; print those that no other beats, and draw them")
    ] = False,
    choose: Annotated[
        bool, typer.Option("--choose", help="with --budget: the fastest keys that fit, of those that compute the same")
    ] = False,
    out: Annotated[Path, typer.Option(help="with --sweep: the folder of plan.html, .png and .json")] = Path("runs/plan"),
    as_json: AsJson = False,
) -> Job:
    """What a recipe's step takes: memory, time, work and messages, by its real program on tensors without values.

    Nothing is trained. The exit code is 1 where it doesn't fit into the device's memory, or the budget.
    """

    def work() -> Result:
        settings = load_recipe(recipe, overrides)
        room = _room(settings.memory.budget if budget is None else budget)
        from trainwright.plan import command
        from trainwright.recipe import InputError

        options = command.Options(device, count, room)
        if choose:
            if room is None:
                raise InputError("--choose needs --budget SIZE, such as --budget 3GiB, or the key memory.budget")
            from trainwright.plan.budget import choose as chosen_of

            return chosen_of(settings, room, options, _tell).as_json()
        if sweep:
            from trainwright.plan.sweep import sweep as try_all

            return try_all(settings, options, out, _tell).as_json()
        planned = command.plan(settings, options, say=_tell)
        shown.append(planned)
        return planned.as_json()

    def show(result: Result) -> None:
        from trainwright.plan import show
        from trainwright.plan.pareto import Choice

        for planned in shown:
            show.show_planned(planned)
        if choose:
            print(result["reason"], *(f"  {key}={value}" for key, value in result["keys"].items()), sep="\n")
        if sweep and not choose:
            front = [Choice(**one) for one in result["front"]]
            show.show_front(front, result["tried"], result["unit"], result["budget"])
            print(*result["files"], sep="\n")

    shown: list[Any] = []
    return Job(work, as_json, show, lambda result: 0 if result["fits"] else 1)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _room(budget: str | int | None) -> int | None:
    from trainwright.recipe import InputError
    from trainwright.recipe.sizes import bytes_of

    try:
        return None if budget is None else bytes_of(budget)
    except ValueError as error:
        raise InputError(f"--budget: {error}") from None
