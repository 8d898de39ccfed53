"""State dicts in PyTorch's own format (.pth, .pt), such as torchvision's weights, read without running what they hold."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainwright.pieces import Piece
from trainwright.recipe import InputError

INNER = ("state_dict", "model")  # where training scripts put the state dict among other things


class TorchWeights:
    """The tensors of a ``.pth`` or ``.pt`` file; they stay in the file until they are read, if its format lets them.

    Raises:
        InputError: the file is damaged, or holds anything but a plain dict of names and tensors.
    """

    def __init__(self, path: Path) -> None:
        self.shown = str(path)
        self._tensors = _state_dict(path, _read(path))

    def names(self) -> list[str]:
        """Names as they are stored."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype."""
        return self._tensors[name].dtype

    def load(self, name: str, dtype: torch.dtype | None = None, piece: Piece | None = None) -> Tensor:
        """A new tensor in ``dtype`` (default: as stored) that shares nothing with the file; of it, only the piece is read."""
        whole = self._tensors[name].detach()
        tensor = piece.of(whole) if piece else whole
        return torch.empty(tensor.shape, dtype=dtype or tensor.dtype).copy_(tensor)


def _read(path: Path) -> Any:
    try:
        # Files of before PyTorch 1.6 are no zip archives and can't be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # pickle, zip and torch each have errors of their own for a damaged file
        raise InputError(f"{path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Why a file can't be read without running code, or what is wrong with it."""
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"holds a {found[1]}, not only tensors, and is refused because loading it can run code; "
            "if you trust it, load it yourself and save model.state_dict()"
        )
    if "TorchScript" in str(error):
        return "holds a TorchScript program, not a state dict; load it yourself with torch.jit.load and save its state_dict()"
    return f"truncated or damaged; download it again ({type(error).__name__})"


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """The names and tensors of a file: all of it, or under ``state_dict`` or ``model``."""
    where = ""
    if isinstance(content, Mapping):
        inner = next((key for key in INNER if isinstance(content.get(key), Mapping)), None)
        where, content = (f" under {inner!r}", content[inner]) if inner else ("", content)
    advice = "a file of weights is a dict of names and tensors, as torch.save(model.state_dict(), file) writes it"
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds a {type(content).__name__}; {advice}")
    if not content:
        raise InputError(f"{path}: holds an empty dict{where}; {advice}")
    for name, value in content.items():
        if fault := _fault(name, value):
            raise InputError(f"{path}: {name!r}{where} {fault}; {advice}")
    return dict(content)


def _fault(name: Any, value: Any) -> str:
    """What is wrong with an entry, or the empty string."""
    if not isinstance(name, str):
        return "is no name"
    if not isinstance(value, Tensor):
        return f"is of type {type(value).__name__}"
    return "" if value.layout == torch.strided else f"is {value.layout}, not dense"
