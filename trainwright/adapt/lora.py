"""LoRA (Hu et al. 2021): W + scale * B A, the base frozen, A Kaiming-uniform, B zero; PEFT's file format in and out.

The two factors become parameters ``lora_A`` and ``lora_B`` of the layer they adapt; no module is wrapped or renamed, so every
other name stays that of the plain model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainwright.models.contract import Change, Portion, dropout, match, seed_of
from trainwright.pieces import Piece, box_of, local
from trainwright.recipe import InputError, Lora, nearest


def apply(model: nn.Module, section: Lora, *, head: str | None = "lm_head") -> Change:
    """Freeze the model and give every target layer its two factors, on the layer's device (meta, too).

    Args:
        head: name of the output layer, which ``all-linear`` leaves out.

    Raises:
        InputError: a pattern that matches no linear layer.
    """
    names = target_names(model, section, head)
    model.requires_grad_(False)
    for name in names:
        _adapt(model.get_submodule(name), section)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    summary = f"rank {section.rank} on {len(names)} linear layers, {trained:,} parameters to train; the base is frozen"
    return Change("lora", summary, tuple(names))


def target_names(model: nn.Module, section: Lora, head: str | None) -> list[str]:
    """Names of the layers that get factors."""
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    if section.targets == "all-linear":
        return [name for name in linear if name != head]
    patterns = [section.targets] if isinstance(section.targets, str) else section.targets
    # PEFT's users write the last part of a name: q_proj means *.q_proj.
    patterns = [p if "*" in p or "." in p else f"*{p}" for p in patterns]
    return match(patterns, linear, "adapt.targets")


def scale_of(section: Lora) -> float:
    """alpha/rank, or alpha/sqrt(rank) for rank-stabilised LoRA (Kalajdzievski 2023)."""
    return section.alpha / (math.sqrt(section.rank) if section.scaling == "rslora" else section.rank)


class LoraLinear(nn.Linear):
    """A linear layer with factors. Layers become one by a change of class: a forward of its own, and the module stays.

    (A closure in ``layer.forward`` would do the same, but compiled blocks could then not share one graph.)
    """

    lora_A: nn.Parameter  # (rank, in_features)
    lora_B: nn.Parameter  # (out_features, rank)
    scale: float
    dropout: float
    portion: Portion | None = None  # the part of the input's features that a process has
    FEATURES: ClassVar = {"lora_A": ("rank", "in"), "lora_B": ("out", "rank")}

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Base and adapter on x, and perhaps a bias."""
        flat = _rows(x)
        dropped = _rows(dropout(x, self.dropout, self.training, self.portion)) if self.dropout else flat
        low = nn.functional.linear(dropped, self.lora_A) * self.scale
        return _added(self.base(flat, bias), low, self.lora_B).view(*x.shape[:-1], len(self.lora_B))

    def base(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The frozen layer's product, which may be made another way."""
        return nn.functional.linear(x, self.weight, bias)

    def base_weight(self) -> Tensor:
        """What that product uses."""
        return self.weight

    @staticmethod
    def apply_all(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
        """The outputs of layers with the same input: their small products become two, as if of one layer.

        Each layer's dropout has masks of its own, so then they stay apart.
        """
        if not all(isinstance(layer, LoraLinear) and not (layer.dropout and layer.training) for layer in layers):
            return [layer(x) for layer in layers]
        adapted, flat = [layer for layer in layers if isinstance(layer, LoraLinear)], _rows(x)
        low = nn.functional.linear(flat, torch.cat([layer.lora_A for layer in adapted])) * adapted[0].scale
        parts = low.split([len(layer.lora_A) for layer in adapted], -1)
        bases = [layer.base(flat, layer.bias) for layer in adapted]
        sums = [_added(base, part, layer.lora_B) for base, part, layer in zip(bases, parts, adapted, strict=True)]
        return [rows.view(*x.shape[:-1], rows.shape[-1]) for rows in sums]

    def effective_weight(self) -> Tensor:
        """W + scale * B A, summed in float32 at least, in W's dtype; without dropout."""
        product = self.scale * (self.lora_B @ self.lora_A)
        return (self.base_weight() + product).to(self.weight.dtype)


def _adapt(layer: nn.Module, section: Lora) -> None:
    assert isinstance(layer, nn.Linear)
    layer.__class__ = LoraLinear
    assert isinstance(layer, LoraLinear)
    layer.scale, layer.dropout = scale_of(section), section.dropout
    layer.lora_A = nn.Parameter(torch.empty(section.rank, layer.in_features, device=layer.weight.device))
    layer.lora_B = nn.Parameter(torch.empty(layer.out_features, section.rank, device=layer.weight.device))


def adapted(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The layers that have factors, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


def _rows(x: Tensor) -> Tensor:
    """A matrix of all rows: gradients of several products with it are then summed by products, without a pass of their own."""
    return x.reshape(-1, x.shape[-1])


def _added(base: Tensor, low: Tensor, factor: Tensor) -> Tensor:
    """``base`` (rows, out) with ``low`` (rows, rank) times B (out, rank): one product that ends in the base's memory."""
    return torch.addmm(base, low, factor.T)


@torch.no_grad()
def initialize(model: nn.Module, seed: int, pieces: Mapping[str, Piece] = MappingProxyType({})) -> None:
    """A Kaiming-uniform as in PEFT (bound 1/sqrt(in_features)), B zero: the adapted model starts as the base.

    Args:
        pieces: which box of the whole factor a parameter is, where it isn't all of it.
    """
    for name, layer in adapted(model):
        piece = box_of(pieces, f"{name}.lora_A", layer.lora_A)
        bound = 1 / math.sqrt(piece.shape[1])
        generator = torch.Generator().manual_seed(seed_of(seed, f"{name}.lora_A"))
        whole = torch.empty(piece.shape).uniform_(-bound, bound, generator=generator)
        local(layer.lora_A).copy_(piece.of(whole))
        local(layer.lora_B).zero_()


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """``name.weight`` of every adapted layer with the product of its factors added in float32, in the base's dtype."""
    return {f"{name}.weight": layer.effective_weight().detach() for name, layer in adapted(model)}


def is_factor(name: str) -> bool:
    """Whether a parameter's name is that of a LoRA factor."""
    return name.endswith((".lora_A", ".lora_B"))


def save(factors: Mapping[str, Tensor], section: Lora, folder: Path, *, base: str, base_hash: str) -> None:
    """Write adapter_model.safetensors and adapter_config.json in PEFT's format.

    Args:
        factors: all of a model's, by their parameters' names.
    """
    tensors = {f"base_model.model.{name}.weight": value.detach().cpu().contiguous() for name, value in factors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt", "base_hash": base_hash})
    config = peft_config(section, _targets(factors), base)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def peft_config(section: Lora, names: list[str], base: str) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it; the targets are the full names of the adapted layers."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": section.rank,
        "lora_alpha": section.alpha,
        "lora_dropout": section.dropout,
        "target_modules": names,
        "use_rslora": section.scaling == "rslora",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": False,
        "modules_to_save": None,
    }


def read_section(folder: Path) -> Lora:
    """The settings of an adapter that PEFT or we saved.

    Raises:
        InputError: no adapter there, or one that isn't plain LoRA.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no adapter_config.json; give a folder with an adapter in PEFT's format")
    config = json.loads(path.read_text())
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type {config.get('peft_type')!r} is not supported; supported: 'LORA'")
    unsupported = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias",
                   "trainable_token_indices", "target_parameters")  # fmt: skip
    if found := [key for key in unsupported if config.get(key)]:
        raise InputError(f"{path}: {', '.join(found)} not supported; merge the adapter with PEFT first")
    if config.get("bias", "none") != "none":
        raise InputError(f"{path}: bias {config['bias']!r} is not supported; supported: 'none'")
    return Lora(
        method="lora",
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        scaling="rslora" if config.get("use_rslora") else "standard",
        targets=_targets(read_tensors(folder)),
    )


def _targets(tensors: Mapping[str, Tensor]) -> list[str]:
    """The layers an adapter file holds factors for: surer than the patterns in its config."""
    return sorted({name.rsplit(".", 1)[0] for name in tensors})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The factors of an adapter, under our parameters' names (``...q_proj.lora_A``)."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        hint = "; only pickled weights are there, and pickle is never loaded" if list(folder.glob("*.bin")) else ""
        raise InputError(f"{folder}: no adapter_model.safetensors{hint}")
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); get it again") from None
    return {name.removeprefix("base_model.model.").removesuffix(".weight"): value for name, value in stored.items()}


@torch.no_grad()
def load(
    model: nn.Module,
    folder: Path,
    base_hash: str | None = None,
    pieces: Mapping[str, Piece] = MappingProxyType({}),
    absent: Callable[[str], bool] = lambda name: False,
) -> None:
    """Copy an adapter's factors into a model that ``apply`` prepared.

    Args:
        pieces: which box of the whole factor a parameter is, where it isn't all of it.
        absent: which names belong to a part of the model that another process has.

    Raises:
        InputError: factors of other names or shapes, or an adapter made for another base.
    """
    tensors = {name: value for name, value in read_tensors(folder).items() if not absent(name)}
    parameters = {name: p for name, p in model.named_parameters() if is_factor(name)}
    check_base(folder / "adapter_model.safetensors", base_hash)
    for name, value in tensors.items():
        if name not in parameters:
            raise InputError(
                f"{folder}: the adapter has {name}, the model has not{nearest(name, parameters)}: is it for another base?"
            )
        piece = box_of(pieces, name, parameters[name])
        if tuple(value.shape) != piece.shape:
            raise InputError(
                f"{folder}: {name} is {list(value.shape)} in the adapter, {list(piece.shape)} in the model: "
                "is it for another base, or another rank?"
            )
        local(parameters[name]).copy_(piece.of(value))
    if missing := sorted(parameters.keys() - tensors.keys()):
        raise InputError(f"{folder}: the adapter lacks {missing[0]} and {len(missing) - 1} more; adapt.targets must be its own")


def check_base(path: Path, base_hash: str | None) -> None:
    """Refuse a file whose metadata names another base; PEFT's own files name none and pass."""
    if base_hash is None:
        return
    with safe_open(path, "pt") as file:
        stored = (file.metadata() or {}).get("base_hash")
    if stored and stored != base_hash:
        raise InputError(f"{path}: made for another base (hash {stored[:12]}, this base has {base_hash[:12]})")


def base_of(folder: Path) -> str:
    """The base that an adapter's config names.

    Raises:
        InputError: it names none.
    """
    base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not base:
        raise InputError(f"{folder}: its adapter_config.json names no base; give the base, and this folder with --adapter")
    return str(base)
