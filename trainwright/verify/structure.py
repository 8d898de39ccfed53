"""What must hold of a run by itself, whatever it is compared with: the plain twin could have the same fault."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from itertools import combinations
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from trainwright.adapt.lora import is_factor
from trainwright.built import Built
from trainwright.ema import UPDATES
from trainwright.memory import supplied
from trainwright.models.pretrained import Source
from trainwright.recipe import Full, Lora, Partial, Recipe, TextData
from trainwright.verify.job import Job
from trainwright.verify.judging import Line
from trainwright.verify.tracing import AVERAGE, BEGIN, END, SAVED, Trace

CLIPPED = 1e-2  # relative


def check(job: Job, built: Built, run: Trace) -> list[Line]:
    """The lines of what must hold. ``built`` is the plain model without values."""
    recipe = job.recipe
    text = isinstance(recipe.data, TextData)
    fresh = isinstance(recipe.adapt, Lora) and recipe.adapt.start is None
    groups = any(group.weight_decay is not None for group in recipe.optimizer.groups)
    tied = bool(built.config.get("tie_word_embeddings"))
    loaded = built.source is not None and getattr(recipe.adapt, "start", None) is None
    clips = recipe.training.clip_norm is not None and bool(run.clipped)
    checks: list[tuple[str, str, bool, Iterator[str]]] = [
        ("labels", "the next tokens of their own document; positions restart with each", text, iter(run.faults)),
        ("clipping", "no longer than training.clip_norm when it is used", clips, _clipped(recipe, run)),
        ("random numbers", "others for other data, the same for parts of a product", len(run.draws) > 1, _draws(recipe, run)),
        ("what learns", "what the section adapt says", True, _learning(recipe, run)),
        ("weight decay", "of matrices only", not groups, _decay(recipe, run)),
        ("start of the adapter", "every lora_B is zero, so that the model begins as its base", fresh, _adapter(run)),
        ("tied weights", "embedding and head are one tensor", tied, _tied(run)),
        ("loaded weights", "what the file holds", loaded, _loaded(job, built, run)),
        ("saved model", "everything that a reader needs, as it was after the last step", True, _saved(recipe, run)),
    ]
    return [_line(what, why, list(found)) for what, why, applies, found in checks if applies]


def _clipped(recipe: Recipe, run: Trace) -> Iterator[str]:
    largest = recipe.training.clip_norm or math.inf
    for step, norm in enumerate(run.clipped, 1):
        if norm > largest * (1 + CLIPPED):
            yield f"step {step} uses a gradient of norm {norm:.4g}, though training.clip_norm is {largest:g}"


def _draws(recipe: Recipe, run: Trace) -> Iterator[str]:
    for (one, mine), (other, theirs) in combinations(enumerate(run.draws), 2):
        alike = one // recipe.parallel.tensor == other // recipe.parallel.tensor
        if (mine == theirs) != alike:
            what = "draw the same random numbers for other data" if mine == theirs else "draw others for one product"
            yield f"ranks {one} and {other} {what}"


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
    weights = run.tensors(BEGIN)
    for name in run.learning:
        should = section.weight_decay > 0 and weights[name].ndim >= 2
        if name in weights and (name in run.decayed) != should:
            yield f"{name} {'is shrunk by weight decay' if name in run.decayed else 'escapes weight decay'}"


def _adapter(run: Trace) -> Iterator[str]:
    for name, value in run.tensors(BEGIN).items():
        if name.endswith(".lora_B") and value.any():
            yield (
                f"{name} isn't zero before the first step, so the adapted model doesn't begin as its base; "
                "draw lora_A only, and leave lora_B zero"
            )


def _tied(run: Trace) -> Iterator[str]:
    if "lm_head.weight" in run.names(END):
        yield "lm_head.weight is a tensor of its own; the config ties it to the embedding"


def _loaded(job: Job, built: Built, run: Trace) -> Iterator[str]:
    """By other readers than ours: safetensors' own, and for GGUF transformers'. Those in 4 bits are the plain run's."""
    assert built.source is not None
    ours = run.tensors(BEGIN)
    if job.rounded or getattr(job.recipe.adapt, "base", "") == "4bit":
        packed = {f"{name}.weight" for name in supplied.layers(built.model, None, "adapt.base")}
        ours = {name: value for name, value in ours.items() if name not in packed}
    for name, value in _file_tensors(built.source, set(ours)):
        mine = ours[name]
        if mine.shape != value.shape:
            continue  # match: overlap has said so
        if not torch.equal(mine, value.to(mine.dtype)):
            yield f"{name} isn't what {built.source.shown} holds"


def _saved(recipe: Recipe, run: Trace) -> Iterator[str]:
    """What is saved: everything, or what learns where the base has the rest; averages in the stead of weights."""
    averages = {name: value for name, value in run.tensors(AVERAGE).items() if name != UPDATES}
    wanted = {**run.tensors(END), **averages}
    if not isinstance(recipe.adapt, Full):
        wanted = {name: value for name, value in wanted.items() if name in run.learning}
    saved = {_plain_name(name): value for name, value in run.tensors(SAVED).items()}
    for name in sorted({*wanted, *saved}):
        if name not in saved:
            yield f"{name} isn't in the saved model"
        elif name not in wanted:
            yield f"{name} is in the saved model, but not in the trained one"
        elif not torch.equal(saved[name], wanted[name].to(saved[name].dtype)):
            yield f"{name} is saved with other values than it had after the last step"


def _plain_name(saved: str) -> str:
    """PEFT's names of factors as ours."""
    return saved.removeprefix("base_model.model.").replace(".lora_A.weight", ".lora_A").replace(".lora_B.weight", ".lora_B")


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
