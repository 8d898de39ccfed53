"""Checkpoints that a killed run can go on from: atomic, hashed, and free of pickle.

    RUN/checkpoints/step-00000100/
        tensors.safetensors      every tensor, under the caller's names
        state.json               everything else
        manifest.json            size and SHA-256 of the two, and a digest of itself

A checkpoint is written under a hidden name beside its place, brought to the disk, and renamed: whenever the writer was
killed, a folder called ``step-...`` is whole. What happens to it later (bad sectors, cut copies) its hashes show.
One process at a time writes to a run folder; ``write`` removes what killed writes left behind.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainwright.recipe import RunError

FORMAT = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-\d{8,}")
_WRITING, _DELETING = ".writing-", ".deleting-"
_MARKS = {"tensor", "float", "tuple", "items"}  # keys that mean something in a skeleton


class CheckpointError(RunError):
    """A checkpoint can't be written or is damaged; the message names the folder, the file and the reason."""


class Loaded(NamedTuple):
    """A checkpoint that was verified and read."""

    folder: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def write(run_folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of ``step``, replacing one of the same step; it is on the disk when its folder is returned.

    tensors   any device and shape (0-dim and empty too), dtypes that safetensors knows; no two may overlap in memory
    state     what JSON keeps, else TypeError; tuples and keys that aren't strings have to go through ``flatten``

    CheckpointError if the disk refuses (full, not writable): what was begun is gone, older checkpoints stay whole.
    """
    state_text = json.dumps(state)
    dense = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    if "__metadata__" in dense:
        raise ValueError("a tensor can't be called '__metadata__': the safetensors format reserves this name")
    final = path_of(run_folder, step)
    try:
        _prepare(final.parent)
        _write_and_publish(final, step, dense, state_text)
    except (OSError, SafetensorError) as error:
        needed = sum(tensor.nbytes for tensor in dense.values()) + len(state_text)
        free = shutil.disk_usage(next(filter(os.path.isdir, final.absolute().parents))).free
        raise CheckpointError(
            f"checkpoint {final} could not be written: {error}. It needs {needed:,} bytes, {free:,} are free. "
            "Older checkpoints are untouched: make room, then resume"
        ) from error
    return final


def _prepare(home: Path) -> None:
    """Make the folder of the checkpoints, and sweep what killed writes and deletions left in it."""
    home.mkdir(parents=True, exist_ok=True)
    _sync(home.parent)  # else a power cut could lose the entry of the new folder, and every checkpoint with it
    for entry in home.iterdir():
        if entry.name.startswith((_WRITING, _DELETING)):
            shutil.rmtree(entry)


def _write_and_publish(final: Path, step: int, tensors: dict[str, Tensor], state_text: str) -> None:
    """All files into a hidden sibling, then the rename; the sibling is gone if anything fails on the way."""
    temporary = final.with_name(_WRITING + final.name)
    try:
        temporary.mkdir()
        _fill(temporary, step, tensors, state_text)
        _publish(temporary, final)
    except BaseException:  # an interrupt from the keyboard must not leave gigabytes either
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _fill(folder: Path, step: int, tensors: dict[str, Tensor], state_text: str) -> None:
    """Write the three files and bring them to the disk."""
    _save_tensors(tensors, folder / TENSORS)
    (folder / STATE).write_text(state_text, encoding="utf-8")
    # NOTE: safetensors makes files that only their owner can read; a team shares its runs as its umask says.
    shutil.copymode(folder / STATE, folder / TENSORS)
    files = {name: _describe(folder / name) for name in (TENSORS, STATE)}
    (folder / MANIFEST).write_text(_render({"format": FORMAT, "step": step, "files": files}), encoding="utf-8")
    for path in (folder / TENSORS, folder / STATE, folder / MANIFEST, folder):
        _sync(path)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """``save_file``, naming the tensors whose dtype has no place in the format (such as complex128)."""
    try:
        save_file(tensors, path)
    except KeyError as error:
        names = [name for name, tensor in tensors.items() if tensor.dtype == error.args[0]]
        raise TypeError(f"safetensors can't hold {error.args[0]}, the dtype of {', '.join(names)}") from error


def _publish(temporary: Path, final: Path) -> None:
    """Rename into place. A kill between the two renames costs the old checkpoint of this same step, no other one."""
    replaced = _set_aside(final) if final.exists() else None
    os.rename(temporary, final)
    _sync(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)  # the next write sweeps what remains


def _set_aside(folder: Path) -> Path:
    """Rename to a hidden name, so that a folder that is half deleted is never taken for a checkpoint."""
    doomed = folder.with_name(_DELETING + folder.name)
    os.rename(folder, doomed)
    _sync(folder.parent)
    return doomed


def _sync(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and state. CheckpointError naming the file that is missing, cut or changed in any byte."""
    for name, expected in _manifest(folder)["files"].items():
        _check(folder / name, expected)
    # NOTE: load_file maps the file. Its tensors lie at odd addresses, and as long as an optimizer holds them they would
    # keep the disk blocks of a checkpoint that was pruned; clones do neither.
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
    return tensors, json.loads((folder / STATE).read_text(encoding="utf-8"))


def latest(run_folder: Path) -> Path | None:
    """The checkpoint with the highest step, judged by names alone; None if there is none."""
    return next(reversed(_whole(run_folder)), None)


def newest_valid(run_folder: Path, warn: Callable[[str], None]) -> Loaded | None:
    """The newest checkpoint whose hashes match, or None; ``warn`` hears which file of which newer one is damaged.

    CheckpointError if there are checkpoints and all are damaged: to begin again from nothing is for the user to decide.
    """
    folders = _whole(run_folder)
    for folder in reversed(folders):
        try:
            return Loaded(folder, *read(folder))
        except CheckpointError as error:
            warn(str(error))
    if folders:
        raise CheckpointError(f"every checkpoint in {folders[0].parent} is damaged; remove that folder to begin again")
    return None


def path_of(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_folder / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name; ValueError if it isn't the name of a checkpoint."""
    return int(folder.name.removeprefix("step-"))


def prune(run_folder: Path, keep: int, protect: Collection[int] = ()) -> None:
    """Delete all but the newest ``keep`` checkpoints, and besides them spare those of the steps in ``protect``."""
    assert keep >= 1, keep
    for folder in _whole(run_folder)[:-keep]:
        if step_of(folder) not in protect:
            shutil.rmtree(_set_aside(folder))


def _whole(run_folder: Path) -> list[Path]:
    """The folders named like checkpoints, oldest step first; by number, for steps may outgrow their eight digits."""
    entries = (run_folder / "checkpoints").glob("step-*")
    return sorted((entry for entry in entries if _NAME.fullmatch(entry.name) and entry.is_dir()), key=step_of)


def _render(body: dict[str, Any]) -> str:
    """The manifest's text: the body and its digest. A body has one text only, so that any flipped byte shows."""
    content = {key: value for key, value in body.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=2) + "\n"


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; CheckpointError if it is missing, changed or of another format."""
    try:
        text = (folder / MANIFEST).read_bytes()
        body: dict[str, Any] = json.loads(text)
        if _render(body).encode() != text:
            raise ValueError("another text than that of its content")
    except OSError as error:
        raise _damaged(folder / MANIFEST, f"can't be read ({error.strerror})") from error
    except (ValueError, AttributeError) as error:  # these also come from what isn't UTF-8, JSON or an object
        raise _damaged(folder / MANIFEST, "is not as it was written") from error
    if body["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {folder} has format {body['format']}; this version reads format {FORMAT}")
    return body


def _check(path: Path, expected: dict[str, Any]) -> None:
    """CheckpointError unless the file has the size and the digest that the manifest states."""
    try:
        found = _describe(path)
    except OSError as error:
        raise _damaged(path, f"can't be read ({error.strerror})") from error
    if found["size"] != expected["size"]:
        raise _damaged(path, f"has {found['size']:,} bytes instead of {expected['size']:,}")
    if found != expected:
        raise _damaged(path, "is not as it was written (its SHA-256 differs)")


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _damaged(path: Path, how: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {path.parent} is damaged: {path.name} {how}")


def flatten(state: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Split a nested state into its tensors by name and a JSON-able skeleton; ``unflatten`` is the exact inverse.

    state    dicts, lists and tuples of tensors, numbers, strings, bools and None, such as ``optimizer.state_dict()`` or
             ``torch.get_rng_state()``; keys may be any of the immutable ones; subclasses come back as the plain type
    prefix   begins the names: ``flatten(sgd.state_dict(), "optimizer")`` gives ``optimizer.state.0.momentum_buffer``

    The tensors are those of the state, not copies; one that occurs twice (the learning rate of several groups) has one
    name. TypeError with the path of a value of any other type.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _encode(state, prefix, tensors, {})


def unflatten(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Put the tensors back into the skeleton; others are ignored. KeyError if one is missing."""
    match skeleton:
        case list():
            return [unflatten(tensors, item) for item in skeleton]
        case {"tensor": name}:
            return tensors[name]
        case {"float": bits}:
            return struct.unpack(">d", bytes.fromhex(bits))[0]
        case {"tuple": items}:
            return tuple(unflatten(tensors, items))
        case {"items": pairs}:
            return {unflatten(tensors, key): unflatten(tensors, value) for key, value in pairs}
        case dict():
            return {key: unflatten(tensors, value) for key, value in skeleton.items()}
    return skeleton


def _encode(value: Any, path: str, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    """The skeleton of one value; its tensors go to ``tensors`` under their paths, which ``names`` keeps by their id."""
    match value:
        case Tensor():
            while path in tensors or not path:  # paths can read alike: those of keys 0 and "0" do
                path += "'" if path else "tensor"
            name = names.setdefault(id(value), path)
            tensors[name] = value
            return {"tensor": name}
        case float() if not math.isfinite(value):
            return {"float": struct.pack(">d", value).hex()}  # JSON has none, and a NaN has a sign and a payload
        case None | bool() | int() | float() | str():
            return value
        case dict():
            return _encode_dict(value, path, tensors, names)
        case list() | tuple():
            items = [_encode(item, f"{path}.{index}".lstrip("."), tensors, names) for index, item in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(f"{path or 'the state'} is a {type(value).__name__}, neither a tensor nor a plain value")


def _encode_dict(value: dict[Any, Any], path: str, tensors: dict[str, Tensor], names: dict[int, str]) -> dict[str, Any]:
    """A plain JSON object where that is exact; pairs where keys aren't strings or would read as one of our marks."""
    encoded = [(key, _encode(item, f"{path}.{key}".lstrip("."), tensors, names)) for key, item in value.items()]
    if all(isinstance(key, str) and key not in _MARKS for key in value):
        return dict(encoded)
    return {"items": [[_encode(key, path, tensors, names), item] for key, item in encoded]}
