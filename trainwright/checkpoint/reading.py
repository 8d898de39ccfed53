"""Reading a checkpoint: any box of any tensor, however many processes wrote it, once its hashes have been compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainwright.checkpoint import manifest
from trainwright.checkpoint.folders import CheckpointError, whole
from trainwright.checkpoint.manifest import PIECES, STATE
from trainwright.pieces import Piece


class Loaded(NamedTuple):
    """A checkpoint that was verified and read."""

    folder: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Reader:
    """A checkpoint whose small files are verified and read; tensors are read on demand, from the files that hold them.

    Raises:
        CheckpointError: the manifest, the pieces or the state are missing, cut or changed in any byte.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = manifest.read(folder)["files"]
        for name in (PIECES, STATE):
            manifest.check(folder / name, self._files[name])
        self._tensors = manifest.parse((folder / PIECES).read_text(encoding="utf-8"))
        self.state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))

    def verify(self, index: int = 0, size: int = 1) -> None:
        """Hash the tensors' files; of ``size`` processes each those that are its own.

        Raises:
            CheckpointError: a file is missing, cut or changed in any byte.
        """
        for name in sorted(self._files.keys() - {PIECES, STATE})[index::size]:
            manifest.check(self.folder / name, self._files[name])

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def load(self, name: str, piece: Piece | None = None) -> Tensor:
        """A new CPU tensor of one box (default: all) of a tensor; of the files, only that box is read.

        Raises:
            CheckpointError: a file is damaged, or no file holds some of the box.
        """
        stored = self._tensors[name]
        box = piece or Piece.all_of(stored.shape)
        assert box.shape == stored.shape, f"{name}: a piece of {list(box.shape)} asked for, {list(stored.shape)} are stored"
        out = torch.empty(box.size, dtype=stored.dtype)
        found = 0
        for file, held in stored.pieces:
            if shared := held.overlap(box):
                shared.inside(box).of(out).copy_(self._slice(file, name, shared.inside(held)))
                found += shared.numel
        if found != box.numel:
            raise CheckpointError(f"checkpoint {self.folder} holds {found:,} of the {box.numel:,} numbers of a piece of {name}")
        return out

    def _slice(self, file: str, name: str, piece: Piece) -> Tensor:
        path = self.folder / file
        try:
            # NOTE: the file is mapped. A tensor that kept it mapped would keep the disk blocks of a pruned checkpoint.
            with safe_open(path, "pt") as opened:
                return opened.get_slice(name)[piece.slices()]
        except (OSError, SafetensorError) as error:
            raise manifest.damaged(path, f"can't be read ({error})") from error


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and state. CheckpointError naming the file that is missing, cut or changed in any byte."""
    reader = Reader(folder)
    reader.verify()
    return {name: reader.load(name) for name in reader.names()}, reader.state


def newest_valid(run_folder: Path, warn: Callable[[str], None]) -> Loaded | None:
    """The newest checkpoint whose hashes match, or None; ``warn`` hears which file of which newer one is damaged.

    CheckpointError if there are checkpoints and all are damaged: to begin again from nothing is for the user to decide.
    """
    reader = newest_reader(run_folder, warn)
    if reader is None:
        return None
    return Loaded(reader.folder, {name: reader.load(name) for name in reader.names()}, reader.state)


def newest_reader(
    run_folder: Path,
    warn: Callable[[str], None],
    index: int = 0,
    share: Callable[[Any], list[Any]] = lambda value: [value],
) -> Reader | None:
    """As ``newest_valid``, with nothing read yet. Processes of a job divide the hashing, and all get the same one.

    Args:
        index: this process's.
        share: gives every process what all say (JSON), in the order of their indices.
    """
    folders = share([str(folder) for folder in whole(run_folder)])[0]  # one process's view: another's may be older
    for folder in reversed(folders):
        reader, fault = _opened(Path(folder))
        faults = share(fault)
        if reader and not any(faults):
            fault = _verified(reader, index, len(faults))
            faults = share(fault)
        if reader and not any(faults):
            return reader
        warn(next(filter(None, faults)))
    if folders:
        raise CheckpointError(f"every checkpoint in {run_folder / 'checkpoints'} is damaged; remove that folder to begin again")
    return None


def _opened(folder: Path) -> tuple[Reader | None, str | None]:
    try:
        return Reader(folder), None
    except CheckpointError as error:
        return None, str(error)


def _verified(reader: Reader, index: int, size: int) -> str | None:
    try:
        reader.verify(index, size)
    except CheckpointError as error:
        return str(error)
    return None
