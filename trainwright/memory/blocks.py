"""Which modules of a model are its blocks: the units that are checkpointed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from trainwright.models.contract import match, present
from trainwright.recipe import InputError

CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # which have no forward


def find(model: nn.Module, patterns: Sequence[str] | None, what: str) -> dict[str, nn.Module]:
    """The blocks that this process has, by name, in the model's order; none lies inside of another.

    Args:
        patterns: names of modules; None: the model's ``blocks()``, else its largest repeated parts.
        what: the key of the recipe, for messages.

    Raises:
        InputError: a pattern that matches nothing, or no repeated parts.
    """
    found = _named(model, patterns, what) if patterns is not None else _own(model) or _repeated(model)
    if not found:
        raise InputError(
            f"{what}: this {type(model).__name__} has no blocks(), and no nn.ModuleList or nn.Sequential with parts of one "
            f"class; name its blocks, such as {what}: ['{next((name for name, _ in model.named_children()), 'layers')}*']"
        )
    here = present(found.values())
    return {name: block for name, block in found.items() if block in here and any(True for _ in block.parameters())}


def _named(model: nn.Module, patterns: Sequence[str], what: str) -> dict[str, nn.Module]:
    modules = {name: module for name, module in model.named_modules() if name and not isinstance(module, CONTAINERS)}
    chosen = match(patterns, modules, what)
    inner = {name for name in chosen for other in chosen if name.startswith(f"{other}.")}
    return {name: modules[name] for name in chosen if name not in inner}


def _own(model: nn.Module) -> dict[str, nn.Module]:
    """What the model says itself; a block needs no name of its own there."""
    blocks: Callable[[], Sequence[nn.Module]] | None = getattr(model, "blocks", None)
    names = {module: name for name, module in model.named_modules()}
    return {names.get(block, f"blocks()[{place}]"): block for place, block in enumerate(blocks() if blocks else ())}


def _repeated(model: nn.Module) -> dict[str, nn.Module]:
    """Of all containers the parts of one class, made of several modules, that hold the most parameters."""
    candidates: list[dict[str, nn.Module]] = []
    for prefix, container in model.named_modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential):
            continue
        parts = {f"{prefix}.{name}".lstrip("."): part for name, part in container.named_children()}
        for kind in {type(part) for part in parts.values()}:
            alike = {name: part for name, part in parts.items() if type(part) is kind and any(True for _ in part.children())}
            candidates += [alike] if len(alike) > 1 else []
    return max(candidates, key=lambda parts: sum(p.numel() for part in parts.values() for p in part.parameters()), default={})
