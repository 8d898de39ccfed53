"""Partial fine-tuning: parameters whose names match learn, and only those are saved, as ``delta.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trainwright.models.contract import Change, match
from trainwright.pieces import Piece, box_of, local
from trainwright.recipe import InputError, Partial, nearest

FILE = "delta.safetensors"


def apply(model: nn.Module, section: Partial) -> Change:
    """Freeze everything but the matching parameters.

    Raises:
        InputError: a pattern that matches no parameter.
    """
    names = match(section.train, (name for name, _ in model.named_parameters()), "adapt.train")
    model.requires_grad_(False)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    count = sum(model.get_parameter(name).numel() for name in names)
    return Change("partial", f"{count:,} parameters in {len(names)} tensors learn; the rest is frozen", tuple(names))


def save(tensors: Mapping[str, Tensor], section: Partial, folder: Path, *, base: str, base_hash: str) -> None:
    """Write the trained tensors, with the base's name and hash and the patterns as metadata."""
    metadata = {"format": "pt", "base": base, "base_hash": base_hash, "patterns": json.dumps(section.train)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, folder / FILE, metadata=metadata)


def read_section(folder: Path) -> Partial:
    """The patterns a delta was trained with."""
    with _open(folder) as file:
        return Partial(method="partial", train=json.loads(file.metadata()["patterns"]))


def read(folder: Path, base_hash: str | None) -> dict[str, Tensor]:
    """The tensors of a delta.

    Raises:
        InputError: no delta there, a damaged one, or one made for another base.
    """
    with _open(folder) as file:
        made_for = file.metadata()
        if base_hash is not None and made_for["base_hash"] != base_hash:
            raise InputError(
                f"{folder / FILE}: made for another base, {made_for['base']} (hash {made_for['base_hash'][:12]}; "
                f"this base has {base_hash[:12]})"
            )
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict


@torch.no_grad()
def load(
    model: nn.Module,
    folder: Path,
    base_hash: str | None,
    pieces: Mapping[str, Piece] = MappingProxyType({}),
    absent: Callable[[str], bool] = lambda name: False,
) -> None:
    """Copy a delta's tensors over those of the base.

    Args:
        pieces: which box of the whole tensor a parameter is, where it isn't all of it.
        absent: which names belong to a part of the model that another process has.
    """
    parameters = dict(model.named_parameters())
    for name, value in read(folder, base_hash).items():
        if absent(name):
            continue
        if name not in parameters or box_of(pieces, name, parameters[name]).shape != tuple(value.shape):
            raise InputError(f"{folder / FILE}: {name} {list(value.shape)} is not in the model{nearest(name, parameters)}")
        local(parameters[name]).copy_(box_of(pieces, name, parameters[name]).of(value))


def _open(folder: Path) -> safe_open:
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{folder}: no {FILE} there")
    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None
    if not {"base", "base_hash", "patterns"} <= set(file.metadata() or {}):
        raise InputError(f"{path}: its metadata doesn't name the base it was made for; it isn't one of ours")
    return file


def base_of(folder: Path) -> str:
    """The name of the base that a delta was made for."""
    with _open(folder) as file:
        return str(file.metadata()["base"])
