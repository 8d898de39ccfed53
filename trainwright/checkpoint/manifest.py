"""What a checkpoint's files are: their sizes and hashes, and which box of which tensor lies in which of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from trainwright.checkpoint.folders import CheckpointError
from trainwright.pieces import Piece

FORMAT = 2
TENSORS, PIECES, STATE, MANIFEST = "tensors.safetensors", "pieces.json", "state.json", "manifest.json"


def tensors_file(index: int, size: int) -> str:
    """The file of process ``index`` of ``size``."""
    return TENSORS if size == 1 else f"tensors-{index + 1:05d}-of-{size:05d}.safetensors"


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint: the files that hold pieces of it, each under the tensor's name."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[str, Piece], ...]

    def check(self, name: str) -> None:
        """Assert that the pieces are the whole tensor and share nothing."""
        boxes = [piece for _, piece in self.pieces]
        total = sum(piece.numel for piece in boxes)
        assert total == Piece.all_of(self.shape).numel, f"{name}: pieces of {total} numbers for {list(self.shape)}"
        assert not any(one.overlap(other) for one, other in combinations(boxes, 2)), f"{name}: two pieces overlap"


def table(spoken: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Stored]:
    """All tensors, from what each process told: file -> name -> ``row``. Names keep the order of the processes."""
    found: dict[str, Stored] = {}
    for file, rows in spoken.items():
        for name, row in rows.items():
            piece = Piece(tuple(row["shape"]), tuple(row["start"]), tuple(row["size"]))
            kind = dtype_of(row["dtype"])
            known = found.get(name, Stored(piece.shape, kind, ()))
            assert (known.shape, known.dtype) == (piece.shape, kind), f"{name}: processes hold it differently: {known}, {row}"
            found[name] = Stored(piece.shape, kind, (*known.pieces, *([(file, piece)] if piece.numel else [])))
    return found


def row(piece: Piece, dtype: torch.dtype) -> dict[str, Any]:
    """One process's piece of a tensor, for JSON."""
    return {"dtype": str(dtype).removeprefix("torch."), "shape": piece.shape, "start": piece.start, "size": piece.size}


def dtype_of(name: str) -> torch.dtype:
    """``float32`` -> ``torch.float32``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype


def dump(tensors: Mapping[str, Stored]) -> str:
    """The text of the pieces, one tensor a line."""
    rows = []
    for name, stored in tensors.items():
        pieces = [{"file": file, "start": piece.start, "size": piece.size} for file, piece in stored.pieces]
        entry = {"dtype": str(stored.dtype).removeprefix("torch."), "shape": stored.shape, "pieces": pieces}
        rows.append(f"{json.dumps(name)}: {json.dumps(entry)}")
    return "{\n" + ",\n".join(rows) + "\n}\n"


def parse(text: str) -> dict[str, Stored]:
    """The inverse of ``dump``."""
    found = {}
    for name, entry in json.loads(text).items():
        shape = tuple(entry["shape"])
        pieces = [(p["file"], Piece(shape, tuple(p["start"]), tuple(p["size"]))) for p in entry["pieces"]]
        found[name] = Stored(shape, dtype_of(entry["dtype"]), tuple(pieces))
    return found


def render(body: Mapping[str, Any]) -> str:
    """The manifest's text: the body and its digest. A body has one text only, so that any flipped byte shows."""
    content = {key: value for key, value in body.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=2) + "\n"


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; CheckpointError if it is missing, changed or of another format."""
    try:
        text = (folder / MANIFEST).read_bytes()
        body: dict[str, Any] = json.loads(text)
        if render(body).encode() != text:
            raise ValueError("another text than that of its content")
    except OSError as error:
        raise damaged(folder / MANIFEST, f"can't be read ({error.strerror})") from error
    except (ValueError, AttributeError) as error:  # these also come from what isn't UTF-8, JSON or an object
        raise damaged(folder / MANIFEST, "is not as it was written") from error
    if body["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {folder} has format {body['format']}; this version reads format {FORMAT}")
    return body


def check(path: Path, expected: Mapping[str, Any]) -> None:
    """CheckpointError unless the file has the size and the digest that the manifest states."""
    try:
        found = describe(path)
    except OSError as error:
        raise damaged(path, f"can't be read ({error.strerror})") from error
    if found["size"] != expected["size"]:
        raise damaged(path, f"has {found['size']:,} bytes instead of {expected['size']:,}")
    if found != expected:
        raise damaged(path, "is not as it was written (its SHA-256 differs)")


def describe(path: Path) -> dict[str, Any]:
    """Size and digest of a file."""
    with path.open("rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def damaged(path: Path, how: str) -> CheckpointError:
    """The error for a file that isn't as it was written."""
    return CheckpointError(f"checkpoint {path.parent} is damaged: {path.name} {how}")
