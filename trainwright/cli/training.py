"""Verbs that train, or prepare it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainwright.cli.base import AsJson, Job, Overrides, RecipeFile, Result, app, folder_of, load_recipe

if TYPE_CHECKING:
    from trainwright.recipe import Recipe


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run's newest checkpoint")] = False,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="processes on this machine, which share the work as the section parallel says")
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="with --nproc: how often to go on from the last checkpoint after a failure")
    ] = 0,
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="stay within so much memory, such as 3GiB; sets memory.budget")
    ] = None,
    as_json: AsJson = False,
) -> Job:
    """Train what a recipe says, into its run folder. Under torchrun or accelerate launch, join their processes."""

    from trainwright import launch

    def work() -> Result | int:
        settings = load_recipe(recipe, [*(overrides or []), *([f"memory.budget={budget}"] if budget else [])])
        from trainwright.recipe import InputError

        if launch.joined():
            return _train_joined(settings, resume)
        if nproc is not None:
            return launch.run(sys.argv[1:], nproc, max_restarts=max_restarts, folder=folder_of(settings))
        if max_restarts:
            raise InputError("--max-restarts needs --nproc; one process alone is started again with --resume")
        from trainwright import fit

        return fit.train(settings, resume=resume)

    # The processes that are started here print their document themselves.
    return Job(work, as_json and (nproc is None or launch.joined()))


def _train_joined(settings: Recipe, resume: bool) -> Result | int:
    """As one of several processes; only the first has something to tell."""
    from trainwright import build, fit, launch

    device = build.choose_device(settings.run.device)
    folder = folder_of(settings)
    with launch.processes(device):
        launch.log_to(folder)
        result = fit.train(settings, resume=resume or launch.restarted(folder), rank=launch.rank())
    return result if launch.rank() == 0 else 0


@app.command("launch-script")
def launch_script(
    recipe: RecipeFile,
    overrides: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="a batch script for sbatch")] = False,
    torchrun: Annotated[bool, typer.Option("--torchrun", help="the command for each machine")] = False,
    nodes: Annotated[int, typer.Option(min=1, help="machines")] = 1,
    nproc: Annotated[int, typer.Option(min=1, help="processes on each machine, one for each GPU")] = 1,
    time: Annotated[str | None, typer.Option(help="with --slurm: the limit, such as 12:00:00 or 2-00")] = None,
    gpus: Annotated[bool, typer.Option("--gpus", help="with --slurm: ask for a GPU for each process")] = False,
    max_restarts: Annotated[int, typer.Option(min=0, help="how often to go on after a failure")] = 3,
    as_json: AsJson = False,
) -> Job:
    """Print a script that trains on several machines."""

    def work() -> Result:
        settings = load_recipe(recipe, overrides)
        from trainwright.launch import script as scripts
        from trainwright.recipe import InputError

        if slurm == torchrun:
            raise InputError("give --slurm or --torchrun, one of them")
        text = scripts.script(
            recipe,
            overrides or [],
            slurm=slurm,
            folder=folder_of(settings),
            nodes=nodes,
            nproc=nproc,
            time=time,
            gpus=gpus,
            max_restarts=max_restarts,
        )
        return {"script": text}

    return Job(work, as_json, lambda result: print(result["script"], end=""))


@app.command("import")
def import_files(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="deepspeed.json, accelerate's YAML, Hugging Face's TrainingArguments"),
    ],
    model: Annotated[
        str | None, typer.Option(help="model.pretrained of the recipe: a hub name, a folder, smollm2-135m")
    ] = None,
    data: Annotated[str | None, typer.Option(help="data.source of the recipe")] = None,
    as_json: AsJson = False,
) -> Job:
    """Turn other tools' configurations into a recipe, with every setting that would mislead pointed out.

    Ends with 2 where the files contradict each other; the recipe is printed all the same.
    """

    def work() -> Result:
        from trainwright.importing import read, render

        found = read.read(files, model=model, data=data)
        told = [finding for finding in found.findings if finding.level != "note"]
        for finding in told:
            print(finding, file=sys.stderr)
        return {**asdict(found), "yaml": render.render(found)}

    def code(result: Result) -> int:
        return 2 if any(finding["level"] == "error" for finding in result["findings"]) else 0

    return Job(work, as_json, lambda result: print(result["yaml"], end=""), code)


@app.command("find-lr")
def find_lr(
    recipe: RecipeFile,
    overrides: Overrides = None,
    start: Annotated[float, typer.Option(help="the first learning rate")] = 1e-7,
    end: Annotated[float, typer.Option(help="the last one, unless the loss explodes before")] = 10.0,
    steps: Annotated[int, typer.Option(min=20, help="how many rates between them")] = 100,
    out: Annotated[Path, typer.Option(metavar="FILE", help="the picture")] = Path("find-lr.png"),
    as_json: AsJson = False,
) -> Job:
    """Try rising learning rates, draw the losses, and suggest a rate."""

    def work() -> Result:
        settings = load_recipe(recipe, overrides)
        from trainwright import find_lr as finding

        return finding.main(settings, start=start, end=end, steps=steps, out=out)

    def show(result: Result) -> None:
        print(f"suggested: {result['suggestion']:.2g}" if result["suggestion"] else "no rate makes the loss fall")
        print(f"picture:   {result['picture']}")

    return Job(work, as_json, show)


@app.command("plot-schedule")
def plot_schedule(
    recipe: RecipeFile,
    overrides: Overrides = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="of the run; else the data is read where epochs say how long")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="the picture")] = Path("schedule.png"),
    as_json: AsJson = False,
) -> Job:
    """Draw the learning rate over the steps."""

    def work() -> Result:
        settings = load_recipe(recipe, overrides)
        from trainwright import plot_schedule as plotting

        return plotting.plot_schedule(settings, steps, out)

    return Job(work, as_json, lambda result: print(f"picture: {result['picture']}"))
