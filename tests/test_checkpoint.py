"""Checkpoints survive kills, full disks and flipped bytes, and continue a run bitwise."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor, nn

from tests import ranks
from trainwright import checkpoint
from trainwright.checkpoint import CheckpointError, Team
from trainwright.pieces import Held, Piece

FILES = (checkpoint.TENSORS, checkpoint.PIECES, checkpoint.STATE, checkpoint.MANIFEST)


def save(run: Path, step: int, size: int = 100) -> Path:
    """A checkpoint whose every number says which step it is of."""
    return checkpoint.write(run, step, {"weight": torch.full((size,), float(step))}, {"step": step})


def steps(run: Path) -> list[int]:
    return sorted(checkpoint.step_of(entry) for entry in (run / "checkpoints").iterdir())


def flip(path: Path, position: int, mask: int = 1) -> None:
    with path.open("r+b") as file:  # in place: rewriting the file costs a flush each time
        file.seek(position, os.SEEK_SET if position >= 0 else os.SEEK_END)
        [byte] = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ mask]))


def no_warning(message: str) -> None:
    raise AssertionError(message)


# ---------------------------------------------------------------------------------------------------------- round trip

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int32]
DTYPES += [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3)], ids=str)
def test_every_dtype_and_shape_comes_back(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(6, dtype=torch.float32)[: torch.Size(shape).numel()].reshape(shape).to(dtype)
    tensors, state = checkpoint.read(checkpoint.write(tmp_path, 3, {"x.y": tensor}, {"a": [1, None, 0.1]}))
    assert same(tensors, {"x.y": tensor})
    assert state == {"a": [1, None, 0.1]}


def test_gradients_layouts_and_no_tensors_at_all(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.randn(3, 4))
    folder = checkpoint.write(tmp_path, 1, {"parameter": parameter, "transposed": torch.arange(6).view(2, 3).t()}, {})
    tensors, _ = checkpoint.read(folder)
    assert same(tensors["parameter"], parameter.detach())
    assert same(tensors["transposed"], torch.arange(6).view(2, 3).t())
    assert checkpoint.read(checkpoint.write(tmp_path, 2, {}, {})) == ({}, {})


def test_content_that_cannot_be_stored_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(TypeError, match=r"complex128.*of z"):
        checkpoint.write(tmp_path, 2, {"a": torch.ones(1), "z": torch.ones(1, dtype=torch.complex128)}, {})
    with pytest.raises(ValueError, match="__metadata__"):
        checkpoint.write(tmp_path, 2, {"__metadata__": torch.ones(1)}, {})
    with pytest.raises(TypeError, match="Tensor"):
        checkpoint.write(tmp_path, 2, {}, {"loss": torch.ones(())})
    weight = torch.ones(4)
    with pytest.raises(RuntimeError, match="share memory"):
        checkpoint.write(tmp_path, 2, {"embedding": weight, "head": weight}, {})
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 4, size=10)
    save(tmp_path, 4, size=20)
    tensors, _ = checkpoint.read(tmp_path / "checkpoints" / "step-00000004")
    assert tensors["weight"].shape == (20,)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000004"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_tensors_that_were_read_hold_no_file(tmp_path: Path) -> None:
    tensors, _ = checkpoint.read(save(tmp_path, 1, size=100_000))
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert tensors["weight"].data_ptr() % 64 == 0


def same(left: Any, right: Any) -> bool:
    """Equal in value, type, order of keys, and every bit of floats and tensors."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(bits(left), bits(right))
    if isinstance(left, float):
        return struct.pack(">d", left) == struct.pack(">d", right)
    if isinstance(left, dict):
        return same(list(left.items()), list(right.items()))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().view(torch.uint8)


def tensors_of(dtype: torch.dtype, shape: list[int]) -> Tensor:
    return (torch.rand(shape) * 100).to(dtype)


# --------------------------------------------------------------------------------------------------------------- kills

