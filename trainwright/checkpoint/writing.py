"""Writing a checkpoint: every process what it holds, at once or not at all; while the caller waits, or beside training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trainwright.checkpoint import manifest
from trainwright.checkpoint.folders import WRITING, CheckpointError, path_of, prepare, publish, sync
from trainwright.checkpoint.manifest import MANIFEST, PIECES, STATE
from trainwright.checkpoint.team import OPEN, VERDICT, Meeting, Team, told
from trainwright.models import tensor_file
from trainwright.pieces import Held, Later, Piece

_REFUSALS = (OSError, SafetensorError)  # the disk's; a TimeoutError, of processes that are gone, is an OSError too


class _Refused(Exception):
    """Other processes could not write their part."""


def write(run_folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """``write_held`` for one process that holds all tensors whole."""
    whole = {name: Held(tensor, Piece.all_of(tuple(tensor.shape))) for name, tensor in tensors.items()}
    return write_held(run_folder, step, whole, state)


def write_held(
    run_folder: Path, step: int, held: Mapping[str, Held], state: Mapping[str, Any], team: Team | None = None
) -> Path:
    """Write the checkpoint of ``step``, replacing one of the same step; it is on the disk when its folder is returned.

    Every process of the team calls it. Together the pieces that speak must be each tensor exactly.

    Args:
        held: any device and shape (0-dim and empty too), dtypes that safetensors knows; no two may overlap in memory.
        state: what JSON keeps, else TypeError; tuples and keys that aren't strings have to go through ``flatten``. The
            lead's is written.

    Raises:
        CheckpointError: at every process, if the disk of any refuses (full, not writable) or one is gone: what was begun
            is gone, older checkpoints stay whole.
    """
    return _write(path_of(run_folder, step), step, _part(held, json.dumps(state)), team or Team())


class Writer:
    """Writes checkpoints in a thread while training goes on, one at a time."""

    def __init__(self, team: Team | None = None) -> None:
        self.team = team or Team()
        self._written: Future[Path] | None = None

    def begin(self, run_folder: Path, step: int, held: Mapping[str, Held], state: Mapping[str, Any]) -> None:
        """As ``write_held``, of a copy that is made now; raises what the last write did."""
        self.wait()
        part, future = _part(held, json.dumps(state), copy=True), Future[Path]()
        # A thread that doesn't keep a failing process alive: to die in a write leaves the older checkpoints, as a kill does.
        Thread(target=self._run, args=(future, path_of(run_folder, step), step, part), daemon=True).start()
        self._written = future

    def wait(self) -> Path | None:
        """The checkpoint that was begun last, once it is on the disk, or its error; None if that was already asked."""
        if self._written is None:
            return None
        try:
            return self._written.result()
        finally:
            if self._written.done():  # an interrupt ends the waiting, not the writing
                self._written = None

    def _run(self, future: Future[Path], final: Path, step: int, part: _Part) -> None:
        try:
            future.set_result(_write(final, step, part, self.team))
        except BaseException as error:
            future.set_exception(error)


@dataclass(frozen=True)
class _Part:
    """What this process writes: its tensors, what it tells of them, and the state."""

    tensors: dict[str, Tensor | Later]
    rows: dict[str, dict[str, Any]]
    state: str


def _part(held: Mapping[str, Held], state: str, copy: bool = False) -> _Part:
    if "__metadata__" in held:
        raise ValueError("a tensor can't be called '__metadata__': the safetensors format reserves this name")
    mine = {name: one for name, one in held.items() if one.speaks}
    for name, one in mine.items():
        assert one.shape == one.piece.size, f"{name}: {list(one.shape)} held as {one.piece}"
    rows = {name: manifest.row(one.piece, one.dtype) for name, one in mine.items()}
    full = {name: one for name, one in mine.items() if one.piece.numel}
    return _Part({name: _copied(one.tensor.detach()) if copy else one.values for name, one in full.items()}, rows, state)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _write(final: Path, step: int, part: _Part, team: Team) -> Path:
    meeting = Meeting(final.parent, team)
    try:
        if team.lead:
            _lead(final, step, part, meeting)
        else:
            _follow(final, part, meeting)
    except (*_REFUSALS, _Refused) as error:
        raise CheckpointError(
            f"checkpoint {final} could not be written: {_reason(final, part, error)}. "
            "Older checkpoints are untouched: make room, then resume"
        ) from error
    return final


def _reason(final: Path, part: _Part, error: BaseException) -> str:
    """What people are told of a failure; of one that the disk is to blame for, with what is needed and free."""
    if isinstance(error, _Refused):
        return str(error)
    if not isinstance(error, _REFUSALS) or isinstance(error, TimeoutError):
        return f"{type(error).__name__}: {error}"
    needed = sum(_like(tensor).nbytes for tensor in part.tensors.values()) + len(part.state)
    place = next(folder for folder in final.absolute().parents if folder.is_dir())
    return f"{error}. It needs {needed:,} bytes, {shutil.disk_usage(place).free:,} are free"


def _lead(final: Path, step: int, part: _Part, meeting: Meeting) -> None:
    """Make the hidden folder; with every part in it, what describes them; then the rename, and the verdict in any case."""
    temporary = final.with_name(WRITING + final.name)
    try:
        prepare(final.parent, meeting.team.prefix)
        with _gone_if_it_fails(temporary):
            temporary.mkdir()
            meeting.say(OPEN, None)
            _describe(temporary, step, _parts(temporary, part, meeting), part.state)
            publish(temporary, final)
    except BaseException as error:
        with suppress(OSError):
            meeting.say(VERDICT, f"{told(0)}: " * (not isinstance(error, _Refused)) + _reason(final, part, error))
        raise
    meeting.say(VERDICT, None)


@contextmanager
def _gone_if_it_fails(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:  # an interrupt from the keyboard must not leave gigabytes either
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _parts(temporary: Path, part: _Part, meeting: Meeting) -> list[dict[str, Any]]:
    """The answers of all. Where the own part fails, the others are heard too: they still write into the folder."""
    try:
        own = _save(temporary, part, meeting.team)
    except Exception:
        with suppress(TimeoutError):
            meeting.answers()
        raise
    answers = [own, *meeting.answers()]
    if faults := [f"{told(index)}: {one['fault']}" for index, one in enumerate(answers) if "fault" in one]:
        raise _Refused("; ".join(faults))
    return answers


def _follow(final: Path, part: _Part, meeting: Meeting) -> None:
    """Write the own part into the lead's folder, tell, and hear what became of the whole."""
    temporary, own = final.with_name(WRITING + final.name), None
    if meeting.opened():
        own = _answer(temporary, final, part, meeting)
    fault = meeting.verdict()
    meeting.leave()
    if own is not None:
        raise own
    if fault is not None:
        raise _Refused(fault)


