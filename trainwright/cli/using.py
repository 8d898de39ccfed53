"""Verbs about what was trained, or is about to be."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from trainwright.cli.base import AsJson, Job, Overrides, Result, RunFolder, app, load_recipe, run_folder

if TYPE_CHECKING:
    pass


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
        folder = run_folder(run)
        from trainwright import evaluation

        return evaluation.evaluate(folder, split)

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
        folder = run_folder(run)
        from trainwright import predict as prediction

        emit = None if as_json else lambda record: print(prediction.render(record), flush=True)
        return prediction.predict(folder, inputs, batch_size=batch_size, out=out, emit=emit)

    return Job(work, as_json)


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
        folder = run_folder(run)
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
        settings = load_recipe(run_folder(target) / "recipe.yaml" if Path(target).is_dir() else Path(target), overrides)
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
