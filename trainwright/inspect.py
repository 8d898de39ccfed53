"""Anatomy of a model: which layers, how many parameters, which of them learn, in which dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from trainwright import build
from trainwright.recipe import Recipe


@dataclass(frozen=True)
class Layer:
    """A module with parameters of its own, or without modules inside. What is tied counts where it comes first."""

    name: str
    type: str
    parameters: int
    trainable: int
    bytes: int
    dtype: str  # of its parameters, tied ones included: "float32", "bfloat16 + float32", or ""
    tied: str = ""  # the parameter that this one's is the same as
    copies: int = 1  # above 1 where ``fold`` made one row of several layers; the numbers are those of all together


def inspect(recipe: Recipe) -> dict[str, Any]:
    """The layers, totals and changes of a recipe's model; no weights are read.

    Raises:
        InputError: a recipe whose model can't be made.
    """
    # NOTE: the recipe's own device and not "meta", because `precision: auto` depends on it.
    built = build.assemble_model(recipe, build.shape_of(recipe))
    layers = table(built.model)
    return {
        "layers": [asdict(layer) for layer in layers],
        "totals": totals(layers),
        "changes": [asdict(change) for change in built.changes],
    }


def table(model: nn.Module) -> list[Layer]:
    """A row for each layer, in the order of the modules."""
    first: dict[int, str] = {}  # where a parameter was met first
    return [
        _layer(name, module, first)
        for name, module in model.named_modules()
        if next(module.children(), None) is None or next(module.parameters(recurse=False), None) is not None
    ]


def _layer(name: str, module: nn.Module, first: dict[int, str]) -> Layer:
    own = {f"{name}.{key}".lstrip("."): p for key, p in module.named_parameters(recurse=False)}
    new = [p for path, p in own.items() if first.setdefault(id(p), path) == path]
    return Layer(
        name=name,
        type=type(module).__name__,
        parameters=sum(p.numel() for p in new),
        trainable=sum(p.numel() for p in new if p.requires_grad),
        bytes=sum(p.numel() * p.element_size() for p in new),
        dtype=" + ".join(dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in own.values())),
        tied=", ".join(first[id(p)] for path, p in own.items() if first[id(p)] != path),
    )


def totals(layers: Sequence[Layer]) -> dict[str, float]:
    """Sums over all layers: parameters, trainable ones (also in percent), and bytes of parameters."""
    parameters, trainable = (sum(getattr(layer, key) for layer in layers) for key in ("parameters", "trainable"))
    return {
        "parameters": parameters,
        "trainable": trainable,
        "trainable_percent": 100 * trainable / parameters if parameters else 0.0,
        "bytes": sum(layer.bytes for layer in layers),
    }


def fold(layers: Sequence[Layer], depth: int = 0) -> list[Layer]:
    """One row for layers that only differ by their number at some depth: ``layers.0.norm``, ``layers.1.norm``, ..."""
    folded: list[list[Layer]] = []
    for block in _blocks(layers, depth):
        joined = _join(folded[-1], block, depth) if folded else None
        if joined is None:
            folded.append(block)
        else:
            folded[-1] = joined
    return [layer for block in folded for layer in block]


def _blocks(layers: Sequence[Layer], depth: int) -> Iterator[list[Layer]]:
    """The layers that share their names down to ``depth``, folded inside."""
    for _, group in groupby(layers, key=lambda layer: layer.name.split(".")[: depth + 1]):
        block = list(group)
        deeper = any(layer.name.count(".") > depth for layer in block)
        yield fold(block, depth + 1) if deeper else block


def _join(above: list[Layer], below: list[Layer], depth: int) -> list[Layer] | None:
    """Two neighbouring blocks as one, if the second continues the first's numbers and is like it otherwise."""
    start, end = _numbers(above[0], depth)
    if end is None or _numbers(below[0], depth) != (end + 1, end + 1):
        return None
    count = end - start + 1
    if [_shape(layer, depth, count) for layer in above] != [_shape(layer, depth, 1) for layer in below]:
        return None
    return [_sum(a, b, depth, f"{start}-{end + 1}") for a, b in zip(above, below, strict=True)]


def _numbers(layer: Layer, depth: int) -> tuple[int, int] | tuple[int, None]:
    """(3, 3) for ``layers.3``, (0, 29) for ``layers.0-29``, (0, None) for a name without number at that depth."""
    parts = layer.name.split(".")
    start, _, end = parts[depth].partition("-") if len(parts) > depth else ("", "", "")
    return (int(start), int(end or start)) if start.isdecimal() and (end or start).isdecimal() else (0, None)


def _shape(layer: Layer, depth: int, count: int) -> tuple[object, ...]:
    """What must agree between repeated layers, for one of ``count``."""
    parts = layer.name.split(".")
    numbers = tuple(n / count for n in (layer.parameters, layer.trainable, layer.bytes, layer.copies))
    return parts[:depth], parts[depth + 1 :], layer.type, layer.dtype, layer.tied, numbers


def _sum(a: Layer, b: Layer, depth: int, numbers: str) -> Layer:
    parts = a.name.split(".")
    added = {key: getattr(a, key) + getattr(b, key) for key in ("parameters", "trainable", "bytes", "copies")}
    return replace(a, name=".".join([*parts[:depth], numbers, *parts[depth + 1 :]]), **added)


def render(result: Mapping[str, Any], *, every: bool = False) -> str:
    """What ``inspect`` found, as text for stdout; without ``every``, repeated blocks are folded."""
    layers = [Layer(**row) for row in result["layers"]]
    sheet = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("layer", "type", "", "parameters", "trainable", "dtype", ""):
        sheet.add_column(heading, justify="right" if heading in ("parameters", "trainable") else "left")
    for layer in layers if every else fold(layers):
        sheet.add_row(*_cells(layer))
    console = Console(highlight=False)
    # As wide as it has to be: a name that is cut can't be copied into a pattern.
    console.width = max(console.width, console.measure(sheet, options=console.options.update(max_width=10_000)).maximum)
    with console.capture() as text:
        console.print(sheet)
        for change in result["changes"]:
            console.print(f"{change['technique']}: {change['summary']}", markup=False, soft_wrap=True)
        console.print(_summary(result["totals"]), style="bold", soft_wrap=True)
    return "\n".join(line.rstrip() for line in text.get().splitlines())


def _summary(sums: Mapping[str, Any]) -> str:
    return (
        f"{sums['parameters']:,} parameters in {sums['bytes'] / 1e6:,.1f} MB, "
        f"{sums['trainable']:,} of them trainable ({sums['trainable_percent']:.2f}%)"
    )


def _cells(layer: Layer) -> tuple[str, ...]:
    """A row of the printed table."""
    return (
        layer.name or "(the model)",
        layer.type,
        f"x{layer.copies}" if layer.copies > 1 else "",
        f"{layer.parameters:,}" if layer.parameters else "",
        f"{layer.trainable:,}" if layer.trainable else "",
        layer.dtype,
        f"same as {layer.tied}" if layer.tied else "",
    )
