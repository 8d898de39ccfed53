"""A plain PyTorch training loop, the naive oracle: the whole batch at once, torch's losses, clipping and optimizers.

Nothing of the product's loop, losses, optimizer groups, schedules or batching is used. What is taken from it is data: the
model's first weights, the tokenised documents or samples, and which rows a step trains on.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trainwright.recipe import Constant, Cosine, InputError, Linear, Recipe, TorchOptimizer
from trainwright.recipe.learning import Optimizer
from trainwright.verify.batches import BITS
from trainwright.verify.tracing import AVERAGE, BEGIN, END, FIRST, LAST, SCALARS, TENSORS, Trace, load

Rate = Callable[[int], float]
OPTIMIZERS = {
    "adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "rmsprop": "RMSprop", "adagrad": "Adagrad", "adadelta": "Adadelta",
}  # fmt: skip
KNOWN_RATES = "constant, linear and cosine"


@dataclass(frozen=True)
class Work:
    """What is trained, and on what.

    forward   of a step's whole batch the outputs (n, classes, ...) and the targets that the loss compares them with
    loss      of these, their mean
    rows      the numbers of a step's rows, as ``batches`` counts them
    counted   how many targets a step has
    held_out  the loss of the held-out data, or None
    """

    model: nn.Module
    forward: Callable[[int], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    rows: Callable[[int], Iterable[int]]
    counted: Callable[[int], int]
    held_out: Callable[[], float] | None = None
    steps_in_all: int = 1


@dataclass
class Kept:
    """What a twin leaves, in the format of ``tracing``."""

    model: nn.Module
    tensors: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def values(self, what: str, values: Mapping[str, Tensor]) -> None:
        """Copies of tensors of a kind."""
        self.tensors |= {f"{what}/{name}": value.detach().clone().contiguous() for name, value in values.items()}

    def weights(self, what: str) -> None:
        self.values(what, state(self.model))

    def gradients(self, what: str) -> None:
        self.values(what, {name: p.grad for name, p in learning(self.model).items() if p.grad is not None})

    def leave(self, folder: Path, work: Work, held_out: Mapping[str, float], notes: Sequence[str] = ()) -> Trace:
        """Write the files, and read them."""
        folder.mkdir(parents=True, exist_ok=True)
        steps = range(len(self.losses))
        found = {
            "losses": self.losses,
            "norms": self.norms,
            "rates": self.rates,
            "faults": [],
            "supervised": [work.counted(step) for step in steps],
            "rows": [sum(work.rows(step)) for step in steps],
            "held_out": dict(held_out),
            "buffers": sorted(state(self.model).keys() - {plain_name(n) for n, _ in self.model.named_parameters()}),
            "learning": sorted(learning(self.model)),
            "decayed": [],
            "notes": list(notes),
        }
        save_file(self.tensors, folder / TENSORS)
        (folder / SCALARS).write_text(json.dumps(found), encoding="utf-8")
        return load(folder)


def train(work: Work, recipe: Recipe, steps: int, folder: Path) -> Trace:
    """Take the first steps; leaves its trace in ``folder``.

    Raises:
        InputError: a schedule, a loss or an optimizer that this loop doesn't know.
    """
    model, kept = work.model, Kept(work.model)
    average = Averages(model, recipe)
    optimizer = make_optimizer(model, recipe.optimizer)
    rate = rates(recipe, work.steps_in_all)
    kept.weights(BEGIN)
    for step in range(steps):
        in_training(model)
        loss = work.loss(*work.forward(step))
        loss.backward()
        if step == 0:
            kept.gradients(FIRST)
        if step == steps - 1:
            kept.gradients(LAST)
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.training.clip_norm or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(step)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        kept.losses.append(loss.item())
        kept.norms.append(norm.item())
        kept.rates.append(optimizer.param_groups[0]["lr"])
    kept.weights(END)
    kept.values(AVERAGE, average.tensors())
    average.use()
    model.eval()
    return kept.leave(folder, work, {"loss": work.held_out()} if work.held_out else {})


def in_training(model: nn.Module) -> None:
    """Training mode, but for BatchNorm of which nothing learns."""
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and own and not any(p.requires_grad for p in own):
            module.eval()


def plain_name(name: str) -> str:
    """PEFT's name of a parameter as the plain model's, factors as ``lora_A`` and ``lora_B`` of the layer."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return name.replace(".lora_A.default.weight", ".lora_A").replace(".lora_B.default.weight", ".lora_B")


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by plain names, tied ones once."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not any(value is other for other in found.values()):
            found[plain_name(name)] = value
    return found


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """What learns, by plain names."""
    return {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether any of the patterns matches."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def number_of(*tensors: Tensor) -> int:
    """A row's or document's number, as ``batches`` has it."""
    digest = hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors))
    return int.from_bytes(digest.digest()[: BITS // 8], "big")


def rates(recipe: Recipe, steps: int) -> Rate:
    """The factor of each step's learning rate; the last step of the warmup is the first with the peak.

    Raises:
        InputError: another schedule than constant, linear and cosine.
    """
    section = recipe.schedule
    warmup = round(section.warmup * steps) if section.warmup < 1 else int(section.warmup)
    falls: dict[type, Callable[[float, float], float]] = {
        Constant: lambda part, final: 1.0,
        Linear: lambda part, final: 1.0 - (1.0 - final) * part,
        Cosine: lambda part, final: final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * part)),
    }
    if type(section) not in falls:
        raise InputError(
            f"schedule.name: {section.name} isn't written anew in the external twin, which knows {KNOWN_RATES}; "
            "add schedule.name=cosine for this proof"
        )
    fall, final = falls[type(section)], getattr(section, "final", 0.0)

    def rate(step: int) -> float:
        return (step + 1) / warmup if step < warmup else fall((step - warmup) / (steps - warmup), final)

    return rate