def _answer(temporary: Path, final: Path, part: _Part, meeting: Meeting) -> Exception | None:
    """Write the own part and tell, or tell why not; gives an error that isn't the disk's."""
    topic = told(meeting.team.index)
    try:
        meeting.say(topic, _save(temporary, part, meeting.team))
    except BaseException as error:
        with suppress(OSError):  # makes room for the note
            (temporary / manifest.tensors_file(meeting.team.index, meeting.team.size)).unlink()
        meeting.say(topic, {"fault": _reason(final, part, error)})
        if not isinstance(error, Exception):
            raise
        return None if isinstance(error, _REFUSALS) else error
    return None


def _save(folder: Path, part: _Part, team: Team) -> dict[str, Any]:
    """Write the tensors and bring them to the disk; what a process answers. Without tensors there is no file."""
    name = manifest.tensors_file(team.index, team.size)
    files = {}
    if part.tensors:
        _save_tensors(part.tensors, folder / name)
        # NOTE: safetensors makes files that only their owner can read; a team shares its runs as its umask says.
        (folder / name).chmod(folder.stat().st_mode & 0o666)
        sync(folder / name)
        files[name] = manifest.describe(folder / name)
    return {"name": name, "files": files, "rows": part.rows}


def _save_tensors(tensors: Mapping[str, Tensor | Later], path: Path) -> None:
    """One after the other, where some are made for it; those needn't be there all at once."""
    if any(isinstance(tensor, Later) for tensor in tensors.values()):
        values = ((name, tensor.make() if isinstance(tensor, Later) else tensor) for name, tensor in tensors.items())
        tensor_file.save_file({path: list(tensors)}, {name: _like(tensor) for name, tensor in tensors.items()}, values)
        return
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    try:
        save_file(whole, path)
    except KeyError as error:
        names = [name for name, tensor in whole.items() if tensor.dtype == error.args[0]]
        raise TypeError(f"safetensors can't hold {error.args[0]}, the dtype of {', '.join(names)}") from error


def _like(tensor: Tensor | Later) -> Tensor:
    return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")


def _describe(folder: Path, step: int, answers: list[dict[str, Any]], state: str) -> None:
    """Write the three files that say what the tensors' files hold, and bring them to the disk."""
    tensors = manifest.table({one["name"]: one["rows"] for one in answers})
    for name, stored in tensors.items():
        stored.check(name)
    (folder / PIECES).write_text(manifest.dump(tensors), encoding="utf-8")
    (folder / STATE).write_text(state, encoding="utf-8")
    files = {name: entry for one in answers for name, entry in one["files"].items()}
    files |= {name: manifest.describe(folder / name) for name in (PIECES, STATE)}
    text = manifest.render({"format": manifest.FORMAT, "step": step, "files": files})
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    for path in (folder / PIECES, folder / STATE, folder / MANIFEST, folder):
        sync(path)