# Runs in a process of its own, which forks the victims: torch is imported once, and pytest's process isn't forked.
NURSERY = '''
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from trainwright import checkpoint

def save(run, step, size):
    return checkpoint.write(run, step, {"weight": torch.full((size,), float(step))}, {"step": step})

def fork(victim):
    child = os.fork()
    if child == 0:
        try:
            victim()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return child

def fail(message):
    raise AssertionError(message)

def check(run, at_least):
    """The newest is whole and new enough, and so is everything else that is called a checkpoint."""
    for folder in checkpoint.whole(run):
        step = checkpoint.step_of(folder)
        tensors, state = checkpoint.read(folder)
        assert state == {"step": step} and bool((tensors["weight"] == step).all()), folder
    loaded = checkpoint.newest_valid(run, fail)
    step = checkpoint.step_of(loaded.folder) if loaded else 0
    assert step >= at_least, f"step {at_least} had been written, the newest is {step}"
    return step

def at_random_moments(run, rounds):
    started = time.perf_counter()
    save(run, 1, 300_000)
    one_write, step = time.perf_counter() - started, 1
    for round in range(rounds):
        receive, send = os.pipe()
        def victim():
            for later in range(step + 1, step + 1000):
                save(run, later, 300_000)
                os.write(send, later.to_bytes(4, "big"))
                checkpoint.prune(run, 2)
        child = fork(victim)
        time.sleep(random.uniform(0.0, 4 * one_write))  # a slow disk or a busy machine still gets some writes done
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(send)
        written = b""
        while part := os.read(receive, 4096):
            written += part
        os.close(receive)
        step = check(run, int.from_bytes(written[-4:], "big") if written else step)
    save(run, step + 1, 10)
    assert not [name for name in os.listdir(run / "checkpoints") if not name.startswith("step-")]
    assert step > 5, f"only {step} steps in {rounds} rounds"

def before_each_system_call(run, rounds):
    """Python reports each operation on a file to audit hooks: the n-th victim dies just before its n-th one."""
    os.fsync = lambda descriptor: None  # matters to power cuts, not to kills, and takes most of the time
    template = run / "template"
    for step in (1, 2):
        save(template, step, 10)
    (template / "checkpoints" / ".writing-step-00000007").mkdir()
    (template / "checkpoints" / ".deleting-step-00000000").mkdir()
    for number in range(1, rounds):
        victims_run = run / str(number)
        shutil.copytree(template, victims_run)
        def victim():
            left = number
            def die(event, arguments):
                nonlocal left
                if event == "open" or event.startswith("os."):
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(die)
            save(victims_run, 3, 10)
            save(victims_run, 3, 10)
            checkpoint.prune(victims_run, 2)
        _, status = os.waitpid(fork(victim), 0)
        check(victims_run, 2)
        if status == 0:
            assert number > 20, f"only {number} operations seen"
            return
        assert os.WIFSIGNALED(status), "the victim failed by itself"
        save(victims_run, 4, 10)
        assert not [name for name in os.listdir(victims_run / "checkpoints") if not name.startswith("step-")]
    raise AssertionError("no victim survived")

torch.set_num_threads(1)
globals()[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("moments", "rounds"), [("at_random_moments", 30), ("before_each_system_call", 200)])
def test_a_killed_write_leaves_the_newest_checkpoint_whole(tmp_path: Path, moments: str, rounds: int) -> None:
    command = [sys.executable, "-c", NURSERY, moments, str(tmp_path), str(rounds)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr


def test_everything_is_on_the_disk_before_the_rename_and_the_rename_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    rename = os.rename

    def note(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)

    def check(source: Path, target: Path) -> None:
        assert {path.stat().st_ino for path in (*source.iterdir(), source, tmp_path)} <= synced
        synced.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", check)
    folder = save(tmp_path, 1)
    assert folder.parent.stat().st_ino in synced


def test_leftovers_are_ignored_and_swept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    home = tmp_path / "checkpoints"
    for name in (".writing-step-00000002", ".deleting-step-00000000"):
        (home / name).mkdir()
        (home / name / checkpoint.TENSORS).write_bytes(b"half")
    assert checkpoint.latest(tmp_path) == home / "step-00000001"
    save(tmp_path, 2)
    assert steps(tmp_path) == [1, 2]


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_named_and_the_one_before_is_taken(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    flip(newest / name, (newest / name).stat().st_size // 2)
    warnings: list[str] = []
    loaded = checkpoint.newest_valid(tmp_path, warnings.append)
    assert loaded is not None
    assert loaded.state == {"step": 1}
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    assert name in warnings[0]


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_pattern_anywhere_is_noticed_in_the_right_file(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1, size=8) / name
    for position in range(path.stat().st_size):
        for mask in (0x01, 0x20, 0x80):  # 0x20 makes other letters of hexadecimal digits, 0x80 breaks the UTF-8
            flip(path, position, mask)
            with pytest.raises(CheckpointError, match=re.escape(name)):
                checkpoint.read(path.parent)
            flip(path, position, mask)
    checkpoint.read(path.parent)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "truncated", "longer", "empty", "a folder"])
def test_other_damage_is_named(tmp_path: Path, name: str, how: str) -> None:
    path = save(tmp_path, 1) / name
    content = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes({"truncated": content[:-1], "longer": content + b"\0", "empty": b""}[how])
    with pytest.raises(CheckpointError, match=f"step-00000001 is damaged: {re.escape(name)} "):
        checkpoint.read(path.parent)


def test_manifests_of_other_shapes_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / checkpoint.MANIFEST
    for text in ("[]", "null", "{}", '"text"', '{"sha256": 1}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="manifest"):
            checkpoint.read(path.parent)
    path.write_text(checkpoint.manifest.render({"format": 9, "step": 1, "files": {}}))
    with pytest.raises(CheckpointError, match="format 9; this version reads format 2"):
        checkpoint.read(path.parent)


def test_all_damaged_is_an_error_and_none_at_all_is_not(tmp_path: Path) -> None:
    assert checkpoint.newest_valid(tmp_path, no_warning) is None
    assert checkpoint.latest(tmp_path) is None
    warnings: list[str] = []
    for step in (1, 2):
        flip(save(tmp_path, step) / checkpoint.TENSORS, -1)
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        checkpoint.newest_valid(tmp_path, warnings.append)
    assert len(warnings) == 2


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json can't be read \(No such file"):
        checkpoint.read(tmp_path / "step-00000009")


# ------------------------------------------------------------------------------------------------------------ the disk


def half_then(error: BaseException) -> Callable[[dict[str, Tensor], Path], None]:
    """A ``save_file`` that dies half-way."""

    def save_file(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"\0" * 50)
        raise error

    return save_file


ENOSPC = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FULL = [ENOSPC, SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")]


@pytest.mark.parametrize("error", FULL, ids=["OSError", "SafetensorError"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.writing, "save_file", half_then(error))
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, 2, size=1_000)
    message = str(caught.value)
    assert str(tmp_path / "checkpoints" / "step-00000002") in message
    assert "No space left" in message
    assert re.search(r"needs 4,011 bytes, [\d,]+ are free", message)
    assert_only_the_first_is_there(tmp_path)
    save(tmp_path, 2)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_refuses_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refuse(*arguments: object) -> None:
        raise ENOSPC

    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(CheckpointError, match="No space left"):
            save(tmp_path, 2)
    assert_only_the_first_is_there(tmp_path)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel itself cuts writes off at ``size`` bytes, as a full disk would; needs no privileges."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("tensor_size", "text_size"), [(50_000, 10), (10, 200_000)], ids=["tensors", "state"])
def test_writes_that_the_kernel_cuts_off(tmp_path: Path, tensor_size: int, text_size: int) -> None:
    save(tmp_path, 1)
    with largest_file(100_000), pytest.raises(CheckpointError, match="File too large"):
        checkpoint.write(tmp_path, 2, {"weight": torch.ones(tensor_size)}, {"text": "x" * text_size})
    assert_only_the_first_is_there(tmp_path)


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.writing, "save_file", half_then(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert_only_the_first_is_there(tmp_path)


def assert_only_the_first_is_there(run: Path) -> None:
    assert os.listdir(run / "checkpoints") == ["step-00000001"]
    loaded = checkpoint.newest_valid(run, no_warning)
    assert loaded is not None
    assert loaded.state == {"step": 1}


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user whom permissions bind, even where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_without_permission() -> None:
    # Not tmp_path: its parents are closed to other users, and the refusal would come from them.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        with unprivileged(), pytest.raises(CheckpointError, match=r"Permission denied.*checkpoints"):
            save(Path(folder), 1)
        assert os.listdir(folder) == []
        os.chmod(folder, 0o755)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path, 1)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_that_the_umask_gives(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        folder = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {name: oct((folder / name).stat().st_mode & 0o777) for name in FILES} == dict.fromkeys(FILES, oct(mode))


# ------------------------------------------------------------------------------------------------- order and deletion


def test_the_latest_is_the_one_with_the_highest_number(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-999999999.old").mkdir()
    (tmp_path / "checkpoints" / "step-99999999999").write_text("a file")
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert checkpoint.step_of(newest) == 100_000_000
    with pytest.raises(ValueError, match="best"):
        checkpoint.step_of(tmp_path / "best")


@pytest.mark.parametrize(
    ("keep", "protect", "left"),
    [(2, set(), [4, 5]), (9, set(), [1, 2, 3, 4, 5]), (1, {2}, [2, 5]), (2, {5, 1}, [1, 4, 5]), (1, {77}, [5])],
)
def test_prune(tmp_path: Path, keep: int, protect: set[int], left: list[int]) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, keep, protect)
    assert steps(tmp_path) == left


def test_prune_without_checkpoints(tmp_path: Path) -> None:
    checkpoint.prune(tmp_path, 1)


def test_a_half_deleted_folder_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_delete(folder: Path, **options: object) -> None:
        (folder / checkpoint.TENSORS).unlink()
        raise KeyboardInterrupt

    for step in (1, 2):
        save(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half_delete)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(tmp_path, 1)
    assert [checkpoint.step_of(folder) for folder in checkpoint.whole(tmp_path)] == [2]
    save(tmp_path, 3)
    assert steps(tmp_path) == [2, 3]


# ---------------------------------------------------------------------------------------------------------- in pieces

tokens = (f"job{number}" for number in itertools.count())


def together(
    run: Path, step: int, parts: list[dict[str, Held]], token: str = "", timeout: float = 60.0, **state: Any
) -> list[Any]:
    """What ``write_held`` gives, or raises, to each member of a team; threads, each of which writes files of its own."""
    token = token or next(tokens)

    def member(index: int) -> Any:
        team = Team(index, len(parts), token, timeout)
        try:
            return checkpoint.write_held(run, step, parts[index], {"step": step, **state}, team)
        except BaseException as error:
            return error

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(member, range(len(parts))))


def halves(value: float, size: int = 100, parts: int = 2) -> list[dict[str, Held]]:
    """Parts of a vector that say which step they are of."""
    whole = Piece.all_of((size,))
    boxes = [whole.chunk(parts, index) for index in range(parts)]
    return [{"weight": Held(torch.full(box.size, value), box)} for box in boxes]


def hidden(run: Path) -> list[str]:
    return [name for name in os.listdir(run / "checkpoints") if name.startswith(".")]


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], most: int) -> list[Piece]:
    """A tensor cut into boxes, some perhaps empty; one for each of at most ``most`` holders."""
    boxes = [Piece.all_of(shape)]
    for _ in range(draw(st.integers(0, most - 1)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, box.size[dim]))
        boxes += [box.narrow(dim, 0, cut), box.narrow(dim, cut, box.size[dim] - cut)]
    return boxes


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_any_layout_writes_any_other_reads(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    run, writers = tmp_path_factory.mktemp("run"), data.draw(st.integers(1, 5))
    shapes = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=4))
    tensors = {f"t.{i}": tensors_of(data.draw(st.sampled_from(DTYPES)), list(shape)) for i, shape in enumerate(shapes)}
    parts: list[dict[str, Held]] = [{} for _ in range(writers)]
    for name, tensor in tensors.items():
        boxes = data.draw(layouts(tuple(tensor.shape), writers))
        holders = data.draw(st.permutations(range(writers)))
        for holder, box in itertools.zip_longest(holders, boxes):
            if box is not None:
                parts[holder][name] = Held(box.of(tensor), box)
            elif data.draw(st.booleans()):  # a copy that isn't the one to be saved
                parts[holder][name] = Held(torch.zeros_like(tensor), Piece.all_of(tuple(tensor.shape)), speaks=False)
    folder = checkpoint.path_of(run, 1)
    assert together(run, 1, parts) == [folder] * writers
    assert hidden(run) == []
    reader = checkpoint.Reader(folder)
    reader.verify()
    assert reader.state == {"step": 1}
    assert sorted(reader.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        assert (reader.shape(name), reader.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        for box in data.draw(layouts(tuple(tensor.shape), 5)):
            assert same(reader.load(name, box), box.of(tensor).contiguous())
    assert same(dict(sorted(checkpoint.read(folder)[0].items())), tensors)


def test_who_speaks_for_nothing_writes_no_file(tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    parts = [
        {"a": Held(tensor, Piece.all_of((6,)), speaks=False)},
        {"a": Held(tensor, Piece.all_of((6,))), "none": Held(torch.empty(0, 2), Piece.all_of((0, 2)))},
        {"none": Held(torch.empty(0, 2), Piece.all_of((0, 2)), speaks=False)},
    ]
    [folder, *_] = together(tmp_path, 1, parts)
    files = {"tensors-00002-of-00003.safetensors", *FILES[1:]}
    assert {path.name for path in folder.iterdir()} == files
    assert same(checkpoint.read(folder)[0], {"a": tensor, "none": torch.empty(0, 2)})


def test_one_process_writes_one_file(tmp_path: Path) -> None:
    assert {path.name for path in save(tmp_path, 1).iterdir()} == set(FILES)


def test_a_box_is_read_from_the_files_that_hold_it(tmp_path: Path) -> None:
    [folder, *_] = together(tmp_path, 1, halves(3.0))
    (folder / "tensors-00002-of-00002.safetensors").unlink()
    reader, whole = checkpoint.Reader(folder), Piece.all_of((100,))
    assert same(reader.load("weight", whole.narrow(0, 20, 30)), torch.full((30,), 3.0))
    with pytest.raises(CheckpointError, match=r"tensors-00002-of-00002\.safetensors can't be read"):
        reader.load("weight", whole.narrow(0, 20, 31))
    with pytest.raises(AssertionError, match="weight"):
        reader.load("weight", Piece.all_of((101,)))


def test_a_part_that_no_file_holds_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.manifest.Stored, "check", lambda self, name: None)
        [folder, *_] = together(tmp_path, 1, [halves(3.0)[0], {}])
    reader = checkpoint.Reader(folder)
    with pytest.raises(CheckpointError, match="holds 50 of the 100 numbers of a piece of weight"):
        reader.load("weight")


def test_pieces_that_do_not_make_up_a_tensor_are_a_bug_of_ours(tmp_path: Path) -> None:
    save(tmp_path, 1)
    one, two = halves(1.0)
    whole = {"weight": Held(torch.ones(100), Piece.all_of((100,)))}
    shifted = {"weight": Held(torch.ones(50), Piece.all_of((100,)).narrow(0, 49, 50))}
    other = {"weight": Held(torch.ones(50).double(), two["weight"].piece)}
    longer = {"weight": Held(torch.ones(50), Piece.all_of((101,)).narrow(0, 50, 50))}
    for parts in ([one, {}], [one, whole], [one, shifted], [one, other], [one, longer]):
        lead, follower = together(tmp_path, 2, parts)
        assert isinstance(lead, AssertionError)
        assert "weight" in str(lead)
        assert isinstance(follower, CheckpointError)
        assert "process 0: AssertionError: weight" in str(follower)
        assert_only_the_first_is_there(tmp_path)
    with pytest.raises(AssertionError, match="weight"):
        checkpoint.write_held(tmp_path, 2, {"weight": Held(torch.ones(3), one["weight"].piece)}, {})


@pytest.mark.parametrize("full", [0, 1, 2])
def test_a_disk_that_is_full_for_one_stops_all(tmp_path: Path, full: int) -> None:
    together(tmp_path, 1, halves(1.0, parts=3))
    boxes = [Piece.all_of((90_000,)).narrow(0, first, size) for first, size in ((0, 10), (10, 10), (20, 89_980))]
    small = iter(boxes)
    order = [boxes[2] if index == full else next(small) for index in range(3)]
    parts = [{"weight": Held(torch.ones(box.size), box)} for box in order]
    token = next(tokens)
    with largest_file(100_000):
        errors = together(tmp_path, 2, parts, token)
    for index, error in enumerate(errors):
        assert isinstance(error, CheckpointError)
        assert "File too large" in str(error)
        assert re.search(r"needs 359,9\d\d bytes, [\d,]+ are free", str(error))
        assert (f"process {full}: " in str(error)) == (index != 0 or full != 0)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]
    assert len(set(together(tmp_path, 2, parts, token))) == 1
    assert steps(tmp_path) == [1, 2]


def test_the_folder_stays_while_others_write_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[bool] = []

    def save_file(tensors: dict[str, Tensor], path: Path) -> None:
        if "00001-of" in path.name:
            raise ENOSPC
        time.sleep(0.2)
        there.append(path.parent.is_dir())
        path.write_bytes(b"")

    monkeypatch.setattr(checkpoint.writing, "save_file", save_file)
    assert all("No space left" in str(error) for error in together(tmp_path, 1, halves(1.0)))
    assert there == [True]
    assert os.listdir(tmp_path / "checkpoints") == []


def test_a_mistake_of_one_stops_all(tmp_path: Path) -> None:
    save(tmp_path, 1)
    parts = [{"a": Held(torch.ones(1), Piece.all_of((1,)))}, {"z": Held(torch.ones(1).cdouble(), Piece.all_of((1,)))}]
    lead, follower = together(tmp_path, 2, parts)
    assert isinstance(follower, TypeError)
    assert isinstance(lead, CheckpointError)
    assert "process 1: TypeError: safetensors can't hold torch.complex128, the dtype of z" in str(lead)
    assert_only_the_first_is_there(tmp_path)


def test_who_gives_no_answer_is_not_waited_for(tmp_path: Path) -> None:
    together(tmp_path, 1, halves(1.0))
    one, two = halves(2.0)
    with pytest.raises(CheckpointError, match=r"nothing from process 1 in 0\.2 seconds"):
        checkpoint.write_held(tmp_path, 2, one, {}, Team(0, 2, "a", 0.2))
    with pytest.raises(CheckpointError, match=r"nothing from process 0 in 0\.2 seconds"):
        checkpoint.write_held(tmp_path, 2, two, {}, Team(1, 2, "b", 0.2))
    assert steps_shown(tmp_path) == [1]
    together(tmp_path, 2, halves(2.0))
    assert hidden(tmp_path) == []
    assert steps(tmp_path) == [1, 2]


def steps_shown(run: Path) -> list[int]:
    return [checkpoint.step_of(folder) for folder in checkpoint.whole(run)]


def test_notes_of_killed_jobs_are_not_believed(tmp_path: Path) -> None:
    """A job was killed when all had answered; the next one's others are slower than its lead."""
    stale = tmp_path / "checkpoints" / ".team-old-1"
    stale.mkdir(parents=True)
    (stale / "open").write_text("null")
    (stale / "process 1").write_text('{"name": "x", "files": {}, "rows": {}}')
    (tmp_path / "checkpoints" / ".writing-step-00000001").mkdir()
    with pytest.raises(CheckpointError, match="nothing from process 1"):
        checkpoint.write_held(tmp_path, 1, halves(1.0)[0], {}, Team(0, 2, "new", 0.1))
    assert hidden(tmp_path) == [".team-new-1"]


def test_the_same_step_twice_by_the_same_job(tmp_path: Path) -> None:
    teams = [Team(index, 2, "job", 60.0) for index in range(2)]

    def twice(index: int) -> None:
        for value in (1.0, 2.0, 3.0):
            checkpoint.write_held(tmp_path, 1, halves(value)[index], {"value": value}, teams[index])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(twice, range(2)))
    tensors, state = checkpoint.read(checkpoint.path_of(tmp_path, 1))
    assert state == {"value": 3.0}
    assert same(tensors["weight"], torch.full((100,), 3.0))
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


def test_a_team_needs_a_token() -> None:
    with pytest.raises(AssertionError, match="token"):
        Team(0, 2)


# ------------------------------------------------------------------------------------------------------ in a thread


def test_a_writer_copies_at_once_and_writes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, real, weight = threading.Event(), checkpoint.writing.save_file, torch.ones(5)

    def slow(*arguments: Any) -> None:
        assert go.wait(60)
        real(*arguments)

    monkeypatch.setattr(checkpoint.writing, "save_file", slow)
    writer = checkpoint.Writer()
    assert writer.wait() is None
    state = {"list": [1]}
    writer.begin(tmp_path, 1, {"w": Held(weight, Piece.all_of((5,)))}, state)
    weight.zero_()
    state["list"].append(2)
    assert checkpoint.latest(tmp_path) is None
    go.set()
    folder = writer.wait()
    assert folder == checkpoint.latest(tmp_path)
    assert writer.wait() is None
    tensors, stored = checkpoint.read(folder)
    assert same(tensors["w"], torch.ones(5))
    assert stored == {"list": [1]}


def test_a_writers_failure_is_told_at_the_next_occasion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"w": Held(torch.ones(5), Piece.all_of((5,)))}
    writer = checkpoint.Writer()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.writing, "save_file", half_then(ENOSPC))
        writer.begin(tmp_path, 1, held, {})
        with pytest.raises(CheckpointError, match="No space left"):
            writer.begin(tmp_path, 2, held, {})
        writer.begin(tmp_path, 2, held, {})
        with pytest.raises(CheckpointError, match="No space left"):
            writer.wait()
    writer.begin(tmp_path, 3, held, {})
    writer.begin(tmp_path, 4, held, {})
    assert checkpoint.step_of(writer.wait() or tmp_path) == 4
    assert steps(tmp_path) == [3, 4]


# ----------------------------------------------------------------------------------------------- damage, among many


def agreeing(count: int, function: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    """``function(index, share)`` in as many threads; ``share`` gives all what each says."""
    barrier, said = threading.Barrier(count), [None] * count

    def member(index: int) -> Any:
        def share(value: Any) -> list[Any]:
            said[index] = json.loads(json.dumps(value))
            barrier.wait(60)
            answer = list(said)
            barrier.wait(60)
            return answer

        return function(index, share)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(member, range(count)))


@pytest.mark.parametrize("name", [*(f"tensors-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)), *FILES[1:]])
def test_all_take_the_same_one_and_hash_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for step in (1, 2):
        together(tmp_path, step, halves(step, parts=3))
    flip(checkpoint.path_of(tmp_path, 2) / name, -3)
    hashed: list[Path] = []
    real = checkpoint.manifest.check
    monkeypatch.setattr(checkpoint.manifest, "check", lambda path, expected: (hashed.append(path), real(path, expected)))
    warnings: list[str] = []
    readers = agreeing(3, lambda i, share: checkpoint.newest_reader(tmp_path, warnings.append, i, share))
    assert [reader.folder for reader in readers] == [checkpoint.path_of(tmp_path, 1)] * 3
    assert len(warnings) == 3
    assert all(name in warning for warning in warnings)
    whole = [path.name for path in hashed if path.parent == checkpoint.path_of(tmp_path, 1) and "tensors" in path.name]
    assert sorted(whole) == [f"tensors-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


def test_all_damaged_is_an_error_for_all(tmp_path: Path) -> None:
    together(tmp_path, 1, halves(1.0))
    flip(checkpoint.path_of(tmp_path, 1) / "tensors-00002-of-00002.safetensors", -3)

    def refused(index: int, share: Callable[[Any], list[Any]]) -> bool:
        with pytest.raises(CheckpointError, match="every checkpoint in"):
            checkpoint.newest_reader(tmp_path, lambda message: None, index, share)
        return True

    assert agreeing(2, refused) == [True, True]
    assert agreeing(2, lambda i, share: checkpoint.newest_reader(tmp_path / "none", no_warning, i, share)) == [None, None]


# ------------------------------------------------------------------------------------------------- real processes


def train_and_write(run: str, rounds: int) -> list[dict[str, Tensor]]:
    """Checkpoints of tensors cut by rows, written in threads while collectives go on; what other layouts read of each."""
    import torch.distributed as dist

    from trainwright.parallel.collectives import gather_json

    rank, size = dist.get_rank(), dist.get_world_size()
    cpu = torch.device("cpu")
    writer = checkpoint.Writer(Team(rank, size, gather_json(f"job{os.getpid()}", cpu)[0], 60.0))
    rows, columns = Piece.all_of((7, 5)).chunk(size, rank), Piece.all_of((7, 5)).chunk(size, rank, 1)
    found = []
    for step in range(1, rounds + 1):
        whole = torch.arange(35.0).view(7, 5) * step
        writer.begin(Path(run), step, {"w": Held(rows.of(whole), rows), "n": number(step, rank)}, {"step": step})
        for _ in range(20):
            total = torch.ones(3) * rank
            dist.all_reduce(total)
            assert total[0] == sum(range(size))
        writer.wait()
        reader = checkpoint.newest_reader(Path(run), no_warning, rank, lambda value: gather_json(value, cpu))
        assert reader is not None
        assert reader.state == {"step": step}
        found.append({"w": reader.load("w", columns), "n": reader.load("n")})
    return found


def number(step: int, rank: int) -> Held:
    return Held(torch.tensor(step), Piece.all_of(()), speaks=rank == 0)


@pytest.mark.parametrize("count", [2, 4])
def test_real_processes_write_in_threads_and_read_another_layout(tmp_path: Path, count: int) -> None:
    found = ranks.run(count, train_and_write, str(tmp_path), 3)
    for step in range(1, 4):
        whole = torch.cat([one[step - 1]["w"] for one in found], 1)
        assert same(whole, torch.arange(35.0).view(7, 5) * step)
        assert all(same(one[step - 1]["n"], torch.tensor(step)) for one in found)
    assert steps(tmp_path) == [1, 2, 3]


TEAMS = '''
from trainwright.checkpoint import Team
from trainwright.pieces import Held, Piece

