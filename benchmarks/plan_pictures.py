"""The trade-off tables and pictures of three recipes, with measured points: docs/plan-examples.md.

    python -m benchmarks.plan_pictures [--recipes recipes/docstrings.yaml ...] [--points 3]

Each measured point is a run of its own process: the peak by PyTorch's profiler, the time as the fastest of some steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainwright.plan import command, page, show, sweep
from trainwright.plan.pareto import Choice
from trainwright.recipe import Recipe
from trainwright.recipe.file import changed, dump, load

RECIPES = ["recipes/docstrings.yaml", "recipes/docstrings-full.yaml", "recipes/fashion-cnn.yaml"]
PAGE, PICTURES = Path("docs/plan-examples.md"), Path("docs/pictures")
DISK = "optimizer offload"  # its time depends on the drive, so that it isn't measured here


def keys_of(choice: Choice) -> dict[str, Any]:
    """The keys of a choice, from its settings."""
    names = {
        "precision": "precision",
        "checkpointing": "memory.checkpointing",
        "every": "memory.every",
        "micro-batch": "training.micro_batch_size",
        "optimizer states": "memory.optimizer_states",
    }
    keys: dict[str, Any] = {names[name]: value for name, value in choice.settings.items() if name in names}
    keys |= {key: int(keys[key]) for key in ("training.micro_batch_size", "memory.every") if key in keys}
    methods = {"lora": {"method": "lora", "rank": 16}, "full": {"method": "full"}}
    return keys | ({"adapt": methods[choice.settings["adapt"]]} if "adapt" in choice.settings else {})


def measured(recipe: Recipe, choice: Choice) -> Choice:
    """The same choice with the peak and the time of real steps."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(dump(changed(recipe, keys_of(choice))))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.plan_pictures", "--measure", str(file)], stdout=subprocess.PIPE
        )
    found = json.loads(done.stdout.splitlines()[-1])
    rate = choice.units_per_second * choice.seconds / found["seconds"]
    return replace(choice, bytes=found["bytes"], seconds=found["seconds"], units_per_second=rate)


def spread(front: list[Choice], count: int) -> list[Choice]:
    """Some of a front, from one end to the other."""
    usable = [choice for choice in front if DISK not in choice.settings]
    places = {round(place * (len(usable) - 1) / max(1, count - 1)) for place in range(count)}
    return [usable[place] for place in sorted(places)]


def section(file: str, count: int) -> str:
    """Sweep one recipe, measure some points, draw them; what the page says of it."""
    recipe, name = load(file), Path(file).stem
    with tempfile.TemporaryDirectory() as folder:
        found = sweep.sweep(recipe, command.Options(), Path(folder), lambda text: print(text, file=sys.stderr))
    points = [measured(recipe, choice) for choice in spread(found.front, count)]
    picture = PICTURES / f"plan-{name}.png"
    page.write_picture(picture, found.choices, f"{name} on this CPU", found.unit, points)
    real = {choice.name: choice for choice in points}
    lines = [
        f"## {name}",
        f"`trainwright plan {file} --sweep`: {len(found.front)} of {len(found.choices)} combinations are beaten by none.",
        "",
        f"| memory | measured | {found.unit}/s | measured | accuracy | settings |",
        "|---|---|---|---|---|---|",
    ]
    for choice in found.front:
        one = real.get(choice.name)
        memory, rate = (show.size(one.bytes), f"{one.units_per_second:,.4g}") if one else ("", "")
        row = [show.size(choice.bytes), memory, f"{choice.units_per_second:,.4g}", rate, choice.accuracy, choice.name]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, "", f"![memory and speed of all combinations](pictures/{picture.name})", ""])


def measure(file: str) -> None:
    """Print the peak and the seconds of a recipe's steps."""
    from benchmarks.plan import peak_of, seconds_of

    recipe = load(file)
    print(json.dumps({"bytes": peak_of(recipe), "seconds": seconds_of(recipe)}))


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--points", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    from benchmarks.plan_page import here

    head = f"# Trade-offs of recipes\n\nBy `python -m benchmarks.plan_pictures`, {here()}. Crosses are measured.\n"
    fresh = {Path(file).stem: section(file, options.points) for file in options.recipes}
    PAGE.write_text("\n".join([head, *(kept() | fresh).values()]), encoding="utf-8")


def kept() -> dict[str, str]:
    """The page's sections by their recipes, as they are."""
    parts = PAGE.read_text(encoding="utf-8").split("\n## ")[1:] if PAGE.exists() else []
    return {part.partition("\n")[0]: f"## {part.rstrip()}\n" for part in parts}


if __name__ == "__main__":
    main()