def make_optimizer(model: nn.Module, section: Optimizer) -> torch.optim.Optimizer:
    """torch's, with decay on matrices only and the recipe's groups; each group has its ``peak``."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in learning(model).items():
        own = next((g for g in section.groups if matches(name, g.match)), None)
        peak = section.learning_rate if own is None or own.learning_rate is None else own.learning_rate
        decay = section.weight_decay if p.ndim > 1 else 0.0
        if own is not None and own.weight_decay is not None:
            decay = own.weight_decay
        groups.setdefault((peak, decay), []).append(p)
    kind = section.type if isinstance(section, TorchOptimizer) else OPTIMIZERS[section.name]
    own_keys = {"name", "learning_rate", "weight_decay", "groups", "type", "arguments"}
    arguments = section.arguments if isinstance(section, TorchOptimizer) else section.model_dump(exclude=own_keys)
    made: list[dict[str, Any]] = [{"params": ps, "peak": peak, "weight_decay": wd} for (peak, wd), ps in groups.items()]
    optimizer: torch.optim.Optimizer = getattr(torch.optim, kind)(made, lr=section.learning_rate, **arguments)
    return optimizer


class Averages:
    """The moving average of what learns, where the recipe asks for one."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self._section = recipe.training.ema
        self._model = model
        self._values = copy.deepcopy({name: p.detach() for name, p in learning(model).items()}) if self._section else {}
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        if self._section is None:
            return
        decay = self._section.decay
        if self._section.warmup:
            decay = min(decay, (1 + self._updates) / (10 + self._updates))
        for name, p in learning(self._model).items():
            self._values[name] = decay * self._values[name] + (1 - decay) * p
        self._updates += 1

    def tensors(self) -> dict[str, Tensor]:
        return {**self._values, "updates": torch.tensor(self._updates)} if self._values else {}

    @torch.no_grad()
    def use(self) -> None:
        """From now on the model has them."""
        for name, p in learning(self._model).items():
            p.copy_(self._values.get(name, p))
