"""What must hold of a run by itself, whatever it is compared with: the plain twin could have the same fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from trainwright.adapt.lora import is_factor
from trainwright.built import Built
from trainwright.models.pretrained import Source
from trainwright.recipe import Full, Lora, Partial, Recipe
from trainwright.verify.judging import Line
from trainwright.verify.tracing import BEGIN, END, Trace


def check(recipe: Recipe, built: Built, run: Trace) -> list[Line]:
    """The lines of what must hold. ``built`` is the plain model without values."""
    faults: list[tuple[str, str, Iterator[str]]] = [
        ("labels", "labels are the next tokens of their own document, positions restart with each", iter(run.faults)),
        ("what learns", "learning is what the section adapt says", _learning(recipe, run)),
        ("weight decay", "only matrices decay", _decay(recipe, run)),
        ("start of the adapter", "the adapted model begins as its base: every lora_B is zero", _adapter(recipe, run)),
        ("tied weights", "embedding and head are one tensor", _tied(built, run)),
        ("loaded weights", "what was loaded is what the file holds", _loaded(recipe, built, run)),
    ]
    return [_line(what, why, list(found)) for what, why, found in faults]


def _line(what: str, why: str, faults: list[str]) -> Line:
    if not faults:
        return Line(f"structure: {what}", "exact", why=why)
    more = f"; {len(faults) - 1} more like it" if len(faults) > 1 else ""
    return Line(f"structure: {what}", "failed", where=faults[0].split()[0], why=faults[0] + more, tensors=tuple(faults))


def _learning(recipe: Recipe, run: Trace) -> Iterator[str]:
    """Held against the section's own words, read anew."""
    parameters = [name for name in run.names(BEGIN) if name not in run.buffers]
    wanted = _wanted(recipe)
    for name in parameters:
        if (name in run.learning) != wanted(name):
            yield f"{name} {'learns' if name in run.learning else 'is frozen'}, which the section adapt doesn't say"


def _wanted(recipe: Recipe) -> Callable[[str], bool]:
    section = recipe.adapt
    if isinstance(section, Lora):
        return is_factor
    if isinstance(section, Partial):
        return lambda name: any(fnmatch(name, pattern) for pattern in section.train)
    assert isinstance(section, Full)
    return lambda name: not any(fnmatch(name, pattern) for pattern in section.freeze)


def _decay(recipe: Recipe, run: Trace) -> Iterator[str]:
    section = recipe.optimizer
    if any(group.weight_decay is not None for group in section.groups):
        return
    weights = run.tensors(BEGIN)
    for name in run.learning:
        should = section.weight_decay > 0 and weights[name].ndim >= 2
        if name in weights and (name in run.decayed) != should:
            yield f"{name} {'is shrunk by weight decay' if name in run.decayed else 'escapes weight decay'}"


def _adapter(recipe: Recipe, run: Trace) -> Iterator[str]:
    if not isinstance(recipe.adapt, Lora) or recipe.adapt.start is not None:
        return
    for name, value in run.tensors(BEGIN).items():
        if name.endswith(".lora_B") and value.any():
            yield (
                f"{name} isn't zero before the first step, so the adapted model doesn't begin as its base; "
                "draw lora_A only, and leave lora_B zero"
            )


def _tied(built: Built, run: Trace) -> Iterator[str]:
    """Two names of one parameter in the plain model are one tensor in the run."""
    names: dict[int, str] = {}
    for name, parameter in built.model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first != name and name in run.names(END):
            yield f"{name} is a tensor of its own; it should be {first}"
    config = built.config
    if config.get("tie_word_embeddings") and "lm_head.weight" in run.names(END):
        yield "lm_head.weight is a tensor of its own; the config ties it to the embedding"


def _loaded(recipe: Recipe, built: Built, run: Trace) -> Iterator[str]:
    """By other readers than ours: safetensors' own, and for GGUF transformers'."""
    if built.source is None or getattr(recipe.adapt, "start", None) is not None:
        return
    ours = run.tensors(BEGIN)
    for name, value in _file_tensors(built.source, set(ours)):
        mine = ours[name]
        if mine.shape != value.shape:
            continue  # match: overlap has said so
        if not torch.equal(mine, value.to(mine.dtype)):
            yield f"{name} isn't what {built.source.shown} holds"


def _file_tensors(source: Source, wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
    if source.kind == "gguf":
        yield from _by_transformers(source.path, wanted)
    files = sorted(source.path.glob("*.safetensors")) if source.kind == "folder" else [source.path]
    for file in files if source.kind in ("folder", "safetensors") else []:
        with safe_open(file, "pt") as opened:
            for name in sorted(wanted & set(opened.keys())):
                yield name, opened.get_tensor(name)


def _by_transformers(file: Path, wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    yield from ((name, value) for name, value in model.state_dict().items() if name in wanted)
