"""The verbs of the command line: argv -> Recipe -> one call. typer parses a verb into a ``Job``; ``__main__`` does it.

NOTE: ours and torch are imported inside the jobs, and after the recipe is read: neither ``--help`` nor the report of a
mistyped key may wait for torch.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    as_json: AsJson = False,
) -> Job:
    """Train what a recipe says, into its run folder. Under torchrun or accelerate launch, join their processes."""

    def work() -> Result | int:
        settings = _load(recipe, overrides)
        from trainwright import launch
        from trainwright.recipe import InputError

        if launch.joined():
            return _train_joined(settings, resume)
        if nproc is not None:
            from trainwright import launch_start

            return launch_start.run(sys.argv[1:], nproc, max_restarts=max_restarts, folder=_folder_of(settings))
        if max_restarts:
            raise InputError("--max-restarts needs --nproc; one process alone is started again with --resume")
        from trainwright import fit

        return fit.train(settings, resume=resume)

    return Job(work, as_json)


def _train_joined(settings: Recipe, resume: bool) -> Result | int:
    """As one of several processes; only the first has something to tell."""
    from trainwright import build, fit, launch

    device = build.choose_device(settings.run.device)
    folder = _folder_of(settings)
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
        settings = _load(recipe, overrides)
        from trainwright import launch_script as scripts
        from trainwright.recipe import InputError

        if slurm == torchrun:
            raise InputError("give --slurm or --torchrun, one of them")
        text = scripts.script(
            recipe,
            overrides or [],
            slurm=slurm,
            folder=_folder_of(settings),
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


@app.command()
def evaluate(
    run: RunFolder,
    split: Annotated[
        Literal["held_out", "test"] | None, typer.Option(help="which data; by default test where there is one")
    ] = None,
    as_json: AsJson = False,
) -> Job:
    """Measure a run's final model on data it wasn't trained on, and draw the results."""

    def work() -> Result:
        folder = _run_folder(run)
        from trainwright import fit

        return fit.evaluate(folder, split)

    return Job(work, as_json)


@app.command()
def predict(
    run: RunFolder,
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="images, tables, arrays, or folders of them")],
    out: Annotated[Path | None, typer.Option(help="where predicted masks go; by default RUN/predictions")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="samples at once")] = 64,
    as_json: AsJson = False,
) -> Job:
    """Let a trained model judge new images, rows or series."""

    def work() -> Result:
        folder = _run_folder(run)
        from trainwright import predict as prediction

        emit = None if as_json else lambda record: print(prediction.render(record), flush=True)
        return prediction.predict(folder, inputs, batch_size=batch_size, out=out, emit=emit)

    return Job(work, as_json)


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
        settings = _load(recipe, overrides)
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
        settings = _load(recipe, overrides)
        from trainwright import plot_schedule as plotting

        return plotting.plot_schedule(settings, steps, out)

    return Job(work, as_json, lambda result: print(f"picture: {result['picture']}"))


@app.command()
def generate(
    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help="a run, a model's folder, .gguf file or name, or an adapter's folder"),
    ],
    prompt: Annotated[str | None, typer.Option(help="what to answer; by default it is read from stdin")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="hold a conversation")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="most tokens to generate")] = 128,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="below 1 more likely, above 1 more varied", show_default="0.7")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="sample from so many of the likeliest tokens")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="sample from the likeliest tokens of this total probability")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="same seed, same text", show_default="0")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="always the likeliest token")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="continue the prompt's text, without the chat template")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="base and tuned model one after the other")] = False,
    adapter: Annotated[str | None, typer.Option(metavar="FOLDER", help="an adapter to put on TARGET")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    as_json: AsJson = False,
) -> Job:
    """Let a language model write, before or after tuning."""

    def work() -> Result:
        _refuse_idle(greedy, {"temperature": temperature, "top-k": top_k, "top-p": top_p, "seed": seed})
        asked = _prompt(prompt, chat)
        from trainwright import generate as speech
        from trainwright.sampling import Sampling

        chosen = 0.0 if greedy else 0.7 if temperature is None else temperature
        sampling = Sampling(max_tokens=max_tokens, temperature=chosen, top_k=top_k, top_p=top_p, seed=seed or 0)
        return speech.main(
            target,
            prompt=asked,
            chat=chat,
            sampling=sampling,
            raw=raw,
            compare=compare,
            adapter=adapter,
            device=device,
            quiet=as_json,
        )

    return Job(work, as_json)


@app.command()
def export(
    run: RunFolder,
    to: Annotated[
        Literal["hf", "peft", "delta", "merged"],
        typer.Option(help="hf, merged: a Hugging Face folder; peft: the adapter; delta: the tensors that were trained"),
    ],
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="where to; by default RUN/export-FORMAT")] = None,
    as_json: AsJson = False,
) -> Job:
    """Write a run's final model in a format that other tools load."""

    def work() -> Result:
        folder = _run_folder(run)
        from trainwright import export as exporting

        return exporting.export(folder, to, out)

    return Job(work, as_json, lambda result: print(f"{result['format']}: {result['folder']}"))


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="a recipe, or the folder of a run")],
    overrides: Overrides = None,
    every: Annotated[bool, typer.Option("--all", help="a row for every layer; repeated blocks aren't folded")] = False,
    as_json: AsJson = False,
) -> Job:
    """Show a model's layers, parameters, and which of them learn."""

    def work() -> Result:
        settings = _load(_run_folder(target) / "recipe.yaml" if Path(target).is_dir() else Path(target), overrides)
        from trainwright import inspect as inspection

        return inspection.inspect(settings)

    def show(result: Result) -> None:
        from trainwright import inspect as inspection

        print(inspection.render(result, every=every))

    return Job(work, as_json, show)


@app.command()
def schema(as_json: AsJson = False) -> Job:
    """Print the JSON Schema of recipes, for editors."""

    def work() -> Result:
        from trainwright.recipe import file as recipe_file

        return recipe_file.schema()

    return Job(work, as_json=True)


def _folder_of(settings: Recipe) -> Path:
    """Where the run of a recipe lies."""
    return Path(settings.run.folder or "runs/run")


def _load(path: Path, overrides: Sequence[str] | None) -> Recipe:
    from trainwright.recipe.file import load

    return load(path, overrides or ())


def _run_folder(name: str) -> Path:
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


def _refuse_idle(greedy: bool, sampling: Mapping[str, float | None]) -> None:
    """Refuse options of sampling that would have no effect."""
    from trainwright.recipe import InputError

    if greedy or sampling["temperature"] == 0:
        cause = "--greedy" if greedy else "--temperature 0"
        idle = [f"--{name}" for name, value in sampling.items() if value is not None and f"--{name} 0" != cause]
        if idle:
            raise InputError(f"{cause} always takes the likeliest token, so {', '.join(idle)} would have no effect")


def _prompt(given: str | None, chat: bool) -> str | None:
    """The prompt, from stdin where none was given; none for a chat."""
    from trainwright.recipe import InputError

    if chat and given is not None:
        raise InputError("give --prompt or --chat, not both")
    if chat or given is not None:
        return given
    if sys.stdin.isatty():
        raise InputError("give --prompt TEXT or --chat, or a prompt on stdin")
    return sys.stdin.read()