def part(value, index, size):
    box = Piece.all_of((40,)).chunk(size, index)
    return {"weight": Held(torch.full(box.size, float(value)), box)}

def a_member_before_each_system_call(run, size):
    """The victim dies before its n-th operation on a file, then the others, at once or when they give up by themselves."""
    os.fsync = lambda descriptor: None
    for victim in range(size):
        for number in range(1, 200):
            alone, dead = number % 5 == 0, run / f"{victim}-{number}"
            save(dead, 1, 10)
            save(dead, 2, 10)
            (dead / "checkpoints" / ".writing-step-00000007").mkdir()
            def member(index):
                left = number
                def die(event, arguments):
                    nonlocal left
                    if (event == "open" and str(dead) in str(arguments[0])) or event in ("os.rename", "os.mkdir", "os.remove"):
                        left -= 1
                        if left == 0:
                            os.kill(os.getpid(), signal.SIGKILL)
                if index == victim:
                    sys.addaudithook(die)
                try:
                    team = Team(index, size, "job", 0.3 if alone else 60)
                    checkpoint.write_held(dead, 3, part(3, index, size), {"step": 3}, team)
                except checkpoint.CheckpointError as error:
                    os._exit(3)
            children = [fork(lambda: member(index)) for index in range(size)]
            _, status = os.waitpid(children[victim], 0)
            survived = os.WIFEXITED(status)
            for index, child in enumerate(children):
                if index != victim:
                    if not alone and not survived:
                        os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
            check(dead, 2)
            if survived and alone:
                continue
            if survived:
                assert os.WEXITSTATUS(status) == 0, status
                check(dead, 3)
                assert number > 5, number
                break
            save(dead, 4, 10)
            assert not [name for name in os.listdir(dead / "checkpoints") if not name.startswith("step-")]
        else:
            raise AssertionError("no victim survived")
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("size", [2, 4])
def test_a_killed_member_leaves_the_older_checkpoint_the_newest(tmp_path: Path, size: int) -> None:
    code = NURSERY.replace("torch.set_num_threads(1)", TEAMS + "\ntorch.set_num_threads(1)")
    command = [sys.executable, "-c", code, "a_member_before_each_system_call", str(tmp_path), str(size)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
